"""Launch parameters for a device, found by timing: each rule of a table keeps the fastest of its candidates.

A candidate is timed on every case of the benchmarks that a rule decides; the least geometric mean wins, and
takes the present launch's place only where it is WORTH faster. What a device's table then says of an
operation is all the rules that were looked at for it, so that no rule of a later table is shadowed.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import tuning
from ..testing import Timer
from ..tuning import Launch, Rule
from .case import Case, said
from .report import geometric_mean

WORTH = 1.015  # less is noise

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
    "cuda_fp4_gemm": [
        *_grid(warpgroups=(2, 4), halves=(2,), resident=(1, 2, 3), split=(2, 4, 6, 8), early=(0, 1, 2)),
        *_grid(warpgroups=(2,), halves=(1,), resident=(1, 2, 3), split=(2, 4, 6, 8)),
    ],
    "cuda_grouped_fp4_gemm": _grid(warpgroups=(2, 4), halves=(1, 2), resident=(1, 2, 3), early=(0, 1)),
}


@dataclass(slots=True)
class Trial:
    """One rule of one operation, and how long its candidates took: a launch -> milliseconds, case by case."""

    operation: str
    rule: Rule
    times: dict[str, list[float]] = field(default_factory=dict)

    def best(self) -> tuple[Launch, float]:
        """The fastest launch that ran every case, and how much faster than the present one it is."""
        present = json.dumps(tuning.launch_of(self.rule), sort_keys=True)
        whole = {
            launch: geometric_mean(times)
            for launch, times in self.times.items()
            if len(times) == len(self.times[present])
        }
        fastest = min(whole, key=whole.__getitem__)
        gain = whole[present] / whole[fastest]
        return json.loads(fastest if gain >= WORTH else present), max(gain, 1.0)


def _launches(operation: str, rule: Rule) -> Iterator[Launch]:
    """The present launch first, then its candidates."""
    present = tuning.launch_of(rule)
    seen = []
    for launch in (present, *({**present, **change} for change in CANDIDATES.get(operation, ()))):
        if launch not in seen:
            seen.append(launch)
            yield launch


def _compile_ahead(operation: str, launches: list[Launch]) -> None:
    """Compile CUDA C++ on all processors: one after another takes a second each."""
    if not operation.startswith("cuda_"):
        return
    from ..cuda import fp4_gemm as native

    tiles = [native.Tile(**launch) for launch in launches]
    choices = itertools.product(tiles, (True, False), ("grouped" in operation,))

    def build(choice: tuple[native.Tile, bool, bool]) -> None:
        with suppress(RuntimeError):  # it cannot be had, as its trial will find
            native.build(*choice, torch.cuda.current_device())

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, choices))


def _time(case: Case, timer: Timer, operation: str, launch: Launch) -> list[float]:
    """Milliseconds; none where this launch asks for more memory or registers than there are."""
    try:
        with tuning.trying(operation, launch):
            return [timer.median_ms(case.call)]
    except Exception as error:  # Triton's, the driver's, the compiler's
        log.info("%s with %s: %s", operation, launch, said(error))
        return []


def _time_case(case: Case, timer: Timer, trials: dict[str, Trial]) -> int:
    """Time every candidate of every rule that decides `case`; how many were timed."""
    with tuning.asked() as found:
        case.call()
    timed = 0
    for operation, rule in {json.dumps(pair, sort_keys=True): pair for pair in found}.values():
        if operation not in CANDIDATES:
            continue
        trial = trials.setdefault(json.dumps((operation, rule), sort_keys=True), Trial(operation, rule))
        launches = list(_launches(operation, rule))
        _compile_ahead(operation, launches)
        for launch in launches:
            times = _time(case, timer, operation, launch)
            trial.times.setdefault(json.dumps(launch, sort_keys=True), []).extend(times)
            timed += len(times)
    return timed


def tune(
    groups: Mapping[str, Callable[[], Iterator[Case]]],
    timer: Timer,
    say: Say,
    out_of_time: Callable[[], bool] = lambda: False,
) -> list[Trial]:
    """Try every candidate on every case of `groups`."""
    trials: dict[str, Trial] = {}
    for group in groups.values():
        for case in group():
            if out_of_time():
                say("time is up: rules whose cases were not all timed may change when they are")
                return list(trials.values())
            try:
                timed = _time_case(case, timer, trials)
            except Exception as error:  # the case itself: what comes after it can still be tuned
                say(f"failed: {case.operation} {case.shape}: {said(error)}")
                continue
            say(f"{case.operation} {case.shape}: {timed} launches timed")
        torch.cuda.empty_cache()
    return list(trials.values())


def table(trials: Iterable[Trial], device: torch.device) -> dict[str, list[Rule]]:
    """What the device's own table is to say of operations for which a faster launch was found."""
    changed: dict[str, list[Rule]] = {}
    for trial in trials:
        launch, gain = trial.best()
        if gain < WORTH:
            continue
        rules = changed.setdefault(trial.operation, tuning.rules(trial.operation, device))
        place = rules.index(trial.rule)
        when = {"when": trial.rule["when"]} if "when" in trial.rule else {}
        rules[place] = {**when, **launch}
    return {operation: _reachable(rules) for operation, rules in changed.items()}


def _reachable(rules: list[Rule]) -> list[Rule]:
    """Rules up to the first that always holds."""
    last = next((i for i, rule in enumerate(rules) if "when" not in rule), len(rules) - 1)
    return rules[: last + 1]


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
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")
