"""Oracles of the matrix products: operands decoded exactly, sums in float32 (float64 on request)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fp4_weights import Fp4Weights, decode_fp4_weights
from ..packed_weights import PackedWeights


def decode_rows(a: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """e4m3 (..., k) with 1x128 scales (..., k / 128) -> `dtype`."""
    groups: Tensor = a.to(dtype).unflatten(-1, (-1, 128)) * scales.to(dtype).unsqueeze(-1)
    return groups.flatten(-2)


def decode_tiles(b: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """e4m3 (n, k) with 128x128 scales -> `dtype`."""
    spread = scales.to(dtype).repeat_interleave(128, 0)[: b.shape[0]].repeat_interleave(128, 1)
    return b.to(dtype) * spread[:, : b.shape[1]]


def fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    experts: Tensor | None,
    block: int,
    out: Tensor,
) -> Tensor:
    """Dense (`experts` None: weights of expert 0) or contiguous grouped product, written to `out`."""
    if experts is None:
        return out.copy_(decode_rows(a, a_scales) @ decode_tiles(b[0], b_scales[0]).T)
    for i, expert in enumerate(experts.tolist()):
        if expert >= 0:
            rows = slice(i * block, (i + 1) * block)
            weights = decode_tiles(b[expert], b_scales[expert])
            out[rows] = (decode_rows(a[rows], a_scales[rows]) @ weights.T).to(out.dtype)
    return out


def masked_fp8_gemm(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, count: Tensor, out: Tensor
) -> Tensor:
    """Writes the rows in use of each expert to `out` (experts, slots, n)."""
    for e, rows in enumerate(count.tolist()):
        weights = decode_tiles(b[e], b_scales[e])
        out[e, :rows] = (decode_rows(a[e, :rows], a_scales[e, :rows]) @ weights.T).to(out.dtype)
    return out


def grouped_gemm(a: Tensor, b: Tensor, experts: Tensor, block: int, out: Tensor) -> Tensor:
    """Contiguous grouped product in float32, written to `out`."""
    for i, expert in enumerate(experts.tolist()):
        if expert >= 0:
            rows = slice(i * block, (i + 1) * block)
            out[rows] = (a[rows].float() @ b[expert].float().T).to(out.dtype)
    return out


def fp4_gemm(
    x: Tensor, w: Fp4Weights | PackedWeights, experts: Tensor | None, block: int, out: Tensor
) -> Tensor:
    """x times FP4 weights decoded from their tiles, plain (`experts` None) or grouped, written to `out`."""
    if experts is None:
        return out.copy_(x.float() @ decode_fp4_weights(w, 0).T)
    for i, expert in enumerate(experts.tolist()):
        if expert >= 0:
            rows = slice(i * block, (i + 1) * block)
            out[rows] = (x[rows].float() @ decode_fp4_weights(w, expert).T).to(out.dtype)
    return out
