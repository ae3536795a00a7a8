"""The plain-Triton products on a CPU, against float64 products, on fresh inputs and small ugly shapes.

Run by `test_portable.py` in a process of its own: TRITON_INTERPRET=1 must be set before the import of Triton.
Addresses, masks, launch order, scale layouts and decoding are checked; instructions are not. Halves are fp16,
because the interpreter does not multiply bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton.runtime import interpreter

from broadbeam_kernels import portable_gemm, scaled_gemm
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
from broadbeam_kernels.packed_weights import one_matrix, pack_weights
from broadbeam_kernels.reference import quantize as quantizers
from broadbeam_kernels.reference import scaled_gemm as oracle
from broadbeam_kernels.reference.gemm import decode_rows, decode_tiles
from broadbeam_kernels.testing import gaussian, poison, relative_difference

F16, F32, F64 = torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True, scope="session")
def _loops() -> Iterator[None]:
    """The bounds of a loop are arrays of one element, which numpy 2.4 no longer takes for integers."""
    patch = pytest.MonkeyPatch()
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.setattr(interpreter, "_patch_lang_tensor", patched)
    yield
    patch.undo()


def values(rows: int, k: int) -> torch.Tensor:
    return gaussian(rows, k, device="cpu", dtype=F16)


def quantized(x: torch.Tensor, fmt: Format) -> Any:
    match fmt:
        case Nvfp4():
            return quantizers.quantize_nvfp4(x, fmt)
        case Mxfp4():
            return quantizers.quantize_mxfp4(x, fmt)
        case Fp8Block():
            return quantizers.quantize_fp8_block(x, fmt)


def portable(bm: int, as_half: bool = False) -> dict[str, Any]:
    return {"BM": bm, "BN": 64, "STAGES": 2, "GROUP": 2, "AS_HALF": as_half, "POW2": False, "num_warps": 4}


def scaled(bm: int) -> dict[str, Any]:
    return {"BM": bm, "STAGES": 2, "GROUP": 2, "NATIVE": False, "num_warps": 4}


def test_the_interpreter_is_on() -> None:
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 8, 8), (37, 136, 200), (16, 64, 64)])
def test_a_dense_product(rows: int, n: int, k: int) -> None:
    a, b = values(rows, k), torch.randn(n, k).half()
    out = poison(torch.empty(rows, n, dtype=F16))
    portable_gemm.launch(a, b, out, tile=portable(16))
    assert relative_difference(out, a.double() @ b.double().T) < 1e-3


def test_a_contiguous_product_leaves_skipped_blocks_alone() -> None:
    a, b = values(192, 72), torch.randn(3, 136, 72).half()
    out, want = torch.zeros(192, 136, dtype=F16), torch.zeros(192, 136, dtype=F64)
    experts = torch.tensor([2, -1, 0], dtype=torch.int32)
    portable_gemm.launch(
        a, b.flatten(0, 1), out, grouping="contiguous", groups=experts, block_rows=64, tile=portable(32)
    )
    want[:64], want[128:] = a[:64].double() @ b[2].double().T, a[128:].double() @ b[0].double().T
    assert relative_difference(out, want) < 1e-3


def test_a_masked_product_writes_rows_in_use_alone() -> None:
    a, b = values(3 * 64, 72), torch.randn(3, 136, 72).half()
    count = torch.tensor([0, 64, 17], dtype=torch.int32)
    out, want = torch.zeros(192, 136, dtype=F16), torch.zeros(192, 136, dtype=F64)
    portable_gemm.launch(
        a, b.flatten(0, 1), out, grouping="masked", groups=count, slots=64, tile=portable(16)
    )
    want[64:128], want[128:145] = a[64:128].double() @ b[1].double().T, a[128:145].double() @ b[2].double().T
    assert relative_difference(out, want) < 1e-3


@pytest.mark.parametrize("fmt", [FP8_BLOCK128, FP8_BLOCK128_COLUMN], ids=str)
def test_fp8_multiplied_in_half_precision(fmt: Fp8Block) -> None:
    a, b = quantized(values(37, 384), fmt), quantized(values(200, 384), FP8_BLOCK128_WEIGHT)
    out = poison(torch.empty(37, 200, dtype=F32))
    portable_gemm.launch(
        a.values, b.values, out, a_scales=a.scales, b_scales=b.scales, tile=portable(16, as_half=True)
    )
    want = decode_rows(a.values, a.scales, F64) @ decode_tiles(b.values, b.scales, F64).T
    assert relative_difference(out, want) < 1e-5


@pytest.mark.parametrize("bm", [16, 128])
@pytest.mark.parametrize(
    ("activations", "weights", "k"),
    [
        (NVFP4, NVFP4, 144),
        (NVFP4_SWIZZLED, NVFP4_SWIZZLED, 336),
        (NVFP4, NVFP4_SWIZZLED, 48),
        (MXFP4, MXFP4, 160),
        (MXFP4_SWIZZLED, MXFP4_SWIZZLED, 416),
        (FP8_BLOCK128, MXFP4, 256),
        (Fp8Block(scale="ue8m0"), MXFP4_SWIZZLED, 256),
        (None, NVFP4, 144),
    ],
    ids=str,
)
def test_a_block_scaled_product(activations: Format | None, weights: Format, k: int, bm: int) -> None:
    rows = bm + 5
    x = values(rows, k)
    a = x if activations is None else quantized(x, activations)
    b = one_matrix(quantized(values(200, k), weights))
    out = poison(torch.empty(rows, 200, dtype=F32))
    scaled_gemm.launch(a, b, out, tile=scaled(bm))
    want = oracle.scaled_gemm(a, b, torch.empty(rows, 200, dtype=F64))
    assert relative_difference(out, want) < 1e-5


@pytest.mark.parametrize("bm", [64, 128])
def test_grouped_block_scaled_products(bm: int) -> None:
    b = pack_weights([quantized(values(200, 144), NVFP4_SWIZZLED) for _ in range(3)])
    a = quantized(values(384, 144), NVFP4_SWIZZLED)
    experts, count = torch.tensor([[2, -1, 0], [5, 0, 128]], dtype=torch.int32)
    out, want = torch.zeros(384, 200, dtype=F32), torch.zeros(384, 200, dtype=F64)
    scaled_gemm.launch(a, b, out, grouping="contiguous", groups=experts, block_rows=128, tile=scaled(bm))
    assert relative_difference(out, oracle.grouped_scaled_gemm(a, b, experts, 128, want)) < 1e-5
    out.zero_()
    scaled_gemm.launch(a, b, out, grouping="masked", groups=count, slots=128, tile=scaled(bm))
    assert relative_difference(out, oracle.masked_scaled_gemm(a, b, count, want.zero_())) < 1e-5
