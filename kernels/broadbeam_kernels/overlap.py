"""Launches that overlap: from Hopper on, a launch may begin while the one ahead of it ends.

Its programs take the places that become free and wait there, so that a row of short launches, as decode is,
does not wait for each one's start. A kernel launched so waits before it reads what others write, or writes.
CUDA's name for it is programmatic dependent launch.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIRST = (9, 0)


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until the launch ahead has ended and what it wrote is there."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def release(OVERLAP: tl.constexpr):
    """The launch behind may begin, once every program says so or has ended.

    Only after `wait`: who begins early then knows that all launches but the one just ahead of it have ended.
    """
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Wait for the launch ahead, and let the one behind come and wait."""
    wait(OVERLAP)
    release(OVERLAP)


# Programs of a launch that may begin early. They start at 0.8 a nanosecond where others do at 1.4: on an H200
# 57,344 small ones took 70 us instead of 40. With 28,672 it is not seen; more run too long to need it.
MOST_PROGRAMS = 30_000


@cache
def _overlaps(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= FIRST


def early(device: torch.device, programs: int) -> dict[str, bool]:
    """Options of a launch on `device` whose kernel takes OVERLAP: early where that is possible, and pays."""
    if device.type != "cuda" or programs > MOST_PROGRAMS:  # not CUDA: Triton's interpreter
        return {"OVERLAP": False}
    index = device.index if device.index is not None else torch.cuda.current_device()
    return {"OVERLAP": True, "launch_pdl": True} if _overlaps(index) else {"OVERLAP": False}
