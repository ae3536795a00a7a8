"""Whether an object must be applied: was it rendered otherwise, or has somebody changed what we set?"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any

from broadbeam_crds.quantity import SUFFIXES
from broadbeam_operator import names
from broadbeam_operator.cluster import Object


def must_apply(wanted: Object, live: Object) -> bool:
    """The hash tells what we have dropped since; comparing values tells what others have changed."""
    return applied_hash(live) != applied_hash(wanted) or not holds(live, wanted)


def applied_hash(obj: Object) -> str | None:
    found: str | None = (obj["metadata"].get("annotations") or {}).get(names.ANNOTATION_APPLIED_HASH)
    return found


def holds(live: Any, wanted: Any) -> bool:
    """Whether `live` has all that `wanted` says; what the API server or others added does not matter."""
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(
            holds(live[key], value) if key in live else _empty(value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(live, list) and _holds_items(live, wanted)
    return bool(live == wanted) or _same_quantity(live, wanted)


def _holds_items(live: list[Any], wanted: list[Any]) -> bool:
    if all(isinstance(item, dict) for item in wanted):
        return all(any(holds(found, item) for found in live) for item in wanted)
    return live == wanted


def _empty(value: Any) -> bool:
    """The API server drops empty values that it would read as absent."""
    return value in ({}, [], "", None)


def _same_quantity(live: Any, wanted: Any) -> bool:
    """The API server writes 1000m as 1 and 1024Mi as 1Gi."""
    left, right = _amount(live), _amount(wanted)
    return left is not None and left == right


def _amount(value: Any) -> Decimal | None:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return None
    text = str(value)
    number = text.rstrip("mkMGTPi" + "K")
    try:
        return Decimal(number) * SUFFIXES.get(text[len(number) :], Decimal(1))
    except InvalidOperation:
        return None
