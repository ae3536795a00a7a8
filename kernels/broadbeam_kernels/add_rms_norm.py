"""Residual add + RMSNorm, with FP8 1x128 codes instead of the normalised row where asked: one launch.

Bound by memory: 4 bytes in and 4 (3.03 with FP8 codes) out per value. One program holds one row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes
from .contracts import HALF_TYPES, check, check_rows, check_shape, check_tensor, launches
from .formats import Fp8Block, Quantized, empty_fp8_scales
from .overlap import begin, early
from .reference import norm as oracle
from .tuning import config


@triton.jit
def _kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scales_ptr,
    columns,
    epsilon,
    x_row,
    residual_row,
    scale_row,
    scale_group,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
    POW2: tl.constexpr,
    BYTE: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two >= columns / 128
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = column < columns
    x = tl.load(x_ptr + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        at = residual_ptr + row * residual_row + column
        x += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / columns
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.math.rsqrt(mean + epsilon) * weight
    if QUANTIZE:
        scale, y = codes.fp8_blocks(y, POW2)
        inside = group * 128 < columns
        codes.store_fp8_scale(scales_ptr + row * scale_row + group * scale_group, scale, inside, BYTE)
    tl.store(out_ptr + row * columns + column, y.to(out_ptr.dtype.element_ty), mask=mask)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    epsilon: float = 1e-6,
    fmt: Fp8Block | None = None,
) -> Tensor | Quantized:
    """x (rows, columns) -> norm(x + residual) * weight in x's type, or as e4m3 codes in `fmt`.

    `residual` (same shape and type) is updated in place with the sum, rounded to its type; the norm is taken
    of the rounded sum, so that residual and norm agree. y = z / sqrt(mean(z^2) + epsilon) * weight, in
    float32. columns <= 16384. Formula: RMSNorm as Llama and DeepSeek use it.
    """
    check_tensor("x", x, 2, HALF_TYPES)
    rows, columns = x.shape
    check_tensor("weight", weight, 1, (*HALF_TYPES, torch.float32), like=x)
    check_shape("weight", weight, (columns,))
    check(0 < columns <= 16384, f"columns={columns} is not within 1..16384")
    check(epsilon >= 0, f"epsilon={epsilon}, expected at least 0")
    if fmt is not None:
        check(fmt.rows == 1, f"fmt has {fmt.rows}x128 scales, expected 1x128")
    if residual is not None:
        check_tensor("residual", residual, 2, (x.dtype,), like=x)
        check_shape("residual", residual, (rows, columns))
        check_rows("residual", residual, residual.element_size())  # updated in place
    dtype = x.dtype if fmt is None else torch.float8_e4m3fn
    if not launches(x, dtype):
        return oracle.add_rms_norm(x, residual, weight, epsilon, fmt)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((rows, columns), dtype=dtype, device=x.device)
    scales = out if fmt is None else empty_fp8_scales(fmt, rows, columns, x.device)
    if rows:
        _kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight.contiguous(),
            out,
            scales,
            columns,
            epsilon,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            scales.stride(0),
            scales.stride(1),
            ADD=residual is not None,
            QUANTIZE=fmt is not None,
            POW2=fmt is not None and fmt.scale != "float32",
            BYTE=fmt is not None and fmt.scale == "ue8m0",
            GROUPS=triton.next_power_of_2(triton.cdiv(columns, 128)),
            **early(x.device, rows),
            **config("add_rms_norm", x.device, columns=columns),
        )
    return out if fmt is None else Quantized(out, scales, fmt, (rows, columns))
