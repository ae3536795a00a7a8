"""The Triton kernels on a CPU, against their oracles, on fresh inputs and small ugly shapes.

Run by `test_interpreted.py` in a process of its own: TRITON_INTERPRET=1 must be set before the import of
Triton. The interpreter cannot run PTX, in whose place kernels then take the plain form of the same arithmetic
(see `codes`). So addresses, masks, layouts and formulas are checked here; the PTX forms (FP4 codes and maxima
of bf16, reciprocals, the saturating e4m3 cast, pairs of 16-bit results, the FP8 division) are checked on GPUs
by `test_quantize_gpu.py` and `test_fused_gpu.py`, the first also by `test_codes_ptx.py` without one. Matrix
products in Gluon and CUDA are beyond the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from broadbeam_kernels import nvfp4
from broadbeam_kernels.add_rms_norm import add_rms_norm
from broadbeam_kernels.concat_mla_k import concat_mla_k
from broadbeam_kernels.finalize import finalize
from broadbeam_kernels.formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_COLUMN,
    FP8_BLOCK128_WEIGHT,
    MXFP4,
    MXFP4_SWIZZLED,
    NVFP4,
    NVFP4_SWIZZLED,
    Format,
    Fp8Block,
    Mxfp4,
    Nvfp4,
    Quantized,
)
from broadbeam_kernels.nvfp4 import amax, quantize_nvfp4
from broadbeam_kernels.pad_quant import pad_quant
from broadbeam_kernels.quantize import dequantize, quantize
from broadbeam_kernels.reference import layout, norm, rope
from broadbeam_kernels.reference import quantize as oracle
from broadbeam_kernels.reference import silu_mul_quant as silu_oracle
from broadbeam_kernels.rope_quantize import LatentCache, Rotary, rope_quantize
from broadbeam_kernels.silu_mul_quant import silu_mul_quant, silu_mul_quant_masked
from broadbeam_kernels.testing import gaussian, poison, relative_difference

BF16, F16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
FORMATS: list[Format] = [
    NVFP4,
    NVFP4_SWIZZLED,
    MXFP4,
    MXFP4_SWIZZLED,
    FP8_BLOCK128,
    FP8_BLOCK128_COLUMN,
    FP8_BLOCK128_WEIGHT,
    Fp8Block(scale="ue8m0"),
]


@pytest.fixture(autouse=True, scope="session")
def _mended_interpreter() -> Iterator[None]:
    """Two faults of Triton 3.6's interpreter, mended from outside.

    Its casts round wrongly (triton issue 8322: 125.6 becomes 64 in e4m3), so torch casts instead; and the
    bounds of a loop are arrays of one element, which numpy 2.4 no longer takes for integers.
    """
    patch = pytest.MonkeyPatch()
    patch_tensor = interpreter._patch_lang_tensor

    def cast(data: Any, source: Any, target: Any, _rounding: Any) -> Any:
        from_type, to_type = (getattr(torch, _TORCH_NAMES[str(t)]) for t in (source, target))
        bits = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[target.primitive_bitwidth]
        values = torch.from_numpy(np.ascontiguousarray(data)).view(from_type).to(to_type)
        return values.view(bits).numpy().view(f"uint{target.primitive_bitwidth}")

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.setattr(interpreter, "_convert_float", cast)
    patch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
    yield
    patch.undo()


_TORCH_NAMES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8e4nv": "float8_e4m3fn",
    "fp8e5": "float8_e5m2",
}


def values(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return gaussian(*shape, device="cpu", dtype=dtype)


def bytes_of(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def want(x: Tensor, fmt: Format, g: Tensor | None = None) -> Quantized:
    match fmt:
        case Nvfp4():
            return oracle.quantize_nvfp4(x, fmt, g)
        case Mxfp4():
            return oracle.quantize_mxfp4(x, fmt)
        case Fp8Block():
            return oracle.quantize_fp8_block(x, fmt)


def decoded(q: Quantized, dtype: torch.dtype) -> Tensor:
    match q.format:
        case Nvfp4():
            return oracle.dequantize_nvfp4(q, dtype)
        case Mxfp4():
            return oracle.dequantize_mxfp4(q, dtype)
        case Fp8Block():
            return oracle.dequantize_fp8_block(q, dtype)


def assert_same(got: Quantized, expected: Quantized) -> None:
    assert torch.equal(bytes_of(got.values), bytes_of(expected.values))
    assert torch.equal(bytes_of(got.scales), bytes_of(expected.scales))


def test_the_interpreter_is_on() -> None:
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (130, 96), (3, 160)], ids=str)
def test_codes_match_the_oracle_bit_for_bit(fmt: Format, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = values(*shape, dtype=dtype)
    got = quantize(x, fmt)
    assert_same(got, want(x, fmt))
    assert torch.equal(bytes_of(dequantize(got, dtype)), bytes_of(decoded(got, dtype)))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_strided_rows_give_the_same_codes(fmt: Format) -> None:
    x = values(9, 130)[::2, 2:98]
    assert_same(quantize(x, fmt), want(x, fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_with_gaps_between_rows_decode_to_the_same_values(fmt: Format) -> None:
    q = quantize(values(9, 256), fmt)
    raw = q.values.view(torch.uint8)
    gaps = torch.cat((raw, raw), dim=1)[:, : raw.shape[1]].view(q.values.dtype)
    got = dequantize(Quantized(gaps, q.scales, q.format, q.shape, q.global_scale))
    assert torch.equal(bytes_of(got), bytes_of(decoded(q, BF16)))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_extremes_and_ties_match_the_oracle(fmt: Format) -> None:
    x = torch.zeros(6, 128)
    x[1] = 3.0e38
    x[2] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(16)
    x[3] = -1e-38
    x[4] = -0.0
    x[4, ::16] = 1.0
    x = x.to(BF16)
    assert_same(quantize(x, fmt), want(x, fmt))
    if isinstance(fmt, Nvfp4):
        one = torch.ones(1)
        assert_same(quantize_nvfp4(x, fmt, one), want(x, fmt, one))


def test_amax_matches() -> None:
    x = values(5, 70)
    assert amax(x).item() == x.abs().max().item()
    assert amax(x[1:4, 2:40]).item() == x[1:4, 2:40].abs().max().item()


@pytest.mark.parametrize("fmt", [NVFP4, NVFP4_SWIZZLED], ids=str)
def test_a_tensor_read_in_parts_has_the_same_global_scale(
    fmt: Nvfp4, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = values(130, 96)
    monkeypatch.setattr(nvfp4, "MOST_WORDS", 500)  # ten rows
    assert_same(quantize(x, fmt), want(x, fmt))
    assert amax(x).item() == x.abs().max().item()


@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN, MXFP4], ids=str)
@pytest.mark.parametrize(("n", "columns"), [(2, 128), (96, 256), (128, 128)])
def test_padding_equals_quantising_the_padded_rows(fmt: Fp8Block | Mxfp4, n: int, columns: int) -> None:
    x = values(5, n + 2)[:, 2:]
    assert_same(pad_quant(x, columns, fmt), layout.pad_quant(x, columns, fmt))


@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN, Fp8Block(scale="ue8m0")], ids=str)
def test_flat_silu_mul_quant_matches(fmt: Fp8Block) -> None:
    y = values(7, 784)[:, 8:-8]
    got, expected = silu_mul_quant(y, fmt), silu_oracle.silu_mul_quant(y, fmt)
    assert relative_difference(decoded(got, BF16), decoded(expected, BF16)) < 1e-2


def test_masked_silu_mul_quant_writes_only_rows_in_use() -> None:
    y, count = values(4, 7, 768), torch.tensor([0, 7, 1, 4], dtype=torch.int32)
    got, scales = silu_mul_quant_masked(y, count)
    for e, n in enumerate(count.tolist()):
        expected = silu_oracle.silu_mul_quant(y[e, :n], FP8_BLOCK128)
        assert relative_difference(scales[e, :n], expected.scales) < 1e-6
        assert relative_difference(got[e, :n].float(), expected.values.float()) < 1e-2


@pytest.mark.parametrize("fmt", [None, FP8_BLOCK128, FP8_BLOCK128_COLUMN], ids=str)
@pytest.mark.parametrize("add", [True, False], ids=["add", "plain"])
@pytest.mark.parametrize("columns", [100, 384])
def test_add_rms_norm_matches(fmt: Fp8Block | None, add: bool, columns: int) -> None:
    x, weight = values(5, columns + 8)[:, :columns], values(columns, 2)[:, 0]  # with gaps
    residual = values(5, columns) if add else None
    theirs = residual.clone() if residual is not None else None
    got = add_rms_norm(x, residual, weight, 1e-6, fmt)
    expected = norm.add_rms_norm(x, theirs, weight, 1e-6, fmt)
    if residual is not None and theirs is not None:
        assert torch.equal(residual, theirs)
    if isinstance(got, Quantized) and isinstance(expected, Quantized):
        got, expected = decoded(got, BF16), decoded(expected, BF16)
    assert isinstance(got, Tensor)
    assert isinstance(expected, Tensor)
    assert relative_difference(got, expected) < 1e-2


@pytest.mark.parametrize(("tokens", "topk", "columns", "padded"), [(1, 1, 7, 8), (5, 3, 1100, 1152)])
def test_finalize_matches(tokens: int, topk: int, columns: int, padded: int) -> None:
    y, weights = values(tokens * topk, padded), torch.rand(tokens, topk)
    rows = torch.randint(-1, y.shape[0], (tokens, topk), dtype=torch.int32)
    got = finalize(y, rows, weights, columns)
    assert relative_difference(got, layout.finalize(y, rows, weights, columns)) < 2e-3


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 16), (3, 5)])
def test_concat_mla_k_matches(dtype: torch.dtype, tokens: int, heads: int) -> None:
    nope, rotary = values(tokens, heads, 64)[..., :32].to(dtype), values(tokens, 1, 16).to(dtype)
    out = poison(torch.empty(tokens, heads, 48, dtype=dtype))
    concat_mla_k(nope, rotary, out)
    expected = layout.concat_mla_k(nope, rotary, torch.empty_like(out))
    assert torch.equal(bytes_of(out), bytes_of(expected))


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("cache_dtype", [E4M3, BF16], ids=str)
@pytest.mark.parametrize(("heads", "out_dtype"), [(16, E4M3), (5, BF16)])
def test_rope_quantize_writes_queries_and_cache(
    interleaved: bool, cache_dtype: torch.dtype, heads: int, out_dtype: torch.dtype
) -> None:
    q, k = values(3, heads, 32 + 16), values(3, 64 + 16)
    angles = torch.rand(9, 8) * 6.28
    rotary = Rotary(
        torch.cat((angles.cos(), angles.sin()), dim=1), torch.tensor([0, 1, 8, 1, 3])[::2], interleaved
    )
    slots = torch.tensor([4, 5, -1, 5, 0])[::2]  # with gaps, as the positions
    caches = [torch.zeros(6, 80).to(cache_dtype) for _ in range(2)]
    keys = [torch.zeros(3, 16, dtype=BF16) for _ in range(2)]
    outs = [torch.zeros(3, heads, 48).to(out_dtype) for _ in range(2)]
    kvs = [LatentCache(k[:, :64], cache, slots, 0.5) for cache in caches]
    parts = (q[..., :32], q[..., 32:], k[:, 64:], rotary)
    rope_quantize(*parts, kvs[0], out=poison(outs[0]), q_multiplier=2.0, k_rope_out=keys[0])
    rope.rope_quantize(*parts, kvs[1], outs[1], 2.0, keys[1])
    for got, expected in (outs, caches, keys):
        assert relative_difference(got.float(), expected.float()) < 1e-2
