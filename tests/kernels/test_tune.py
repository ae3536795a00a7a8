"""Finding launch parameters: what is tried, what wins, what a table says then. No GPU: our clock times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from broadbeam_kernels import tuning
from broadbeam_kernels.bench import tune
from broadbeam_kernels.bench.case import Case
from broadbeam_kernels.tuning import Launch

CPU = torch.device("cpu")


class Clock:
    """Stands where the device's timer stands: a call answers how long it took."""

    def median_ms(self, fn: Callable[[], object]) -> float:
        taken = fn()
        assert isinstance(taken, float)
        return taken


def case(shape: str, took: Callable[[Launch], float], operation: str = "rope_quantize", **facts: int) -> Case:
    """A case of one operation that asks the tables, and takes as long as its launch says."""
    return Case(operation, shape, lambda: took(tuning.config(operation, CPU, **facts)), 1)


def tuned(*cases: Case) -> list[tune.Trial]:
    def group() -> Iterator[Case]:
        yield from cases

    return tune.tune({"group": group}, Clock(), lambda _sentence: None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _as_on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose table has a rule for `nope` up to 128; for others the default's holds."""
    monkeypatch.setattr(tuning, "_names", lambda _device: ("nvidia_h100_80gb_hbm3", "default"))


def by_heads(**times: float) -> Callable[[Launch], float]:
    return lambda launch: times.get(f"h{launch['HEADS']}", 2.0)


def test_the_fastest_launch_over_all_cases_of_a_rule_wins() -> None:
    (trial,) = tuned(
        case("small", by_heads(h4=1.0, h8=0.5, h16=0.8), nope=512, tokens=1),
        case("large", by_heads(h4=1.0, h8=1.9, h16=0.8), nope=512, tokens=9),
    )
    launch, gain = trial.best()
    assert (launch["HEADS"], round(gain, 3)) == (16, 1.25)


def test_a_gain_within_noise_changes_nothing() -> None:
    trials = tuned(case("a", by_heads(h4=1.0, h8=0.99), nope=512, tokens=1))
    assert trials[0].best()[0] == {"HEADS": 4, "num_warps": 4}
    assert tune.table(trials, CPU) == {}


def test_a_launch_that_one_case_cannot_have_is_not_chosen() -> None:
    def refusing(launch: Launch) -> float:
        if launch["HEADS"] == 8:
            raise RuntimeError("out of resources: shared memory")
        return 1.0

    (trial,) = tuned(
        case("a", by_heads(h4=1.0, h8=0.1, h16=0.9), nope=512, tokens=1),
        case("b", refusing, nope=512, tokens=1),
    )
    assert trial.best()[0]["HEADS"] == 16


def test_rules_are_tuned_apart_and_a_table_repeats_those_it_would_hide() -> None:
    trials = tuned(
        case("prefill", lambda _launch: 1.0, nope=128, tokens=1),
        case("decode", by_heads(h4=1.0, h16=0.5), nope=512, tokens=1),
    )
    rules = tune.table(trials, CPU)["rope_quantize"]
    assert [rule.get("when") for rule in rules] == [{"nope": [0, 128]}, None]
    assert [rule["HEADS"] for rule in rules] == [32, 16]


def test_what_fails_is_named_and_the_others_are_tuned() -> None:
    said: list[str] = []

    def group() -> Iterator[Case]:
        yield Case("broken", "that cannot run", lambda: 1 / 0, 1)
        yield case("decode", by_heads(h4=1.0, h16=0.5), nope=512, tokens=1)

    trials = tune.tune({"group": group}, Clock(), said.append)  # type: ignore[arg-type]
    assert said[0] == "failed: broken that cannot run: ZeroDivisionError: division by zero"
    assert [trial.best()[0]["HEADS"] for trial in trials] == [16]


def test_no_case_begins_when_time_is_up() -> None:
    said: list[str] = []
    group = {"group": lambda: iter([case("a", by_heads(), nope=512, tokens=1)])}
    assert tune.tune(group, Clock(), said.append, out_of_time=lambda: True) == []  # type: ignore[arg-type]
    assert said == ["time is up: rules whose cases were not all timed may change when they are"]


def test_a_table_keeps_what_was_not_tuned(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    before: dict[str, Any] = {"like": "sm_90", "finalize": [{"COLUMNS": 1024, "num_warps": 2}]}
    path.write_text(json.dumps(before))
    tune.write(path, {"rope_quantize": [{"HEADS": 8, "num_warps": 4}]})
    assert json.loads(path.read_text()) == {**before, "rope_quantize": [{"HEADS": 8, "num_warps": 4}]}


def test_every_candidate_names_parameters_of_its_operation() -> None:
    default = json.loads((tuning.TUNED / "default.json").read_text())
    assert set(tune.CANDIDATES) <= set(default)
    for operation, candidates in tune.CANDIDATES.items():
        if not operation.startswith("cuda_"):  # whose tile has defaults
            assert all(set(launch) <= set(default[operation][0]) for launch in candidates), operation
