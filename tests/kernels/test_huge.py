"""Past 2^31 values, rows and experts at the far end are what they are alone. Without a GPU: the same, small.

What a 32-bit offset would get wrong shows at the end of a tensor, so an operation on all of it is compared
there with the operation on its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from broadbeam_kernels.add_rms_norm import add_rms_norm
from broadbeam_kernels.concat_mla_k import concat_mla_k
from broadbeam_kernels.finalize import finalize
from broadbeam_kernels.formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_COLUMN,
    FP8_BLOCK128_WEIGHT,
    MXFP4,
    NVFP4,
    Fp8Block,
    Mxfp4,
    Nvfp4,
)
from broadbeam_kernels.fp8_gemm import grouped_fp8_gemm
from broadbeam_kernels.grouped_gemm import grouped_gemm
from broadbeam_kernels.nvfp4 import amax, quantize_nvfp4
from broadbeam_kernels.quantize import dequantize, quantize
from broadbeam_kernels.silu_mul_quant import silu_mul_quant
from broadbeam_kernels.testing import gaussian

HUGE = torch.cuda.is_available()
DEVICE = "cuda" if HUGE else "cpu"
COLUMNS = 7168 if HUGE else 256
ROWS = 2**31 // 7168 + 3 if HUGE else 40
EXPERTS, N, K = (80, 4096, 7168) if HUGE else (3, 32, 128)  # 2.3e9 weights
END = 3  # rows
pytestmark = [pytest.mark.gpu] if HUGE else []


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    if HUGE:
        torch.cuda.empty_cache()


def tall(rows: int, columns: int = COLUMNS) -> Tensor:
    """(rows, columns) bf16: some random rows over and over, and random ones of its own at the end."""
    x = gaussian(min(rows, 1021), columns, device=DEVICE).repeat(-(-rows // 1021), 1)[:rows]
    x[-END:] = gaussian(END, columns, device=DEVICE)
    return x


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, b)))


@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN, MXFP4], ids=str)
def test_the_last_rows_have_the_codes_they_have_alone(fmt: Fp8Block | Mxfp4) -> None:
    x = tall(ROWS)
    q, alone = quantize(x, fmt), quantize(x[-END:].clone(), fmt)
    assert same(q.values[-END:], alone.values)
    assert same(q.scales[-END:], alone.scales)
    assert same(dequantize(q)[-END:], dequantize(alone))


def test_the_last_rows_have_the_nvfp4_codes_they_have_alone() -> None:
    x, g = tall(ROWS), torch.full((1,), 7.0, device=DEVICE)
    q, alone = quantize_nvfp4(x, NVFP4, g), quantize_nvfp4(x[-END:].clone(), NVFP4, g)
    assert same(q.values[-END:], alone.values)
    assert same(q.scales[-END:], alone.scales)
    assert same(dequantize(q)[-END:], dequantize(alone))


@pytest.mark.parametrize("rows", [2 * ROWS - 12, 2 * ROWS], ids=["just below", "above"])
@pytest.mark.parametrize("fmt", [NVFP4, Nvfp4(scales="swizzled")], ids=str)
def test_the_last_value_of_2_to_the_31_pairs_sets_the_global_scale(rows: int, fmt: Nvfp4) -> None:
    x = tall(rows)
    x[-1, -1] = -30000.0
    assert amax(x).item() == x[-1, -1].abs().item()
    g = quantize(x, fmt).global_scale
    assert g is not None
    assert g.item() == pytest.approx(2688 / 30000, rel=5e-3)


def test_the_last_rows_are_normalised_as_they_are_alone() -> None:
    x, residual, weight = tall(ROWS), tall(ROWS), gaussian(COLUMNS, device=DEVICE)
    ends = x[-END:].clone(), residual[-END:].clone()
    whole, alone = add_rms_norm(x, residual, weight), add_rms_norm(*ends, weight)
    assert isinstance(whole, Tensor)
    assert isinstance(alone, Tensor)
    assert same(whole[-END:], alone)
    assert same(residual[-END:], ends[1])


def test_the_last_rows_are_activated_as_they_are_alone() -> None:
    y = tall(ROWS)
    whole, alone = silu_mul_quant(y), silu_mul_quant(y[-END:].clone())
    assert same(whole.values[-END:], alone.values)
    assert same(whole.scales[-END:], alone.scales)


def test_the_last_slots_are_gathered() -> None:
    y = tall(ROWS)
    rows = torch.tensor([[ROWS - 1, ROWS - 2]], dtype=torch.int32, device=DEVICE)
    weights = torch.ones(1, 2, device=DEVICE)
    near = torch.tensor([[END - 1, END - 2]], dtype=torch.int32, device=DEVICE)
    assert same(finalize(y, rows, weights), finalize(y[-END:].clone(), near, weights))


def test_the_last_tokens_have_their_keys() -> None:
    tokens = 2**31 // (128 * 128) + END if HUGE else 20
    nope, rope = tall(tokens, 128 * 128).view(tokens, 128, 128), gaussian(tokens, 64, device=DEVICE)
    alone = concat_mla_k(nope[-END:].clone(), rope[-END:].clone())
    assert same(concat_mla_k(nope, rope)[-END:], alone)


def assert_the_last_expert_multiplies(product: Callable[[slice, int], Tensor]) -> None:
    assert same(product(slice(None), EXPERTS - 1), product(slice(EXPERTS - 1, None), 0))


def index(expert: int) -> Tensor:
    return torch.full((1,), expert, dtype=torch.int32, device=DEVICE)


def test_the_last_of_many_bf16_experts_multiplies() -> None:
    x, w = gaussian(128, K, device=DEVICE), tall(EXPERTS * N, K).view(EXPERTS, N, K)
    assert_the_last_expert_multiplies(lambda those, expert: grouped_gemm(x, w[those], index(expert)))


def test_the_last_of_many_fp8_experts_multiplies() -> None:
    a, b = quantize(gaussian(128, K, device=DEVICE), FP8_BLOCK128), tall(EXPERTS * N, K)
    q = quantize(b, FP8_BLOCK128_WEIGHT if N % 128 == 0 else FP8_BLOCK128)
    w = q.values.view(EXPERTS, N, K)
    scales = torch.rand(EXPERTS, -(-N // 128), K // 128, device=DEVICE) + 0.5
    assert_the_last_expert_multiplies(
        lambda those, expert: grouped_fp8_gemm(a.values, a.scales, w[those], scales[those], index(expert))
    )
