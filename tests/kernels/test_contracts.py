"""What each operation refuses at its door: a sentence with the argument, its value and the limit. No GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from broadbeam_kernels import contracts, paths
from broadbeam_kernels.add_rms_norm import add_rms_norm
from broadbeam_kernels.concat_mla_k import concat_mla_k
from broadbeam_kernels.finalize import finalize
from broadbeam_kernels.formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_WEIGHT,
    MXFP4,
    MXFP4_SWIZZLED,
    NVFP4,
    Format,
    Quantized,
)
from broadbeam_kernels.fp4_gemm import fp4_gemm, grouped_fp4_gemm
from broadbeam_kernels.fp4_weights import prepare_fp4_weights
from broadbeam_kernels.fp8_block import dequantize_fp8_block
from broadbeam_kernels.fp8_gemm import fp8_gemm, grouped_fp8_gemm, masked_fp8_gemm
from broadbeam_kernels.grouped_gemm import grouped_gemm
from broadbeam_kernels.masked_gemm import masked_fp4_gemm, masked_gemm, used_blocks
from broadbeam_kernels.mxfp4 import dequantize_mxfp4
from broadbeam_kernels.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from broadbeam_kernels.packed_weights import pack_weights
from broadbeam_kernels.pad_quant import pad_quant
from broadbeam_kernels.quantize import dequantize, quantize
from broadbeam_kernels.rope_quantize import LatentCache, Rotary, rope_quantize
from broadbeam_kernels.scaled_gemm import masked_scaled_gemm, scaled_gemm
from broadbeam_kernels.silu_mul_quant import silu_mul_quant, silu_mul_quant_masked
from broadbeam_kernels.testing import gaussian

BF16, F32 = torch.bfloat16, torch.float32


def values(*shape: int) -> Tensor:
    return gaussian(*shape, device="cpu")


def ints(*items: int) -> Tensor:
    return torch.tensor(items, dtype=torch.int32)


def shifted(rows: int, columns: int, by: int, dtype: torch.dtype = BF16) -> Tensor:
    """(rows, columns) whose rows are as far apart as alignment asks, but start `by` values too late."""
    return torch.zeros(rows, columns + 128).to(dtype)[:, by : by + columns]


def twice(x: Tensor) -> Tensor:
    """The same values, two apart."""
    return torch.stack((x, torch.zeros_like(x)), dim=-1).flatten()[::2]


def refused(case: Callable[[], object], message: str, id: str) -> object:  # noqa: A002
    return pytest.param(case, message, id=id)


X = values(2, 128)
A, B = quantize(values(128, 256), FP8_BLOCK128), quantize(values(136, 256), FP8_BLOCK128_WEIGHT)
EXPERT = (B.values.unsqueeze(0), B.scales.unsqueeze(0))
SLOTS = (A.values.unsqueeze(0), A.scales.unsqueeze(0))
NV, MX = quantize(values(8, 128), NVFP4), quantize(values(8, 128), MXFP4)
TILES = prepare_fp4_weights([NV, NV])
PACKED = pack_weights([quantize(values(16, 128), MXFP4)] * 2)
ROTARY = Rotary(torch.rand(8, 64), torch.tensor([0, 1]))
Q = (values(2, 3, 128), values(2, 3, 64), values(2, 64))


def cache(**changes: Tensor) -> LatentCache:
    whole = LatentCache(values(2, 128), torch.zeros(4, 192, dtype=BF16), torch.tensor([0, 1]))
    return replace(whole, **changes)


QUANTISERS = [
    refused(lambda: quantize_nvfp4(X, global_scale=torch.zeros(1)), "global_scale is 0.0", "no global scale"),
    refused(
        lambda: quantize_nvfp4(X, global_scale=torch.ones(2)), "has 2 elements, expected 1", "two of them"
    ),
    refused(
        lambda: quantize_nvfp4(X, global_scale=torch.ones(1, device="meta")),
        "global_scale is on meta, expected cpu",
        "a global scale elsewhere",
    ),
    refused(lambda: dequantize_nvfp4(MX), "q is in Mxfp4.*, expected Nvfp4", "not NVFP4"),
    refused(lambda: dequantize_mxfp4(NV), "q is in Nvfp4.*, expected Mxfp4", "not MXFP4"),
    refused(lambda: dequantize_fp8_block(NV), "q is in Nvfp4.*, expected Fp8Block", "not FP8"),
    refused(
        lambda: dequantize(replace(NV, global_scale=None)), "needs its global scale", "without global scale"
    ),
    refused(
        lambda: dequantize(replace(MX, global_scale=torch.ones(1))), "which only NVFP4 has", "one too many"
    ),
    refused(
        lambda: dequantize(replace(MX, shape=(8, 160))),
        r"q has shape \(8, 64\), expected \(8, 80\)",
        "another shape",
    ),
    refused(lambda: dequantize(replace(A, scales=A.scales[:, :1])), r"q_scales has shape", "too few scales"),
    refused(lambda: dequantize(NV, F32), "dtype is torch.float32", "a dtype nobody writes"),
    refused(lambda: pad_quant(X, 256, NVFP4), "fmt is Nvfp4", "padding to NVFP4"),  # type: ignore[arg-type]
    refused(lambda: pad_quant(X, 256, MXFP4_SWIZZLED), "swizzled scales, expected linear", "padded swizzled"),
    refused(lambda: pad_quant(X, 100), "columns=100 is less than x's 128", "padding to less"),
    refused(lambda: silu_mul_quant(X), "is not a multiple of 256", "half a group"),
    refused(
        lambda: silu_mul_quant_masked(values(2, 3, 256), ints(1, 4)),
        r"count holds 4, not within 0\.\.3",
        "more rows than slots",
    ),
]
FUSED = [
    refused(lambda: add_rms_norm(X, None, torch.ones(64)), r"weight has shape \(64,\)", "a short weight"),
    refused(lambda: add_rms_norm(X, None, torch.ones(128), -1.0), "epsilon=-1.0", "a negative epsilon"),
    refused(
        lambda: add_rms_norm(X, X[:1].expand(2, 128), torch.ones(128)), "they overlap", "one residual for all"
    ),
    refused(
        lambda: add_rms_norm(X, None, torch.ones(128), fmt=FP8_BLOCK128_WEIGHT),
        "128x128 scales, expected 1x128",
        "a norm in tiles",
    ),
    refused(
        lambda: finalize(X, ints(0, 2).view(1, 2), torch.ones(1, 2)),
        r"rows holds 2, not within -1\.\.1",
        "a row that is not there",
    ),
    refused(
        lambda: concat_mla_k(values(2, 4, 256)[..., ::2], values(2, 64)),
        "k_nope's last dimension has stride 2, expected 1",
        "a key with gaps",
    ),
    refused(lambda: concat_mla_k(values(2, 4, 96), values(2, 64)), "nope=96", "no power of two"),
    refused(
        lambda: rope_quantize(*Q, replace(ROTARY, positions=torch.tensor([0, 8]))),
        r"positions holds 8, not within 0\.\.7",
        "a position past the angles",
    ),
    refused(
        lambda: rope_quantize(*Q, ROTARY, cache(slots=torch.tensor([0, 4]))),
        r"slots holds 4, not within -1\.\.3",
        "a slot past the cache",
    ),
    refused(
        lambda: rope_quantize(*Q, ROTARY, cache(kv_c=values(2, 96), cache=torch.zeros(4, 160, dtype=BF16))),
        "latent=96 is not a power of two",
        "a latent width no kernel has",
    ),
    refused(lambda: rope_quantize(*Q, ROTARY, out_dtype=F32), "out is torch.float32", "queries in float32"),
]
PRODUCTS = [
    refused(lambda: fp8_gemm(A, B, dtype=F32), "dtype is torch.float32", "a product in float32"),
    refused(lambda: fp8_gemm(A, replace(B, shape=(264, 256))), r"b has shape \(136, 256\)", "another shape"),
    refused(
        lambda: fp8_gemm(replace(A, values=shifted(128, 256, 8, torch.float8_e4m3fn)), B),
        "a starts 8 bytes past a multiple of 16",
        "codes between 16 bytes",
    ),
    refused(
        lambda: fp8_gemm(replace(A, values=A.values[:1].expand(128, 256)), B),
        "they overlap",
        "one row for all",
    ),
    refused(
        lambda: fp8_gemm(A, B, out=shifted(128, 136, 1)), "out starts 2 bytes past", "output between 16 bytes"
    ),
    refused(
        lambda: fp8_gemm(quantize(values(2, 0), FP8_BLOCK128), quantize(values(8, 0), FP8_BLOCK128_WEIGHT)),
        "k=0, expected at least 128",
        "nothing to sum",
    ),
    refused(
        lambda: grouped_fp8_gemm(A.values, A.scales, *EXPERT, ints(1)),
        r"experts holds 1, not within -1\.\.0",
        "an expert that is not there",
    ),
    refused(
        lambda: grouped_fp8_gemm(A.values[:96], A.scales[:96], *EXPERT, ints(0)),
        "blocks of 96 rows",
        "a block no tile fits",
    ),
    refused(
        lambda: masked_fp8_gemm(*SLOTS, *EXPERT, ints(128), torch.zeros(128, 1, 136, dtype=BF16)),
        r"out has shape \(128, 1, 136\), expected \(1, 128, 136\)",
        "output transposed",
    ),
    refused(
        lambda: masked_fp8_gemm(*SLOTS, *EXPERT, ints(128), torch.zeros(1, 136, 128, dtype=BF16).mT),
        "out has strides .*, it must be contiguous",
        "output that a flat view would copy",
    ),
    refused(
        lambda: grouped_gemm(
            X.repeat(64, 1), values(1, 16, 128), ints(0), torch.zeros(128, 32).bfloat16()[:, ::2]
        ),
        "out's last dimension has stride 2, expected 1",
        "output with gaps",
    ),
    refused(
        lambda: grouped_gemm(values(256, 64), values(1, 16, 64), twice(ints(0, 0))),
        "experts has stride 2, expected 1",
        "experts with gaps",
    ),
    refused(
        lambda: masked_gemm(values(2, 128, 64), values(2, 16, 64), twice(ints(1, 2))),
        "count has stride 2, expected 1",
        "counts with gaps",
    ),
    refused(
        lambda: masked_gemm(values(1, 128, 64), values(1, 16, 64), ints(129)),
        r"count holds 129, not within 0\.\.128",
        "more rows than slots",
    ),
    refused(lambda: used_blocks(ints(1), 16, 0), "block=0, expected at least 1", "blocks of nothing"),
    refused(
        lambda: scaled_gemm(NV, NV, torch.zeros(8, 16)[:, ::2]), "out's last dimension has stride 2", "gaps"
    ),
    refused(
        lambda: masked_scaled_gemm(quantize(values(32, 128), MXFP4), PACKED, ints(17, 0)),
        r"count holds 17, not within 0\.\.16",
        "more scaled rows than slots",
    ),
    refused(
        lambda: scaled_gemm(NV, replace(NV, scales=NV.scales.view(torch.uint8))),
        "b_scales is torch.uint8",
        "scales of another type",
    ),
]
FP4 = [
    refused(lambda: prepare_fp4_weights([]), "no weights given", "no weights"),
    refused(lambda: prepare_fp4_weights([A]), r"weights\[0\] is in Fp8Block", "weights in FP8"),
    refused(
        lambda: prepare_fp4_weights([NV, replace(NV, global_scale=None)]),
        r"weights\[1\] is in NVFP4 and needs its global scale",
        "weights without global scale",
    ),
    refused(
        lambda: prepare_fp4_weights([replace(NV, global_scale=torch.tensor([float("inf")]))]),
        "global_scale is inf, expected a positive finite number",
        "weights of an infinite scale",
    ),
    refused(
        lambda: prepare_fp4_weights([NV, quantize(values(16, 128), NVFP4)]),
        "differ in format or shape",
        "differ",
    ),
    refused(
        lambda: grouped_fp4_gemm(values(32, 128), TILES, ints(0, 2)),
        r"experts holds 2, not within -1\.\.1",
        "an FP4 expert that is not there",
    ),
    refused(
        lambda: fp4_gemm(quantize(values(4, 128), MXFP4), prepare_fp4_weights([NV])),
        "x is in Mxfp4.*, expected Fp8Block",
        "FP4 activations",
    ),
    refused(
        lambda: fp4_gemm(shifted(4, 128, 1), prepare_fp4_weights([NV])), "x starts 2 bytes past", "between"
    ),
    refused(
        lambda: masked_fp4_gemm(values(2, 16, 128), TILES, ints(17, 0)),
        r"count holds 17, not within 0\.\.16",
        "more FP4 rows than slots",
    ),
]


@pytest.mark.parametrize(("call", "message"), [*QUANTISERS, *FUSED, *PRODUCTS, *FP4])
def test_a_broken_contract_is_refused_with_its_argument_value_and_limit(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one: what lies on it has no values, so nothing past the door may run."""
    monkeypatch.setattr(paths, "_capability", lambda _index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, FP8_BLOCK128, FP8_BLOCK128_WEIGHT], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [(1, 2**30 + 128, "columns=1073741952"), (2**20, 2**20, "scales, at most 2147475456")],
    ids=["a row", "all rows"],
)
def test_what_kernels_cannot_count_in_32_bits_is_refused(
    fmt: Format, rows: int, columns: int, message: str
) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        quantize(torch.empty(rows, columns, dtype=BF16, device="cuda"), fmt)


@pytest.mark.usefixtures("hopper")
def test_operands_on_a_gpu_that_is_not_the_current_one_are_refused() -> None:
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match="operands are on cuda:1, the current device is cuda:0"),
    ):
        contracts.launches(torch.empty(2, 128, dtype=BF16, device="cuda:1"))


@pytest.mark.usefixtures("hopper")
def test_amds_gpus_run_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with FakeTensorMode():
        x = torch.empty(4, 256, dtype=BF16, device="cuda")
        assert not contracts.launches(x)
        assert quantize(x, NVFP4).values.is_cuda
        assert silu_mul_quant(x).shape == (4, 128)


def test_a_quantised_tensor_without_columns_passes() -> None:
    empty = quantize(values(3, 0), NVFP4)
    assert isinstance(empty, Quantized)
    assert dequantize(empty).shape == (3, 0)
