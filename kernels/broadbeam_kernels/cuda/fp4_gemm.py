"""Launches `fp4_gemm.cu`: products with FP4 weights on Hopper, plain and grouped."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from torch import Tensor

from ..formats import Nvfp4
from ..fp4_weights import Fp4Weights
from ..tuning import multiprocessors
from .nvrtc import Function, cubin, native
from .tensor_map import tensor_map

log = logging.getLogger(__name__)

SHARED_BYTES = 227 << 10  # what the blocks of one multiprocessor share on sm_90, 1 KiB more for each of them
MOST_STAGES = 12
# A stage is given back while the next one is multiplied: one alone would be waited for forever.
LEAST_STAGES = 2
MOST_SPLIT = 8  # blocks of a cluster on any device


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time choices of the kernel, named as there; `group` is the launch's."""

    tokens: int
    warpgroups: int = 2
    halves: int = 2
    split: int = 1
    resident: int = 1
    group: int = 1
    stages: int = MOST_STAGES
    ahead: int = 0

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + (128 if self.tokens > 128 else 32)

    @property
    def box(self) -> int:
        """Tokens that are fetched at once."""
        return min(self.tokens, 128)

    @property
    def sent(self) -> int:
        """Tokens that are sent at once."""
        return 8 if self.split > 1 else self.box

    @property
    def _out_bytes(self) -> int:
        if self.split == 1:
            return self.warpgroups * self.sent * 128
        kept = -(-self.tokens // 8 // self.split)
        return self.warpgroups * kept * (1024 + (self.split - 1) * 2048)

    def _stage_bytes(self, nvfp4: bool) -> int:
        packed = self.warpgroups // 2 * (4096 + (512 if nvfp4 else 256))
        return self.halves * (self.tokens * 128 + packed) + 16

    def ring(self, nvfp4: bool) -> int:
        """Stages that fit beside the outgoing tile."""
        room = (SHARED_BYTES - (self.resident - 1) * 1024) // self.resident - self._out_bytes - 16
        return min(self.stages, room // self._stage_bytes(nvfp4))

    def shared_bytes(self, nvfp4: bool) -> int:
        """Of one block."""
        return self.ring(nvfp4) * self._stage_bytes(nvfp4) + self._out_bytes + 16


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "alpha", "groups")),
        *(
            (name, ctypes.c_int)
            for name in (
                "rows",
                "tiles_m",
                "tiles_n",
                "packed",
                "steps",
                "block_rows",
                "group",
                "scale_factor",
            )
        ),
    )


def _multiply(n: int) -> str:
    """`multiply(d, a0..a3, b)`: d += a (64, 16) @ b (n, 16).T in bf16, a in registers, d spelled out."""
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    operand = ", ".join(f"%{count + i}" for i in range(4))
    return f"""
__device__ __forceinline__ void multiply(
    float (&d)[{count}], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned long long b) {{
  asm volatile(
      "{{\\n.reg .pred p;\\nsetp.eq.b32 p, 0, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 "
      "{{{registers}}}, {{{operand}}}, %{count + 4}, p, 1, 1, 0;\\n}}"
      : {outputs} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}}
"""


def source(tile: Tile, nvfp4: bool, grouped: bool) -> tuple[str, dict[str, str], dict[str, int]]:
    """The kernel's text, its headers and its definitions for these choices."""
    here = Path(__file__)
    headers = {
        "hopper.cuh": here.with_name("hopper.cuh").read_text(),
        "wgmma.cuh": "".join(_multiply(n) for n in {tile.tokens, tile.box}),
    }
    defines = {
        "TOKENS": tile.tokens,
        "WARPGROUPS": tile.warpgroups,
        "HALVES": tile.halves,
        "STAGES": tile.ring(nvfp4),
        "SPLIT": tile.split,
        "RESIDENT": tile.resident,
        "AHEAD": tile.ahead,
        "NVFP4": int(nvfp4),
        "GROUPED": int(grouped),
    }
    return here.with_suffix(".cu").read_text(), headers, defines


def build(tile: Tile, nvfp4: bool, grouped: bool, device: int) -> bytes:
    """Machine code of the kernel for these choices; RuntimeError with what the compiler said."""
    if tile.ring(nvfp4) < LEAST_STAGES:
        raise RuntimeError(f"{tile} leaves room for {tile.ring(nvfp4)} stages, expected {LEAST_STAGES}")
    text, headers, defines = source(tile, nvfp4, grouped)
    return cubin(text, headers, defines, native(device))


@cache
def function(tile: Tile, nvfp4: bool, grouped: bool, device: int) -> Function | None:
    """The kernel for these choices, loaded on `device`; None, said once, where it cannot be had."""
    try:
        code = build(tile, nvfp4, grouped, device)
        return Function(code, "fp4_gemm", device, tile.shared_bytes(nvfp4))
    except RuntimeError as error:  # the compiler's or the driver's refusal, or a library that is not there
        log.warning("no CUDA C++ kernel for %s, Triton's stands in: %s", tile, error)
        return None


def spread(tile: Tile, x: Tensor, n: int) -> Tile:
    """`tile` with k split over as many blocks as run at once: few tiles would leave multiprocessors idle."""
    rows, k = x.shape
    tiles = -(-rows // tile.tokens) * -(-n // (64 * tile.warpgroups))
    room = multiprocessors(x.device.index) * tile.resident
    split = 1
    while split < MOST_SPLIT and 2 * split * tiles <= room and 8 * split <= k // 128:
        split *= 2
    return replace(tile, split=split)


def launch(x: Tensor, w: Fp4Weights, experts: Tensor | None, block: int, out: Tensor, tile: Tile) -> bool:
    """out (rows, n) = x (rows, k) @ w[expert] (n, k).T, with the arguments already checked.

    `experts` int32 (rows / block), -1 to skip a block, or None: one expert for all rows. False: there is no
    such kernel, and nothing was launched.
    """
    rows, n = out.shape
    nvfp4 = isinstance(w.format, Nvfp4)
    kernel = function(tile, nvfp4, experts is not None, x.device.index)
    if kernel is None:
        return False
    tiles_m, tiles_n = -(-rows // tile.tokens), -(-n // (64 * tile.warpgroups))
    problem = _Problem(
        w.codes.data_ptr(),
        w.scales.data_ptr(),
        w.alpha.data_ptr(),
        experts.data_ptr() if experts is not None else 0,
        rows,
        tiles_m,
        tiles_n,
        -(-n // 128),
        x.shape[1] // 128,
        max(block, 1),
        tile.group,
        16 if nvfp4 else 128,
    )
    maps = tensor_map(x, (tile.box, 64)), tensor_map(out, (tile.sent, 64))
    clusters = tiles_m * tiles_n
    if tile.split == 1:
        clusters = min(clusters, multiprocessors(x.device.index) * tile.resident)
    arguments = (*(int(m.getPtr()) for m in maps), ctypes.addressof(problem))
    kernel.launch(clusters * tile.split, tile.threads, arguments, early=experts is None)
    return True
