"""Finalize + slice: gather a token's expert outputs, weigh, sum, drop the padded columns, in one launch.

Bound by memory: top-k * 2 bytes in and 2 out per value.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contracts import HALF_TYPES, WIDEST, check, check_range, check_shape, check_tensor, launches
from .overlap import begin, early
from .reference import layout as oracle
from .tuning import config


@triton.jit
def _kernel(
    y_ptr,
    rows_ptr,
    weights_ptr,
    out_ptr,
    columns,
    y_row,
    TOPK: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(TOPK):
        row = tl.load(rows_ptr + token * TOPK + j).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOPK + j).to(tl.float32)
        value = tl.load(y_ptr + row * y_row + column, mask=mask & (row >= 0), other=0.0).to(tl.float32)
        total += value * weight
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def finalize(y: Tensor, rows: Tensor, weights: Tensor, columns: int | None = None) -> Tensor:
    """y (slots, padded) bf16 or fp16; rows int32 (tokens, k), -1 for none; weights float32 (or y's kinds).

    Returns (tokens, columns) in y's type, columns <= padded (all of them where not said).
    out[t] = sum over j of weights[t, j] * y[rows[t, j], :columns], summed in float32 in the order of j.
    """
    check_tensor("y", y, 2, HALF_TYPES)
    check_tensor("rows", rows, 2, (torch.int32,), like=y)
    check_tensor("weights", weights, 2, (torch.float32, *HALF_TYPES), like=y)
    check_shape("weights", weights, tuple(rows.shape))
    columns = y.shape[1] if columns is None else columns
    check(0 <= columns <= y.shape[1], f"columns={columns} is not within y's {y.shape[1]}")
    check(columns <= WIDEST // 16, f"columns={columns}, expected at most {WIDEST // 16}")
    check_range("rows", rows, -1, y.shape[0] - 1)
    if not launches(y):
        return oracle.finalize(y, rows, weights, columns)
    tokens, topk = rows.shape
    out = torch.empty((tokens, columns), dtype=y.dtype, device=y.device)
    if out.numel():
        y = y if y.stride(1) == 1 else y.contiguous()
        tuned = config("finalize", y.device)
        grid = (tokens, triton.cdiv(columns, tuned["COLUMNS"]))
        operands = (y, rows.contiguous(), weights.contiguous(), out)
        _kernel[grid](*operands, columns, y.stride(0), TOPK=topk, **early(y.device, math.prod(grid)), **tuned)
    return out
