"""Checks at the door of an operation: one sentence that names the argument, its value and the limit.

Values that lie on a GPU are not looked at, because the host would wait for them: indices and counts out of
their range, a global scale that is not positive, NaN and infinity are the caller's to avoid there.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .formats import Format, Fp8Block, Nvfp4, Quantized, swizzled_size
from .paths import multiplies_fp8, runs_kernels

HALF_TYPES = (torch.bfloat16, torch.float16)
FP8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDEST = 1 << 30  # columns of a row: kernels count within a row in 32 bits
MOST_BLOCKS = (1 << 31) - (1 << 13)  # scales of a tensor: kernels number them in 32 bits


def check(holds: bool, message: str) -> None:
    """Raise ValueError(message) unless `holds`."""
    if not holds:
        raise ValueError(message)


def check_type(name: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    """`dtype` is one of `dtypes`."""
    if dtype not in dtypes:
        raise ValueError(f"{name} is {dtype}, expected one of {', '.join(map(str, dtypes))}")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """`x` lives where `like` lives."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device}")


def check_tensor(
    name: str, x: Tensor, dims: int, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None
) -> None:
    """`x` has `dims` dimensions, one of `dtypes`, and lives where `like` lives."""
    if x.dim() != dims:
        raise ValueError(f"{name} has {x.dim()} dimensions, expected {dims}")
    check_type(name, x.dtype, dtypes)
    if like is not None:
        check_device(name, x, like)


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """`x` has exactly `shape`."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")


def check_multiple(name: str, n: int, of: int, least: int = 0) -> None:
    """`n` is a multiple of `of`, and no less than `least`."""
    if n % of:
        raise ValueError(f"{name}={n} is not a multiple of {of}")
    if n < least:
        raise ValueError(f"{name}={n}, expected at least {least}")


def check_dense(name: str, x: Tensor, aligned: int = 16) -> None:
    """`x` is contiguous and starts on `aligned` bytes: 16 where the copy engine reads or writes it."""
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}, it must be contiguous")
    _check_start(name, x, aligned)


def check_rows(name: str, x: Tensor, aligned: int = 16) -> None:
    """(rows, columns): rows are dense, do not overlap, and each starts on `aligned` bytes."""
    rows, columns = x.shape
    if not x.numel():
        return
    if columns > 1 and x.stride(1) != 1:
        raise ValueError(f"{name}'s last dimension has stride {x.stride(1)}, expected 1")
    if rows > 1 and x.stride(0) < columns:
        raise ValueError(f"{name}'s rows of {columns} are {x.stride(0)} apart: they overlap")
    if x.stride(0) * x.element_size() % aligned:
        raise ValueError(
            f"{name}'s rows are {x.stride(0) * x.element_size()} bytes apart, not a multiple of {aligned}"
        )
    _check_start(name, x, aligned)


def _check_start(name: str, x: Tensor, aligned: int) -> None:
    if x.numel() and x.data_ptr() % aligned:
        raise ValueError(f"{name} starts {x.data_ptr() % aligned} bytes past a multiple of {aligned}")


def check_indices(
    name: str, x: Tensor, like: Tensor, shape: tuple[int, ...] | None, least: int, limit: int
) -> None:
    """A dense int32 vector of `shape`; on a CPU its values are seen to lie within least..limit, too."""
    check_tensor(name, x, 1, (torch.int32,), like=like)
    if shape is not None:
        check_shape(name, x, shape)
    if not x.is_contiguous():
        raise ValueError(f"{name} has stride {x.stride(0)}, expected 1")
    check_range(name, x, least, limit)


def check_range(name: str, x: Tensor, least: int, limit: int) -> None:
    """On a CPU: every value lies within least..limit."""
    if x.is_cpu and x.numel():
        low, high = (int(bound.item()) for bound in x.aminmax())
        if low < least or high > limit:
            raise ValueError(f"{name} holds {low if low < least else high}, not within {least}..{limit}")


def block_rows(rows: int, experts: Tensor, sizes: tuple[int, ...]) -> int:
    """Rows of a block, of which each has its expert in `experts`: one of `sizes`."""
    blocks = experts.numel()
    block = rows // max(blocks, 1)
    if rows != block * blocks:
        raise ValueError(f"experts names {blocks} blocks, which do not divide {rows} rows")
    if rows and block not in sizes:
        raise ValueError(f"experts names blocks of {block} rows, expected one of {sizes}")
    return block


def check_global_scale(name: str, g: Tensor, like: Tensor) -> None:
    """One number where `like` lives; on a CPU it is seen to be positive and finite, too."""
    if g.numel() != 1:
        raise ValueError(f"{name} has {g.numel()} elements, expected 1")
    check_device(name, g, like)
    if g.is_cpu and not 0 < float(g.item()) < math.inf:
        raise ValueError(f"{name} is {float(g.item())}, expected a positive finite number")


def check_size(rows: int, columns: int, block: int) -> None:
    """A matrix that kernels can count through, with a scale for each `block` values of a row."""
    if columns > WIDEST:
        raise ValueError(f"columns={columns}, expected at most {WIDEST}")
    blocks = rows * -(-columns // block)
    if blocks > MOST_BLOCKS:
        raise ValueError(f"rows={rows} times columns={columns}: {blocks} scales, at most {MOST_BLOCKS}")


def check_quantized(name: str, q: Quantized, *kinds: type[Format]) -> None:
    """`q` is in a format of one of `kinds`, and its parts are what the format says of q's shape."""
    fmt, (rows, columns) = q.format, q.shape
    if not isinstance(fmt, kinds):
        raise ValueError(f"{name} is in {fmt}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    scales = f"{name}_scales"
    if not isinstance(fmt, Nvfp4):
        check(q.global_scale is None, f"{name} is in {fmt} and has a global scale, which only NVFP4 has")
    if isinstance(fmt, Fp8Block):
        check_tensor(name, q.values, 2, (torch.float8_e4m3fn,))
        check_shape(name, q.values, (rows, columns))
        stored = torch.uint8 if fmt.scale == "ue8m0" else torch.float32
        check_tensor(scales, q.scales, 2, (stored,), like=q.values)
        check_shape(scales, q.scales, (-(-rows // fmt.rows), -(-columns // fmt.block)))
        return
    check_tensor(name, q.values, 2, (torch.uint8,))
    check_multiple(f"{name}'s columns", columns, fmt.block)
    check_shape(name, q.values, (rows, columns // 2))
    nvfp4, blocks = isinstance(fmt, Nvfp4), columns // fmt.block
    check_type(scales, q.scales.dtype, (torch.float8_e4m3fn if nvfp4 else torch.uint8,))
    check_device(scales, q.scales, q.values)
    swizzled = fmt.scales == "swizzled"
    check_shape(scales, q.scales, (swizzled_size(rows, blocks),) if swizzled else (rows, blocks))
    if nvfp4:
        check(q.global_scale is not None, f"{name} is in NVFP4 and needs its global scale")
        assert q.global_scale is not None
        check_global_scale(f"{name}_global_scale", q.global_scale, q.values)


def paired(x: Tensor) -> Tensor:
    """`x` if its 16-bit values can be read as 32-bit pairs (dense aligned rows, even strides), or a copy."""
    addressable = (
        x.stride(-1) == 1 and x.data_ptr() % 4 == 0 and all(stride % 2 == 0 for stride in x.stride()[:-1])
    )
    return x if addressable else x.clone(memory_format=torch.contiguous_format)


def launches(x: Tensor, *types: torch.dtype) -> bool:
    """Whether an operation on `x` launches its kernel, rather than run its reference.

    On a GPU that runs kernels, and anywhere under Triton's interpreter; but not where a kernel reads or
    writes one of `types` that is FP8 and the GPU has no instructions to convert it.
    """
    if triton.knobs.runtime.interpret:
        return True
    return runs_kernels(x) and (multiplies_fp8(x.device) or not set(types) & set(FP8_TYPES))
