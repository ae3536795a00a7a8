"""Cases of masked and block-scaled products, and of the portable bodies beside those of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import paths
from ..formats import FP8_BLOCK128_COLUMN, FP8_BLOCK128_WEIGHT, MXFP4, NVFP4, Mxfp4, Nvfp4, Quantized
from ..fp4_gemm import grouped_fp4_gemm
from ..fp8_gemm import fp8_gemm
from ..grouped_gemm import grouped_gemm
from ..masked_gemm import masked_fp4_gemm, masked_gemm
from ..scaled_gemm import scaled_gemm
from ..testing import nbytes
from .case import Call, Case, ready
from .matrix import GROUPED, codes, row_scales, tile_scales
from .packed import EXPERTS, activations, fp4_weights

DENSE = ((4096, 4096, 7168), (4096, 7168, 2048), (128, 4096, 7168), (16, 7168, 16384), (1, 7168, 2048))
SCALED = ((4096, 7168, 2048), (16, 7168, 2048))


def _blocks(experts: int, each: int, block: int) -> Tensor:
    index = torch.arange(experts, device="cuda", dtype=torch.int32)
    return index.repeat_interleave(each // block)


def _count(experts: int, used: int) -> Tensor:
    return torch.full((experts,), used, dtype=torch.int32, device="cuda")


def forced(fn: Callable[..., object], *arguments: Any) -> Call:
    """A call of `fn` on the portable path."""

    def call() -> object:
        with paths.forced("portable"):
            return fn(*arguments)

    return call


def masked_bf16() -> Iterator[Case]:
    """Masked grouped bf16, all slots in use and 16 of them; the contiguous form of the same tokens beside."""
    for experts, slots, n, k in GROUPED:
        a = activations(experts * slots, k).view(experts, slots, k)
        b = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(experts, slots, n, device="cuda", dtype=torch.bfloat16)
        blocks = _blocks(experts, slots, 256 if slots % 256 == 0 else 128)
        contiguous = partial(grouped_gemm, a.flatten(0, 1), b, blocks, out.flatten(0, 1))
        for used in (slots, 16):
            yield Case(
                "masked_gemm",
                f"bf16 {experts}x{used} of {slots}, {n}x{k}",
                partial(masked_gemm, a, b, _count(experts, used), out),
                nbytes(b) + 2 * experts * used * (n + k),
                2 * experts * used * n * k,
                "bf16",
                peers={"contiguous": ready(contiguous)} if used == slots else {},
            )


def masked_fp4() -> Iterator[Case]:
    """Masked grouped NVFP4 weights: 16 of few and of many slots, and many of many; contiguous beside."""
    for experts, n, k in EXPERTS:
        weights = fp4_weights(experts, n, k, NVFP4)
        for slots, used in ((16, 16), (128, 16), (1024, 16), (1024, 256)):
            x, block = activations(experts * slots, k), min(used, 128)
            rows = x[: experts * used]
            contiguous = partial(grouped_fp4_gemm, rows, weights, _blocks(experts, used, block))
            yield Case(
                "masked_fp4_gemm",
                f"nvfp4 {experts}x{used} of {slots}, {n}x{k}",
                partial(
                    masked_fp4_gemm, x.view(experts, slots, k), weights, _count(experts, used), min(used, 128)
                ),
                weights.nbytes + 2 * experts * used * (n + k),
                2 * experts * used * n * k,
                "bf16",
                peers={"contiguous": ready(contiguous)},
            )


def _random(rows: int, k: int, fmt: Nvfp4 | Mxfp4) -> Quantized:
    packed = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, device="cuda")
    nvfp4 = isinstance(fmt, Nvfp4)
    scales = torch.full((rows, k // fmt.block), 0x38 if nvfp4 else 127, dtype=torch.uint8, device="cuda")
    one = torch.ones(1, device="cuda") if nvfp4 else None
    return Quantized(packed, scales.view(torch.float8_e4m3fn) if nvfp4 else scales, fmt, (rows, k), one)


def block_scaled() -> Iterator[Case]:
    """W4A4; where tensor cores do not take FP4 the row says `decoded`, and bf16 products are its floor."""
    native = paths.multiplies_block_scaled(torch.device("cuda"))
    for m, n, k in SCALED:
        x, dense = activations(m, k), torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        for name, fmt in (("nvfp4", NVFP4), ("mxfp4", MXFP4)):
            a, b = _random(m, k, fmt), _random(n, k, fmt)
            yield Case(
                "scaled_gemm",
                f"{name} by {name} {m}x{n}x{k}, {'native' if native else 'decoded'}",
                partial(scaled_gemm, a, b),
                a.nbytes + b.nbytes + 2 * m * n,
                2 * m * n * k,
                "fp8" if native else "bf16",
                peers={"torch bf16": ready(partial(torch.mm, x, dense.t()))},
            )


def portable_fp8() -> Iterator[Case]:
    """The portable FP8 body; the device's own beside (the same one, where it has no other)."""
    for m, n, k in DENSE:
        a = Quantized(codes(m, k), row_scales(m, k), FP8_BLOCK128_COLUMN, (m, k))
        b = Quantized(codes(n, k), tile_scales(1, n, k)[0], FP8_BLOCK128_WEIGHT, (n, k))
        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
        yield Case(
            "portable_gemm",
            f"fp8 {m}x{n}x{k}",
            forced(fp8_gemm, a, b, out),
            a.nbytes + b.nbytes + nbytes(out),
            2 * m * n * k,
            peers={"own path": ready(partial(fp8_gemm, a, b, out))},
        )
