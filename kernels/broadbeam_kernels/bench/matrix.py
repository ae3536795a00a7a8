"""Cases of the matrix products: DeepSeek-V3's dense shapes and its experts', and DeepSeek-V2-Lite's experts'."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..formats import FP8_BLOCK128_COLUMN, FP8_BLOCK128_WEIGHT, Quantized
from ..fp8_gemm import fp8_gemm, grouped_fp8_gemm, masked_fp8_gemm
from ..grouped_gemm import grouped_gemm
from ..testing import nbytes
from . import peers
from .case import Case

# (n, k): MLA's fused down-projection, q up, kv up, output; the shared expert's two; V2-Lite's q up-projection.
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


def _codes(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(torch.float8_e4m3fn)


def _row_scales(rows: int, k: int) -> Tensor:
    return (torch.rand(k // 128, -(-rows // 4) * 4, device="cuda") + 0.5).t()[:rows]


def dense() -> Iterator[Case]:
    """FP8 block GEMM."""
    for n, k in DENSE:
        b, b_scales = _codes(n, k), torch.rand(-(-n // 128), k // 128, device="cuda") + 0.5
        weights = Quantized(b, b_scales, FP8_BLOCK128_WEIGHT, (n, k))
        for m in TOKENS:
            a, a_scales = _codes(m, k), _row_scales(m, k)
            out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
            rows = Quantized(a, a_scales, FP8_BLOCK128_COLUMN, (m, k))
            moved = nbytes(a, a_scales, b, b_scales, out)
            yield Case(
                "fp8_gemm",
                f"{m}x{n}x{k}",
                lambda rows=rows, w=weights, o=out: fp8_gemm(rows, w, o),
                moved,
                2 * m * n * k,
                "fp8" if m > 128 else "memory",
                {
                    "deep_gemm": lambda a=a, s=a_scales, b=b, t=b_scales, o=out: peers.deep_gemm_dense(
                        a, s, b, t, o
                    ),
                    "torch": lambda a=a, s=a_scales, b=b, t=b_scales: peers.torch_blockwise(a, s, b, t),
                    "torch tensorwise": lambda a=a, b=b: peers.torch_tensorwise(a, b),
                },
            )


def grouped_fp8() -> Iterator[Case]:
    """Grouped FP8 GEMM, contiguous and masked, all slots in use."""
    for experts, each, n, k in GROUPED:
        m = experts * each
        a, b = _codes(m, k), _codes(experts, n, k)
        a_scales = _row_scales(m, k)
        b_scales = torch.rand(experts, -(-n // 128), k // 128, device="cuda") + 0.5
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        blocks = torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(each // 128)
        rows = blocks.repeat_interleave(128)
        moved, flops = nbytes(a, a_scales, b, b_scales, out), 2 * m * n * k
        shape = f"{experts}x{each}, {n}x{k}"
        yield Case(
            "grouped_fp8_gemm",
            f"contiguous {shape}",
            lambda: grouped_fp8_gemm(a, a_scales, b, b_scales, blocks, out),
            moved,
            flops,
            "fp8",
            {"deep_gemm": lambda: peers.deep_gemm_contiguous(a, a_scales, b, b_scales, out, rows)},
        )
        count = torch.full((experts,), each, dtype=torch.int32, device="cuda")
        slots = a.view(experts, each, k)
        slot_scales = (torch.rand(experts, k // 128, each, device="cuda") + 0.5).transpose(1, 2)
        out3 = out.view(experts, each, n)
        yield Case(
            "grouped_fp8_gemm",
            f"masked {shape}",
            lambda: masked_fp8_gemm(slots, slot_scales, b, b_scales, count, out3),
            moved,
            flops,
            "fp8",
            {
                "contiguous": lambda: lambda: grouped_fp8_gemm(a, a_scales, b, b_scales, blocks, out),
                "deep_gemm": lambda: peers.deep_gemm_masked(
                    slots, slot_scales, b, b_scales, out3, count, each
                ),
            },
        )
        del a, b, out, out3, slots


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
            lambda: grouped_gemm(a, b, blocks, out),
            nbytes(a, b, out),
            2 * m * n * k,
            "bf16",
            {"torch": lambda: peers.torch_grouped(a, b, offsets)},
        )
        del a, b, out
