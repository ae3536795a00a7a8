"""CUDA C++ kernels compile without a GPU, are kept on disk, and their tiles fit a Hopper."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest

from broadbeam_kernels.cuda import fp8_gemm, nvrtc
from broadbeam_kernels.cuda.tiles import SHARED_BYTES, Tile, dense_tile, grouped_tile

ARCH = "sm_90a"
SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (136, 128)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "broadbeam" / "kernels"


@pytest.mark.parametrize(
    ("tile", "grouping"),
    [
        pytest.param(Tile(128, "ab", pipeline=1), "dense", id="a cluster of two by two"),
        pytest.param(Tile(192), "masked", id="the widest tile"),
        pytest.param(Tile(64, split=2, a_rows=64), "dense", id="split over k"),
    ],
)
def test_a_kernel_compiles_once(tile: Tile, grouping: fp8_gemm.Grouping, cache: Path) -> None:
    code = fp8_gemm.code(tile, grouping, True, False, ARCH)
    assert code.startswith(b"\x7fELF")
    (kept,) = cache.iterdir()
    kept.write_bytes(b"from the disk")
    assert fp8_gemm.code(tile, grouping, True, False, ARCH) == b"from the disk"


def test_kept_code_that_cannot_be_read_is_compiled_again(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = [nvrtc.cubin('extern "C" __global__ void f() {}', {}, {}, ARCH)]
    (kept,) = cache.iterdir()
    kept.unlink()
    (kept / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        compiled.append(nvrtc.cubin('extern "C" __global__ void f() {}', {}, {}, ARCH))
    assert compiled[0] == compiled[1]
    assert "cannot be kept" in caplog.text
    assert [path.name for path in cache.iterdir()] == [kept.name]  # and nothing half written


def test_what_the_compiler_says_is_in_the_error(cache: Path) -> None:
    with pytest.raises(nvrtc.CudaError, match="nonsense"):
        nvrtc.cubin('extern "C" __global__ void f() { nonsense(); }', {}, {}, ARCH)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        code = nvrtc.cubin('extern "C" __global__ void f() {}', {}, {}, ARCH)
    assert code.startswith(b"\x7fELF")
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(("rows", "shape"), [*itertools.product([33, 64, 65, 128, 129, 512, 8192], SHAPES)])
def test_a_chosen_tile_fits(rows: int, shape: tuple[int, int]) -> None:
    n, k = shape
    tiles = [
        *(dense_tile(rows, n, k // 128, 132, alone) for alone in (1.0, 1.05)),
        grouped_tile(rows, 4, n, k // 128, 132),
    ]
    for tile in tiles:
        assert tile.ring >= 3
        assert tile.shared_bytes <= SHARED_BYTES
        assert tile.split <= k // 128
        assert tile.a_rows >= min(rows, 128)


def test_experts_side_by_side_never_share_weights() -> None:
    assert all("b" not in grouped_tile(4096, 32, n, k // 128, 132).shared for n, k in SHAPES)


@pytest.mark.parametrize(("each", "rows_of_tiles"), [(128, 1), (256, 2), (8192, 2)])
def test_a_band_is_no_higher_than_an_expert(each: int, rows_of_tiles: int) -> None:
    assert grouped_tile(8 * each, 8, 4096, 56, 132).group == rows_of_tiles
