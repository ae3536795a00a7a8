"""Cases of products whose weights stay packed in FP4: MLA's output projection, DeepSeek-V3's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..formats import FP8_BLOCK128_COLUMN, MXFP4, NVFP4, Mxfp4, Nvfp4, Quantized
from ..fp4_gemm import Weights, fp4_gemm, grouped_fp4_gemm
from ..fp4_weights import Fp4Weights
from ..grouped_gemm import grouped_gemm
from ..packed_weights import PackedWeights
from ..paths import matrix_path
from ..testing import nbytes
from .case import Call, Case, in_a_row, in_turn, ready
from .matrix import codes, row_scales

OUTPUT = (7168, 16384)
LAYERS = 8
EXPERTS = ((32, 4096, 7168), (32, 7168, 2048))
FORMATS: dict[str, Nvfp4 | Mxfp4] = {"nvfp4": NVFP4, "mxfp4": MXFP4}


def fp4_weights(experts: int, n: int, k: int, fmt: Nvfp4 | Mxfp4) -> Weights:
    """Random codes as the device's kernel reads them, all scales alike: quantising gigabytes would measure
    nothing."""
    if matrix_path(torch.device("cuda")) == "portable":
        packed = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device="cuda")
        one = 0x38 if isinstance(fmt, Nvfp4) else 127  # 1.0 as e4m3, as an exponent
        blocks = torch.full((experts, n * k // fmt.block), one, dtype=torch.uint8, device="cuda")
        ones = torch.ones(experts, device="cuda") if isinstance(fmt, Nvfp4) else None
        return PackedWeights(packed, blocks, ones, fmt, (experts, n, k))
    tiles = (experts, -(-n // 128), k // 128, 2, 2)
    words = torch.randint(-(2**31), 2**31 - 1, (*tiles, 128, 4), dtype=torch.int32, device="cuda")
    scale = 0x4040 if isinstance(fmt, Nvfp4) else 0x7D7D
    scales = torch.full((*tiles, 32, 64 // fmt.block), scale, dtype=torch.int16, device="cuda")
    return Fp4Weights(words, scales, torch.ones(experts, device="cuda"), fmt, (experts, n, k))


def activations(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)


def _projections(weights: list[Weights], name: str, dense: list[Tensor]) -> Iterator[Case]:
    """Layer after layer, as a model has it: the caches hold what other layers read, not a flush."""
    n, k = OUTPUT
    for m in (1, 16, 64, 128):
        x = activations(m, k)
        yield Case(
            "fp4_gemm",
            f"{name} {m}x{n}x{k}, {LAYERS} layers in a row",
            partial(in_turn, [partial(fp4_gemm, x, w) for w in weights]),
            LAYERS * (weights[0].nbytes + nbytes(x) + 2 * m * n),
            LAYERS * 2 * m * n * k,
            "bf16",
            peers={"torch bf16": ready(partial(in_turn, [partial(torch.mm, x, d.t()) for d in dense]))},
        )


def plain() -> Iterator[Case]:
    """FP4 weights: the output projection, 1 to 128 tokens; torch's bf16 product of that shape beside."""
    n, k = OUTPUT
    layers = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]
    dense = layers[0]
    for name, fmt in FORMATS.items():
        projections = [fp4_weights(1, n, k, fmt) for _ in range(LAYERS)]
        weights = projections[0]
        yield from _projections(projections, name, layers)
        for m in (1, 16, 64, 128):
            x = activations(m, k)
            yield Case(
                "fp4_gemm",
                f"{name} {m}x{n}x{k}",
                partial(fp4_gemm, x, weights),
                weights.nbytes + nbytes(x) + 2 * m * n,
                2 * m * n * k,
                "bf16",
                peers={"torch bf16": ready(partial(torch.mm, x, dense.t()))},
            )
        for m in (16, 128):
            yield _with_fp8(f"{name} {m}x{n}x{k}", m, weights, partial(fp4_gemm, w=weights))


def _with_fp8(
    shape: str, rows: int, weights: Weights, product: Callable[[Tensor | Quantized], Tensor]
) -> Case:
    """FP8 activations, which become bf16 on the way; the same product of bf16 ones beside."""
    experts, n, k = weights.shape
    x = Quantized(codes(rows, k), row_scales(rows, k), FP8_BLOCK128_COLUMN, (rows, k))
    return Case(
        "fp4_gemm" if experts == 1 else "grouped_fp4_gemm",
        f"{shape}, FP8 activations",
        partial(product, x),
        weights.nbytes + x.nbytes + 2 * rows * n,
        2 * rows * n * k,
        "bf16",
        peers={"bf16 activations": ready(partial(product, activations(rows, k)))},
    )


def _groups(experts: int, each: int, block: int) -> Tensor:
    return torch.arange(experts, device="cuda", dtype=torch.int32).repeat_interleave(each // block)


def _grouped(experts: int, n: int, k: int, each: int, block: int, name: str) -> Iterator[Case]:
    """At decode sizes also in a row: layer after layer, each with weights of its own."""
    fmt = FORMATS[name]
    weights, x = fp4_weights(experts, n, k, fmt), activations(experts * each, k)
    groups = _groups(experts, each, block)
    peers = {}
    if block >= 128:
        dense = torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16)
        peers["our bf16"] = ready(partial(grouped_gemm, x, dense, groups))
    shape = f"{name} {experts}x{each}, {n}x{k}"
    moved, flops = weights.nbytes + nbytes(x) + 2 * experts * each * n, 2 * experts * each * n * k
    call = partial(grouped_fp4_gemm, x, weights, groups)
    yield Case("grouped_fp4_gemm", shape, call, moved, flops, "bf16", peers=peers)
    if each <= 64:

        def layer() -> Call:
            return partial(grouped_fp4_gemm, x, fp4_weights(experts, n, k, fmt), groups)

        yield in_a_row("grouped_fp4_gemm", shape, layer, moved, flops, "bf16", sets=2)


def grouped() -> Iterator[Case]:
    """FP4 weights: experts at decode (16, 64 tokens each) and prefill (256, 1024, our bf16 beside)."""
    for shape in EXPERTS:
        for name in FORMATS:
            for each, block in ((16, 16), (64, 64), (256, 128), (1024, 128)):
                yield from _grouped(*shape, each, block, name)
            experts, n, k = shape
            weights = fp4_weights(*shape, FORMATS[name])
            for each, block in ((16, 16), (256, 128)):
                product = partial(grouped_fp4_gemm, w=weights, experts=_groups(experts, each, block))
                yield _with_fp8(f"{name} {experts}x{each}, {n}x{k}", experts * each, weights, product)
