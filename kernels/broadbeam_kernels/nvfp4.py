"""NVFP4: quantise to and from e2m1 codes with e4m3 scales of 16 values and one float32 global scale.

Bound by memory: 2 bytes in and 0.5625 out per value. One program takes a run of 16-value blocks, whatever
row they lie in, so that no hidden size wastes lanes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes
from .contracts import HALF_TYPES, check, check_tensor, paired
from .formats import NVFP4, NVFP4_RANGE, Nvfp4, Quantized, align, swizzled_size
from .reference import quantize as oracle
from .tuning import config


@triton.jit
def _quantize_kernel(
    x_ptr,  # int32 view: pairs of 16-bit values
    codes_ptr,
    scales_ptr,
    global_ptr,  # float32: g, or the tensor's amax where FROM_AMAX
    rows,
    blocks,
    grid_blocks,  # blocks per row, padded to 4 where SWIZZLED
    total,
    row_words,
    BF16: tl.constexpr,
    FROM_AMAX: tl.constexpr,
    SWIZZLED: tl.constexpr,
    FLAT: tl.constexpr,  # dense rows and linear scales: a block's number is its place
    BLOCKS: tl.constexpr,
):
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = index < total
    word = tl.arange(0, 8)
    if FLAT:
        place = index
        at = index.to(tl.int64) * 8
    else:
        row = index // grid_blocks
        block = index - row * grid_blocks
        inside = inside & (row < rows) & (block < blocks)
        place = row * blocks + block
        at = row.to(tl.int64) * row_words + block * 8
    g = tl.load(global_ptr)
    if FROM_AMAX:
        g = tl.where(g > 0, tl.div_rn(2688.0, g), 1.0)
    words = tl.load(x_ptr + at[:, None] + word[None, :], mask=inside[:, None], other=0)
    low, high = codes.unpack_pair(words, BF16)
    amax = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1)
    scale = codes.e4m3(g * (amax * (1.0 / 6.0)))
    decoded = scale.to(tl.float32)
    factor = tl.where(decoded == 0.0, 0.0, tl.div_rn(1.0, decoded * tl.div_rn(1.0, g)))[:, None]
    packed = codes.e2m1_pack(low * factor, high * factor)
    out = place.to(tl.int64)[:, None] * 8 + word[None, :]
    tl.store(codes_ptr + out, packed, mask=inside[:, None])
    if SWIZZLED:
        offset = codes.swizzled_offset(row, block, grid_blocks // 4)
        tl.store(scales_ptr + offset, tl.where(inside, decoded, 0.0).to(tl.float8e4nv), mask=index < total)
    else:
        tl.store(scales_ptr + place, scale, mask=inside)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    global_ptr,
    out_ptr,  # int32 view: pairs of 16-bit values
    blocks,
    total,
    BF16: tl.constexpr,
    SWIZZLED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = index < total
    at = index.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
    code = tl.load(codes_ptr + at, mask=inside[:, None], other=0).to(tl.int32)
    scale_at = index
    if SWIZZLED:
        row = index // blocks
        scale_at = codes.swizzled_offset(row, index - row * blocks, (blocks + 3) // 4)
    scale = tl.load(scales_ptr + scale_at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(scale, tl.load(global_ptr))[:, None]
    low = codes.e2m1_value(code) * scale
    high = codes.e2m1_value(code >> 4) * scale
    tl.store(out_ptr + at, codes.pack_pair(low, high, BF16), mask=inside[:, None])


@triton.jit
def _amax_kernel(
    x_ptr, amax_ptr, columns, row_words, total, BF16: tl.constexpr, FLAT: tl.constexpr, WORDS: tl.constexpr
):
    best = tl.zeros((WORDS,), tl.float32)
    for start in tl.range(tl.program_id(0) * WORDS, total, tl.num_programs(0) * WORDS):
        index = start + tl.arange(0, WORDS)
        at = index
        if not FLAT:
            row = index // columns
            at = row.to(tl.int64) * row_words + (index - row * columns)
        low, high = codes.unpack_pair(tl.load(x_ptr + at, mask=index < total, other=0), BF16)
        best = tl.maximum(best, tl.maximum(tl.abs(low), tl.abs(high)))
    # Non-negative floats order as their bits do, so an integer maximum needs no lock.
    tl.atomic_max(amax_ptr, tl.max(best, axis=0).to(tl.int32, bitcast=True))


def amax(x: Tensor) -> Tensor:
    """Largest magnitude of a (rows, columns) bf16 or fp16 tensor, as a float32 tensor of one element."""
    check_tensor("x", x, 2, HALF_TYPES)
    if not x.is_cuda or x.numel() == 0 or x.shape[1] % 2:
        return x.abs().max().float().reshape(1) if x.numel() else torch.zeros(1, device=x.device)
    x = paired(x)
    out = torch.zeros(1, dtype=torch.int32, device=x.device)
    words = x.numel() // 2
    grid = (min(triton.cdiv(words, 4096), 132 * 8),)
    _amax_kernel[grid](
        x.view(torch.int32),
        out,
        x.shape[1] // 2,
        x.stride(0) // 2,
        words,
        BF16=x.dtype == torch.bfloat16,
        FLAT=x.is_contiguous(),
        WORDS=4096,
        num_warps=8,
    )
    return out.view(torch.float32)


def global_scale(x: Tensor) -> Tensor:
    """NVFP4 global scale of a tensor: 448 * 6 / amax, 1 for a tensor of zeros (float32, one element)."""
    return _from_amax(amax(x))


def _from_amax(largest: Tensor) -> Tensor:
    # A scalar over a tensor would multiply by a rounded reciprocal; this divides.
    return torch.where(largest > 0, torch.full_like(largest, NVFP4_RANGE) / largest, torch.ones_like(largest))


def quantize_nvfp4(x: Tensor, fmt: Nvfp4 = NVFP4, global_scale: Tensor | None = None) -> Quantized:
    """(rows, columns) bf16 or fp16 -> NVFP4; columns a multiple of 16.

    With g the global scale (computed from `x` as 2688 / amax when not given):
    scale = e4m3(g * (amax_block * (1/6))); code = e2m1(x * (1 / (scale * (1/g)))), nearest, ties to even.
    Source: vLLM `nvfp4_emulation_utils.py`, with exact reciprocals.
    """
    check_tensor("x", x, 2, HALF_TYPES)
    rows, columns = x.shape
    check(columns % fmt.block == 0, f"columns={columns} is not a multiple of {fmt.block}")
    if global_scale is not None:
        check(global_scale.numel() == 1, f"global_scale has {global_scale.numel()} elements, expected 1")
    if not x.is_cuda:
        return oracle.quantize_nvfp4(x, fmt, global_scale)
    x = paired(x)
    blocks = columns // fmt.block
    swizzled = fmt.scales == "swizzled"
    values = torch.empty((rows, columns // 2), dtype=torch.uint8, device=x.device)
    shape = (swizzled_size(rows, blocks),) if swizzled else (rows, blocks)
    scales = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    source = amax(x) if global_scale is None else global_scale.to(torch.float32).reshape(1)
    grid_blocks = align(blocks, 4) if swizzled else blocks
    total = scales.numel()
    tuned = config("nvfp4_quantize", x.device)
    if total:
        _quantize_kernel[(triton.cdiv(total, tuned["BLOCKS"]),)](
            x.view(torch.int32),
            values,
            scales,
            source,
            rows,
            blocks,
            grid_blocks,
            total,
            x.stride(0) // 2,
            BF16=x.dtype == torch.bfloat16,
            FROM_AMAX=global_scale is None,
            SWIZZLED=swizzled,
            FLAT=x.is_contiguous() and not swizzled,
            **tuned,
        )
    if global_scale is None:
        source = _from_amax(source)
    return Quantized(values, scales, fmt, (rows, columns), source)


def dequantize_nvfp4(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """NVFP4 -> (rows, columns) bf16 or fp16: x = code * (scale / g), rounded to float32, then to `dtype`."""
    assert isinstance(q.format, Nvfp4)
    check(q.global_scale is not None, "an NVFP4 tensor needs its global scale")
    check(dtype in HALF_TYPES, f"dtype is {dtype}, expected one of {', '.join(map(str, HALF_TYPES))}")
    if not q.values.is_cuda:
        return oracle.dequantize_nvfp4(q, dtype)
    rows, columns = q.shape
    out = torch.empty((rows, columns), dtype=dtype, device=q.values.device)
    blocks = columns // q.format.block
    tuned = config("nvfp4_dequantize", out.device)
    if rows * blocks:
        _dequantize_kernel[(triton.cdiv(rows * blocks, tuned["BLOCKS"]),)](
            q.values,
            q.scales,
            q.global_scale,
            out.view(torch.int32),
            blocks,
            rows * blocks,
            BF16=dtype == torch.bfloat16,
            SWIZZLED=q.format.scales == "swizzled",
            **tuned,
        )
    return out
