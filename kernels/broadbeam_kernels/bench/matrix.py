"""Cases of the matrix products: DeepSeek-V3's dense shapes and experts, DeepSeek-V2-Lite's experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..formats import FP8_BLOCK128_COLUMN, FP8_BLOCK128_WEIGHT, Quantized
from ..fp8_gemm import fp8_gemm, grouped_fp8_gemm, masked_fp8_gemm
from ..grouped_gemm import grouped_gemm
from ..testing import nbytes
from . import peers
from .case import Case, ready

# (n, k): MLA's fused down-projection, q up, kv up, output; the shared expert's two; V2-Lite's q projection.
DENSE = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (3072, 1536))
TOKENS = (1, 16, 64, 128, 512, 4096, 8192)
# (experts, tokens each, n, k)
GROUPED = (
    (4, 8192, 4096, 7168),
    (4, 8192, 7168, 2048),
    (32, 256, 4096, 7168),
    (32, 256, 7168, 2048),
    (64, 128, 2816, 2048),
    (64, 128, 2048, 1408),
)


def codes(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn)


def row_scales(rows: int, k: int) -> Tensor:
    return (torch.rand(k // 128, -(-rows // 4) * 4, device="cuda") + 0.5).t()[:rows]


def tile_scales(experts: int, n: int, k: int) -> Tensor:
    return torch.rand(experts, -(-n // 128), k // 128, device="cuda") + 0.5


def _dense(m: int, b: Tensor, b_scales: Tensor) -> Case:
    n, k = b.shape
    a, a_scales = codes(m, k), row_scales(m, k)
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    rows = Quantized(a, a_scales, FP8_BLOCK128_COLUMN, (m, k))
    weights = Quantized(b, b_scales, FP8_BLOCK128_WEIGHT, (n, k))
    return Case(
        "fp8_gemm",
        f"{m}x{n}x{k}",
        partial(fp8_gemm, rows, weights, out),
        nbytes(a, a_scales, b, b_scales, out),
        2 * m * n * k,
        peers={
            "deep_gemm": partial(peers.deep_gemm_dense, a, a_scales, b, b_scales, out),
            "torch": partial(peers.torch_blockwise, a, a_scales, b, b_scales),
            "torch tensorwise": partial(peers.torch_tensorwise, a, b),
        },
    )


def dense() -> Iterator[Case]:
    """FP8 block GEMM."""
    for n, k in DENSE:
        b, b_scales = codes(n, k), tile_scales(1, n, k)[0]
        for m in TOKENS:
            yield _dense(m, b, b_scales)


def _contiguous(experts: int, each: int, n: int, k: int) -> Case:
    m = experts * each
    a, a_scales = codes(m, k), row_scales(m, k)
    b, b_scales = codes(experts, n, k), tile_scales(experts, n, k)
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    blocks = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(each // 128)
    rows = blocks.repeat_interleave(128)
    return Case(
        "grouped_fp8_gemm",
        f"contiguous {experts}x{each}, {n}x{k}",
        partial(grouped_fp8_gemm, a, a_scales, b, b_scales, blocks, out),
        nbytes(a, a_scales, b, b_scales, out),
        2 * m * n * k,
        peers={"deep_gemm": partial(peers.deep_gemm_contiguous, a, a_scales, b, b_scales, out, rows)},
    )


def _masked(experts: int, each: int, n: int, k: int) -> Case:
    a, b, b_scales = codes(experts, each, k), codes(experts, n, k), tile_scales(experts, n, k)
    a_scales = (torch.rand(experts, k // 128, each, device="cuda") + 0.5).transpose(1, 2)
    flat, flat_scales = a.flatten(0, 1), row_scales(experts * each, k)
    out = torch.empty(experts, each, n, dtype=torch.bfloat16, device="cuda")
    flat_out = out.flatten(0, 1)
    count = torch.full((experts,), each, dtype=torch.int32, device="cuda")
    blocks = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(each // 128)
    contiguous = partial(grouped_fp8_gemm, flat, flat_scales, b, b_scales, blocks, flat_out)
    return Case(
        "grouped_fp8_gemm",
        f"masked {experts}x{each}, {n}x{k}",
        partial(masked_fp8_gemm, a, a_scales, b, b_scales, count, out),
        nbytes(a, a_scales, b, b_scales, out),
        2 * experts * each * n * k,
        peers={
            "contiguous": ready(contiguous),
            "deep_gemm": partial(peers.deep_gemm_masked, a, a_scales, b, b_scales, out, count, each),
        },
    )


def grouped_fp8() -> Iterator[Case]:
    """Grouped FP8 GEMM, contiguous and masked, all slots in use."""
    for shape in GROUPED:
        yield _contiguous(*shape)
        yield _masked(*shape)


def grouped_bf16() -> Iterator[Case]:
    """Grouped bf16 GEMM."""
    for experts, each, n, k in GROUPED:
        m = experts * each
        a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        # 256 rows to a block where each expert has that many: the kernel may then use its larger tile.
        block = 256 if each % 256 == 0 else 128
        blocks = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(each // block)
        offsets = (torch.arange(1, experts + 1, device="cuda") * each).int()
        yield Case(
            "grouped_gemm",
            f"bf16 {experts}x{each}, {n}x{k}",
            partial(grouped_gemm, a, b, blocks, out),
            nbytes(a, b, out),
            2 * m * n * k,
            "bf16",
            peers={"torch": partial(peers.torch_grouped, a, b, offsets)},
        )
