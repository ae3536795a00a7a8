"""Which body of a matrix product a device runs: decided by its compute capability, never by trying.

| compute capability | FP8, bf16 and FP4-weight products | block-scaled products (W4A4) |
|---|---|---|
| 9.0 (Hopper) | `hopper`: Gluon kernels on wgmma and the bulk copy engine | decoded to bf16 in registers |
| 10.x, 12.x (Blackwell) | `portable`: plain Triton | native: `tl.dot_scaled` is one instruction |
| others from 8.0 | `portable` | decoded to bf16 in registers |
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from triton.runtime import driver

MatrixPath = Literal["hopper", "portable"]

OLDEST = (8, 0)  # the first to multiply bf16
HOPPER = (9, 0)
FIRST_FP8 = (8, 9)  # below, tensor cores do not multiply e4m3: codes become fp16 in registers
BLOCK_SCALED = (10, 12)  # major versions whose tensor cores apply the block scales themselves
ASYNCHRONOUS = (9, 10)

_forced: ContextVar[MatrixPath | None] = ContextVar("forced matrix path", default=None)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _shared_memory(index: int) -> int:
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on a CUDA device."""
    return _shared_memory(_index(device))


def runs_kernels(x: Tensor) -> bool:
    """Whether `x` lies where our kernels run: on an NVIDIA GPU, which then must be the current device.

    torch calls AMD's GPUs `cuda`, too: there the references run.
    """
    if not x.is_cuda or torch.version.hip is not None:
        return False
    current = torch.cuda.current_device()  # whose stream a launch joins, wherever its operands lie
    if x.device.index not in (None, current):
        raise ValueError(f"operands are on {x.device}, the current device is cuda:{current}")
    return True


def matrix_path(device: torch.device) -> MatrixPath:
    """The kernels that FP8, bf16 and FP4-weight products run on `device`."""
    forced = _forced.get()
    if forced is not None:
        return forced
    found = _capability(_index(device))
    if found < OLDEST:
        raise ValueError(f"{device} has compute capability {found}, matrix products need {OLDEST} or later")
    return "hopper" if found == HOPPER else "portable"


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the tensor cores of `device` multiply e4m3."""
    return _capability(_index(device)) >= FIRST_FP8


def multiplies_block_scaled(device: torch.device) -> bool:
    """Whether the tensor cores of `device` multiply FP4 and apply block scales."""
    return _capability(_index(device))[0] in BLOCK_SCALED


def multiplies_asynchronously(device: torch.device) -> bool:
    """Whether matrix instructions of `device` read shared memory on their own time (wgmma, tcgen05)."""
    return _capability(_index(device))[0] in ASYNCHRONOUS


@contextmanager
def forced(path: MatrixPath) -> Iterator[None]:
    """Within the block every device takes `path`: to test or time a portable kernel on a Hopper."""
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)
