"""Launch parameters for a device, found by timing: each rule of a table keeps the fastest of its candidates.

A candidate is timed on every case of the benchmarks that a rule decides; the least geometric mean wins, and
takes the present launch's place only where it is WORTH faster. What a device's table then says of an
operation is all the rules that were looked at for it, so that no rule of a later table is shadowed.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import tuning
from ..testing import Timer
from ..tuning import Launch, Rule
from .case import Case, said
from .report import geometric_mean

WORTH = 1.015  # less is noise
FINALISTS = 3

log = logging.getLogger(__name__)

Say = Callable[[str], None]


def _grid(**axes: Iterable[Any]) -> list[Launch]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


WARPS = (1, 2, 4, 8)
# Parameters of each operation that are worth a trial; those a candidate does not name stay as they are.
CANDIDATES: dict[str, list[Launch]] = {
    "nvfp4_quantize": _grid(BLOCKS=(64, 128, 256, 512), num_warps=WARPS),
    "mxfp4_quantize": _grid(BLOCKS=(16, 32, 64, 128), num_warps=(1, 2, 4)),
    "amax": _grid(PROGRAMS=(264, 528, 1056), WORDS=(2048, 4096, 8192), num_warps=(4, 8)),
    "nvfp4_dequantize": _grid(BLOCKS=(32, 64, 128, 256), num_warps=(1, 2, 4)),
    "mxfp4_dequantize": _grid(BLOCKS=(16, 32, 64, 128), num_warps=(1, 2, 4)),
    "fp8_quantize_rows": _grid(GROUPS=(4, 8, 16, 32), num_warps=WARPS),
    "fp8_quantize_tiles": _grid(num_warps=(2, 4, 8, 16)),
    "fp8_dequantize": _grid(GROUPS=(4, 8, 16, 32), num_warps=WARPS),
    "silu_mul_quant": [
        launch
        for launch in _grid(ROWS=(1, 2, 4), GROUPS=(4, 8, 16), num_warps=WARPS)
        if 8 <= launch["ROWS"] * launch["GROUPS"] <= 32
    ],
    "concat_mla_k": _grid(HEADS=(4, 8, 16, 32), num_warps=(1, 2, 4, 8)),
    "add_rms_norm": _grid(num_warps=(4, 8, 16)),
    "finalize": _grid(COLUMNS=(512, 1024, 2048), num_warps=(1, 2, 4, 8)),
    "rope_quantize": _grid(HEADS=(4, 8, 16, 32), num_warps=(2, 4, 8)),
    "grouped_gemm": [
        *_grid(BN=(256,), STAGES=(3,), GROUP=(1, 2, 4, 8)),
        *_grid(BN=(128,), STAGES=(5, 6), GROUP=(1, 2, 4, 8)),
    ],
    "cuda_fp4_gemm": _grid(warpgroups=(2, 4), halves=(1, 2), resident=(1, 2, 3), ahead=(0, 1, 2)),
    "cuda_grouped_fp4_gemm": _grid(warpgroups=(2, 4), halves=(1, 2), resident=(1, 2, 3)),
}


Times = dict[str, dict[str, float]]  # a launch, as JSON -> a case's shape -> milliseconds


@dataclass(slots=True)
class Trial:
    """One rule of one operation, and how long its candidates took on each case that it decides."""

    operation: str
    rule: Rule
    times: Times = field(default_factory=dict)

    def best(self) -> tuple[Launch, float]:
        """The fastest launch that ran every case that the present one ran, and how much faster it is.

        1 for the present one itself, which stays where the gain is noise.
        """
        present = _key(tuning.launch_of(self.rule))
        cases = self.times.get(present)
        if not cases:
            return tuning.launch_of(self.rule), 1.0
        whole = {
            launch: geometric_mean(list(times.values()))
            for launch, times in self.times.items()
            if times.keys() == cases.keys()
        }
        fastest = min(whole, key=whole.__getitem__)
        gain = whole[present] / whole[fastest]
        return (json.loads(fastest), gain) if gain >= WORTH else (json.loads(present), 1.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Trials of the groups that were timed whole, what failed with what it said, and whether none is left."""

    trials: list[Trial]
    failures: list[str]
    finished: bool


def _key(launch: Launch) -> str:
    return json.dumps(launch, sort_keys=True)


def _launches(operation: str, rule: Rule) -> list[Launch]:
    """The present launch first, then its candidates."""
    present = tuning.launch_of(rule)
    launches = [present, *({**present, **change} for change in CANDIDATES.get(operation, ()))]
    distinct = list({_key(launch): launch for launch in launches}.values())
    return _buildable(distinct, "grouped" in operation) if operation.startswith("cuda_") else distinct


def _buildable(launches: list[Launch], grouped: bool) -> list[Launch]:
    """The present launch, and those whose CUDA C++ can be had in both formats.

    Where it cannot, another kernel would run and be timed. All processors compile: each takes a second.
    """
    device = torch.cuda.current_device()  # each thread has one of its own
    with ThreadPoolExecutor() as pool:
        built = pool.map(lambda launch: _builds(_key(launch), grouped, device), launches[1:])
        return [launches[0], *(launch for launch, found in zip(launches[1:], built, strict=True) if found)]


