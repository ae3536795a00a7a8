"""Block-scaled and masked products where there is no GPU: oracles, contracts, and the bodies interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from broadbeam_kernels import paths
from broadbeam_kernels.bench import packed
from broadbeam_kernels.contracts import launches
from broadbeam_kernels.formats import (
    FP8_BLOCK128,
    FP8_BLOCK128_WEIGHT,
    MXFP4,
    MXFP4_SWIZZLED,
    NVFP4,
    NVFP4_SWIZZLED,
    Format,
    Fp8Block,
    Quantized,
)
from broadbeam_kernels.fp4_gemm import fp4_gemm, grouped_fp4_gemm
from broadbeam_kernels.fp4_weights import decode_fp4_weights, prepare_fp4_weights
from broadbeam_kernels.grouped_gemm import grouped_gemm
from broadbeam_kernels.masked_gemm import masked_fp4_gemm, masked_gemm, used_blocks
from broadbeam_kernels.packed_weights import PackedWeights, pack_weights
from broadbeam_kernels.pad_quant import pad_quant
from broadbeam_kernels.quantize import dequantize, quantize
from broadbeam_kernels.scaled_gemm import grouped_scaled_gemm, masked_scaled_gemm, scaled_gemm
from broadbeam_kernels.silu_mul_quant import silu_mul_quant
from broadbeam_kernels.testing import gaussian, relative_difference

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16


def values(*shape: int) -> Tensor:
    return gaussian(*shape, device="cpu")


def experts_of(count: int, n: int, k: int, fmt: Format) -> PackedWeights:
    return pack_weights([quantize(values(n, k), fmt) for _ in range(count)])


def test_the_bodies_agree_with_float64_products_under_the_interpreter() -> None:
    tests = Path(__file__).with_name("interpreted_products.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", str(tests)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("activations", "weights"),
    [
        (NVFP4, NVFP4),
        (NVFP4_SWIZZLED, NVFP4),
        (MXFP4, MXFP4_SWIZZLED),
        (FP8_BLOCK128, MXFP4),
        (Fp8Block(scale="ue8m0"), MXFP4),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_a_block_scaled_product_is_that_of_the_decoded_operands(
    activations: Format, weights: Format, rows: int
) -> None:
    a, b = quantize(values(rows, 256), activations), quantize(values(40, 256), weights)
    got = scaled_gemm(a, b, dtype=torch.float32)
    # (what is compared with rounds to bf16, and one row may cancel)
    assert relative_difference(got, dequantize(a).double() @ dequantize(b).double().T) < 3e-2


def test_alpha_is_the_product_of_both_inverse_global_scales() -> None:
    x, w = values(4, 64), values(8, 64)
    a, b = quantize(x, NVFP4), quantize(w, NVFP4)
    assert a.global_scale is not None
    doubled = Quantized(a.values, a.scales, a.format, a.shape, a.global_scale * 2)
    got, halved = scaled_gemm(a, b, dtype=torch.float32), scaled_gemm(doubled, b, dtype=torch.float32)
    assert torch.equal(halved * 2, got)


def test_grouped_block_scaled_products_skip_blocks_and_slots_not_in_use() -> None:
    b, a = experts_of(2, 24, 64, NVFP4), quantize(values(64, 64), NVFP4)
    out = torch.full((64, 24), 7.0)
    grouped_scaled_gemm(a, b, torch.tensor([-1, 1], dtype=torch.int32), out)
    assert torch.equal(out[:32], torch.full((32, 24), 7.0))
    masked = torch.full((64, 24), 7.0)
    masked_scaled_gemm(a, b, torch.tensor([0, 3], dtype=torch.int32), masked)
    assert torch.equal(masked[32:35], out[32:35])
    assert torch.equal(masked[35:], torch.full((29, 24), 7.0))


def two_by(fmt: Format, k: int = 128) -> Quantized:
    return quantize(values(2, k), fmt)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (two_by(NVFP4), two_by(MXFP4), "one FP4 format for both"),
        (two_by(FP8_BLOCK128), two_by(NVFP4), "FP8 activations take MXFP4 weights"),
        (two_by(FP8_BLOCK128_WEIGHT), two_by(MXFP4), "128x128 scales, expected 1x128"),
        (two_by(MXFP4), two_by(MXFP4, 256), "a has k=128, b has k=256"),
        (two_by(NVFP4), two_by(FP8_BLOCK128), "expected Nvfp4 or Mxfp4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_block_scaled_product_refuses(a: Quantized, b: Quantized, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_gemm(a, b)


def test_an_nvfp4_operand_without_its_global_scale_is_refused() -> None:
    a, b = two_by(NVFP4), two_by(NVFP4)
    with pytest.raises(ValueError, match="needs its global scale"):
        scaled_gemm(Quantized(a.values, a.scales, a.format, a.shape), b)
    with pytest.raises(ValueError, match="needs its global scale"):
        scaled_gemm(a, Quantized(b.values, b.scales, b.format, b.shape))


def test_weights_that_differ_are_not_stacked() -> None:
    with pytest.raises(ValueError, match="differ in format or shape"):
        pack_weights([two_by(NVFP4), two_by(MXFP4)])


def test_a_masked_product_of_full_experts_is_the_contiguous_one() -> None:
    a, b = values(2, 128, 64), values(2, 24, 64)
    count = torch.tensor([128, 128], dtype=torch.int32)
    contiguous = grouped_gemm(a.flatten(0, 1), b, torch.tensor([0, 1], dtype=torch.int32))
    assert relative_difference(masked_gemm(a, b, count).flatten(0, 1), contiguous) < 4e-3


def test_a_masked_product_leaves_slots_not_in_use_alone() -> None:
    out = torch.full((2, 128, 24), 7.0, dtype=BF16)
    masked_gemm(values(2, 128, 64), values(2, 24, 64), torch.tensor([0, 5], dtype=torch.int32), out)
    assert torch.equal(out[0], torch.full((128, 24), 7.0, dtype=BF16))
    assert torch.equal(out[1, 5:], torch.full((123, 24), 7.0, dtype=BF16))


@pytest.mark.parametrize(
    ("slots", "counts", "block", "expected"),
    [
        (64, [0, 1, 64], 32, [-1, -1, 1, -1, 2, 2]),
        (32, [32, 33], 16, [0, 0, 1, 1]),
        (16, [], 16, []),
    ],
)
def test_used_blocks_names_the_expert_of_each_block_in_use(
    slots: int, counts: list[int], block: int, expected: list[int]
) -> None:
    assert used_blocks(torch.tensor(counts, dtype=torch.int32), slots, block).tolist() == expected


@pytest.mark.parametrize("expected_rows", [None, 1, 40])
def test_a_masked_fp4_product_follows_the_decoded_weights(expected_rows: int | None) -> None:
    x, w = values(3, 48, 128), prepare_fp4_weights([quantize(values(16, 128), NVFP4) for _ in range(3)])
    counts = [0, 5, 48]
    got = masked_fp4_gemm(x, w, torch.tensor(counts, dtype=torch.int32), expected_rows)
    for expert, used in enumerate(counts):
        want = x[expert, :used].float() @ decode_fp4_weights(w, expert).T
        assert relative_difference(got[expert, :used], want) < 4e-3


def refused(call: str) -> Any:
    count = torch.tensor([1, 1], dtype=torch.int32)
    w = prepare_fp4_weights([quantize(values(16, 128), MXFP4) for _ in range(2)])
    match call:
        case "slots":
            return masked_gemm(values(2, 100, 64), values(2, 16, 64), count)
        case "count":
            return masked_gemm(values(2, 128, 64), values(2, 16, 64), count[:1])
        case "fp4 slots":
            return masked_fp4_gemm(values(2, 24, 128), w, count)
        case "fp4 experts":
            return masked_fp4_gemm(values(3, 16, 128), w, count)
        case _:
            a = quantize(values(64, 128), MXFP4_SWIZZLED)
            return masked_scaled_gemm(a, experts_of(2, 16, 128, MXFP4), count)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("slots", "slots=100 is not a multiple of 128"),
        ("count", r"count has shape \(1,\), expected \(2,\)"),
        ("fp4 slots", "slots=24 is not a multiple of 16"),
        ("fp4 experts", "w holds 2 experts, x has 3"),
        ("swizzled slots", "slots=32 is not a multiple of 128, a's scales are swizzled"),
    ],
)
def test_a_masked_product_refuses(call: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(call)


def test_fp4_weights_left_as_they_were_quantised_give_the_same_products() -> None:
    qs, x = [quantize(values(24, 128), NVFP4) for _ in range(2)], values(32, 128)
    tiles, packed = prepare_fp4_weights(qs), pack_weights(qs)
    experts = torch.tensor([1, 0], dtype=torch.int32)
    assert (
        relative_difference(grouped_fp4_gemm(x, packed, experts), grouped_fp4_gemm(x, tiles, experts)) < 1e-3
    )
    one = pack_weights(qs[:1])
    assert relative_difference(fp4_gemm(x, one), x.float() @ decode_fp4_weights(one, 0).T) < 4e-3


def test_a_forced_path_holds_inside_its_block_alone() -> None:
    device = torch.device("cuda", 0)
    with paths.forced("portable"):
        assert paths.matrix_path(device) == "portable"
        with paths.forced("hopper"):
            assert paths.matrix_path(device) == "hopper"
        assert paths.matrix_path(device) == "portable"


@pytest.mark.parametrize(
    ("capability", "path", "native"),
    [
        ((8, 0), "portable", False),
        ((9, 0), "hopper", False),
        ((10, 3), "portable", True),
        ((12, 0), "portable", True),
    ],
)
def test_the_path_follows_from_the_compute_capability(
    capability: tuple[int, int], path: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_capability", lambda _index: capability)
    device = torch.device("cuda", 0)
    assert (paths.matrix_path(device), paths.multiplies_block_scaled(device)) == (path, native)


def test_a_gpu_without_bf16_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_capability", lambda _index: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability \(7, 5\), matrix products need \(8, 0\)"):
        paths.matrix_path(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "writes", "launched"),
    [
        ((8, 0), torch.float8_e4m3fn, False),
        ((8, 0), torch.bfloat16, True),
        ((8, 9), torch.float8_e4m3fn, True),
    ],
)
def test_operations_on_fp8_run_their_reference_on_a_gpu_that_cannot_convert_it(
    capability: tuple[int, int], writes: torch.dtype, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_capability", lambda _index: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        x = torch.empty(2, 256, dtype=torch.bfloat16, device="cuda")
        assert launches(x, writes) is launched
        if writes == torch.float8_e4m3fn and not launched:
            assert quantize(x, FP8_BLOCK128).values.is_cuda
            assert quantize(x, NVFP4).scales.is_cuda
            assert pad_quant(x, 384).shape == (2, 384)
            assert silu_mul_quant(x).shape == (2, 128)


def test_the_benchmarks_products_read_the_same_bytes_in_either_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paths, "_index", lambda _device: 0)
    cases = []
    for capability in ((9, 0), (10, 0)):
        monkeypatch.setattr(paths, "_capability", lambda _index, found=capability: found)
        with FakeTensorMode():
            cases.append([(case.shape, case.bytes) for case in (*packed.plain(), *packed.grouped())])
    assert cases[0] == cases[1]
    assert len(cases[0]) == 52
