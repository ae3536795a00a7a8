"""Finding launch parameters: what is tried, what wins, what a table says then. No GPU: our clock times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from broadbeam_kernels import tuning
from broadbeam_kernels.bench import tune
from broadbeam_kernels.bench.case import Case
from broadbeam_kernels.cuda import fp4_gemm as native
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

    return tune.tune({"group": group}, Clock(), lambda _sentence: None).trials  # type: ignore[arg-type]


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
    assert trials[0].best() == ({"HEADS": 4, "num_warps": 4}, 1.0)
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


def test_a_present_launch_that_cannot_be_timed_stays() -> None:
    first = iter([True])

    def refusing(launch: Launch) -> float:
        if launch["HEADS"] == 4 and not next(first, False):
            raise RuntimeError("out of memory")
        return 1.0

    trials = tuned(case("a", refusing, nope=512, tokens=1))
    assert trials[0].best() == ({"HEADS": 4, "num_warps": 4}, 1.0)
    assert tune.table(trials, CPU) == {}


def test_a_reading_that_was_low_by_luck_does_not_win() -> None:
    readings = iter([1.0, *[2.0] * 20])

    def lucky(launch: Launch) -> float:
        return next(readings) if launch["HEADS"] == 8 else 1.1

    (trial,) = tuned(case("a", lucky, nope=512, tokens=1))
    assert trial.best()[1] == 1.0


def test_cuda_kernels_that_cannot_be_built_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "_builds", lambda launch, _grouped, _device: json.loads(launch)["resident"] < 3)
    took: list[int] = []

    def product(launch: Launch) -> float:
        took.append(launch.get("resident", 1))
        return 1.0

    tuned(case("a", product, "cuda_fp4_gemm", rows=64))
    assert took
    assert max(took) == 2


@pytest.mark.parametrize(("resident", "builds"), [(2, True), (8, False)])
def test_a_tile_without_room_for_a_ring_does_not_build(
    resident: int, builds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "native", lambda _device: "sm_90a")
    tune._builds.cache_clear()
    assert tune._builds(json.dumps({"tokens": 64, "resident": resident}), False, 0) is builds


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

    outcome = tune.tune({"group": group}, Clock(), said.append)  # type: ignore[arg-type]
    assert outcome.failures == ["broken that cannot run: ZeroDivisionError: division by zero"]
    assert said[0] == f"failed: {outcome.failures[0]}"
    assert [trial.best()[0]["HEADS"] for trial in outcome.trials] == [16]


def test_of_a_group_that_is_cut_short_nothing_is_kept() -> None:
    said: list[str] = []

    def group(*shapes: str) -> Callable[[], Iterator[Case]]:
        return lambda: (case(shape, by_heads(h4=1.0, h16=0.5), nope=512, tokens=1) for shape in shapes)

    asked = iter([False, False, True])
    groups = {"whole": group("a"), "cut": group("b", "c")}
    outcome = tune.tune(groups, Clock(), said.append, out_of_time=lambda: next(asked))  # type: ignore[arg-type]
    assert not outcome.finished
    assert said[-1] == "time is up: nothing of cut is kept"
    assert all(set(times) == {"a"} for times in outcome.trials[0].times.values())


def test_a_table_keeps_what_was_not_tuned(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    before: dict[str, Any] = {"like": "sm_90", "finalize": [{"COLUMNS": 1024, "num_warps": 2}]}
    path.write_text(json.dumps(before))
    tune.write(path, {"rope_quantize": [{"HEADS": 8, "num_warps": 4}]})
    assert json.loads(path.read_text()) == {**before, "rope_quantize": [{"HEADS": 8, "num_warps": 4}]}


def test_a_condition_stands_in_a_table_once() -> None:
    rules = [
        {"when": {"rows": [0, 8]}, "tokens": 8},
        {"when": {"rows": [0, 8]}, "tokens": 16},
        {"tokens": 64},
    ]
    assert tune._reachable([*rules, {"tokens": 128}]) == [rules[0], rules[2]]


def test_every_candidate_names_parameters_of_its_operation() -> None:
    default = json.loads((tuning.TUNED / "default.json").read_text())
    tile = {field.name for field in fields(native.Tile)}
    assert set(tune.CANDIDATES) <= set(default)
    for operation, candidates in tune.CANDIDATES.items():
        known = tile if operation.startswith("cuda_") else set(default[operation][0])
        assert all(set(launch) <= known for launch in candidates), operation
