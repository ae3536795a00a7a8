"""FP8 block GEMM, dense and grouped: 1x128-scaled activations by 128x128-scaled weights.

Up to 128 rows the weights' bytes bound it, above the tensor cores do: `fp8_products` chooses. Grouped
forms: `contiguous` (each expert's rows stand together, padded to a block) and `masked` (a fixed number of
slots per expert, a count of them in use).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fp8_products
from .contracts import (
    block_rows,
    check,
    check_dense,
    check_indices,
    check_multiple,
    check_quantized,
    check_rows,
    check_shape,
    check_tensor,
    check_type,
)
from .formats import Fp8Block, Quantized
from .paths import runs_kernels
from .reference import gemm as oracle

E4M3 = (torch.float8_e4m3fn,)
OUT_TYPES = (torch.bfloat16, torch.float16)


def _check_activations(a: Tensor, a_scales: Tensor) -> None:
    """a (..., k) and a_scales (..., k / 128): a matrix, or one of each expert."""
    check_type("a", a.dtype, E4M3)
    *outer, k = a.shape
    check_multiple("k", k, 128, least=128)
    check_tensor("a_scales", a_scales, a.dim(), (torch.float32,), like=a)
    check_shape("a_scales", a_scales, (*outer, k // 128))


def _check_weights(b: Tensor, b_scales: Tensor, a: Tensor) -> None:
    """b (experts, n, k) and b_scales (experts, ceil(n / 128), k / 128), contiguous."""
    check_tensor("b", b, 3, E4M3, like=a)
    check_tensor("b_scales", b_scales, 3, (torch.float32,), like=a)
    experts, n, k = b.shape
    check(k == a.shape[-1], f"b has k={k}, a has k={a.shape[-1]}")
    check_multiple("n", n, 8)
    check_shape("b_scales", b_scales, (experts, -(-n // 128), k // 128))
    check_dense("b", b)
    check_dense("b_scales", b_scales, 1)


def _output(shape: tuple[int, ...], a: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    if out is None:
        check_type("dtype", dtype, OUT_TYPES)
        return torch.empty(shape, dtype=dtype, device=a.device)
    check_tensor("out", out, len(shape), OUT_TYPES, like=a)
    check_shape("out", out, shape)
    return out


def fp8_gemm(
    a: Quantized, b: Quantized, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a (rows, k) in FP8 1x128 @ b (n, k) in FP8 128x128, transposed -> (rows, n) bf16 or fp16.

    k a multiple of 128, n of 8; scales float32 (`float32` or `pow2`), a's in either layout. Products of 128
    values of k are summed by the tensor core and added in float32 after scaling, as DeepGEMM does.
    """
    for name, q, rows in (("a", a, 1), ("b", b, 128)):
        check_quantized(name, q, Fp8Block)
        assert isinstance(q.format, Fp8Block)
        check(q.format.rows == rows, f"{name} has {q.format.rows}x128 scales, expected {rows}x128")
    weights, weight_scales = b.values.unsqueeze(0), b.scales.unsqueeze(0)
    _check_activations(a.values, a.scales)
    check_rows("a", a.values)
    _check_weights(weights, weight_scales, a.values)
    out = _output((a.shape[0], b.shape[0]), a.values, out, dtype)
    check_rows("out", out)
    if not runs_kernels(out):
        return oracle.fp8_gemm(a.values, a.scales, weights, weight_scales, None, 0, out)
    if not out.numel():
        return out
    pow2 = all(isinstance(q.format, Fp8Block) and q.format.scale == "pow2" for q in (a, b))
    fp8_products.launch(a.values, b.values, out, a_scales=a.scales, b_scales=b.scales, pow2=pow2)
    return out


def grouped_fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    experts: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Contiguous grouped GEMM: rows of a (rows, k), block by block, times their expert's weights.

    experts int32 (rows / block): the expert of each block of 128 or 256 rows, -1 for a block to skip (its
    output is not written). b (experts, n, k), b_scales (experts, n / 128, k / 128), a_scales float32
    (rows, k / 128) in either layout. Contract of DeepGEMM's `m_grouped_fp8_gemm_nt_contiguous`, with one
    index per block instead of per row.
    """
    check_tensor("a", a, 2, E4M3)
    _check_activations(a, a_scales)
    check_rows("a", a)
    _check_weights(b, b_scales, a)
    check_indices("experts", experts, a, None, -1, b.shape[0] - 1)
    block = block_rows(a.shape[0], experts, (128, 256))
    out = _output((a.shape[0], b.shape[1]), a, out, dtype)
    check_rows("out", out)
    if not runs_kernels(out):
        return oracle.fp8_gemm(a, a_scales, b, b_scales, experts, block, out)
    if out.numel() and b.numel():
        fp8_products.launch(
            a,
            b.flatten(0, 1),
            out,
            a_scales=a_scales,
            b_scales=b_scales,
            grouping="contiguous",
            groups=experts,
            block_rows=block,
        )
    return out


def masked_fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    count: Tensor,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Masked grouped GEMM: a (experts, slots, k), of which count[e] rows are in use -> (experts, slots, n).

    slots a multiple of 128; a_scales float32 (experts, slots, k / 128) in any strides, column-major inside an
    expert being the fastest; out contiguous, its rows past an expert's count hold anything. Contract of
    DeepGEMM's `m_grouped_fp8_gemm_nt_masked`.
    """
    check_tensor("a", a, 3, E4M3)
    experts, slots, _ = a.shape
    check_multiple("slots", slots, 128)
    _check_activations(a, a_scales)
    check_dense("a", a)
    _check_weights(b, b_scales, a)
    check(b.shape[0] == experts, f"b has {b.shape[0]} experts, a has {experts}")
    check_indices("count", count, a, (experts,), 0, slots)
    out = _output((experts, slots, b.shape[1]), a, out, dtype)
    check_dense("out", out)
    if not runs_kernels(out):
        return oracle.masked_fp8_gemm(a, a_scales, b, b_scales, count, out)
    if out.numel():
        fp8_products.launch(
            a.flatten(0, 1),
            b.flatten(0, 1),
            out.flatten(0, 1),
            a_scales=a_scales,
            b_scales=b_scales,
            grouping="masked",
            groups=count,
            slots=slots,
        )
    return out
