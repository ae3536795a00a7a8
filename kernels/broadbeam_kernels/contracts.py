"""Checks at the door of an operation: one sentence that names the argument, its value and the limit."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .paths import multiplies_fp8

HALF_TYPES = (torch.bfloat16, torch.float16)
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def check(holds: bool, message: str) -> None:
    """Raise ValueError(message) unless `holds`."""
    if not holds:
        raise ValueError(message)


def check_tensor(
    name: str, x: Tensor, dims: int, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None
) -> None:
    """`x` has `dims` dimensions, one of `dtypes`, and lives where `like` lives."""
    check(x.dim() == dims, f"{name} has {x.dim()} dimensions, expected {dims}")
    check(x.dtype in dtypes, f"{name} is {x.dtype}, expected one of {', '.join(map(str, dtypes))}")
    if like is not None:
        check(x.device == like.device, f"{name} is on {x.device}, expected {like.device}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """`x` has exactly `shape`."""
    check(tuple(x.shape) == shape, f"{name} has shape {tuple(x.shape)}, expected {shape}")


def paired(x: Tensor) -> Tensor:
    """`x` if its 16-bit values can be read as 32-bit pairs (dense aligned rows, even strides), or a copy."""
    addressable = (
        x.stride(-1) == 1 and x.data_ptr() % 4 == 0 and all(stride % 2 == 0 for stride in x.stride()[:-1])
    )
    return x if addressable else x.clone(memory_format=torch.contiguous_format)


def launches(x: Tensor, *types: torch.dtype) -> bool:
    """Whether an operation on `x` launches its kernel, rather than run its reference.

    On a GPU, and anywhere under Triton's interpreter; but not where a kernel reads or writes one of `types`
    that is FP8 and the GPU has no instructions to convert it.
    """
    if triton.knobs.runtime.interpret:
        return True
    return x.is_cuda and (multiplies_fp8(x.device) or not set(types) & set(FP8_TYPES))
