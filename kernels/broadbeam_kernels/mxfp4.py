"""MXFP4: quantise to and from e2m1 codes with a power-of-two scale for 32 values.

Bound by memory: 2 bytes in and 0.53 out per value.
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
from .formats import MXFP4, Mxfp4, Quantized, align, swizzled_size
from .reference import quantize as oracle
from .tuning import config


@triton.jit
def mxfp4_exponent(amax):
    """Biased E8M0 exponent: amax rounded to a power of two, mantissas from 1.75 up, less e2m1's own 2."""
    rounded = amax.to(tl.int32, bitcast=True) + (1 << 21)
    exponent = ((rounded >> 23) & 0xFF) - 2
    return tl.minimum(tl.maximum(exponent, 0), 254)


@triton.jit
def _quantize_kernel(
    x_ptr,  # int32 view: pairs of 16-bit values
    codes_ptr,
    scales_ptr,
    rows,
    blocks,
    grid_blocks,
    total,
    row_words,
    BF16: tl.constexpr,
    SWIZZLED: tl.constexpr,
    FLAT: tl.constexpr,  # dense rows and linear scales: a block's number is its place
    BLOCKS: tl.constexpr,
):
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = index < total
    word = tl.arange(0, 16)
    if FLAT:
        place = index
        at = index.to(tl.int64) * 16
    else:
        row = index // grid_blocks
        block = index - row * grid_blocks
        inside = inside & (row < rows) & (block < blocks)
        place = row * blocks + block
        at = row.to(tl.int64) * row_words + block * 16
    words = tl.load(x_ptr + at[:, None] + word[None, :], mask=inside[:, None], other=0)
    low, high = codes.unpack_pair(words, BF16)
    exponent = mxfp4_exponent(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1))
    # 2^(127 - exponent): exponent 254 needs 2^-127, a denormal, whose bits are 1 << 22.
    bits = tl.where(exponent == 254, 1 << 22, (254 - exponent) << 23)
    factor = bits.to(tl.float32, bitcast=True)[:, None]
    packed = codes.e2m1_pack(low * factor, high * factor)
    out = place.to(tl.int64)[:, None] * 16 + word[None, :]
    tl.store(codes_ptr + out, packed, mask=inside[:, None])
    if SWIZZLED:
        offset = codes.swizzled_offset(row, block, grid_blocks // 4)
        tl.store(scales_ptr + offset, tl.where(inside, exponent, 0).to(tl.uint8), mask=index < total)
    else:
        tl.store(scales_ptr + place, exponent.to(tl.uint8), mask=inside)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,  # int32 view: pairs of 16-bit values
    blocks,
    total,
    BF16: tl.constexpr,
    SWIZZLED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = index < total
    at = index.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :]
    code = tl.load(codes_ptr + at, mask=inside[:, None], other=0).to(tl.int32)
    scale_at = index
    if SWIZZLED:
        row = index // blocks
        scale_at = codes.swizzled_offset(row, (index - row * blocks), (blocks + 3) // 4)
    exponent = tl.load(scales_ptr + scale_at, mask=inside, other=0).to(tl.int32)
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)  # 2^-127 is a denormal
    scale = bits.to(tl.float32, bitcast=True)[:, None]
    low = codes.e2m1_value(code) * scale
    high = codes.e2m1_value(code >> 4) * scale
    tl.store(out_ptr + at, codes.pack_pair(low, high, BF16), mask=inside[:, None])


def quantize_mxfp4(x: Tensor, fmt: Mxfp4 = MXFP4) -> Quantized:
    """(rows, columns) bf16 or fp16 -> MXFP4; columns a multiple of 32.

    scale = 2^e with e the exponent of the block's amax (mantissas of 1.75 and more round up) minus 2;
    code = e2m1(x / scale), nearest, ties to even. Source: vLLM `nvfp4_emulation_utils.py`, UE8M0.
    """
    check_tensor("x", x, 2, HALF_TYPES)
    rows, columns = x.shape
    check(columns % fmt.block == 0, f"columns={columns} is not a multiple of {fmt.block}")
    if not x.is_cuda:
        return oracle.quantize_mxfp4(x, fmt)
    x = paired(x)
    blocks = columns // fmt.block
    swizzled = fmt.scales == "swizzled"
    values = torch.empty((rows, columns // 2), dtype=torch.uint8, device=x.device)
    shape = (swizzled_size(rows, blocks),) if swizzled else (rows, blocks)
    scales = torch.empty(shape, dtype=torch.uint8, device=x.device)
    total = scales.numel()
    tuned = config("mxfp4_quantize", x.device)
    if total:
        _quantize_kernel[(triton.cdiv(total, tuned["BLOCKS"]),)](
            x.view(torch.int32),
            values,
            scales,
            rows,
            blocks,
            align(blocks, 4) if swizzled else blocks,
            total,
            x.stride(0) // 2,
            BF16=x.dtype == torch.bfloat16,
            SWIZZLED=swizzled,
            FLAT=x.is_contiguous() and not swizzled,
            **tuned,
        )
    return Quantized(values, scales, fmt, (rows, columns))


def dequantize_mxfp4(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """MXFP4 -> (rows, columns) bf16 or fp16: x = code * 2^(b - 127), exact in float32."""
    assert isinstance(q.format, Mxfp4)
    check(dtype in HALF_TYPES, f"dtype is {dtype}, expected one of {', '.join(map(str, HALF_TYPES))}")
    if not q.values.is_cuda:
        return oracle.dequantize_mxfp4(q, dtype)
    rows, columns = q.shape
    out = torch.empty((rows, columns), dtype=dtype, device=q.values.device)
    blocks = columns // q.format.block
    tuned = config("mxfp4_dequantize", out.device)
    if rows * blocks:
        _dequantize_kernel[(triton.cdiv(rows * blocks, tuned["BLOCKS"]),)](
            q.values,
            q.scales,
            out.view(torch.int32),
            blocks,
            rows * blocks,
            BF16=dtype == torch.bfloat16,
            SWIZZLED=q.format.scales == "swizzled",
            **tuned,
        )
    return out
