"""What a rank and its group agree on before each step; the exchange itself is a fake."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from broadbeam_runtime.parallel import Lockstep


class Store:
    """Waits in it never end."""

    def set(self, key: str, value: str) -> None: ...

    def wait(self, keys: list[str], timeout: Any) -> None:
        threading.Event().wait()


def lockstep(working: int, stopping: int) -> Lockstep:
    """Of rank 1 of 2, of which so many have work and so many have been told to stop."""
    store = Store()
    group: Any = SimpleNamespace(
        store=store, rank=1, world=2, connect=lambda: store, count=lambda _flags: [working, stopping]
    )
    return Lockstep(group, lambda: None)


@pytest.mark.parametrize(
    ("working", "stopping", "steps", "asleep", "finished"),
    [
        pytest.param(1, 0, True, False, False, id="a peer has work"),
        pytest.param(0, 0, False, True, False, id="nobody has work"),
        pytest.param(0, 1, False, True, False, id="one alone stops"),
        pytest.param(1, 2, True, False, False, id="all stop when the work is done"),
        # Whoever sleeps waits in rank 0's store, and rank 0 may be gone before this process is.
        pytest.param(0, 2, False, False, True, id="all stop"),
    ],
)
def test_a_group_steps_sleeps_or_ends_together(
    working: int, stopping: int, steps: bool, asleep: bool, finished: bool
) -> None:
    agreed = lockstep(working, stopping)
    assert agreed.must_step(has_work=False, stopping=True) is steps
    assert (agreed.asleep, agreed.finished) == (asleep, finished)
