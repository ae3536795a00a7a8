"""Launch parameters per device and operation, chosen by table; nothing is tuned while a request waits.

`tuned/<device>.json` maps an operation to a list of rules. A rule is an object with optional `when`
({"rows": [low, high]}, inclusive) and the launch parameters; the first rule that holds wins. A device
without a file, an operation without a rule: `tuned/default.json`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"

Launch = dict[str, Any]


@cache
def _table(name: str) -> dict[str, list[Launch]]:
    path = TUNED / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def device_name(index: int) -> str:
    """File name for a device: `nvidia_h100_80gb_hbm3`."""
    return torch.cuda.get_device_name(index).lower().replace(" ", "_").replace("-", "_")


@cache
def multiprocessors(index: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def launches_overlap(device: torch.device) -> bool:
    """Whether a launch may start before the one ahead of it ends, and wait inside (from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _holds(rule: Launch, facts: dict[str, int]) -> bool:
    return all(low <= facts[name] <= high for name, (low, high) in rule.get("when", {}).items())


@cache
def _choose(operation: str, device: str, facts: tuple[tuple[str, int], ...]) -> Launch:
    known = dict(facts)
    for table in (_table(device), _table("default")):
        for rule in table.get(operation, ()):
            if _holds(rule, known):
                return {key: value for key, value in rule.items() if key != "when"}
    raise KeyError(f"no launch parameters for {operation} with {known}")


def config(operation: str, device: torch.device, **facts: int) -> Launch:
    """Launch parameters (block sizes, num_warps, num_stages) of `operation` on `device` for `facts`."""
    if device.type != "cuda":  # Triton's interpreter
        return _choose(operation, "default", tuple(sorted(facts.items())))
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _choose(operation, device_name(index), tuple(sorted(facts.items())))
