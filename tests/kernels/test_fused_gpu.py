"""Fused memory-bound kernels against their oracles, on fresh inputs and ugly shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from broadbeam_kernels.add_rms_norm import add_rms_norm
from broadbeam_kernels.concat_mla_k import concat_mla_k
from broadbeam_kernels.finalize import finalize
from broadbeam_kernels.formats import FP8_BLOCK128, FP8_BLOCK128_COLUMN, Fp8Block, Quantized
from broadbeam_kernels.reference import layout, norm, rope
from broadbeam_kernels.reference import quantize as oracle
from broadbeam_kernels.reference import silu_mul_quant as silu_oracle
from broadbeam_kernels.rope_quantize import LatentCache, Rotary, rope_quantize
from broadbeam_kernels.silu_mul_quant import silu_mul_quant, silu_mul_quant_masked
from broadbeam_kernels.testing import gaussian, poison, relative_difference

pytestmark = pytest.mark.gpu

BF16, F16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def assert_codes_near(got: Tensor, want: Tensor, fraction: float = 1e-3) -> None:
    """e4m3 codes equal but for a rounding of the last float32 bit: at most one code apart, and rarely."""
    a, b = got.view(torch.uint8).int(), want.contiguous().view(torch.uint8).int()
    apart = (a - b).abs()
    apart = torch.where(((a | b) & 0x7F) == 0, torch.zeros_like(apart), apart)  # 0 and -0
    assert apart.numel() == 0 or apart.max().item() <= 1
    assert apart.numel() == 0 or (apart > 0).float().mean().item() <= fraction


@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN, Fp8Block(scale="ue8m0")], ids=str)
@pytest.mark.parametrize("shape", [(0, 256), (1, 256), (3, 4096), (513, 1408 * 2), (1030, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_flat_silu_mul_quant_matches(fmt: Fp8Block, shape: tuple[int, int], dtype: torch.dtype) -> None:
    y = gaussian(shape[0], shape[1] + 16, dtype=dtype)[:, 8:-8]
    got, want = silu_mul_quant(y, fmt), silu_oracle.silu_mul_quant(y, fmt)
    assert_codes_near(got.values, want.values)
    a, b = oracle.load_scales(got.scales, fmt), oracle.load_scales(want.scales, fmt)
    assert relative_difference(a, b) < (1e-6 if fmt.scale == "float32" else 0.05)


@pytest.mark.parametrize("slots", [1, 7, 128])
def test_masked_silu_mul_quant_writes_only_rows_in_use(slots: int) -> None:
    y = gaussian(5, slots, 3072)
    count = torch.randint(0, slots + 1, (5,), dtype=torch.int32, device="cuda")
    values, scales = silu_mul_quant_masked(y, count)
    assert scales.stride() == (slots * 12, 1, slots)
    for e, n in enumerate(count.tolist()):
        want = silu_oracle.silu_mul_quant(y[e, :n], FP8_BLOCK128)
        assert_codes_near(values[e, :n], want.values)
        assert relative_difference(scales[e, :n], want.scales) < 1e-6


@pytest.mark.parametrize("dtype", [BF16, F16, E4M3, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(0, 128), (1, 128), (77, 128), (130, 16), (33, 5)])
def test_concat_mla_k_matches(dtype: torch.dtype, tokens: int, heads: int) -> None:
    kv = gaussian(tokens, heads, 256).to(dtype)
    rope_part = gaussian(tokens, 1, 80).to(dtype)[..., 16:]
    out = poison(torch.empty(tokens, heads, 192, dtype=dtype, device="cuda"))
    concat_mla_k(kv[..., :128], rope_part, out)
    want = layout.concat_mla_k(kv[..., :128], rope_part, torch.empty_like(out))
    assert torch.equal(out.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("fmt", [None, FP8_BLOCK128, FP8_BLOCK128_COLUMN], ids=str)
@pytest.mark.parametrize("add", [True, False], ids=["add", "plain"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(0, 128), (1, 7168), (3, 100), (1027, 2048), (64, 7168), (5, 16384)]
)
def test_add_rms_norm_matches(fmt: Fp8Block | None, add: bool, rows: int, columns: int) -> None:
    x = gaussian(rows, columns + 8)[:, :columns]
    residual = gaussian(rows, columns) if add else None
    weight = gaussian(columns)
    theirs = residual.clone() if residual is not None else None
    got = add_rms_norm(x, residual, weight, 1e-6, fmt)
    want = norm.add_rms_norm(x, theirs, weight, 1e-6, fmt)
    if residual is not None and theirs is not None:
        assert torch.equal(residual, theirs)
    if isinstance(got, Quantized) and isinstance(want, Quantized):
        assert_codes_near(got.values, want.values, 2e-3)
        assert relative_difference(got.scales, want.scales) < 1e-5
    else:
        assert isinstance(got, Tensor)
        assert isinstance(want, Tensor)
        assert relative_difference(got, want) < 1e-3


@pytest.mark.parametrize(
    ("tokens", "topk", "columns", "padded"), [(0, 8, 128, 128), (1, 1, 7, 8), (77, 8, 2880, 3072)]
)
def test_finalize_matches(tokens: int, topk: int, columns: int, padded: int) -> None:
    y = gaussian(max(tokens * topk, 1), padded)
    rows = torch.randint(-1, y.shape[0], (tokens, topk), dtype=torch.int32, device="cuda")
    weights = torch.rand(tokens, topk, device="cuda")
    got = finalize(y, rows, weights, columns)
    assert got.shape == (tokens, columns)
    assert relative_difference(got, layout.finalize(y, rows, weights, columns)) < 2e-3


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("nope", [512, 128], ids=["decode", "prefill"])
@pytest.mark.parametrize("cache_dtype", [E4M3, BF16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "out_dtype"), [(0, 128, E4M3), (1, 128, E4M3), (77, 128, E4M3), (33, 5, BF16)]
)
def test_rope_quantize_writes_queries_and_cache(
    interleaved: bool, nope: int, cache_dtype: torch.dtype, tokens: int, heads: int, out_dtype: torch.dtype
) -> None:
    q = gaussian(tokens, heads, nope + 64)
    k = gaussian(tokens, 512 + 64)
    angles = torch.rand(4096, 32, device="cuda") * 6.28
    positions = torch.randint(0, 4096, (tokens,), device="cuda")
    rotary = Rotary(torch.cat((angles.cos(), angles.sin()), dim=1), positions, interleaved)
    slots = torch.randperm(2 * tokens, device="cuda")[:tokens]
    slots[::5] = -1
    caches = [torch.zeros(2 * tokens, 640, device="cuda").to(cache_dtype)[:, :576] for _ in range(2)]
    keys = [torch.zeros(tokens, 64, dtype=BF16, device="cuda") for _ in range(2)]
    outs = [torch.zeros(tokens, heads, nope + 64, device="cuda").to(out_dtype) for _ in range(2)]
    kvs = [LatentCache(k[:, :512], cache, slots, 0.5) for cache in caches]
    poison(outs[0])
    rope_quantize(
        q[..., :nope],
        q[..., nope:],
        k[:, 512:],
        rotary,
        kvs[0],
        out=outs[0],
        q_multiplier=2.0,
        k_rope_out=keys[0],
    )
    rope.rope_quantize(q[..., :nope], q[..., nope:], k[:, 512:], rotary, kvs[1], outs[1], 2.0, keys[1])
    if out_dtype == E4M3:
        assert_codes_near(outs[0], outs[1])
    else:
        assert relative_difference(outs[0], outs[1]) < 1e-3
    if cache_dtype == E4M3:
        assert_codes_near(caches[0].contiguous(), caches[1])
    else:
        assert relative_difference(caches[0], caches[1]) < 1e-3
    assert relative_difference(keys[0], keys[1]) < 1e-3
