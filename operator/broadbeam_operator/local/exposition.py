"""Reading a Prometheus text page: just enough to add up counters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


def samples(page: str) -> list[Sample]:
    """Every sample of a page, timestamps dropped."""
    lines = (line for line in page.splitlines() if line and not line.startswith("#"))
    matches = (match for line in lines if (match := _SAMPLE.match(line)))
    return [Sample(m[1], dict(_LABEL.findall(m[2] or "")), float(m[3])) for m in matches]


def total(found: Iterable[Sample], name: str, **labels: str) -> float:
    """The sum of the samples of that name that have all of `labels`."""
    return sum(s.value for s in found if s.name == name and labels.items() <= s.labels.items())
