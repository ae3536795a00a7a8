"""What a benchmark prints: one JSON line per figure, each a ratio measured in the same run.

A figure says which bar it must reach; `report` also warns where one is more than 15 % worse than the line of
the same name in `runtime/baselines.jsonl`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

BASELINES = Path(__file__).parents[1] / "baselines.jsonl"
WARNING = 0.15


@dataclass(frozen=True, slots=True)
class Figure:
    """`value` in `unit`; `ratio` to the reference of the same run, at least `bar` if there is one."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    bar: float | None = None
    reference: str = ""
    machine: str = ""


def measuring(name: str) -> None:
    """Progress, for a person: standard output has nothing but figures."""
    print(f"measuring {name}", file=sys.stderr, flush=True)


def report(figures: Iterable[Figure], write: bool, baselines: Path = BASELINES) -> int:
    """Print the figures; the number of bars that were missed."""
    known = {}
    if baselines.exists():
        known = {line["name"]: line for line in map(json.loads, baselines.read_text().splitlines())}
    missed = 0
    for figure in figures:
        line = {key: round(v, 4) if isinstance(v, float) else v for key, v in asdict(figure).items()}
        print(json.dumps(line), flush=True)
        if figure.bar and figure.ratio and figure.ratio < figure.bar:
            missed += 1
            print(f"{figure.name}: {figure.ratio:.2f} misses its bar of {figure.bar}", file=sys.stderr)
        before = known.get(figure.name, {}).get("ratio")
        if before and figure.ratio and figure.ratio < before * (1 - WARNING):
            print(
                f"{figure.name}: {figure.ratio:.2f}, the committed baseline is {before:.2f}", file=sys.stderr
            )
        known[figure.name] = line
    if write:
        baselines.write_text("".join(json.dumps(line) + "\n" for line in known.values()))
    return missed
