"""Cases of the operations that memory bounds, at their bars' sizes. `torch` runs the oracle eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..add_rms_norm import add_rms_norm
from ..concat_mla_k import concat_mla_k
from ..finalize import finalize
from ..formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_COLUMN,
    FP8_BLOCK128_WEIGHT,
    MXFP4,
    NVFP4,
    NVFP4_SWIZZLED,
    Format,
    Fp8Block,
    Mxfp4,
    Nvfp4,
    Quantized,
)
from ..nvfp4 import quantize_nvfp4
from ..pad_quant import pad_quant
from ..quantize import dequantize, quantize
from ..reference import layout, norm, rope
from ..reference import quantize as oracle
from ..reference import silu_mul_quant as silu_oracle
from ..rope_quantize import LatentCache, Rotary, rope_quantize
from ..silu_mul_quant import silu_mul_quant, silu_mul_quant_masked
from ..testing import gaussian, nbytes
from . import peers
from .case import Call, Case, in_a_row, ready

ROWS, HIDDEN = 8192, 7168
E4M3 = torch.float8_e4m3fn
FORMATS: dict[str, Format] = {
    "mxfp4": MXFP4,
    "fp8 1x128 row": FP8_BLOCK128,
    "fp8 1x128 column": FP8_BLOCK128_COLUMN,
    "fp8 1x128 ue8m0": Fp8Block(scale="ue8m0"),
    "fp8 128x128": FP8_BLOCK128_WEIGHT,
}


def _eager(x: torch.Tensor, fmt: Format) -> Quantized:
    match fmt:
        case Nvfp4():
            return oracle.quantize_nvfp4(x, fmt)
        case Mxfp4():
            return oracle.quantize_mxfp4(x, fmt)
        case Fp8Block():
            return oracle.quantize_fp8_block(x, fmt)


Quantizer = Callable[[torch.Tensor], Quantized]


def _quantizing(shape: str, call: Quantizer, eager: Quantizer) -> Iterator[Case]:
    """Quantise, the oracle beside, then dequantise."""
    x = gaussian(ROWS, HIDDEN)
    coded = call(x)
    moved = nbytes(x) + coded.nbytes

    def quantizing() -> Call:
        return partial(call, gaussian(ROWS, HIDDEN))

    def dequantizing() -> Call:
        return partial(dequantize, call(gaussian(ROWS, HIDDEN)))

    yield Case("quantize", shape, partial(call, x), moved, peers={"torch": ready(partial(eager, x))})
    yield in_a_row("quantize", shape, quantizing, moved)
    yield Case("dequantize", shape, partial(dequantize, coded), moved)
    yield in_a_row("dequantize", shape, dequantizing, moved)


def _computing(fmt: Format) -> Call:
    return partial(quantize, gaussian(ROWS, HIDDEN), fmt)


def quantizers() -> Iterator[Case]:
    """Quantise and dequantise every format at 8192 x 7168."""
    size = f"{ROWS}x{HIDDEN}"
    g = torch.tensor([3.0], device="cuda")
    for name, nv in (("nvfp4 linear", NVFP4), ("nvfp4 swizzled", NVFP4_SWIZZLED)):
        ours = partial(quantize_nvfp4, fmt=nv, global_scale=g)
        eager = partial(oracle.quantize_nvfp4, fmt=nv, global_scale=g)
        yield from _quantizing(f"{name} {size}", ours, eager)
    # A computed global scale needs the tensor's maximum first: one more reading of it.
    for name, nv in (("nvfp4 linear", NVFP4), ("nvfp4 swizzled", NVFP4_SWIZZLED)):
        x, shape = gaussian(ROWS, HIDDEN), f"{name}, computed global {size}"
        moved = 2 * nbytes(x) + quantize(x, nv).nbytes
        yield Case("quantize", shape, partial(quantize, x, nv), moved)
        yield in_a_row("quantize", shape, partial(_computing, nv), moved)
    for name, fmt in FORMATS.items():
        yield from _quantizing(f"{name} {size}", partial(quantize, fmt=fmt), partial(_eager, fmt=fmt))


def silu() -> Iterator[Case]:
    """SiLU-mul-quant, flat and masked."""
    y, shape = gaussian(ROWS, 2 * HIDDEN), f"flat {ROWS}x{HIDDEN}"
    moved = nbytes(y) + ROWS * HIDDEN * 33 // 32
    eager = {"torch": ready(partial(silu_oracle.silu_mul_quant, y, FP8_BLOCK128))}
    yield Case("silu_mul_quant", shape, partial(silu_mul_quant, y), moved, peers=eager)
    yield in_a_row(
        "silu_mul_quant", shape, lambda: partial(silu_mul_quant, gaussian(ROWS, 2 * HIDDEN)), moved
    )
    slots, hidden = 1024, 2048

    def masked(count: torch.Tensor) -> Call:
        return partial(silu_mul_quant_masked, gaussian(32, slots, 2 * hidden), count)

    for used in (slots, 256):
        count = torch.full((32,), used, dtype=torch.int32, device="cuda")
        moved = 32 * used * (4 * hidden + hidden * 33 // 32)
        shape = f"masked 32x{slots}x{hidden}, {used} used"
        yield Case("silu_mul_quant", shape, masked(count), moved)
        yield in_a_row("silu_mul_quant", shape, partial(masked, count), moved)


def concat() -> Iterator[Case]:
    """concat_mla_k, 128 heads of 128 + 64."""
    for dtype, sizes in ((torch.bfloat16, (128, 2048, 8192, 32768)), (E4M3, (8192,))):
        for tokens in sizes:
            nope = gaussian(tokens, 128, 128).to(dtype)
            rotary_part = gaussian(tokens, 64).to(dtype)
            out = torch.empty(tokens, 128, 192, dtype=dtype, device="cuda")
            yield Case(
                "concat_mla_k",
                f"{str(dtype)[6:]} {tokens} tokens",
                partial(concat_mla_k, nope, rotary_part, out),
                nbytes(nope, rotary_part, out),
                peers={
                    "flashinfer": partial(peers.flashinfer_concat, nope, rotary_part, out),
                    "torch": ready(partial(layout.concat_mla_k, nope, rotary_part.unsqueeze(1), out)),
                },
            )


def _rope(tokens: int, nope: int, cache_type: torch.dtype, cos_sin: torch.Tensor) -> Case:
    q, kv = gaussian(tokens, 128, nope + 64), gaussian(tokens, 576)
    positions = torch.arange(tokens, device="cuda")
    cache = torch.zeros(tokens, 576, device="cuda").to(cache_type)
    kept = LatentCache(kv[:, :512], cache, positions)
    out = torch.empty(tokens, 128, nope + 64, dtype=E4M3, device="cuda")
    parts = (q[..., :nope], q[..., nope:], kv[:, 512:], Rotary(cos_sin, positions))
    others = {"torch": ready(partial(rope.rope_quantize, *parts, kept, out, 1.0, None))}
    if cache_type == E4M3:
        others["flashinfer"] = partial(peers.flashinfer_rope, q, kv, cos_sin, positions, nope)
    return Case(
        "rope_quantize",
        f"{'decode' if nope == 512 else 'prefill'} {tokens} tokens, {str(cache_type)[6:]} cache",
        partial(rope_quantize, *parts, kept, out=out),
        nbytes(q, kv, out, cache),
        peers=others,
    )


def rotary() -> Iterator[Case]:
    """RoPE + quantise + Q write + KV-cache write: decode (absorbed, 512 + 64) and prefill (128 + 64)."""
    angles = torch.rand(8192, 32, device="cuda") * 6.28
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    for nope, sizes in ((512, (1, 64, 256, 1024, 4096)), (128, (1024, 4096))):
        for tokens in sizes:
            yield _rope(tokens, nope, E4M3, cos_sin)
        yield _rope(4096, nope, torch.bfloat16, cos_sin)


def norms() -> Iterator[Case]:
    """Residual add + RMSNorm, with and without FP8 codes."""
    x, residual, weight = gaussian(ROWS, HIDDEN), gaussian(ROWS, HIDDEN), gaussian(HIDDEN)
    formats: dict[str, Fp8Block | None] = {"bf16": None, "fp8 1x128": FP8_BLOCK128}
    for name, fmt in formats.items():
        written = 2 * x.numel() if fmt is None else x.numel() * 33 // 32
        yield Case(
            "add_rms_norm",
            f"{name} {ROWS}x{HIDDEN}",
            partial(add_rms_norm, x, residual, weight, 1e-6, fmt),
            3 * nbytes(x) + written,
            peers={"torch": ready(partial(norm.add_rms_norm, x, residual, weight, 1e-6, fmt))},
        )


def _padding(fmt: Fp8Block | Mxfp4) -> Call:
    return partial(pad_quant, gaussian(16384, 2880), 3072, fmt)


def layouts() -> Iterator[Case]:
    """Pad + quant and finalize + slice at gpt-oss's 2880 of 3072."""
    x = gaussian(16384, 2880)
    padded: tuple[tuple[Fp8Block | Mxfp4, str, float], ...] = (
        (FP8_BLOCK128, "fp8 1x128", 33 / 32),
        (MXFP4, "mxfp4", 17 / 32),
    )
    for fmt, name, size in padded:
        shape, moved = f"{name} 16384x2880 to 3072", nbytes(x) + int(16384 * 3072 * size)
        eager = {"torch": ready(partial(layout.pad_quant, x, 3072, fmt))}
        yield Case("pad_quant", shape, partial(pad_quant, x, 3072, fmt), moved, peers=eager)
        yield in_a_row("pad_quant", shape, partial(_padding, fmt), moved)
    y = gaussian(ROWS * 8, 3072)
    rows = torch.randperm(ROWS * 8, device="cuda").int().view(ROWS, 8)
    weights = torch.rand(ROWS, 8, device="cuda")
    yield Case(
        "finalize",
        f"{ROWS} tokens, 8 experts, 2880 of 3072",
        partial(finalize, y, rows, weights, 2880),
        ROWS * 2880 * 2 * 9 + nbytes(rows, weights),
        peers={"torch": ready(partial(layout.finalize, y, rows, weights, 2880))},
    )
