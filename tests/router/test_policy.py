from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadbeam_router.policy import least_loaded, random, round_robin


@pytest.mark.parametrize(
    ("loads", "chance", "index"),
    [
        pytest.param([3], 0.9, 0, id="one candidate"),
        pytest.param([2, 0, 1], 0.9, 1, id="the least, whatever the chance"),
        pytest.param([1, 0, 0, 0], 0.0, 1, id="first of three ties"),
        pytest.param([1, 0, 0, 0], 0.34, 2, id="second of three ties"),
        pytest.param([0, 1, 0, 0], 0.99, 3, id="last of three ties"),
    ],
)
def test_least_loaded_breaks_ties_by_chance(loads: list[int], chance: float, index: int) -> None:
    assert least_loaded(loads, 7, chance) == index


def test_round_robin_takes_turns() -> None:
    assert [round_robin([9, 0, 0], turn, 0.5) for turn in range(5)] == [0, 1, 2, 0, 1]


@given(
    loads=st.lists(st.integers(0, 50), min_size=1, max_size=80),
    turn=st.integers(0, 10**9),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_every_policy_picks_a_candidate(loads: list[int], turn: int, chance: float) -> None:
    for policy in (least_loaded, round_robin, random):
        assert 0 <= policy(loads, turn, chance) < len(loads)
    assert loads[least_loaded(loads, turn, chance)] == min(loads)
