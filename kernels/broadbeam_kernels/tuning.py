"""Launch parameters per device and operation, chosen by table; nothing is tuned while a request waits.

A table, `tuned/<name>.json`, maps an operation to a list of rules. A rule is an object with optional `when`
({"rows": [low, high]}, inclusive) and the launch parameters; the first rule that holds wins. Tables are asked
in turn: the device's own (`nvidia_h100_80gb_hbm3`), its architecture's (`sm_90`), and `default`, which is
safe everywhere. `"like": name` in a table continues with another one: an H200, which nobody has tuned yet, is
a Hopper, and Hoppers without a table are launched as the H100 is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"

Launch = dict[str, Any]


@cache
def _table(name: str) -> dict[str, Any]:
    path = TUNED / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def device_name(index: int) -> str:
    """A device as tables name it: `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(index).lower())


@cache
def architecture(index: int) -> str:
    """A device's architecture as tables name it: `sm_90`."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def launches_overlap(device: torch.device) -> bool:
    """Whether a launch may start before the one ahead of it ends, and wait inside (from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _holds(rule: Launch, facts: dict[str, int]) -> bool:
    return all(low <= facts[name] <= high for name, (low, high) in rule.get("when", {}).items())


def _tables(*names: str) -> Iterator[dict[str, Any]]:
    """The tables of these names, each followed by those it is `like`."""
    for name in names:
        following: str | None = name
        while following is not None:
            table = _table(following)
            yield table
            following = table.get("like")


@cache
def _choose(operation: str, names: tuple[str, ...], facts: tuple[tuple[str, int], ...]) -> Launch:
    known = dict(facts)
    for table in _tables(*names):
        for rule in table.get(operation, ()):
            if _holds(rule, known):
                return {key: value for key, value in rule.items() if key != "when"}
    raise KeyError(f"no launch parameters for {operation} with {known}")


def config(operation: str, device: torch.device, **facts: int) -> Launch:
    """Launch parameters (block sizes, num_warps, num_stages) of `operation` on `device` for `facts`."""
    known = tuple(sorted(facts.items()))
    if device.type != "cuda":  # Triton's interpreter
        return _choose(operation, ("default",), known)
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _choose(operation, (device_name(index), architecture(index), "default"), known)
