"""Launch parameters per device and operation, chosen by table; nothing is tuned while a request waits.

A table, `tuned/<name>.json`, maps an operation to a list of rules. A rule is an object with optional `when`
({"rows": [low, high]}, inclusive) and the launch parameters; the first rule that holds wins. Tables are asked
in turn: the device's own (`nvidia_h100_80gb_hbm3`), its architecture's (`sm_90`), and `default`, which is
safe everywhere. `"like": name` in a table continues with another one: a Hopper without a table, or without a
rule, is launched as the H100 is. `python -m broadbeam_kernels tune` measures, and writes a device's table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"

Launch = dict[str, Any]
Rule = dict[str, Any]  # launch parameters, and `when` they hold

_tried: ContextVar[tuple[str, Launch] | None] = ContextVar("launch parameters on trial", default=None)
_asked: ContextVar[list[tuple[str, Rule]] | None] = ContextVar("operations asked about", default=None)


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
def _choose(
    operation: str, names: tuple[str, ...], facts: tuple[tuple[str, int], ...]
) -> tuple[Rule, Launch]:
    known = dict(facts)
    for rule in _rules(operation, names):
        if _holds(rule, known):
            return rule, launch_of(rule)
    raise KeyError(f"no launch parameters for {operation} with {known}")


def _rules(operation: str, names: tuple[str, ...]) -> Iterator[Rule]:
    for table in _tables(*names):
        yield from table.get(operation, ())


def launch_of(rule: Rule) -> Launch:
    """What a rule says, less when."""
    return {key: value for key, value in rule.items() if key != "when"}


def _names(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":  # Triton's interpreter
        return ("default",)
    index = device.index if device.index is not None else torch.cuda.current_device()
    return device_name(index), architecture(index), "default"


def rules(operation: str, device: torch.device) -> list[Rule]:
    """Every rule of `operation` that is looked at for `device`, in their order."""
    return list(_rules(operation, _names(device)))


def config(operation: str, device: torch.device, **facts: int) -> Launch:
    """Launch parameters (block sizes, num_warps, num_stages) of `operation` on `device` for `facts`."""
    tried, noted = _tried.get(), _asked.get()
    if tried is not None and tried[0] == operation:
        return tried[1]
    rule, launch = _choose(operation, _names(device), tuple(sorted(facts.items())))
    if noted is not None:
        noted.append((operation, rule))
    return launch


@contextmanager
def trying(operation: str, launch: Launch) -> Iterator[None]:
    """`operation` is launched with `launch`, whatever the tables say."""
    token = _tried.set((operation, launch))
    try:
        yield
    finally:
        _tried.reset(token)


@contextmanager
def asked() -> Iterator[list[tuple[str, Rule]]]:
    """Which operations are launched meanwhile, and by which of their rules."""
    found: list[tuple[str, Rule]] = []
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)
