"""Kernels that are launched early wait before they touch memory, and release the next launch after that.

Read off the PTX that Triton makes for a Hopper, without a GPU: a race would show on one now and then at most.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from broadbeam_kernels import (  # noqa: E402
    add_rms_norm,
    concat_mla_k,
    finalize,
    fp4_block,
    fp8_block,
    masked_gemm,
    nvfp4,
    overlap,
    rope_quantize,
    silu_mul_quant,
)

EVENTS = re.compile(r"griddepcontrol\.wait|griddepcontrol\.launch_dependents|ld\.global|st\.global")
WAIT, RELEASE = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
F8 = {"codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
FP4 = {"x_ptr": "*i32", "codes_ptr": "*u8", "global_ptr": "*fp32", "maxima_ptr": "*fp32"}
BLOCKS = {"NVFP4": True, "BF16": True, "BLOCKS": 64, "BLOCKS_ROW": 448}


def events(kernel: Any, types: dict[str, str], values: dict[str, Any]) -> list[str]:
    """What `kernel`, launched early on sm_90, does with memory and with its neighbours, in its PTX's order.

    Every argument not named is an int32.
    """
    values = {**values, "OVERLAP": True}
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return EVENTS.findall(compiled.asm["ptx"])


KERNELS = [
    pytest.param(
        add_rms_norm._kernel,
        dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr"), "*bf16")
        | {"scales_ptr": "*fp32", "epsilon": "fp32"},
        {"ADD": True, "QUANTIZE": False, "POW2": False, "BYTE": False, "GROUPS": 8},
        id="norm",
    ),
    pytest.param(
        concat_mla_k._kernel,
        dict.fromkeys(("k_ptr", "nope_ptr", "rope_ptr"), "*bf16"),
        {"NOPE": 128, "ROPE": 64, "HEADS": 8},
        id="concat",
    ),
    pytest.param(
        finalize._kernel,
        {"y_ptr": "*bf16", "rows_ptr": "*i32", "weights_ptr": "*fp32", "out_ptr": "*bf16"},
        {"TOPK": 8, "COLUMNS": 1024},
        id="finalize",
    ),
    pytest.param(
        silu_mul_quant._kernel,
        {**F8, "y_ptr": "*bf16", "count_ptr": "*i32"},
        {"MASKED": True, "POW2": False, "BYTE": False, "ROWS": 2, "GROUPS": 8},
        id="silu",
    ),
    pytest.param(
        rope_quantize._kernel,
        {
            **dict.fromkeys(("nope_ptr", "rope_ptr", "latent_ptr", "key_rope_ptr", "key_out_ptr"), "*bf16"),
            **dict.fromkeys(("angle_ptr", "q_factor", "kv_factor"), "fp32"),
            **{"angle_ptr": "*fp32", "position_ptr": "*i64", "slot_ptr": "*i64"},
            **{"out_ptr": "*fp8e4nv", "cache_ptr": "*fp8e4nv"},
        },
        {
            **{"NOPE": 512, "ROPE": 64, "LATENT": 512, "HEADS": 4, "BF16": True},
            **{"INTERLEAVED": True, "CACHE": True, "KEY_OUT": False},
        },
        id="rope",
    ),
    pytest.param(
        fp8_block._quantize_rows_kernel,
        {**F8, "x_ptr": "*bf16"},
        {
            **{"POW2": False, "BYTE": False, "READ_WHOLE": True, "WRITE_WHOLE": True},
            **{"GROUPS_ROW": 56, "GROUPS": 16},
        },
        id="fp8 rows",
    ),
    pytest.param(
        fp8_block._quantize_tiles_kernel,
        {**F8, "x_ptr": "*bf16"},
        {"POW2": False, "BYTE": False},
        id="fp8 tiles",
    ),
    pytest.param(
        fp8_block._dequantize_kernel,
        {**F8, "out_ptr": "*bf16"},
        {"TILED": False, "BYTE": False, "WHOLE": True, "GROUPS": 16},
        id="fp8 back",
    ),
    pytest.param(
        fp4_block._quantize_kernel,
        {**FP4, "scales_ptr": "*fp8e4nv"},
        {**BLOCKS, "SWIZZLED": False, "FLAT": True, "PADDED": False, "MAXIMA": 0},
        id="fp4",
    ),
    pytest.param(
        fp4_block._dequantize_kernel,
        {**FP4, "scales_ptr": "*fp8e4nv", "out_ptr": "*i32"},
        {**BLOCKS, "SWIZZLED": False},
        id="fp4 back",
    ),
    pytest.param(
        nvfp4._maxima_kernel,
        FP4,
        {"BF16": True, "FLAT": True, "WORDS": 4096},
        id="maxima",
    ),
    pytest.param(
        masked_gemm._used_blocks_kernel,
        {"count_ptr": "*i32", "table_ptr": "*i32"},
        {"ENTRIES": 1024},
        id="used blocks",
    ),
]


@pytest.mark.parametrize(("kernel", "types", "values"), KERNELS)
def test_memory_is_touched_after_the_launch_ahead_has_ended(
    kernel: Any, types: dict[str, str], values: dict[str, Any]
) -> None:
    found = events(kernel, types, values)
    assert found[0] == WAIT
    assert found.count(WAIT) == found.count(RELEASE) == 1
    assert {"ld.global", "st.global"} <= set(found)


def test_the_quantiser_of_a_computed_scale_reads_early_what_the_launch_before_last_wrote() -> None:
    values = {**BLOCKS, "SWIZZLED": False, "FLAT": True, "PADDED": False, "MAXIMA": 512}
    found = events(fp4_block._quantize_kernel, {**FP4, "scales_ptr": "*fp8e4nv"}, values)
    waits = found.index(WAIT)
    assert set(found[:waits]) == {"ld.global"}
    assert found[waits + 1] == RELEASE


@pytest.mark.parametrize(
    ("programs", "capability", "early"),
    [
        (1, (9, 0), True),
        (overlap.MOST_PROGRAMS, (10, 0), True),
        (overlap.MOST_PROGRAMS + 1, (9, 0), False),
        (1, (8, 9), False),
    ],
)
def test_launches_are_early_where_that_is_possible_and_pays(
    programs: int, capability: tuple[int, int], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap.torch.cuda, "get_device_capability", lambda _index: capability)
    overlap._overlaps.cache_clear()
    try:
        options = overlap.early(overlap.torch.device("cuda", 0), programs)
    finally:
        overlap._overlaps.cache_clear()
    assert options.get("launch_pdl", False) is options["OVERLAP"] is early
