"""FP8 block GEMM, dense and grouped: 1x128-scaled activations by 128x128-scaled weights.

Up to 128 rows the weights' bytes bound it, above the tensor cores do: `fp8_products` chooses. Grouped
forms: `contiguous` (each expert's rows stand together, padded to a block) and `masked` (a fixed number of
slots per expert, a count of them in use).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fp8_products
from .contracts import check, check_shape, check_tensor
from .formats import Fp8Block, Quantized
from .reference import gemm as oracle

E4M3 = (torch.float8_e4m3fn,)
OUT_TYPES = (torch.bfloat16, torch.float16)


def _check_activations(a: Tensor, a_scales: Tensor) -> None:
    check_tensor("a", a, 2, E4M3)
    rows, k = a.shape
    check(k % 128 == 0, f"k={k} is not a multiple of 128")
    check_tensor("a_scales", a_scales, 2, (torch.float32,), like=a)
    check_shape("a_scales", a_scales, (rows, k // 128))
    check(a.stride(1) == 1 and a.stride(0) % 16 == 0, "a's rows must be dense and 16-byte aligned")


def _check_weights(b: Tensor, b_scales: Tensor, a: Tensor) -> None:
    """b (experts, n, k) and b_scales (experts, ceil(n / 128), k / 128), contiguous."""
    check_tensor("b", b, 3, E4M3, like=a)
    check_tensor("b_scales", b_scales, 3, (torch.float32,), like=a)
    experts, n, k = b.shape
    check(k == a.shape[-1], f"b has k={k}, a has k={a.shape[-1]}")
    check_shape("b_scales", b_scales, (experts, -(-n // 128), k // 128))
    check(b.is_contiguous() and b_scales.is_contiguous(), "b and b_scales must be contiguous")


def _output(rows: int, n: int, a: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    if out is None:
        return torch.empty((rows, n), dtype=dtype, device=a.device)
    check_tensor("out", out, 2, OUT_TYPES, like=a)
    check_shape("out", out, (rows, n))
    check(out.stride(1) == 1 and out.stride(0) % 8 == 0, "out's rows must be dense and 16-byte aligned")
    return out


def fp8_gemm(
    a: Quantized, b: Quantized, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a (rows, k) in FP8 1x128 @ b (n, k) in FP8 128x128, transposed -> (rows, n) bf16 or fp16.

    k a multiple of 128, n of 8; scales float32 (`float32` or `pow2`), a's in either layout. Products of 128
    values of k are summed by the tensor core and added in float32 after scaling, as DeepGEMM does.
    """
    for name, q, rows in (("a", a, 1), ("b", b, 128)):
        fmt = q.format
        check(isinstance(fmt, Fp8Block), f"{name} is in {fmt}, expected FP8 blocks")
        assert isinstance(fmt, Fp8Block)
        check(fmt.rows == rows, f"{name} has {fmt.rows}x128 scales, expected {rows}x128")
    weights, weight_scales = b.values.unsqueeze(0), b.scales.unsqueeze(0)
    _check_activations(a.values, a.scales)
    _check_weights(weights, weight_scales, a.values)
    rows, n = a.shape[0], b.shape[0]
    check(n % 8 == 0, f"n={n} is not a multiple of 8")
    out = _output(rows, n, a.values, out, dtype)
    if not out.is_cuda:
        return oracle.fp8_gemm(a.values, a.scales, weights, weight_scales, None, 0, out)
    if not rows or not n:
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
    _check_activations(a, a_scales)
    _check_weights(b, b_scales, a)
    rows, n = a.shape[0], b.shape[1]
    check(n % 8 == 0, f"n={n} is not a multiple of 8")
    check_tensor("experts", experts, 1, (torch.int32,), like=a)
    block = rows // max(experts.numel(), 1)
    check(rows == block * experts.numel(), f"{experts.numel()} blocks do not divide {rows} rows")
    check(not rows or block in (128, 256), f"blocks of {block} rows, expected 128 or 256")
    out = _output(rows, n, a, out, dtype)
    if not out.is_cuda:
        return oracle.fp8_gemm(a, a_scales, b, b_scales, experts, block, out)
    if rows:
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

    slots a multiple of 128; a_scales float32 (experts, slots, k / 128) with expert stride
    slots * k / 128, row-major or column-major inside an expert; output rows past an expert's count hold
    anything. Contract of DeepGEMM's `m_grouped_fp8_gemm_nt_masked`.
    """
    check_tensor("a", a, 3, E4M3)
    experts, slots, k = a.shape
    check(slots % 128 == 0, f"slots={slots} is not a multiple of 128")
    check(k % 128 == 0, f"k={k} is not a multiple of 128")
    check(a.is_contiguous(), "a must be contiguous")
    check_tensor("a_scales", a_scales, 3, (torch.float32,), like=a)
    check_shape("a_scales", a_scales, (experts, slots, k // 128))
    _check_weights(b, b_scales, a)
    check(b.shape[0] == experts, f"b has {b.shape[0]} experts, a has {experts}")
    check_tensor("count", count, 1, (torch.int32,), like=a)
    check_shape("count", count, (experts,))
    n = b.shape[1]
    check(n % 8 == 0, f"n={n} is not a multiple of 8")
    flat = None if out is None else out.flatten(0, 1)
    result = _output(experts * slots, n, a, flat, dtype)
    if not result.is_cuda:
        return oracle.masked_fp8_gemm(a, a_scales, b, b_scales, count, result)
    if experts and slots:
        fp8_products.launch(
            a.flatten(0, 1),
            b.flatten(0, 1),
            result,
            a_scales=a_scales,
            b_scales=b_scales,
            grouping="masked",
            groups=count,
            slots=slots,
        )
    return result.view(experts, slots, n)
