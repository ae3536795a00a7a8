"""Other libraries' kernels for the same work. Imported only when a benchmark asks for them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Call


def _member(module: str, *names: str) -> Any:
    """The first of `names` that `module` has: libraries rename their functions between releases."""
    loaded = importlib.import_module(module)
    for name in names:
        if hasattr(loaded, name):
            return getattr(loaded, name)
    raise AttributeError(f"{module} has none of {', '.join(names)}")


def deep_gemm_dense(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor) -> Call:
    """DeepGEMM `fp8_gemm_nt`."""
    gemm = _member("deep_gemm", "fp8_gemm_nt")
    return lambda: gemm((a, a_scales), (b, b_scales), out)


def deep_gemm_contiguous(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, row_experts: Tensor
) -> Call:
    """DeepGEMM's contiguous grouped product; `row_experts` int32 (rows,)."""
    gemm = _member("deep_gemm", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous")
    return lambda: gemm((a, a_scales), (b, b_scales), out, row_experts)


def deep_gemm_masked(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, count: Tensor, expected: int
) -> Call:
    """DeepGEMM's masked grouped product."""
    gemm = _member("deep_gemm", "m_grouped_fp8_gemm_nt_masked", "m_grouped_fp8_fp4_gemm_nt_masked")
    return lambda: gemm((a, a_scales), (b, b_scales), out, count, expected)


def torch_blockwise(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Call:
    """torch `scaled_mm`, 1x128 by 128x128 scales."""
    kind = F.ScalingType
    return lambda: F.scaled_mm(
        a,
        b.t(),
        a_scales,
        kind.BlockWise1x128,
        b_scales.t(),
        kind.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def torch_tensorwise(a: Tensor, b: Tensor) -> Call:
    """torch `_scaled_mm` with one scale per tensor: less work than a block GEMM, a ceiling for it."""
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def torch_grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Call:
    """torch `_grouped_mm`, bf16; offsets int32 (experts,) = ends of the experts' rows."""
    return lambda: torch._grouped_mm(a, b.transpose(1, 2), offsets, out_dtype=a.dtype)


def flashinfer_concat(k_nope: Tensor, k_rope: Tensor, out: Tensor) -> Call:
    """FlashInfer `concat_mla_k`."""
    concat = _member("flashinfer.concat_ops", "concat_mla_k")
    rope = k_rope.unsqueeze(1)
    return lambda: concat(out, k_nope, rope)


def flashinfer_rope(q: Tensor, kv: Tensor, cos_sin: Tensor, positions: Tensor, nope: int) -> Call:
    """FlashInfer `mla_rope_quantize_fp8` into views of one query tensor and of one row per key."""
    rope = _member("flashinfer.rope", "mla_rope_quantize_fp8")
    tokens, heads, width = q.shape
    q_out = torch.empty((tokens, heads, width), dtype=torch.float8_e4m3fn, device=q.device)
    k_out = torch.empty((tokens, kv.shape[1]), dtype=torch.float8_e4m3fn, device=q.device)
    split = kv.shape[1] - (width - nope)
    ids = positions.to(torch.int32)
    return lambda: rope(
        q[..., nope:],
        kv[:, split:],
        q[..., :nope],
        kv[:, :split],
        cos_sin,
        ids,
        is_neox=False,
        quantize_dtype=torch.float8_e4m3fn,
        q_rope_out=q_out[..., nope:],
        k_rope_out=k_out[:, split:],
        q_nope_out=q_out[..., :nope],
        k_nope_out=k_out[:, :split],
    )
