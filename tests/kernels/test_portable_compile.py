"""The plain-Triton products compile for GPUs that are not here, down to machine code and without a device.

What this proves: Triton takes the kernel for that compute capability, its assembler accepts the result, and
the instruction that multiplies is the one that was meant. It says nothing of results or speed: results are
checked on a Hopper (test_portable_gpu.py), where the same source compiles to other instructions.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from broadbeam_kernels.portable_gemm import _gemm_kernel  # noqa: E402
from broadbeam_kernels.scaled_gemm import _scaled_kernel  # noqa: E402

MULTIPLY = re.compile(r"(?:tcgen05\.mma|mma\.sync)[\w.:]*")


def multiplications(
    kernel: Any, capability: int, types: dict[str, str], warps: int, **values: Any
) -> set[str]:
    """The matrix instructions in `kernel` compiled for `capability`; every argument not named is an int32."""
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in values
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
    return set(MULTIPLY.findall(compiled.asm["ptx"]))


FP8 = {"a_ptr": "*fp8e4nv", "b_ptr": "*fp8e4nv", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32"}
CODES = {**FP8, "a_ptr": "*u8", "b_ptr": "*u8"}
BF16 = {"a_ptr": "*bf16", "b_ptr": "*bf16"}


@pytest.mark.parametrize(
    ("capability", "types", "grouping", "instruction"),
    [
        pytest.param(80, CODES, "dense", "m16n8k16.row.col.f32.f16.f16", id="sm_80 fp8, multiplied in fp16"),
        pytest.param(80, BF16, "contiguous", "m16n8k16.row.col.f32.bf16.bf16", id="sm_80 bf16"),
        pytest.param(89, BF16, "masked", "m16n8k16.row.col.f32.bf16.bf16", id="sm_89 bf16 masked"),
        pytest.param(89, FP8, "contiguous", "m16n8k32.row.col.f32.e4m3.e4m3", id="sm_89 fp8"),
        pytest.param(100, FP8, "dense", "tcgen05.mma.cta_group::1.kind::f8f6f4", id="sm_100 fp8"),
        pytest.param(
            100, FP8, "dense", "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale", id="sm_100 fp8 pow2"
        ),
        pytest.param(100, BF16, "masked", "tcgen05.mma.cta_group::1.kind::f16", id="sm_100 bf16 masked"),
        pytest.param(120, FP8, "dense", "m16n8k32.row.col.kind::mxf8f6f4.block_scale", id="sm_120 fp8 pow2"),
        pytest.param(120, BF16, "contiguous", "m16n8k16.row.col.f32.bf16.bf16", id="sm_120 bf16"),
        pytest.param(120, FP8, "masked", "m16n8k32.row.col.f32.e4m3.e4m3", id="sm_120 fp8 masked"),
    ],
)
def test_a_portable_product_multiplies_with(
    capability: int, types: dict[str, str], grouping: str, instruction: str
) -> None:
    scaled, pow2 = types is not BF16, "block_scale" in instruction
    tile = {
        "BM": 16,
        "BN": 128 if pow2 else 64,
        "BK": 128 if scaled else 64,
        "STAGES": 3,
        "BLOCK_ROWS": 128,
        "GROUP": 4,
    }
    flags = {"GROUPING": grouping, "SCALED": scaled, "AS_HALF": types is CODES, "POW2": pow2, "WHOLE": True}
    pointers = {**types, "out_ptr": "*bf16"}
    absent: dict[str, Any] = {} if scaled else {"a_scale_ptr": None, "b_scale_ptr": None}
    if grouping == "dense":
        absent["group_ptr"] = None
    else:
        pointers["group_ptr"] = "*i32"
    found = multiplications(_gemm_kernel, capability, pointers, 4, **tile, **flags, **absent)
    assert any(instruction in name for name in found), found


NVFP4 = {"A": "fp4", "NVFP4": True}
MXFP4 = {"A": "fp4", "NVFP4": False}
FP8_BY_MXFP4 = {"A": "fp8", "NVFP4": False}
BF16_BY_NVFP4 = {"A": "bf16", "NVFP4": True}


@pytest.mark.parametrize(
    ("capability", "formats", "rows", "instruction"),
    [
        pytest.param(
            100, NVFP4, 128, "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X", id="sm_100"
        ),
        pytest.param(
            100,
            NVFP4,
            16,
            "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X",
            id="sm_100 16 rows",
        ),
        pytest.param(
            100,
            MXFP4,
            128,
            "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X",
            id="sm_100 mxfp4",
        ),
        pytest.param(
            100, FP8_BY_MXFP4, 16, "kind::mxf8f6f4.block_scale.scale_vec::1X", id="sm_100 fp8 by mxfp4"
        ),
        pytest.param(103, NVFP4, 16, "kind::mxf4nvf4.block_scale.scale_vec::4X", id="sm_103"),
        pytest.param(
            120,
            NVFP4,
            16,
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X",
            id="sm_120",
        ),
        pytest.param(120, MXFP4, 16, "kind::mxf4nvf4.block_scale.scale_vec::2X", id="sm_120 mxfp4"),
        pytest.param(
            120, FP8_BY_MXFP4, 16, "m16n8k16.row.col.f32.bf16.bf16", id="sm_120 fp8 by mxfp4, in bf16"
        ),
        pytest.param(80, NVFP4, 16, "m16n8k16.row.col.f32.bf16.bf16", id="sm_80, decoded to bf16"),
        pytest.param(89, NVFP4, 16, "m16n8k16.row.col.f32.bf16.bf16", id="sm_89, decoded to bf16"),
        pytest.param(
            100, BF16_BY_NVFP4, 16, "tcgen05.mma.cta_group::1.kind::f16", id="sm_100 weights in fp4"
        ),
        pytest.param(80, BF16_BY_NVFP4, 16, "m16n8k16.row.col.f32.bf16.bf16", id="sm_80 weights in fp4"),
    ],
)
def test_a_block_scaled_product_multiplies_with(
    capability: int, formats: dict[str, Any], rows: int, instruction: str
) -> None:
    fp4 = formats["A"] == "fp4"
    pointers = {
        "a_ptr": {"fp4": "*u8", "fp8": "*fp8e4nv", "bf16": "*bf16"}[formats["A"]],
        "a_scale_ptr": "*u8",
        "b_ptr": "*u8",
        "b_scale_ptr": "*u8",
        "out_ptr": "*bf16",
        "group_ptr": "*i32",
    }
    absent: dict[str, Any] = {}
    if formats["NVFP4"]:
        pointers |= {"a_global_ptr": "*fp32", "b_global_ptr": "*fp32"}
    else:
        absent = {"a_global_ptr": None, "b_global_ptr": None}
    found = multiplications(
        _scaled_kernel,
        capability,
        pointers,
        8 if rows == 128 else 4,
        **formats,
        **absent,
        A_SWIZZLED=fp4,
        B_SWIZZLED=True,
        NATIVE=capability >= 100 and formats["A"] != "bf16",
        BM=rows,
        BN=128,
        BK=128,
        STAGES=3,
        BLOCK_ROWS=128,
        GROUP=4,
        GROUPING="contiguous",
    )
    assert any(instruction in name for name in found), found
