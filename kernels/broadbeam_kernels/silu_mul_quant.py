"""SiLU(gate) * up, quantised to FP8 1x128: flat rows, or the rows of each expert that hold tokens.

Bound by memory: 4 bytes in and 1.03 out per value. One program takes some rows by some 128-value
groups; programs past an expert's count leave at once.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes
from .contracts import HALF_TYPES, check, check_indices, check_multiple, check_size, check_tensor, launches
from .formats import FP8_BLOCK128, Fp8Block, Quantized, empty_fp8_scales
from .overlap import begin, early
from .reference import silu_mul_quant as oracle
from .tuning import config

MOST_EXPERTS = 65535  # programs of a grid's third dimension


@triton.jit
def _kernel(
    y_ptr,
    count_ptr,
    codes_ptr,
    scales_ptr,
    hidden,
    groups,
    slots,  # rows per expert; the row count where flat
    y_expert,
    y_row,
    scale_expert,
    scale_row,
    scale_group,
    MASKED: tl.constexpr,
    POW2: tl.constexpr,
    BYTE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    # Some rows by some groups: few programs find nothing to do, and an expert with one row still spreads.
    first = tl.program_id(0) * ROWS
    expert = tl.program_id(2).to(tl.int64)
    count = slots
    if MASKED:
        count = tl.load(count_ptr + expert)
        if first >= count:
            return
    unit = tl.arange(0, ROWS * GROUPS)
    row = first + unit // GROUPS
    group = tl.program_id(1) * GROUPS + unit % GROUPS
    inside = (row < count) & (group < groups)
    mask = inside[:, None]
    column = (group * 128)[:, None] + tl.arange(0, 128)[None, :]
    source = y_ptr + expert * y_expert + (row.to(tl.int64) * y_row)[:, None] + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + hidden, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    scale, code = codes.fp8_blocks(value, POW2)
    tl.store(codes_ptr + ((expert * slots + row) * hidden)[:, None] + column, code, mask=mask)
    at = scales_ptr + expert * scale_expert + row.to(tl.int64) * scale_row + group * scale_group
    codes.store_fp8_scale(at, scale, inside, BYTE)


def _launch(y: Tensor, count: Tensor | None, values: Tensor, scales: Tensor, fmt: Fp8Block) -> None:
    experts, slots, doubled = y.shape
    hidden = doubled // 2
    tuned = config("silu_mul_quant", y.device)
    grid = (triton.cdiv(slots, tuned["ROWS"]), triton.cdiv(hidden // 128, tuned["GROUPS"]), experts)
    _kernel[grid](
        y,
        count if count is not None else y,
        values,
        scales,
        hidden,
        hidden // 128,
        slots,
        y.stride(0),
        y.stride(1),
        scales.stride(0),
        scales.stride(1),
        scales.stride(2),
        MASKED=count is not None,
        POW2=fmt.scale != "float32",
        BYTE=fmt.scale == "ue8m0",
        **early(y.device, math.prod(grid)),
        **tuned,
    )


def _check(y: Tensor, dims: int, fmt: Fp8Block) -> Tensor:
    check_tensor("y", y, dims, HALF_TYPES)
    check(fmt.rows == 1, f"fmt has {fmt.rows}x128 scales, expected 1x128")
    check_multiple("y's last dimension (gate | up)", y.shape[-1], 256)
    check_size(y.shape[:-1].numel(), y.shape[-1], 256)
    return y if y.stride(-1) == 1 else y.contiguous()


def silu_mul_quant(y: Tensor, fmt: Fp8Block = FP8_BLOCK128) -> Quantized:
    """y (rows, 2 * hidden) = gate | up, bf16 or fp16 -> e4m3 (rows, hidden) with 1x128 scales.

    value = gate * sigmoid(gate) * up, all in float32; then as `quantize_fp8_block`. hidden % 128 == 0.
    """
    y = _check(y, 2, fmt)
    rows, hidden = y.shape[0], y.shape[1] // 2
    if not launches(y, torch.float8_e4m3fn):
        return oracle.silu_mul_quant(y, fmt)
    values = torch.empty((rows, hidden), dtype=torch.float8_e4m3fn, device=y.device)
    scales = empty_fp8_scales(fmt, rows, hidden, y.device)
    if y.numel():
        _launch(y.unsqueeze(0), None, values, scales.unsqueeze(0), fmt)
    return Quantized(values, scales, fmt, (rows, hidden))


def silu_mul_quant_masked(y: Tensor, count: Tensor, fmt: Fp8Block = FP8_BLOCK128) -> tuple[Tensor, Tensor]:
    """y (experts, slots, 2 * hidden), count int32 (experts,) -> e4m3 (experts, slots, hidden) and its scales.

    Only rows below an expert's count (at most `slots`) are written. Scales are (experts, slots,
    hidden / 128), with strides (slots * groups, 1, slots): column-major inside an expert, as the masked
    grouped GEMM reads them. fmt.layout is not asked: this form has one.
    Layout: vLLM `persistent_masked_m_silu_mul_quant`; arithmetic: float32 throughout (vLLM's CUDA kernel
    keeps 8 bits of the scale's mantissa).
    """
    y = _check(y, 3, fmt)
    experts, slots, doubled = y.shape
    check(experts <= MOST_EXPERTS, f"y has {experts} experts, at most {MOST_EXPERTS}")
    check_indices("count", count, y, (experts,), 0, slots)
    hidden = doubled // 2
    values = torch.empty((experts, slots, hidden), dtype=torch.float8_e4m3fn, device=y.device)
    dtype = torch.uint8 if fmt.scale == "ue8m0" else torch.float32
    scales = torch.empty((experts, hidden // 128, slots), dtype=dtype, device=y.device).transpose(1, 2)
    if not launches(y, torch.float8_e4m3fn):
        return oracle.silu_mul_quant_masked(y, count, values, scales, fmt)
    if y.numel():
        _launch(y, count, values, scales, fmt)
    return values, scales
