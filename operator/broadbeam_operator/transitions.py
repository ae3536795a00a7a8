"""Events for conditions that have changed, so that `kubectl describe` tells a story. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from broadbeam_operator.cluster import Object

# Worth an Event, with the statuses that are bad news.
BAD = {"Accepted": "False", "Available": "False", "Progressing": "", "Degraded": "True"}
# What a new cluster begins with, and nobody needs to hear.
INITIAL = {("Available", "False"), ("Degraded", "False"), ("Progressing", "False")}


class Transition(NamedTuple):
    severity: Literal["Normal", "Warning"]
    reason: str
    message: str


def transitions(before: Mapping[str, object], after: Object) -> list[Transition]:
    """What to tell of the step from one status to the next, in a fixed order."""
    old, new = _conditions(before), _conditions(after)
    return [
        Transition(
            "Warning" if new[kind]["status"] == bad else "Normal",
            _reason(kind, new[kind]),
            new[kind].get("message", ""),
        )
        for kind, bad in BAD.items()
        if kind in new and _told(kind, old.get(kind), new[kind])
    ]


def _told(kind: str, old: Object | None, new: Object) -> bool:
    if old is None:
        return (kind, new["status"]) not in INITIAL
    if kind == "Accepted" and new["status"] == "False":
        return bool(old["status"] != "False" or old.get("message") != new.get("message"))
    return bool(old["status"] != new["status"])


def _reason(kind: str, condition: Object) -> str:
    """Available, NotAvailable, Degraded, Recovered, ...: readable without the condition."""
    good = condition["status"] == "True"
    words = {"Progressing": ("Progressing", "Complete"), "Degraded": ("Degraded", "Recovered")}
    positive, negative = words.get(kind, (kind, f"Not{kind}"))
    return positive if good else negative


def _conditions(status: Mapping[str, object]) -> dict[str, Object]:
    found = status.get("conditions") or ()
    assert isinstance(found, list | tuple)
    return {each["type"]: each for each in found}
