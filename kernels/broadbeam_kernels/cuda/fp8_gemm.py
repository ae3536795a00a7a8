"""Launches `fp8_gemm.cu`: FP8 block GEMM on Hopper, dense with many rows, contiguous and masked."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..tuning import multiprocessors
from .nvrtc import Function, cubin, native
from .tensor_map import tensor_map

Grouping = Literal["dense", "contiguous", "masked"]

SHARED_BYTES = 227 << 10  # what one block may have on sm_90
MOST_STAGES = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time choices of the kernel, named as there; `group` and the grid are the launch's."""

    n: int
    shared: Literal["", "a", "b"] = ""  # what two tiles of a cluster fetch together
    split: int = 1
    a_rows: int = 128
    group: int = 16
    stages: int = MOST_STAGES
    turns: int = 0

    @property
    def multicast(self) -> int:
        return 2 if self.shared else 1

    @property
    def warpgroups(self) -> int:
        return 2 if self.a_rows > 64 else 1

    @property
    def m(self) -> int:
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def cluster(self) -> int:
        return self.multicast * self.split

    @property
    def _out_bytes(self) -> int:
        if self.split == 1:
            return self.m * self.n * 2
        return (self.split - 1) * -(-self.n // 8 // self.split) * self.m * 32

    @property
    def _stage_bytes(self) -> int:
        return (self.m + self.n) * 128 + (self.m + 4) * 4 + 16

    @property
    def ring(self) -> int:
        """Stages that fit beside the outgoing tile."""
        return min(self.stages, (SHARED_BYTES - self._out_bytes) // self._stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self._out_bytes + self.ring * self._stage_bytes

    @property
    def box(self) -> int:
        """Columns of an output box: what one swizzle of the shared tile spans."""
        return next(width for width in (64, 32, 16, 8) if self.n % width == 0)


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


def code(tile: Tile, grouping: Grouping, out_half: bool, arch: str) -> bytes:
    """The kernel's machine code for these choices, compiled or from the disk."""
    return cubin(
        Path(__file__).with_suffix(".cu").read_text(),
        {"wgmma.cuh": wgmma_header(tile.n)},
        {
            "TILE_N": tile.n,
            "STAGES": tile.ring,
            "WARPGROUPS": tile.warpgroups,
            "A_ROWS": tile.a_rows,
            "MULTICAST": tile.multicast,
            "SHARE_B": int(tile.shared == "b"),
            "SPLIT": tile.split,
            "GROUPING": ("dense", "contiguous", "masked").index(grouping),
            "OUT_HALF": int(out_half),
            "TURNS": tile.turns if tile.warpgroups == 2 else 0,
        },
        arch,
    )


@cache
def function(tile: Tile, grouping: Grouping, out_half: bool, device: int) -> Function:
    """The kernel for these choices, loaded on `device`."""
    return Function(code(tile, grouping, out_half, native(device)), "fp8_gemm", device, tile.shared_bytes)


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
    tile: Tile,
) -> None:
    """out (rows, n) = a (rows, k) @ b[expert] (n, k).T, with the arguments already checked.

    b is (experts * n, k) dense rows; a_scales (rows, k / 128), or (experts, slots, k / 128) when masked, with
    any strides; b_scales (experts, n / 128, k / 128) contiguous. `groups` as in `persistent_gemm.launch`.
    """
    rows, n = out.shape
    masked = grouping == "masked"
    tiles_m = -(-rows // (tile.m * (2 if tile.shared == "b" else 1)))
    tiles_n = -(-n // (tile.n * (2 if tile.shared == "a" else 1)))
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
        tensor_map(a, (tile.a_rows // (2 if tile.shared == "a" else 1), 128)),
        tensor_map(b, (tile.n // (2 if tile.shared == "b" else 1), 128)),
        tensor_map(out, (64, tile.box)),
    )
    clusters = tiles_m * tiles_n
    if tile.split == 1:
        clusters = min(clusters, multiprocessors(a.device.index) // tile.cluster)
    function(tile, grouping, out.dtype == torch.float16, a.device.index).launch(
        clusters * tile.cluster, tile.threads, (*(int(m.getPtr()) for m in maps), ctypes.addressof(problem))
    )
