"""One run of the benchmarks: case after case, each row kept as it is measured, in parts if time is short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from .case import Case, Row, said

Groups = Mapping[str, Callable[[], Iterator[Case]]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows of the whole run so far, what failed with what it said, and whether no case is left."""

    rows: list[Row]
    failures: list[str]
    finished: bool


def measure(
    groups: Groups,
    time: Callable[[Case], Row],
    *,
    earlier: Iterable[Row] = (),
    keep: Callable[[list[Row]], None] = lambda rows: None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Time every case that `earlier` rows do not have; `keep` is given all rows after each new one.

    A case, or a group's building of its next one, that raises is named and passed over: what comes after it
    is still measured. No case begins once `out_of_time`.
    """
    rows, failures = list(earlier), list[str]()
    done = {(row["operation"], row["shape"]) for row in rows}
    for name, group in groups.items():
        cases = group()
        while (case := _attempt(partial(next, cases, None), name, failures)) is not None:
            if (case.operation, case.shape) in done:
                continue
            if out_of_time():
                return Outcome(rows, failures, finished=False)
            row = _attempt(partial(time, case), f"{case.operation} {case.shape}", failures)
            if row is not None:
                rows.append(row)
                keep(rows)
        torch.cuda.empty_cache()
    return Outcome(rows, failures, finished=True)


def _attempt(call: Callable[[], T], what: str, failures: list[str]) -> T | None:
    try:
        return call()
    except Exception as error:  # whatever it is, the cases after it are to be measured
        failures.append(f"{what}: {said(error)}")
        return None
