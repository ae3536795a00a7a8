"""What is timed, what it is compared with, and the ceilings of the device it runs on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from ..testing import Timer

Call = Callable[[], object]
Unit = Literal["fp8", "bf16"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    bytes and flops: the least the operation must move and compute; unit: the type the tensor cores multiply.
    peers: name -> builder of the peer's call; a builder or call that raises is reported with its error.
    """

    operation: str
    shape: str
    call: Call
    bytes: int
    flops: int = 0
    unit: Unit = "fp8"
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """Measured in this run: GB/s of a large copy (read + write) and TFLOP/s of 8192^3 products."""

    copy_gb_s: float
    fp8_tflop_s: float
    bf16_tflop_s: float

    def floor_s(self, case: Case) -> tuple[float, str]:
        """The least time this device could take for `case`, and what sets it: `memory`, `fp8` or `bf16`."""
        moving = case.bytes / (self.copy_gb_s * 1e9)
        rate = self.fp8_tflop_s if case.unit == "fp8" else self.bf16_tflop_s
        computing = case.flops / (rate * 1e12)
        return max((moving, "memory"), (computing, case.unit))


def measure_ceilings(timer: Timer) -> Ceilings:
    """A 1 GiB copy, and 8192^3 products through torch (FP8 with one scale per tensor, bf16), random data."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_ms = timer.median_ms(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    bf16_ms = timer.median_ms(lambda: a @ a.t())
    b = a.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    fp8_ms = timer.median_ms(lambda: torch._scaled_mm(b, b.t(), one, one, out_dtype=torch.bfloat16))
    flops = 2 * 8192**3
    return Ceilings((2 << 30) / copy_ms / 1e6, flops / fp8_ms / 1e9, flops / bf16_ms / 1e9)


def ready(call: Call) -> Callable[[], Call]:
    """The builder of a peer that needs no building."""
    return lambda: call


SETS = 4  # operands of calls in a row: together several times what a cache holds


def in_a_row(
    operation: str,
    shape: str,
    build: Callable[[], Call],
    moved: int,
    flops: int = 0,
    unit: Unit = "fp8",
    sets: int = SETS,
) -> Case:
    """Calls one after another, each of `sets` built calls twice: what one call takes among its like.

    A call by itself begins with a cache full of the flush's written lines, and writes them back: 60 MB on an
    H200, a third of what a quantiser moves. In a row every call writes back what another of them wrote.
    """
    calls = [build() for _ in range(sets)] * 2
    return Case(
        operation,
        f"{shape}, {len(calls)} in a row",
        partial(in_turn, calls),
        len(calls) * moved,
        len(calls) * flops,
        unit,
    )


def in_turn(calls: Sequence[Call]) -> list[object]:
    """Every call's result, all kept, so that no call writes where the cache holds what another wrote."""
    return [call() for call in calls]


def versions() -> dict[str, str]:
    """Versions of everything that a timing depends on."""
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "sgl-deep-gemm", "flashinfer-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    found["driver"] = _driver()
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip()


def said(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:160]


def _peer(build: Callable[[], Call], timer: Timer, ours_ms: float) -> Row:
    try:
        ms = timer.median_ms(build())
    except Exception as error:  # another library's, of any kind: it is named with what it said
        return {"error": said(error)}
    return {"median_us": round(ms * 1e3, 2), "ratio": round(ms / ours_ms, 3)}


def time_case(case: Case, timer: Timer, ceilings: Ceilings) -> Row:
    """One line of `baselines.jsonl`, less device and versions. ratio = peer's time / ours: above 1 we win."""
    ms = timer.median_ms(case.call)
    floor, bound = ceilings.floor_s(case)
    return {
        "operation": case.operation,
        "shape": case.shape,
        "median_us": round(ms * 1e3, 2),
        "bytes": case.bytes,
        "flops": case.flops,
        "bound": bound,
        "gb_s": round(case.bytes / ms / 1e6, 1),
        "tflop_s": round(case.flops / ms / 1e9, 1),
        "fraction": round(floor / (ms / 1e3), 3),
        "peers": {name: _peer(build, timer, ms) for name, build in case.peers.items()},
    }
