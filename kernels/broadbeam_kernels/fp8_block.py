"""FP8 blocks: quantise to and from e4m3 codes with one scale for 1x128 or 128x128 values.

Bound by memory: 2 bytes in and 1.03 out per value (1x128), 1.0002 (128x128).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes
from .contracts import HALF_TYPES, check_quantized, check_size, check_tensor, check_type, launches
from .formats import FP8_BLOCK128, Fp8Block, Quantized, empty_fp8_scales
from .overlap import begin, early
from .reference import quantize as oracle
from .tuning import config


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    columns,  # of x; beyond them, up to `padded`, the row is zero
    padded,
    total,
    x_row,
    scale_row,
    scale_group,
    POW2: tl.constexpr,
    BYTE: tl.constexpr,
    READ_WHOLE: tl.constexpr,  # columns fill every group
    WRITE_WHOLE: tl.constexpr,  # padded columns do
    GROUPS_ROW: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = index < total
    row32 = index // GROUPS_ROW
    group = index - row32 * GROUPS_ROW
    row = row32.to(tl.int64)
    column = (group * 128)[:, None] + tl.arange(0, 128)[None, :]
    read = inside[:, None] if READ_WHOLE else inside[:, None] & (column < columns)
    write = inside[:, None] if WRITE_WHOLE else inside[:, None] & (column < padded)
    x = tl.load(x_ptr + (row * x_row)[:, None] + column, mask=read, other=0.0).to(tl.float32)
    scale, code = codes.fp8_blocks(x, POW2)
    tl.store(codes_ptr + (row * padded)[:, None] + column, code, mask=write)
    codes.store_fp8_scale(scales_ptr + row * scale_row + group * scale_group, scale, inside, BYTE)


@triton.jit
def _quantize_tiles_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    columns,
    x_row,
    groups,
    POW2: tl.constexpr,
    BYTE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    tile_row = tl.program_id(0) // groups
    tile_column = tl.program_id(0) % groups
    row = tile_row * 128 + tl.arange(0, 128)
    column = tile_column * 128 + tl.arange(0, 128)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * x_row + column[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = codes.fp8_scale(tl.max(tl.max(tl.abs(x), axis=1), axis=0), POW2)
    code = codes.e4m3(codes.divide(x, scale, codes.reciprocal(scale)))
    tl.store(codes_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], code, mask=mask)
    codes.store_fp8_scale(scales_ptr + tl.program_id(0), scale, True, BYTE)


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,
    columns,
    groups,
    total,
    scale_row,
    scale_group,
    TILED: tl.constexpr,
    BYTE: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    index = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = index < total
    row32 = index // groups
    group = index - row32 * groups
    row = row32.to(tl.int64)
    column = (group * 128)[:, None] + tl.arange(0, 128)[None, :]
    mask = inside[:, None] if WHOLE else inside[:, None] & (column < columns)
    at = (row * columns)[:, None] + column
    code = tl.load(codes_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale_at = (row // 128 if TILED else row) * scale_row + group * scale_group
    if BYTE:
        exponent = tl.load(scales_ptr + scale_at, mask=inside, other=0).to(tl.int32)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(scales_ptr + scale_at, mask=inside, other=0.0)
    tl.store(out_ptr + at, (code * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def quantize_rows(x: Tensor, columns: int, fmt: Fp8Block) -> Quantized:
    """x (rows, n) bf16 or fp16, followed by zero columns up to `columns`, with 1x128 scales; one launch."""
    x = x if x.stride(1) == 1 or x.numel() == 0 else x.contiguous()
    rows, n = x.shape
    values = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = empty_fp8_scales(fmt, rows, columns, x.device)
    groups = triton.cdiv(columns, 128)
    tuned = config("fp8_quantize_rows", x.device)
    programs = triton.cdiv(rows * groups, tuned["GROUPS"])
    if programs:
        _quantize_rows_kernel[(programs,)](
            x,
            values,
            scales,
            n,
            columns,
            rows * groups,
            x.stride(0),
            scales.stride(0),
            scales.stride(1),
            POW2=fmt.scale != "float32",
            BYTE=fmt.scale == "ue8m0",
            READ_WHOLE=n == columns and columns % 128 == 0,
            WRITE_WHOLE=columns % 128 == 0,
            GROUPS_ROW=groups,
            **early(x.device, programs),
            **tuned,
        )
    return Quantized(values, scales, fmt, (rows, columns))


def _quantize_tiles(x: Tensor, fmt: Fp8Block) -> Quantized:
    x = x if x.stride(1) == 1 or x.numel() == 0 else x.contiguous()
    rows, columns = x.shape
    values = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = empty_fp8_scales(fmt, rows, columns, x.device)
    groups = triton.cdiv(columns, 128)
    programs = triton.cdiv(rows, 128) * groups
    if programs:
        _quantize_tiles_kernel[(programs,)](
            x,
            values,
            scales,
            rows,
            columns,
            x.stride(0),
            groups,
            POW2=fmt.scale != "float32",
            BYTE=fmt.scale == "ue8m0",
            **early(x.device, programs),
            **config("fp8_quantize_tiles", x.device),
        )
    return Quantized(values, scales, fmt, (rows, columns))


def quantize_fp8_block(x: Tensor, fmt: Fp8Block = FP8_BLOCK128) -> Quantized:
    """(rows, columns) bf16 or fp16 -> e4m3 with block scales; a last partial block is quantised by itself.

    scale = max(amax, 1e-10) * (1/448), rounded up to a power of two unless fmt.scale is `float32`;
    code = e4m3(x / scale). Sources: vLLM `fp8_utils.py` (1/448 as a factor), DeepGEMM `utils/math.py` (pow2).
    """
    check_tensor("x", x, 2, HALF_TYPES)
    check_size(x.shape[0], x.shape[1], fmt.block)
    if not launches(x, torch.float8_e4m3fn):
        return oracle.quantize_fp8_block(x, fmt)
    return _quantize_tiles(x, fmt) if fmt.rows == 128 else quantize_rows(x, x.shape[1], fmt)


def dequantize_fp8_block(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """e4m3 with block scales -> (rows, columns) bf16 or fp16: x = code * scale."""
    check_quantized("q", q, Fp8Block)
    assert isinstance(q.format, Fp8Block)
    check_type("dtype", dtype, HALF_TYPES)
    if not launches(q.values, torch.float8_e4m3fn):
        return oracle.dequantize_fp8_block(q, dtype)
    rows, columns = q.shape
    out = torch.empty((rows, columns), dtype=dtype, device=q.values.device)
    groups = triton.cdiv(columns, 128)
    tuned = config("fp8_dequantize", out.device)
    programs = triton.cdiv(rows * groups, tuned["GROUPS"])
    if programs:
        _dequantize_kernel[(programs,)](
            q.values.contiguous(),
            q.scales,
            out,
            columns,
            groups,
            rows * groups,
            q.scales.stride(0),
            q.scales.stride(1),
            TILED=q.format.rows == 128,
            BYTE=q.format.scale == "ue8m0",
            WHOLE=columns % 128 == 0,
            **early(out.device, programs),
            **tuned,
        )
    return out
