"""Portable, block-scaled and masked products against float64 products, on fresh inputs and ugly shapes.

On a Hopper the portable bodies run because the path is forced. Block scales are applied by the decoding body,
and by `tl.dot_scaled` as the compiler emulates it: that checks operands and layouts, not Blackwell's unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from broadbeam_kernels import paths, portable_gemm, scaled_gemm
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
)
from broadbeam_kernels.fp4_gemm import fp4_gemm, grouped_fp4_gemm
from broadbeam_kernels.fp4_weights import decode_fp4_weights, prepare_fp4_weights
from broadbeam_kernels.fp8_gemm import fp8_gemm, grouped_fp8_gemm, masked_fp8_gemm
from broadbeam_kernels.grouped_gemm import grouped_gemm
from broadbeam_kernels.masked_gemm import masked_fp4_gemm, masked_gemm, used_blocks
from broadbeam_kernels.packed_weights import PackedWeights, one_matrix, pack_weights
from broadbeam_kernels.quantize import quantize
from broadbeam_kernels.reference import masked_gemm as masked_oracle
from broadbeam_kernels.reference import scaled_gemm as oracle
from broadbeam_kernels.reference.gemm import decode_rows, decode_tiles
from broadbeam_kernels.testing import gaussian, poison, relative_difference

pytestmark = pytest.mark.gpu

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BOUND = 4e-3  # bf16 output alone is 1.7e-3 away
EXACT = 1e-5  # float32 output of exact operands


@pytest.fixture
def portable() -> Iterator[None]:
    with paths.forced("portable"):
        yield


def exact(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return decode_rows(a, a_scales, F64) @ decode_tiles(b, b_scales, F64).T


def weights(experts: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    qs = [quantize(gaussian(n, k), FP8_BLOCK128_WEIGHT) for _ in range(experts)]
    return torch.stack([q.values for q in qs]), torch.stack([q.scales for q in qs])


def counts(experts: int, slots: int) -> Tensor:
    """Fresh counts; the first experts have none, all and one of their slots in use."""
    count = torch.randint(0, slots + 1, (experts,), dtype=torch.int32, device="cuda")
    edges = torch.tensor([0, slots, 1], dtype=torch.int32, device="cuda")
    count[: min(experts, 3)] = edges[:experts]
    return count


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN, Fp8Block(scale="pow2")], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 64, 65, 300, 1024])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (256, 128), (136, 640)])
def test_portable_fp8_gemm_matches(fmt: Fp8Block, rows: int, n: int, k: int) -> None:
    a, b = quantize(gaussian(rows, k), fmt), quantize(gaussian(n, k), FP8_BLOCK128_WEIGHT)
    out = poison(torch.empty(rows, n, dtype=BF16, device="cuda"))
    fp8_gemm(a, b, out)
    assert relative_difference(out, exact(a.values, a.scales, b.values, b.scales)) < BOUND


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_fp8_codes_multiply_as_halves_where_tensor_cores_lack_them(rows: int) -> None:
    a, b = quantize(gaussian(rows, 640), FP8_BLOCK128), quantize(gaussian(136, 640), FP8_BLOCK128_WEIGHT)
    out = poison(torch.empty(rows, 136, dtype=F32, device="cuda"))
    tile = {"BM": 64, "BN": 64, "STAGES": 2, "GROUP": 4, "AS_HALF": True, "POW2": False, "num_warps": 4}
    portable_gemm.launch(a.values, b.values, out, a_scales=a.scales, b_scales=b.scales, tile=tile)
    assert relative_difference(out, exact(a.values, a.scales, b.values, b.scales)) < EXACT


@pytest.mark.parametrize("bm", [16, 128])
def test_powers_of_two_go_to_the_tensor_core_as_scales(bm: int) -> None:
    """`tl.dot_scaled` as Triton emulates it on Hopper."""
    a = quantize(gaussian(300, 640), Fp8Block(scale="pow2"))
    b = quantize(gaussian(264, 640), Fp8Block(rows=128, scale="pow2"))
    out = poison(torch.empty(300, 264, dtype=F32, device="cuda"))
    tile = {"BM": bm, "BN": 128, "STAGES": 2, "GROUP": 4, "AS_HALF": False, "POW2": True}
    tile["num_warps"] = 4 if bm == 16 else 8
    portable_gemm.launch(a.values, b.values, out, a_scales=a.scales, b_scales=b.scales, tile=tile)
    assert relative_difference(out, exact(a.values, a.scales, b.values, b.scales)) < EXACT


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("block", [128, 256])
def test_portable_contiguous_fp8_gemm_matches(block: int) -> None:
    a, (b, b_scales) = quantize(gaussian(9 * block, 512), FP8_BLOCK128_COLUMN), weights(4, 2112, 512)
    index = torch.randint(-1, 4, (9,), dtype=torch.int32, device="cuda")
    out = torch.zeros(9 * block, 2112, dtype=BF16, device="cuda")
    grouped_fp8_gemm(a.values, a.scales, b, b_scales, index, out)
    for i, e in enumerate(index.tolist()):
        rows = slice(i * block, (i + 1) * block)
        want = torch.zeros_like(out[rows])
        if e >= 0:
            want = exact(a.values[rows], a.scales[rows], b[e], b_scales[e])
        assert relative_difference(out[rows], want) < BOUND


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize(("experts", "slots", "n", "k"), [(1, 128, 256, 128), (5, 256, 2112, 512)])
def test_portable_masked_fp8_gemm_matches(experts: int, slots: int, n: int, k: int) -> None:
    a, (b, b_scales) = quantize(gaussian(experts * slots, k), FP8_BLOCK128), weights(experts, n, k)
    values, scales = a.values.view(experts, slots, k), a.scales.view(experts, slots, k // 128)
    count = counts(experts, slots)
    for layout in (scales, scales.transpose(1, 2).contiguous().transpose(1, 2)):
        got = masked_fp8_gemm(values, layout, b, b_scales, count)
        for e, rows in enumerate(count.tolist()):
            want = exact(values[e, :rows], scales[e, :rows], b[e], b_scales[e])
            assert relative_difference(got[e, :rows], want) < BOUND


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize(
    ("blocks", "experts", "n", "k"), [(1, 1, 256, 64), (9, 4, 2112, 520), (24, 32, 1408, 1024)]
)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_portable_grouped_gemm_matches(
    block: int, blocks: int, experts: int, n: int, k: int, dtype: torch.dtype
) -> None:
    a, b = gaussian(blocks * block, k, dtype=dtype), torch.randn(experts, n, k, device="cuda").to(dtype)
    index = torch.randint(0, experts, (blocks,), dtype=torch.int32, device="cuda")
    out = poison(torch.empty(blocks * block, n, dtype=dtype, device="cuda"))
    grouped_gemm(a, b, index, out)
    for i, e in enumerate(index.tolist()):
        rows = slice(i * block, (i + 1) * block)
        assert relative_difference(out[rows], a[rows].double() @ b[e].double().T) < BOUND


@pytest.mark.parametrize("path", [None, "portable"])
@pytest.mark.parametrize(
    ("experts", "slots", "n", "k"),
    [(1, 128, 256, 64), (5, 256, 2112, 520), (40, 128, 136, 256), (3, 384, 264, 1024)],
)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_masked_gemm_matches(
    path: paths.MatrixPath | None, experts: int, slots: int, n: int, k: int, dtype: torch.dtype
) -> None:
    a, b = gaussian(experts, slots, k, dtype=dtype), torch.randn(experts, n, k, device="cuda").to(dtype)
    count = counts(experts, slots)
    out = poison(torch.empty(experts, slots, n, dtype=dtype, device="cuda"))
    with paths.forced(path) if path else nullcontext():
        masked_gemm(a, b, count, out)
    for e, used in enumerate(count.tolist()):
        assert relative_difference(out[e, :used], a[e, :used].double() @ b[e].double().T) < BOUND


@pytest.mark.parametrize("experts", [1, 40, 3000])
@pytest.mark.parametrize(("slots", "block"), [(16, 16), (1024, 16), (384, 128)])
def test_used_blocks_matches(experts: int, slots: int, block: int) -> None:
    count = counts(experts, slots)
    assert torch.equal(used_blocks(count, slots, block), masked_oracle.used_blocks(count, slots, block))


@pytest.mark.parametrize("path", [None, "portable"])
@pytest.mark.parametrize("fmt", [NVFP4, NVFP4_SWIZZLED, MXFP4], ids=str)
@pytest.mark.parametrize(("slots", "expected_rows"), [(16, None), (48, 8), (128, 16), (256, None)])
def test_masked_fp4_gemm_matches(
    path: paths.MatrixPath | None, fmt: Nvfp4 | Mxfp4, slots: int, expected_rows: int | None
) -> None:
    count, x = counts(6, slots), gaussian(6, slots, 512)
    with paths.forced(path) if path else nullcontext():
        w = prepare_fp4_weights([quantize(gaussian(264, 512), fmt) for _ in range(6)])
        got = masked_fp4_gemm(x, w, count, expected_rows)
    assert isinstance(w, PackedWeights) == (path == "portable" or paths.matrix_path(x.device) == "portable")
    for e, used in enumerate(count.tolist()):
        want = x[e, :used].double() @ decode_fp4_weights(w, e).double().T
        assert relative_difference(got[e, :used], want) < BOUND


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, MXFP4_SWIZZLED], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 17, 65, 300])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (264, 1024), (2880, 2880)])
def test_portable_fp4_gemm_matches(fmt: Nvfp4 | Mxfp4, rows: int, n: int, k: int) -> None:
    x, w = gaussian(rows, k), prepare_fp4_weights([quantize(gaussian(n, k), fmt)])
    assert relative_difference(fp4_gemm(x, w), x.double() @ decode_fp4_weights(w, 0).double().T) < BOUND


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_portable_grouped_fp4_gemm_matches(block: int) -> None:
    x = gaussian(9 * block, 512)
    w = prepare_fp4_weights([quantize(gaussian(264, 512), NVFP4) for _ in range(4)])
    index = torch.randint(0, 4, (9,), dtype=torch.int32, device="cuda")
    got = grouped_fp4_gemm(x, w, index)
    for i, e in enumerate(index.tolist()):
        rows = slice(i * block, (i + 1) * block)
        assert relative_difference(got[rows], x[rows].double() @ decode_fp4_weights(w, e).double().T) < BOUND


PAIRS = [
    (NVFP4, NVFP4),
    (NVFP4_SWIZZLED, NVFP4_SWIZZLED),
    (NVFP4, NVFP4_SWIZZLED),
    (MXFP4, MXFP4),
    (MXFP4_SWIZZLED, MXFP4_SWIZZLED),
]


@pytest.mark.parametrize(("activations", "weights_in"), PAIRS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 17, 130, 300])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (264, 2880), (2112, 96)])
def test_scaled_gemm_matches(activations: Format, weights_in: Format, rows: int, n: int, k: int) -> None:
    a, b = quantize(gaussian(rows, k), activations), quantize(gaussian(n, k), weights_in)
    out = poison(torch.empty(rows, n, dtype=F32, device="cuda"))
    scaled_gemm.scaled_gemm(a, b, out)
    want = oracle.scaled_gemm(a, one_matrix(b), torch.empty(rows, n, dtype=F64, device="cuda"))
    assert relative_difference(out, want) < EXACT


@pytest.mark.parametrize(
    "fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN, Fp8Block(scale="pow2"), Fp8Block(scale="ue8m0")], ids=str
)
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_scaled_gemm_takes_fp8_activations(fmt: Fp8Block, rows: int) -> None:
    a, b = quantize(gaussian(rows, 1024), fmt), quantize(gaussian(264, 1024), MXFP4)
    got = scaled_gemm.scaled_gemm(a, b, dtype=F32)
    want = oracle.scaled_gemm(a, one_matrix(b), torch.empty(rows, 264, dtype=F64, device="cuda"))
    assert relative_difference(got, want) < EXACT


@pytest.mark.parametrize(
    "fmt", [MXFP4, MXFP4_SWIZZLED, Fp8Block(scale="ue8m0"), Fp8Block(scale="pow2")], ids=str
)
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_the_body_with_dot_scaled_matches(fmt: Format, rows: int) -> None:
    """Triton emulates `dot_scaled` on Hopper for scales of 32 values; those of 16 (NVFP4) it does not."""
    a, b = quantize(gaussian(rows, 1024), fmt), one_matrix(quantize(gaussian(264, 1024), MXFP4_SWIZZLED))
    out = poison(torch.empty(rows, 264, dtype=F32, device="cuda"))
    tile: dict[str, Any] = {"BM": 16 if rows == 1 else 128, "STAGES": 2, "GROUP": 4, "NATIVE": True}
    scaled_gemm.launch(a, b, out, tile={**tile, "num_warps": 4 if rows == 1 else 8})
    assert relative_difference(out, oracle.scaled_gemm(a, b, torch.empty_like(out, dtype=F64))) < EXACT


def experts_of(fmt: Format) -> PackedWeights:
    return pack_weights([quantize(gaussian(264, 480), fmt) for _ in range(4)])


@pytest.mark.parametrize("fmt", [NVFP4, NVFP4_SWIZZLED, MXFP4_SWIZZLED], ids=str)
@pytest.mark.parametrize("block", [16, 64, 128, 256])
def test_grouped_scaled_gemm_matches(fmt: Format, block: int) -> None:
    a, b = quantize(gaussian(9 * block, 480), fmt), experts_of(fmt)
    index = torch.randint(-1, 4, (9,), dtype=torch.int32, device="cuda")
    out = torch.zeros(9 * block, 264, dtype=F32, device="cuda")
    scaled_gemm.grouped_scaled_gemm(a, b, index, out)
    want = oracle.grouped_scaled_gemm(a, b, index, block, torch.zeros_like(out, dtype=F64))
    assert relative_difference(out, want) < EXACT


@pytest.mark.parametrize("fmt", [NVFP4, NVFP4_SWIZZLED, MXFP4_SWIZZLED], ids=str)
@pytest.mark.parametrize("slots", [128, 256])
def test_masked_scaled_gemm_matches(fmt: Format, slots: int) -> None:
    a, b, count = quantize(gaussian(4 * slots, 480), fmt), experts_of(fmt), counts(4, slots)
    out = torch.zeros(4 * slots, 264, dtype=F32, device="cuda")
    scaled_gemm.masked_scaled_gemm(a, b, count, out)
    want = oracle.masked_scaled_gemm(a, b, count, torch.zeros_like(out, dtype=F64))
    assert relative_difference(out, want) < EXACT
