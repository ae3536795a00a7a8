"""Every shape of tile of the CUDA C++ kernel against float64, on fresh inputs and ugly sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from broadbeam_kernels.cuda.fp8_gemm import Grouping, launch
from broadbeam_kernels.cuda.tiles import Tile
from broadbeam_kernels.formats import FP8_BLOCK128, FP8_BLOCK128_COLUMN, FP8_BLOCK128_WEIGHT, Fp8Block
from broadbeam_kernels.quantize import quantize
from broadbeam_kernels.reference.gemm import decode_rows, decode_tiles
from broadbeam_kernels.testing import gaussian, poison, relative_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

BF16 = torch.bfloat16
BOUND = 4e-3  # as in test_gemm_gpu.py
TWO = {"pipeline": 1}  # two sets of registers for products
TILES = [
    Tile(64, **TWO),
    *(Tile(n, shared, **TWO) for n in (96, 112) for shared in ("", "b")),
    *(Tile(128, shared, **TWO) for shared in ("", "a", "b", "ab")),
    Tile(160),
    Tile(160, "b"),
    *(Tile(176, shared, turns=2) for shared in ("", "a", "ab")),
    *(Tile(192, shared) for shared in ("", "a", "b")),
]
BESIDE = [tile for tile in TILES if "b" not in tile.shared]  # neighbours below may have another expert
SPLIT = [Tile(32, split=2), Tile(64, split=2, **TWO), Tile(72, split=4), Tile(128, split=8)]


def name(tile: Tile) -> str:
    return f"{tile.n}{tile.shared}" + (f" split {tile.split}" if tile.split > 1 else "")


def exact(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return decode_rows(a, a_scales, torch.float64) @ decode_tiles(b, b_scales, torch.float64).T


def check(rows: int, n: int, k: int, tile: Tile, fmt: Fp8Block, dtype: torch.dtype = BF16) -> None:
    a, b = quantize(gaussian(rows, k), fmt), quantize(gaussian(n, k), FP8_BLOCK128_WEIGHT)
    out = poison(torch.empty(rows, n, dtype=dtype, device="cuda"))
    launch(a.values, b.values, out, a.scales, b.scales, tile=tile)
    assert relative_difference(out, exact(a.values, a.scales, b.values, b.scales)) < BOUND


@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN], ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(129, 136, 128), (301, 2112, 640), (1000, 3000, 512)])
@pytest.mark.parametrize("tile", TILES, ids=name)
def test_dense_tiles_match(tile: Tile, rows: int, n: int, k: int, fmt: Fp8Block) -> None:
    check(rows, n, k, tile, fmt)


@pytest.mark.parametrize(("n", "k"), [(136, 1024), (2112, 1664)])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("tile", SPLIT, ids=name)
def test_tiles_that_split_k_match(tile: Tile, rows: int, n: int, k: int) -> None:
    fetched = next(fit for fit in (16, 32, 64, 128) if fit >= min(rows, 128))
    check(rows, n, k, replace(tile, a_rows=fetched), FP8_BLOCK128_COLUMN)


def test_a_split_tile_gives_the_same_bits_every_time() -> None:
    a, b = quantize(gaussian(100, 7168), FP8_BLOCK128), quantize(gaussian(2112, 7168), FP8_BLOCK128_WEIGHT)
    outs = [torch.empty(100, 2112, dtype=BF16, device="cuda") for _ in range(20)]
    for out in outs:
        launch(a.values, b.values, out, a.scales, b.scales, tile=Tile(64, split=2, pipeline=1))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_fp16_output_matches() -> None:
    check(200, 2112, 512, Tile(128, "a", pipeline=1), FP8_BLOCK128, torch.float16)


def grouped(
    grouping: Grouping, experts: int, slots: int, n: int, k: int, groups: Tensor, tile: Tile
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and the product of every slot with its expert's weights."""
    a = quantize(gaussian(experts * slots, k), FP8_BLOCK128)
    qs = [quantize(gaussian(n, k), FP8_BLOCK128_WEIGHT) for _ in range(experts)]
    b, b_scales = torch.cat([q.values for q in qs]), torch.stack([q.scales for q in qs])
    out = torch.zeros(experts * slots, n, dtype=BF16, device="cuda")
    scales = a.scales.view(experts, slots, -1) if grouping == "masked" else a.scales
    launch(a.values, b, out, scales, b_scales, grouping=grouping, groups=groups, slots=slots, tile=tile)
    values = decode_rows(a.values, a.scales, torch.float64).view(experts, slots, k)
    owners = range(experts)
    if grouping == "contiguous":
        values, owners = values.view(-1, 128, k), groups.tolist()
    want = [
        x @ decode_tiles(qs[e].values, qs[e].scales, torch.float64).T * (e >= 0)
        for x, e in zip(values, owners, strict=True)
    ]
    return out.view(len(want), -1, n), torch.stack(want)


@pytest.mark.parametrize("tile", BESIDE, ids=name)
def test_contiguous_tiles_match_and_leave_skipped_blocks_alone(tile: Tile) -> None:
    groups = torch.tensor([2, 2, -1, 0, 4, 4, 4, 1, 0, 3], dtype=torch.int32, device="cuda")
    got, want = grouped("contiguous", 5, 256, 2112, 640, groups, tile)
    assert all(relative_difference(g, w) < BOUND for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("tile", BESIDE, ids=name)
def test_masked_tiles_match_with_experts_that_have_no_rows(tile: Tile) -> None:
    count = torch.tensor([0, 384, 3, 0, 129, 128, 0], dtype=torch.int32, device="cuda")
    got, want = grouped("masked", 7, 384, 2112, 384, count, tile)
    for g, w, rows in zip(got, want, count.tolist(), strict=True):
        assert relative_difference(g[:rows], w[:rows]) < BOUND


def test_a_launch_can_be_captured_and_replayed() -> None:
    a, b = quantize(gaussian(256, 512), FP8_BLOCK128), quantize(gaussian(384, 512), FP8_BLOCK128_WEIGHT)
    out = torch.empty(256, 384, dtype=BF16, device="cuda")
    launch(a.values, b.values, out, a.scales, b.scales, tile=Tile(128, "b", pipeline=1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(a.values, b.values, out, a.scales, b.scales, tile=Tile(128, "b", pipeline=1))
    poison(out)
    graph.replay()
    assert relative_difference(out, exact(a.values, a.scales, b.values, b.scales)) < BOUND
