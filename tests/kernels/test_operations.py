"""Public operations where there is no GPU: the oracle runs, contracts are checked, properties hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from broadbeam_kernels.add_rms_norm import add_rms_norm
from broadbeam_kernels.concat_mla_k import concat_mla_k
from broadbeam_kernels.finalize import finalize
from broadbeam_kernels.formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_WEIGHT,
    MXFP4,
    NVFP4,
    NVFP4_SWIZZLED,
    Mxfp4,
    Nvfp4,
    Quantized,
)
from broadbeam_kernels.fp4_gemm import fp4_gemm, grouped_fp4_gemm
from broadbeam_kernels.fp4_weights import decode_fp4_weights, prepare_fp4_weights
from broadbeam_kernels.fp8_gemm import fp8_gemm, grouped_fp8_gemm, masked_fp8_gemm
from broadbeam_kernels.grouped_gemm import grouped_gemm
from broadbeam_kernels.pad_quant import pad_quant
from broadbeam_kernels.quantize import dequantize, quantize
from broadbeam_kernels.rope_quantize import LatentCache, Rotary, rope_quantize
from broadbeam_kernels.silu_mul_quant import silu_mul_quant, silu_mul_quant_masked
from broadbeam_kernels.testing import gaussian, relative_difference

BF16 = torch.bfloat16


def values(*shape: int) -> Tensor:
    return gaussian(*shape, device="cpu")


@pytest.mark.parametrize("fmt", [NVFP4, NVFP4_SWIZZLED, MXFP4], ids=str)
@pytest.mark.parametrize(("n", "k"), [(128, 128), (200, 256)])
def test_prepared_fp4_weights_decode_to_what_was_quantised(fmt: Nvfp4 | Mxfp4, n: int, k: int) -> None:
    x = values(n, k)
    x[3] = 0
    x[5, :32] *= 1e-4  # scales among e4m3's denormals
    q = quantize(x, fmt)
    prepared = prepare_fp4_weights([quantize(values(n, k), fmt), q])
    # Within bf16's rounding, value by value: a product that falls on a tie may round either way.
    expected = dequantize(q).float()
    assert ((decode_fp4_weights(prepared, 1) - expected).abs() <= expected.abs() * 2**-8).all()


def test_prepared_fp4_weights_take_no_more_bytes_than_packed_ones() -> None:
    q = quantize(values(256, 512), NVFP4)
    assert prepare_fp4_weights([q]).nbytes == q.nbytes


def test_an_mxfp4_scale_beyond_the_kernels_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"above 2\^10"):
        prepare_fp4_weights([quantize(values(128, 128) * 1e6, MXFP4)])


def test_fp4_products_follow_the_decoded_weights() -> None:
    x, w = values(32, 256), prepare_fp4_weights([quantize(values(136, 256), NVFP4) for _ in range(2)])
    got = grouped_fp4_gemm(x, w, torch.tensor([1, 0], dtype=torch.int32))
    want = torch.cat(
        [x[:16].float() @ decode_fp4_weights(w, 1).T, x[16:].float() @ decode_fp4_weights(w, 0).T]
    )
    assert relative_difference(got, want) < 4e-3
    with pytest.raises(ValueError, match="holds 2 experts"):
        fp4_gemm(x, w)


def test_fp8_products_agree_dense_contiguous_and_masked() -> None:
    a, b = quantize(values(128, 256), FP8_BLOCK128), quantize(values(136, 256), FP8_BLOCK128_WEIGHT)
    dense = fp8_gemm(a, b)
    weights, scales = b.values.unsqueeze(0), b.scales.unsqueeze(0)
    one = torch.zeros(1, dtype=torch.int32)
    assert torch.equal(grouped_fp8_gemm(a.values, a.scales, weights, scales, one), dense)
    count = torch.tensor([128], dtype=torch.int32)
    masked = masked_fp8_gemm(a.values.unsqueeze(0), a.scales.unsqueeze(0), weights, scales, count)
    assert torch.equal(masked[0], dense)
    assert relative_difference(dense, dequantize(a).float() @ dequantize(b).float().T) < 1e-2


def test_fp8_products_refuse_weights_with_row_scales() -> None:
    a = quantize(values(4, 256), FP8_BLOCK128)
    with pytest.raises(ValueError, match="b has 1x128 scales, expected 128x128"):
        fp8_gemm(a, a)


def test_grouped_products_leave_skipped_blocks_alone() -> None:
    a, b = values(256, 64), values(2, 32, 64)
    out = torch.full((256, 32), 7.0, dtype=BF16)
    grouped_gemm(a, b, torch.tensor([-1, 1], dtype=torch.int32), out)
    assert torch.equal(out[:128], torch.full((128, 32), 7.0, dtype=BF16))
    assert relative_difference(out[128:], a[128:].float() @ b[1].float().T) < 4e-3


def test_masked_silu_writes_only_rows_in_use_and_equals_the_flat_one() -> None:
    y, count = values(3, 4, 512), torch.tensor([0, 4, 2], dtype=torch.int32)
    got, scales = silu_mul_quant_masked(y, count)
    assert scales.stride() == (8, 1, 4)
    flat = silu_mul_quant(y[1])
    assert torch.equal(got[1].view(torch.uint8), flat.values.view(torch.uint8))
    assert torch.equal(scales[1], flat.scales)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_rotation_keeps_lengths_and_position_zero_keeps_values(interleaved: bool) -> None:
    angle = torch.outer(torch.arange(8).float(), 10000 ** (-torch.arange(32) / 32))
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    q, k = values(2, 3, 128 + 64), values(2, 512 + 64)
    cache = torch.zeros(4, 576, dtype=BF16)
    rotary = Rotary(cos_sin, torch.tensor([0, 5]), interleaved)
    kv = LatentCache(k[:, :512], cache, torch.tensor([2, -1]))
    out = rope_quantize(q[..., :128], q[..., 128:], k[:, 512:], rotary, kv, out_dtype=BF16)
    assert torch.equal(out[0], q[0])
    assert math.isclose(out[1, 0, 128:].float().norm(), q[1, 0, 128:].float().norm(), rel_tol=1e-2)
    assert torch.equal(cache[2], k[0])
    assert cache[[0, 1, 3]].abs().sum() == 0  # slot -1 writes nowhere


def test_the_residual_is_the_sum_and_the_norm_is_taken_of_it() -> None:
    x, residual, weight = values(3, 128), values(3, 128), torch.ones(128)
    total = (x.float() + residual.float()).to(BF16)
    out = add_rms_norm(x, residual, weight)
    assert torch.equal(residual, total)
    assert isinstance(out, Tensor)
    assert torch.allclose(out.float().square().mean(-1), torch.ones(3), rtol=2e-2)


def test_concatenation_broadcasts_the_rope_part() -> None:
    nope, rope = values(2, 4, 128), values(2, 64)
    out = concat_mla_k(nope, rope)
    assert torch.equal(out[..., :128], nope)
    assert all(torch.equal(out[:, h, 128:], rope) for h in range(4))


def test_padding_appends_zero_columns() -> None:
    x = values(3, 96)
    q = pad_quant(x, 256)
    assert q.shape == (3, 256)
    assert dequantize(q)[:, 96:].abs().sum() == 0


def test_finalize_weighs_sums_and_slices() -> None:
    y = torch.arange(12, dtype=BF16).reshape(3, 4)
    rows, weights = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32), torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert finalize(y, rows, weights, 2).tolist() == [[16.0, 19.0], [12.0, 15.0]]


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_and_one_row_pass_through_every_quantiser(rows: int) -> None:
    x = values(rows, 256)
    for q in (silu_mul_quant(x), pad_quant(x, 384), quantize(x, FP8_BLOCK128)):
        assert isinstance(q, Quantized)
        assert q.values.shape[0] == rows
