"""Quantisation kernels against their oracles, codes bit for bit, on fresh inputs and ugly shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
from broadbeam_kernels.reference import layout
from broadbeam_kernels.reference import quantize as oracle
from broadbeam_kernels.testing import gaussian

pytestmark = pytest.mark.gpu

FORMATS: list[Format] = [
    NVFP4,
    NVFP4_SWIZZLED,
    MXFP4,
    MXFP4_SWIZZLED,
    FP8_BLOCK128,
    FP8_BLOCK128_COLUMN,
    FP8_BLOCK128_WEIGHT,
    Fp8Block(scale="pow2"),
    Fp8Block(scale="ue8m0"),
    Fp8Block(scale="ue8m0", layout="column"),
    Fp8Block(rows=128, scale="pow2"),
]
SHAPES = [(0, 128), (1, 32), (1, 7168), (3, 96), (127, 160), (130, 2880), (257, 7168), (4099, 1536)]


def want(x: Tensor, fmt: Format) -> Quantized:
    match fmt:
        case Nvfp4():
            return oracle.quantize_nvfp4(x, fmt)
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


def raw(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(raw(a), raw(b))


def assert_same(got: Quantized, expected: Quantized) -> None:
    assert same_bits(got.scales, expected.scales)
    wrong = (got.values.view(torch.uint8) != expected.values.view(torch.uint8)).sum().item()
    assert wrong == 0, f"{wrong} of {got.values.numel()} codes differ"


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_and_scales_match_the_oracle_bit_for_bit(
    fmt: Format, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = gaussian(*shape, dtype=dtype)
    if not isinstance(fmt, Fp8Block):
        x = x[:, : shape[1] // fmt.block * fmt.block]
    got = quantize(x, fmt)
    assert_same(got, want(x, fmt))
    assert same_bits(dequantize(got, dtype), decoded(got, dtype))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 8], ids=lambda n: f"offset {n}")
def test_strided_and_misaligned_rows_give_the_same_codes(fmt: Format, offset: int) -> None:
    wide = gaussian(67, 1024 + offset)
    x = wide[::2, offset : offset + 512]
    assert_same(quantize(x, fmt), want(x, fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_transposed_input_gives_the_same_codes(fmt: Format) -> None:
    x = gaussian(256, 64).t()
    assert_same(quantize(x, fmt), want(x, fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_extremes_and_ties_match_the_oracle(fmt: Format) -> None:
    x = torch.zeros(64, 512, device="cuda")
    x[1] = 3.0e38
    x[2] = torch.linspace(-6, 6, 512, device="cuda")
    x[3:8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], device="cuda").repeat(64)
    x[8] = 1e-38
    x[9, 0] = 1.0
    x[10] = -0.0  # a sign that a wrong division loses
    x[10, ::16] = 1.0
    x = x.to(torch.bfloat16)
    assert_same(quantize(x, fmt), want(x, fmt))
    one = torch.ones(1, device="cuda")
    if isinstance(fmt, Nvfp4):
        assert_same(quantize_nvfp4(x, fmt, one), oracle.quantize_nvfp4(x, fmt, one))


@pytest.mark.parametrize("fmt", [NVFP4, NVFP4_SWIZZLED], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("g", [1e-3, 1.0, 37.7, 2e5], ids=lambda g: f"g {g:g}")
def test_a_given_global_scale_is_taken_as_it_is(fmt: Nvfp4, dtype: torch.dtype, g: float) -> None:
    x, scale = gaussian(131, 1040, dtype=dtype), torch.tensor([g], device="cuda")
    assert_same(quantize_nvfp4(x, fmt, scale), oracle.quantize_nvfp4(x, fmt, scale))


@pytest.mark.parametrize("fmt", [NVFP4, NVFP4_SWIZZLED], ids=str)
def test_a_computed_global_scale_is_returned(fmt: Nvfp4) -> None:
    x = gaussian(4099, 1536)
    got, expected = quantize_nvfp4(x, fmt), oracle.quantize_nvfp4(x, fmt)
    assert got.global_scale is not None
    assert expected.global_scale is not None
    assert same_bits(got.global_scale, expected.global_scale)


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (257, 7168)], ids=str)
def test_amax_matches(shape: tuple[int, int]) -> None:
    x = gaussian(*shape)
    assert amax(x).item() == x.abs().max().item()
    assert amax(x[:, ::2]).item() == x[:, ::2].abs().max().item()


@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN, MXFP4], ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "columns"),
    [(0, 2880, 3072), (1, 2, 128), (77, 2880, 3072), (130, 256, 256), (67, 250, 384), (3, 96, 1024)],
)
def test_padding_and_quantising_at_once_equals_doing_one_after_the_other(
    fmt: Fp8Block | Mxfp4, rows: int, n: int, columns: int
) -> None:
    x = gaussian(rows, n + 2)[:, 2:]
    assert_same(pad_quant(x, columns, fmt), layout.pad_quant(x, columns, fmt))
