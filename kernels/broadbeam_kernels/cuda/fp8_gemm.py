"""Launches `fp8_gemm.cu`: FP8 block GEMM on Hopper, dense with many rows, contiguous and masked."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..tuning import config, multiprocessors
from .nvrtc import Function, cubin, native
from .tensor_map import tensor_map
from .tiles import Tile, dense_tile, grouped_tile

Grouping = Literal["dense", "contiguous", "masked"]

log = logging.getLogger(__name__)


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a_scales", "b_scales", "groups", "out")),
        ("a_expert_stride", ctypes.c_longlong),
        *(
            (name, ctypes.c_int)
            for name in (
                "a_row_stride", "a_step_stride", "rows", "columns", "steps", "experts", "slots", "block_log",
                "tiles_m", "tiles_n", "band_log", "tiles_n_inverse", "out_stride",
            )
        ),
    )  # fmt: skip


def wgmma_header(n: int) -> str:
    """`multiply(d, a, b, add)`: d (+)= a (64, 32) @ b (n, 32).T, with its n / 2 registers spelled out."""
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void multiply(
    float (&d)[{count}], unsigned long long a, unsigned long long b, int add) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 "
      "{{{registers}}}, %{count}, %{count + 1}, p, 1, 1;\\n}}"
      : {outputs} : "l"(a), "l"(b), "r"(add));
}}
"""


def code(tile: Tile, grouping: Grouping, packed: bool, out_half: bool, arch: str) -> bytes:
    """The kernel's machine code for these choices, compiled or from the disk."""
    here = Path(__file__)
    return cubin(
        here.with_suffix(".cu").read_text(),
        {"hopper.cuh": here.with_name("hopper.cuh").read_text(), "wgmma.cuh": wgmma_header(tile.n)},
        {
            "TILE_N": tile.n,
            "STAGES": tile.ring,
            "WARPGROUPS": tile.warpgroups,
            "A_ROWS": tile.a_rows,
            "SHARE_A": int("a" in tile.shared),
            "SHARE_B": int("b" in tile.shared),
            "SPLIT": tile.split,
            "GROUPING": ("dense", "contiguous", "masked").index(grouping),
            "PACKED": int(packed),
            "OUT_HALF": int(out_half),
            "PIPELINE": tile.pipeline,
            "TURNS": tile.turns if tile.warpgroups == 2 else 0,
        },
        arch,
    )


@cache
def function(tile: Tile, grouping: Grouping, packed: bool, out_half: bool, device: int) -> Function | None:
    """The kernel for these choices, loaded on `device`; None, said once, where it cannot be had."""
    try:
        machine_code = code(tile, grouping, packed, out_half, native(device))
        return Function(machine_code, "fp8_gemm", device, tile.shared_bytes)
    except RuntimeError as error:  # the compiler's or the driver's refusal, or a library that is not there
        log.warning("no CUDA C++ kernel for %s, Triton's stands in: %s", tile, error)
        return None


@cache
def _tile(rows: int, experts: int, n: int, steps: int, grouping: Grouping, device: int) -> Tile:
    available = multiprocessors(device)
    if grouping == "dense":
        alone = config("cuda_fp8_gemm", torch.device("cuda", device))["alone"]
        return dense_tile(rows, n, steps, available, alone)
    return grouped_tile(rows, experts, n, steps, available)


def _packed(scales: Tensor) -> bool:
    """Whether scales of four neighbouring rows can be copied at once: column-major, padded to 16 bytes."""
    *outer, rows, steps = scales.stride()
    return rows == 1 and scales.data_ptr() % 16 == 0 and steps % 4 == 0 and all(s % 4 == 0 for s in outer)


def launch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    *,
    grouping: Grouping = "dense",
    groups: Tensor | None = None,
    block_rows: int = 128,
    slots: int = 0,
    tile: Tile | None = None,
) -> bool:
    """out (rows, n) = a (rows, k) @ b[expert] (n, k).T, with the arguments already checked.

    b is (experts * n, k) dense rows; a_scales (rows, k / 128), or (experts, slots, k / 128) when masked, with
    any strides; b_scales (experts, n / 128, k / 128) contiguous. `groups` as in `persistent_gemm.launch`.
    `tile`: by cost where none is given. False: there is no such kernel, and nothing was launched.
    """
    rows, n = out.shape
    tile = tile or _tile(rows, b.shape[0] // n, n, a.shape[1] // 128, grouping, a.device.index)
    kernel = function(tile, grouping, _packed(a_scales), out.dtype == torch.float16, a.device.index)
    if kernel is None:
        return False
    masked = grouping == "masked"
    tiles_m, tiles_n = tile.clusters(rows, n)
    problem = _Problem(
        a_scales.data_ptr(),
        b_scales.data_ptr(),
        groups.data_ptr() if groups is not None else 0,
        out.data_ptr(),
        a_scales.stride(0) if masked else 0,
        a_scales.stride(-2),
        a_scales.stride(-1),
        rows,
        n,
        a.shape[1] // 128,
        b.shape[0] // n,
        slots,
        block_rows.bit_length() - 1,
        tiles_m,
        tiles_n,
        tile.group.bit_length() - 1,
        -(-(1 << 31) // tiles_n),
        out.stride(0),
    )
    maps = (
        tensor_map(a, (tile.a_rows // (2 if "a" in tile.shared else 1), 128)),
        tensor_map(b, (tile.n // (2 if "b" in tile.shared else 1), 128)),
        tensor_map(out, (64, tile.box)),
    )
    clusters = tiles_m * tiles_n
    if tile.split == 1:
        clusters = min(clusters, kernel.clusters(tile.threads, tile.cluster))
    kernel.launch(
        clusters * tile.cluster, tile.threads, (*(int(m.getPtr()) for m in maps), ctypes.addressof(problem))
    )
    return True
