"""Pad + quant: zero columns appended up to a kernel-friendly width and the whole row quantised, one launch.

Bound by memory: the padded copy of the input that two launches would write and read again never exists.
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
from .formats import FP8_BLOCK128, Fp8Block, Mxfp4, Quantized, empty_fp8_scales
from .mxfp4 import mxfp4_exponent
from .reference import layout as oracle
from .tuning import config


@triton.jit
def _fp8_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    columns,
    groups,
    total,
    x_row,
    scale_row,
    scale_group,
    POW2: tl.constexpr,
    BYTE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = index < total
    row32 = index // groups
    group = index - row32 * groups
    row = row32.to(tl.int64)
    column = (group * 128)[:, None] + tl.arange(0, 128)[None, :]
    mask = inside[:, None] & (column < columns)
    x = tl.load(x_ptr + (row * x_row)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    scale = codes.fp8_scale(tl.max(tl.abs(x), axis=1), POW2)
    code = codes.e4m3(codes.divide(x, scale[:, None], tl.div_rn(1.0, scale)[:, None]))
    at = index.to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(codes_ptr + at, code, mask=inside[:, None])
    where = scales_ptr + row * scale_row + group * scale_group
    if BYTE:
        tl.store(where, (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=inside)
    else:
        tl.store(where, scale, mask=inside)


@triton.jit
def _mxfp4_kernel(
    x_ptr,  # int32 view: pairs of 16-bit values
    codes_ptr,
    scales_ptr,
    words,  # columns / 2 of the input
    blocks,  # 32-value blocks of the padded row
    total,
    row_words,
    BF16: tl.constexpr,
    GROUPS: tl.constexpr,
):
    index = tl.program_id(0) * (GROUPS * 4) + tl.arange(0, GROUPS * 4)
    inside = index < total
    row = index // blocks
    word = ((index - row * blocks) * 16)[:, None] + tl.arange(0, 16)[None, :]
    mask = inside[:, None] & (word < words)
    low, high = codes.unpack_pair(
        tl.load(x_ptr + (row.to(tl.int64) * row_words)[:, None] + word, mask=mask, other=0), BF16
    )
    exponent = mxfp4_exponent(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1))
    bits = tl.where(exponent == 254, 1 << 22, (254 - exponent) << 23)
    factor = bits.to(tl.float32, bitcast=True)[:, None]
    packed = codes.e2m1_pack(low * factor, high * factor)
    tl.store(
        codes_ptr + index.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :], packed, mask=inside[:, None]
    )
    tl.store(scales_ptr + index, exponent.to(tl.uint8), mask=inside)


def pad_quant(x: Tensor, columns: int, fmt: Fp8Block | Mxfp4 = FP8_BLOCK128) -> Quantized:
    """x (rows, n) bf16 or fp16 -> (rows, columns >= n) in `fmt`, the added columns zero.

    columns is a multiple of 128; n is even for MXFP4. fmt: FP8 with 1x128 scales, or MXFP4 with linear ones.
    gpt-oss needs it: hidden 2880 becomes 3072.
    """
    check_tensor("x", x, 2, HALF_TYPES)
    _rows, n = x.shape
    check(columns >= n, f"columns={columns} is less than x's {n}")
    check(columns % 128 == 0, f"columns={columns} is not a multiple of 128")
    if isinstance(fmt, Fp8Block):
        check(fmt.rows == 1, "fmt must have one scale per row (rows=1)")
    else:
        check(fmt.scales == "linear", "fmt must have linear scales")
        check(n % 2 == 0, f"x has {n} columns: MXFP4 needs an even number")
    if not x.is_cuda:
        return oracle.pad_quant(x, columns, fmt)
    if isinstance(fmt, Fp8Block):
        return _pad_fp8(x, columns, fmt)
    return _pad_mxfp4(x, columns, fmt)


def _pad_fp8(x: Tensor, columns: int, fmt: Fp8Block) -> Quantized:
    x = x if x.stride(1) == 1 or x.numel() == 0 else x.contiguous()
    rows, n = x.shape
    values = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = empty_fp8_scales(fmt, rows, columns, x.device)
    groups = columns // 128
    tuned = config("pad_quant", x.device)
    if values.numel():
        _fp8_kernel[(triton.cdiv(rows * groups, tuned["GROUPS"]),)](
            x,
            values,
            scales,
            n,
            groups,
            rows * groups,
            x.stride(0),
            scales.stride(0),
            scales.stride(1),
            POW2=fmt.scale != "float32",
            BYTE=fmt.scale == "ue8m0",
            **tuned,
        )
    return Quantized(values, scales, fmt, (rows, columns))


def _pad_mxfp4(x: Tensor, columns: int, fmt: Mxfp4) -> Quantized:
    x = paired(x)
    rows, n = x.shape
    blocks = columns // fmt.block
    values = torch.empty((rows, columns // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, blocks), dtype=torch.uint8, device=x.device)
    tuned = config("pad_quant", x.device)
    if values.numel():
        _mxfp4_kernel[(triton.cdiv(rows * blocks, tuned["GROUPS"] * 4),)](
            x.view(torch.int32),
            values,
            scales,
            n // 2,
            blocks,
            rows * blocks,
            x.stride(0) // 2,
            BF16=x.dtype == torch.bfloat16,
            **tuned,
        )
    return Quantized(values, scales, fmt, (rows, columns))
