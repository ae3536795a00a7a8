"""The oracles themselves: known codes, ties, bounds, and the scale layouts' inverses. No GPU."""

from __future__ import annotations

import pytest
import torch

from broadbeam_kernels.formats import (
    E2M1_VALUES,
    FP8_BLOCK128,
    FP8_BLOCK128_COLUMN,
    FP8_BLOCK128_WEIGHT,
    MXFP4,
    MXFP4_SWIZZLED,
    NVFP4,
    NVFP4_SWIZZLED,
    Format,
    Fp8Block,
)
from broadbeam_kernels.nvfp4 import quantize_nvfp4
from broadbeam_kernels.quantize import dequantize, quantize
from broadbeam_kernels.reference.quantize import (
    ceil_pow2,
    e2m1_codes,
    e2m1_values,
    mxfp4_exponents,
    pack,
    swizzle,
    unpack,
    unswizzle,
)
from broadbeam_kernels.testing import relative_difference


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0),
        (-0.0, 8),
        (0.25, 0),
        (0.2500001, 1),
        (0.75, 2),
        (0.7499999, 1),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
        (5.000001, 7),
        (1e9, 7),
        (-5.0, 14),
        (-0.1, 8),
    ],
)
def test_e2m1_rounds_to_nearest_with_ties_to_the_even_code(value: float, code: int) -> None:
    assert e2m1_codes(torch.tensor([value])).item() == code


def test_every_e2m1_code_survives_a_round_trip() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(e2m1_codes(e2m1_values(codes)), codes)
    assert e2m1_values(codes[:8]).tolist() == list(E2M1_VALUES)


def test_packing_puts_even_elements_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (127, 3), (128, 4), (130, 17), (256, 448)])
def test_swizzled_scales_lie_where_the_tensor_core_reads_them(rows: int, blocks: int) -> None:
    scales = torch.randint(1, 255, (rows, blocks), dtype=torch.uint8)
    flat = swizzle(scales)
    row = torch.arange(rows)[:, None]
    block = torch.arange(blocks)[None, :]
    tiles = -(-blocks // 4)
    at = ((row >> 7) * tiles + (block >> 2)) * 512 + (row & 31) * 16 + ((row >> 5) & 3) * 4 + (block & 3)
    assert torch.equal(flat[at], scales)
    assert flat.sum() == scales.sum()  # the padding is zero
    assert torch.equal(unswizzle(flat, rows, blocks), scales)


@pytest.mark.parametrize(
    ("amax", "exponent"),
    [(6.0, 127), (4.0, 127), (3.9, 127), (3.5, 127), (3.4999, 126), (7.0, 128), (0.0, 0), (2.0**-130, 0)],
)
def test_mxfp4_scales_round_mantissas_from_seven_quarters_up(amax: float, exponent: int) -> None:
    assert mxfp4_exponents(torch.tensor([amax])).item() == exponent


@pytest.mark.parametrize("exponent", [-126, -20, 0, 1, 90])
def test_powers_of_two_are_their_own_ceiling_and_the_next_float_is_not(exponent: int) -> None:
    power = torch.tensor([2.0**exponent])
    assert ceil_pow2(power).item() == power.item()
    assert ceil_pow2(torch.nextafter(power, power * 2)).item() == 2 * power.item()


BOUNDS: list[tuple[Format, float]] = [
    (NVFP4, 0.11),
    (NVFP4_SWIZZLED, 0.11),
    (MXFP4, 0.13),
    (MXFP4_SWIZZLED, 0.13),
    (FP8_BLOCK128, 0.03),
    (FP8_BLOCK128_COLUMN, 0.03),
    (FP8_BLOCK128_WEIGHT, 0.03),
    (Fp8Block(scale="pow2"), 0.03),
    (Fp8Block(scale="ue8m0"), 0.03),
    (Fp8Block(rows=128, scale="ue8m0"), 0.03),
]


@pytest.mark.parametrize(("fmt", "bound"), BOUNDS, ids=lambda v: str(v))
@pytest.mark.parametrize("rows", [0, 1, 129])
def test_a_round_trip_stays_within_the_formats_error(fmt: Format, bound: float, rows: int) -> None:
    # 2,048 values a row put every bound at least 6 standard deviations above the mean error (256: only 2).
    x = torch.randn(rows, 2048).to(torch.bfloat16)
    assert relative_difference(dequantize(quantize(x, fmt)), x) <= bound


@pytest.mark.parametrize("fmt", [f for f, _ in BOUNDS], ids=str)
def test_zeros_stay_zeros(fmt: Format) -> None:
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    assert torch.equal(dequantize(quantize(x, fmt)), x)


def test_column_scales_are_dense_along_rows_and_padded_to_four() -> None:
    q = quantize(torch.randn(5, 256).to(torch.bfloat16), FP8_BLOCK128_COLUMN)
    assert q.scales.stride() == (1, 8)


def test_a_given_global_scale_is_used_as_it_is() -> None:
    x = torch.full((1, 16), 3.0, dtype=torch.bfloat16)
    q = quantize_nvfp4(x, global_scale=torch.tensor([2.0]))
    assert q.scales.float().item() == 1.0  # e4m3(2 * 3 / 6)
    assert set(unpack(q.values).flatten().tolist()) == {7}  # 3 * (1 / (1 * (1 / 2))) = 6


@pytest.mark.parametrize(
    ("x", "fmt", "words"),
    [
        (torch.zeros(2, 24, dtype=torch.bfloat16), NVFP4, "columns=24 is not a multiple of 16"),
        (torch.zeros(2, 48, dtype=torch.bfloat16), MXFP4, "columns=48 is not a multiple of 32"),
        (torch.zeros(2, 128), FP8_BLOCK128, "x is torch.float32"),
        (torch.zeros(128, dtype=torch.bfloat16), NVFP4, "x has 1 dimensions, expected 2"),
    ],
    ids=["odd block", "odd mx block", "wrong type", "wrong rank"],
)
def test_a_broken_contract_is_named_with_its_value_and_limit(
    x: torch.Tensor, fmt: Format, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        quantize(x, fmt)


def test_column_layout_is_refused_for_weights() -> None:
    with pytest.raises(ValueError, match="row-major"):
        Fp8Block(rows=128, layout="column")
