"""FP4-weight kernels compile without a GPU, fit a Hopper, and keep their products in flight."""

from __future__ import annotations

import json

import pytest
from cuda.bindings import nvrtc

from broadbeam_kernels.cuda.fp4_gemm import SHARED_BYTES, Tile, source
from broadbeam_kernels.tuning import TUNED

RULES = json.loads((TUNED / "default.json").read_text())


def table(operation: str) -> list[Tile]:
    return [Tile(**{k: v for k, v in rule.items() if k != "when"}) for rule in RULES[operation]]


TILES = [
    *(pytest.param(tile, True, id=f"grouped {tile.tokens}") for tile in table("cuda_grouped_fp4_gemm")),
    *(pytest.param(tile, False, id=f"plain {tile.tokens}") for tile in table("cuda_fp4_gemm")),
    pytest.param(Tile(16, resident=3, split=4), False, id="plain 16, split"),
    pytest.param(Tile(128, split=2), False, id="plain 128, split"),
]


def compiled(text: str, headers: dict[str, str], defines: dict[str, int]) -> str:
    """What compiler and assembler say."""
    names, texts = [n.encode() for n in headers], [t.encode() for t in headers.values()]
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", len(names), texts, names)
    options = ["--gpu-architecture=sm_90a", "--ptxas-options=-v", *(f"-D{k}={v}" for k, v in defines.items())]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    assert int(status) == 0, log.decode()
    return log.decode()


@pytest.mark.parametrize(("tile", "grouped"), TILES)
def test_products_stay_in_flight_and_nothing_spills(tile: Tile, grouped: bool) -> None:
    log = compiled(*source(tile, True, grouped))
    assert "serialized" not in log
    assert "0 bytes spill stores" in log


@pytest.mark.parametrize("nvfp4", [True, False], ids=["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("tile", "grouped"), TILES)
def test_a_tile_fits_with_a_ring_of_three_stages(tile: Tile, grouped: bool, nvfp4: bool) -> None:
    assert tile.ring(nvfp4) >= 3
    assert tile.resident * (tile.shared_bytes(nvfp4) + 1024) <= SHARED_BYTES + 1024