@cache
def _builds(launch: str, grouped: bool, device: int) -> bool:
    from ..cuda import fp4_gemm as native

    try:
        for nvfp4 in (True, False):
            native.build(native.Tile(**json.loads(launch)), nvfp4, grouped, device)
    except RuntimeError as error:  # too many registers, too little room for a ring
        log.info("%s: %s", launch, said(error))
        return False
    return True


def _time(case: Case, timer: Timer, operation: str, launch: Launch) -> float:
    """Milliseconds; infinite where this launch asks for more memory or registers than there are."""
    try:
        with tuning.trying(operation, launch):
            return timer.median_ms(case.call)
    except Exception as error:  # Triton's, the driver's
        log.info("%s with %s: %s", operation, launch, said(error))
        return math.inf


def _time_launches(case: Case, timer: Timer, operation: str, launches: list[Launch]) -> dict[str, float]:
    """Those that ran; the present one and the fastest are timed twice, as one of many is low by luck."""
    times = {_key(launch): _time(case, timer, operation, launch) for launch in launches}
    again = {_key(launches[0]), *sorted(times, key=times.__getitem__)[:FINALISTS]}
    for launch in again:
        times[launch] = (times[launch] + _time(case, timer, operation, json.loads(launch))) / 2
    return {launch: ms for launch, ms in times.items() if ms < math.inf}


def _try_case(case: Case, timer: Timer) -> list[Trial]:
    """A trial of every rule that decides `case`."""
    with tuning.asked() as found:
        case.call()
    distinct = {_key({"operation": operation, "rule": rule}): (operation, rule) for operation, rule in found}
    trials = []
    for operation, rule in distinct.values():
        if operation in CANDIDATES:
            times = _time_launches(case, timer, operation, _launches(operation, rule))
            trials.append(Trial(operation, rule, {launch: {case.shape: ms} for launch, ms in times.items()}))
    return trials


def _merged(trials: Iterable[Trial]) -> list[Trial]:
    """One trial for each rule, with all its cases."""
    merged: dict[str, Trial] = {}
    for trial in trials:
        key = _key({"operation": trial.operation, "rule": trial.rule})
        whole = merged.setdefault(key, Trial(trial.operation, trial.rule))
        for launch, times in trial.times.items():
            whole.times.setdefault(launch, {}).update(times)
    return list(merged.values())


def tune(
    groups: Mapping[str, Callable[[], Iterator[Case]]],
    timer: Timer,
    say: Say,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Try every candidate on every case of `groups`; of a group that is cut short nothing is kept."""
    trials, failures = list[Trial](), list[str]()
    for name, group in groups.items():
        mine = list[Trial]()
        for case in group():
            if out_of_time():
                say(f"time is up: nothing of {name} is kept")
                return Outcome(_merged(trials), failures, finished=False)
            try:
                found = _try_case(case, timer)
            except Exception as error:  # the case itself: what comes after it can still be tuned
                failures.append(f"{case.operation} {case.shape}: {said(error)}")
                say(f"failed: {failures[-1]}")
                continue
            mine += found
            say(f"{case.operation} {case.shape}: {sum(len(trial.times) for trial in found)} launches timed")
        trials += mine
        torch.cuda.empty_cache()
    return Outcome(_merged(trials), failures, finished=True)


def table(trials: Iterable[Trial], device: torch.device) -> dict[str, list[Rule]]:
    """What the device's own table is to say of operations for which a faster launch was found."""
    changed: dict[str, list[Rule]] = {}
    for trial in trials:
        launch, gain = trial.best()
        if gain < WORTH:
            continue
        rules = changed.setdefault(trial.operation, tuning.rules(trial.operation, device))
        when = {"when": trial.rule["when"]} if "when" in trial.rule else {}
        rules[rules.index(trial.rule)] = {**when, **launch}
    return {operation: _reachable(rules) for operation, rules in changed.items()}


def _reachable(rules: list[Rule]) -> list[Rule]:
    """Rules up to the first that always holds, each condition once: of equal ones the first decides."""
    found: dict[str, Rule] = {}
    for rule in rules:
        found.setdefault(_key(rule.get("when", {})), rule)
        if "when" not in rule:
            break
    return list(found.values())


def write(path: Path, changed: Mapping[str, list[Rule]]) -> None:
    """Put these operations' rules into a table, one rule a line."""
    before = json.loads(path.read_text()) if path.exists() else {}
    entries = []
    for operation, rules in {**before, **changed}.items():
        if isinstance(rules, str):  # "like"
            entries.append(f"  {json.dumps(operation)}: {json.dumps(rules)}")
            continue
        lines = ",\n".join(f"    {json.dumps(rule)}" for rule in rules)
        entries.append(f"  {json.dumps(operation)}: [\n{lines}\n  ]")
    written = path.with_name(f".{path.name}.new")
    written.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    written.replace(path)
