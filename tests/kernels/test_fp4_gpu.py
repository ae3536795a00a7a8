"""FP4-weight products in every shape of tile, against float64 products of the decoded weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from broadbeam_kernels import fp4_persistent
from broadbeam_kernels.cuda import fp4_gemm as cuda
from broadbeam_kernels.cuda.fp4_gemm import Tile
from broadbeam_kernels.formats import MXFP4, NVFP4, Mxfp4, Nvfp4
from broadbeam_kernels.fp4_gemm import fp4_gemm, grouped_fp4_gemm
from broadbeam_kernels.fp4_weights import Fp4Weights, decode_fp4_weights, prepare_fp4_weights
from broadbeam_kernels.quantize import quantize
from broadbeam_kernels.testing import gaussian, poison, relative_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

BF16 = torch.bfloat16
BOUND = 4e-3  # bf16 output alone is 1.7e-3 away
FORMATS = pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)

PLAIN = [
    Tile(8, split=2),
    Tile(8, split=8, resident=3),
    Tile(16, split=2, resident=2),
    Tile(16, split=7, resident=3),
    Tile(32, split=4),
    Tile(64, split=4, warpgroups=4),
    Tile(64, resident=2),
    Tile(128, split=2),
    Tile(128, split=3, halves=1),
]
GROUPED = [
    Tile(16, resident=2),
    Tile(32, warpgroups=4, group=3),
    Tile(64, warpgroups=4),
    Tile(64, resident=2),
    Tile(128, group=2),
    Tile(256, halves=1, group=4),
]


@cache
def weights(experts: int, n: int, k: int, fmt: Nvfp4 | Mxfp4) -> Fp4Weights:
    prepared = prepare_fp4_weights([quantize(gaussian(n, k), fmt) for _ in range(experts)])
    assert isinstance(prepared, Fp4Weights)
    return prepared


def exact(x: Tensor, w: Fp4Weights, expert: int) -> Tensor:
    return x.double() @ decode_fp4_weights(w, expert).double().T


def product(x: Tensor, w: Fp4Weights, tile: Tile) -> Tensor:
    out = poison(torch.empty(x.shape[0], w.shape[1], dtype=BF16, device="cuda"))
    cuda.launch(x, w, None, 0, out, tile)
    return out


@FORMATS
@pytest.mark.parametrize("tile", PLAIN, ids=str)
@pytest.mark.parametrize(("n", "k"), [(128, 128), (264, 1024), (2880, 2944)])
def test_every_tile_multiplies_any_number_of_rows(fmt: Nvfp4 | Mxfp4, tile: Tile, n: int, k: int) -> None:
    w = weights(1, n, k, fmt)
    for rows in (1, 7, 16, 65, 300):
        x = gaussian(rows, k)
        assert relative_difference(product(x, w, tile), exact(x, w, 0)) < BOUND


def test_rows_of_activations_may_stand_apart() -> None:
    w, wide = weights(1, 264, 1024, NVFP4), gaussian(33, 2048)
    x = wide[:, 512:1536]
    assert relative_difference(product(x, w, Tile(16, split=2)), exact(x, w, 0)) < BOUND


@pytest.mark.parametrize("tile", [tile for tile in PLAIN if tile.split > 1], ids=str)
def test_a_split_product_gives_the_same_bits_every_time(tile: Tile) -> None:
    x, w = gaussian(21, 2944), weights(1, 2880, 2944, NVFP4)
    first = product(x, w, tile)
    assert all(torch.equal(product(x, w, tile), first) for _ in range(20))


def assert_blocks_match(got: Tensor, x: Tensor, w: Fp4Weights, index: Tensor, block: int) -> None:
    for i, expert in enumerate(index.tolist()):
        rows = slice(i * block, (i + 1) * block)
        want = exact(x[rows], w, expert) if expert >= 0 else torch.zeros_like(got[rows])
        assert relative_difference(got[rows], want) < BOUND


@FORMATS
@pytest.mark.parametrize("tile", GROUPED, ids=str)
@pytest.mark.parametrize("blocks", [1, 11, 70])
def test_every_tile_takes_each_block_to_its_expert(fmt: Nvfp4 | Mxfp4, tile: Tile, blocks: int) -> None:
    w = weights(4, 2440, 640, fmt)
    block = {1: tile.tokens, 11: 2 * tile.tokens, 70: min(tile.tokens, 128)}[blocks]
    x = gaussian(blocks * block, 640)
    index = torch.randint(-1, 4, (blocks,), dtype=torch.int32, device="cuda")
    index[0] = 3
    out = torch.zeros(blocks * block, 2440, dtype=BF16, device="cuda")
    cuda.launch(x, w, index, block, out, tile)
    assert_blocks_match(out, x, w, index, block)


@pytest.mark.parametrize("n", [136, 2048, 7168])
@pytest.mark.parametrize("rows", [1, 9, 17, 33, 65, 700])
def test_the_tile_of_the_table_multiplies(rows: int, n: int) -> None:
    x, w = gaussian(rows, 1024), weights(1, n, 1024, MXFP4)
    assert relative_difference(fp4_gemm(x, w), exact(x, w, 0)) < BOUND


@pytest.mark.parametrize(("block", "blocks"), [(16, 9), (32, 9), (64, 9), (128, 9), (128, 23), (256, 11)])
def test_the_tile_of_the_table_takes_each_block_to_its_expert(block: int, blocks: int) -> None:
    x, w = gaussian(blocks * block, 640), weights(4, 2440, 640, NVFP4)
    index = torch.randint(0, 4, (blocks,), dtype=torch.int32, device="cuda")
    assert_blocks_match(grouped_fp4_gemm(x, w, index), x, w, index, block)


@FORMATS
@pytest.mark.parametrize(("bm", "split", "resident"), [(16, 3, 2), (64, 2, 1), (128, 1, 1)])
def test_the_gluon_kernel_multiplies_any_number_of_rows(
    fmt: Nvfp4 | Mxfp4, bm: int, split: int, resident: int
) -> None:
    w = weights(1, 264, 1024, fmt)
    for rows in (1, 17, 300):
        x = gaussian(rows, 1024)
        out = poison(torch.empty(rows, 264, dtype=BF16, device="cuda"))
        tile = {"BM": bm, "STAGES": 4, "GROUP": 2, "SPLIT": split, "RESIDENT": resident}
        fp4_persistent.launch(x, w, None, 0, out, tile)
        assert relative_difference(out, exact(x, w, 0)) < BOUND


@pytest.mark.parametrize("bm", [32, 128])
def test_the_gluon_kernel_takes_each_block_to_its_expert(bm: int) -> None:
    w, x = weights(4, 264, 1024, NVFP4), gaussian(9 * bm, 1024)
    index = torch.randint(-1, 4, (9,), dtype=torch.int32, device="cuda")
    out = torch.zeros(9 * bm, 264, dtype=BF16, device="cuda")
    tile = {"BM": bm, "STAGES": 4, "GROUP": 2, "SPLIT": 1, "RESIDENT": 1}
    fp4_persistent.launch(x, w, index, bm, out, tile)
    assert_blocks_match(out, x, w, index, bm)


def prepared_alike(count: int, fmt: Nvfp4 | Mxfp4) -> list[Fp4Weights]:
    """(2048, 2048) weights of as many layers."""
    prepared = [prepare_fp4_weights([quantize(gaussian(2048, 2048), fmt)]) for _ in range(count)]
    return [w for w in prepared if isinstance(w, Fp4Weights)]


def chain(x: Tensor, layers: list[Fp4Weights], between: Callable[[], object] = lambda: None) -> Tensor:
    for w in layers:
        x = fp4_gemm(x, w)
        between()
    return x


@FORMATS
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 600])
def test_a_product_that_starts_early_reads_what_the_one_before_it_wrote(
    fmt: Nvfp4 | Mxfp4, rows: int
) -> None:
    layers = prepared_alike(8, fmt)
    for _ in range(50):
        x = gaussian(rows, 2048)
        want = chain(x, layers, torch.cuda.synchronize)
        assert torch.equal(chain(x, layers), want)


def test_products_that_start_early_are_captured_as_they_are() -> None:
    layers = prepared_alike(8, NVFP4)
    x = gaussian(16, 2048)
    chain(x, layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, layers)
    for _ in range(50):
        x.copy_(gaussian(16, 2048))
        poison(out)
        graph.replay()
        assert torch.equal(out, chain(x, layers, torch.cuda.synchronize))
