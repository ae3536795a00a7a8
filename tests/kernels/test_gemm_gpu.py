"""Matrix kernels against float64 products of the decoded operands, on fresh inputs and ugly shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from broadbeam_kernels.formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_COLUMN,
    FP8_BLOCK128_WEIGHT,
    MXFP4,
    NVFP4,
    Fp8Block,
    Mxfp4,
    Nvfp4,
    Quantized,
)
from broadbeam_kernels.fp4_gemm import fp4_gemm, grouped_fp4_gemm
from broadbeam_kernels.fp4_weights import Fp4Weights, decode_fp4_weights, prepare_fp4_weights
from broadbeam_kernels.fp8_gemm import fp8_gemm, grouped_fp8_gemm, masked_fp8_gemm
from broadbeam_kernels.grouped_gemm import grouped_gemm
from broadbeam_kernels.quantize import quantize
from broadbeam_kernels.reference.gemm import decode_rows, decode_tiles
from broadbeam_kernels.testing import gaussian, poison, relative_difference

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
# bf16 output alone is 1.7e-3 away; the tensor core's own FP8 sums keep about 14 bits inside 128 values of k.
BOUND = 4e-3


def weights(experts: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    qs = [quantize(gaussian(n, k), FP8_BLOCK128_WEIGHT) for _ in range(experts)]
    return torch.stack([q.values for q in qs]), torch.stack([q.scales for q in qs])


def exact(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return decode_rows(a, a_scales, torch.float64) @ decode_tiles(b, b_scales, torch.float64).T


@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN, Fp8Block(scale="pow2")], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 63, 64, 65, 128, 129, 300, 1024])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (256, 128), (136, 640)])
def test_fp8_gemm_matches(fmt: Fp8Block, rows: int, n: int, k: int) -> None:
    a = quantize(gaussian(rows, k), fmt)
    b = quantize(gaussian(n, k), FP8_BLOCK128_WEIGHT)
    out = poison(torch.empty(rows, n, dtype=BF16, device="cuda"))
    fp8_gemm(a, b, out)
    assert relative_difference(out, exact(a.values, a.scales, b.values, b.scales)) < BOUND


def test_a_captured_product_runs_before_what_was_captured_ahead_of_it() -> None:
    a, b = quantize(gaussian(7, 7168), FP8_BLOCK128), quantize(gaussian(2112, 7168), FP8_BLOCK128_WEIGHT)
    outs = [torch.empty(7, 2112, dtype=BF16, device="cuda") for _ in range(2)]
    fp8_gemm(a, b, outs[0])  # compiled
    graphs = [torch.cuda.CUDAGraph() for _ in outs]
    for graph, out in zip(graphs, outs, strict=True):
        with torch.cuda.graph(graph):
            fp8_gemm(a, b, out)
    for i in (1, 0, 1):
        poison(outs[i])
        graphs[i].replay()
        assert relative_difference(outs[i], exact(a.values, a.scales, b.values, b.scales)) < BOUND


def test_fp8_gemm_gives_the_same_bits_every_time() -> None:
    a, b = quantize(gaussian(7, 7168), FP8_BLOCK128), quantize(gaussian(2112, 7168), FP8_BLOCK128_WEIGHT)
    first = fp8_gemm(a, b)
    assert all(torch.equal(fp8_gemm(a, b), first) for _ in range(20))


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize(
    ("blocks", "experts", "n", "k"), [(1, 1, 256, 128), (9, 4, 2112, 512), (24, 32, 1408, 1024)]
)
def test_contiguous_grouped_fp8_gemm_matches(block: int, blocks: int, experts: int, n: int, k: int) -> None:
    a = quantize(gaussian(blocks * block, k), FP8_BLOCK128_COLUMN)
    b, b_scales = weights(experts, n, k)
    index = torch.randint(-1, experts, (blocks,), dtype=torch.int32, device="cuda")
    index[0] = experts - 1
    out = torch.zeros(blocks * block, n, dtype=BF16, device="cuda")
    grouped_fp8_gemm(a.values, a.scales, b, b_scales, index, out)
    for i, e in enumerate(index.tolist()):
        rows = slice(i * block, (i + 1) * block)
        want = (
            exact(a.values[rows], a.scales[rows], b[e], b_scales[e])
            if e >= 0
            else torch.zeros_like(out[rows])
        )
        assert relative_difference(out[rows], want) < BOUND


@pytest.mark.parametrize(
    ("experts", "slots", "n", "k"), [(1, 128, 256, 128), (5, 256, 2112, 512), (40, 128, 512, 256)]
)
def test_masked_grouped_fp8_gemm_matches(experts: int, slots: int, n: int, k: int) -> None:
    a = quantize(gaussian(experts * slots, k), FP8_BLOCK128)
    values, scales = a.values.view(experts, slots, k), a.scales.view(experts, slots, k // 128)
    b, b_scales = weights(experts, n, k)
    count = torch.randint(0, slots + 1, (experts,), dtype=torch.int32, device="cuda")
    count[-1] = slots
    for layout in (scales, scales.transpose(1, 2).contiguous().transpose(1, 2)):
        got = masked_fp8_gemm(values, layout, b, b_scales, count)
        for e, rows in enumerate(count.tolist()):
            want = exact(values[e, :rows], scales[e, :rows], b[e], b_scales[e])
            assert relative_difference(got[e, :rows], want) < BOUND


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize(
    ("blocks", "experts", "n", "k"), [(1, 1, 256, 64), (9, 4, 2112, 520), (24, 32, 1408, 1024)]
)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_grouped_gemm_matches(
    block: int, blocks: int, experts: int, n: int, k: int, dtype: torch.dtype
) -> None:
    a = gaussian(blocks * block, k, dtype=dtype)
    b = torch.randn(experts, n, k, device="cuda").to(dtype)
    index = torch.randint(0, experts, (blocks,), dtype=torch.int32, device="cuda")
    out = poison(torch.empty(blocks * block, n, dtype=dtype, device="cuda"))
    grouped_gemm(a, b, index, out)
    want = torch.cat(
        [a[i * block : (i + 1) * block].double() @ b[e].double().T for i, e in enumerate(index.tolist())]
    )
    assert relative_difference(out, want) < BOUND


def test_scales_of_the_wrong_shape_are_refused() -> None:
    a = quantize(gaussian(4, 256), FP8_BLOCK128)
    b = quantize(gaussian(128, 256), FP8_BLOCK128_WEIGHT)
    bad = Quantized(b.values, b.scales[:, :1], b.format, b.shape)
    with pytest.raises(ValueError, match="b_scales has shape"):
        fp8_gemm(a, bad)


def fp4(experts: int, n: int, k: int, fmt: Nvfp4 | Mxfp4) -> Fp4Weights:
    return prepare_fp4_weights([quantize(gaussian(n, k), fmt) for _ in range(experts)])


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 64, 65, 300])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (264, 1024), (2880, 2944)])
def test_fp4_gemm_matches(fmt: Nvfp4 | Mxfp4, rows: int, n: int, k: int) -> None:
    x, w = gaussian(rows, k), fp4(1, n, k, fmt)
    assert relative_difference(fp4_gemm(x, w), x.double() @ decode_fp4_weights(w, 0).double().T) < BOUND


def test_fp4_gemm_takes_fp8_activations() -> None:
    x, w = quantize(gaussian(33, 1024), FP8_BLOCK128), fp4(1, 256, 1024, NVFP4)
    want = decode_rows(x.values, x.scales, torch.float64) @ decode_fp4_weights(w, 0).double().T
    assert relative_difference(fp4_gemm(x, w), want) < BOUND


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_grouped_fp4_gemm_matches(fmt: Nvfp4 | Mxfp4, block: int) -> None:
    x, w = gaussian(9 * block, 512), fp4(4, 264, 512, fmt)
    index = torch.randint(0, 4, (9,), dtype=torch.int32, device="cuda")
    got = grouped_fp4_gemm(x, w, index)
    for i, e in enumerate(index.tolist()):
        rows = slice(i * block, (i + 1) * block)
        assert relative_difference(got[rows], x[rows].double() @ decode_fp4_weights(w, e).double().T) < BOUND
