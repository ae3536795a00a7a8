"""FP4-weight kernels compile without a GPU, fit a Hopper, and keep their products in flight."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cuda.bindings import nvrtc

from broadbeam_kernels import fp4_gemm, fp4_persistent
from broadbeam_kernels.cuda import fp4_gemm as cuda
from broadbeam_kernels.cuda.fp4_gemm import SHARED_BYTES, Tile, source
from broadbeam_kernels.cuda.nvrtc import CudaError
from broadbeam_kernels.formats import NVFP4
from broadbeam_kernels.fp4_weights import Fp4Weights, prepare_fp4_weights
from broadbeam_kernels.quantize import quantize
from broadbeam_kernels.testing import gaussian
from broadbeam_kernels.tuning import TUNED, launch_of

TABLES = [json.loads(path.read_text()) for path in sorted(TUNED.glob("*.json"))]


def table(operation: str) -> list[Tile]:
    """The tiles of every device's table."""
    rules = [launch_of(rule) for rules in TABLES for rule in rules.get(operation, ())]
    return list(dict.fromkeys(Tile(**rule) for rule in rules))


def name(tile: Tile) -> str:
    ahead = f", {tile.ahead} ahead" if tile.ahead else ""
    return f"{tile.tokens}, {tile.resident} resident{ahead}"


TILES = [
    *(pytest.param(tile, True, id=f"grouped {name(tile)}") for tile in table("cuda_grouped_fp4_gemm")),
    *(pytest.param(tile, False, id=f"plain {name(tile)}") for tile in table("cuda_fp4_gemm")),
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


@pytest.mark.parametrize("experts", [None, torch.zeros(1, dtype=torch.int32)], ids=["plain", "grouped"])
def test_where_cuda_cannot_be_built_the_gluon_kernel_runs_and_the_log_says_why(
    experts: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> bytes:
        raise CudaError("no libnvrtc")

    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(cuda, "cubin", refuse)
    monkeypatch.setattr(cuda, "native", lambda _device: "sm_90a")
    monkeypatch.setattr(cuda, "multiprocessors", lambda _device: 132)
    monkeypatch.setattr(fp4_gemm, "matrix_path", lambda _device: "hopper")
    monkeypatch.setattr(fp4_persistent, "launch", lambda *arguments: launched.append(arguments[-1]))
    cuda.function.cache_clear()
    w = prepare_fp4_weights([quantize(gaussian(128, 128, device="cpu"), NVFP4)])
    assert isinstance(w, Fp4Weights)
    x, out = gaussian(16, 128, device="cpu"), torch.empty(16, 128, dtype=torch.bfloat16)
    fp4_gemm._launch(x, w, experts, 16 if experts is not None else 0, out)
    cuda.function.cache_clear()
    assert launched[0]["STAGES"]
    assert "no libnvrtc" in caplog.text
