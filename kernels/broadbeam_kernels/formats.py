"""Quantisation formats as frozen objects, and the container that a quantised tensor travels in.

A format says how codes are packed, how many values share a scale, and how scales are stored. Formats are
compared by value and passed where other libraries pass booleans.

Sources: NVFP4 and MXFP4 follow the OCP Microscaling specification and NVIDIA's e2m1/e4m3 block format as
vLLM writes it (`nvfp4_utils.cuh`); FP8 blocks follow DeepSeek-V3's 1x128 activations and 128x128 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
NVFP4_RANGE = E4M3_MAX * E2M1_MAX  # the global scale maps a tensor's largest magnitude to this
SWIZZLE_ROWS = 128
SWIZZLE_COLUMNS = 4

ScaleLayout = Literal["linear", "swizzled"]
Fp8Scale = Literal["float32", "pow2", "ue8m0"]
Fp8Layout = Literal["row", "column"]


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """E2M1 codes, 16 to an e4m3 scale, one fp32 global scale `g` per tensor: x = code * scale / g.

    Codes: uint8 (rows, columns / 2), element 2i in the low nibble. Scales: float8_e4m3fn, linear
    (rows, columns / 16), or swizzled in 128x4 tiles, flat, rows padded to 128 and blocks to 4 with zeros.
    """

    scales: ScaleLayout = "linear"
    block: int = 16


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """E2M1 codes, 32 to an E8M0 scale 2^(b-127) stored as uint8: x = code * 2^(b-127)."""

    scales: ScaleLayout = "linear"
    block: int = 32


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """e4m3 codes with one scale for `rows` x 128 values: x = code * scale.

    rows: 1 for activations, 128 for weights.
    scale: `float32` is amax / 448; `pow2` is that rounded up to a power of two, still float32 (what Hopper's
    kernels read); `ue8m0` is the same power as its biased exponent in a uint8 (what Blackwell's read).
    layout: `row` stores scales row-major; `column` stores them column-major with the row count padded to a
    multiple of 4 (strides (1, align(rows, 4))), as the bulk tensor copy needs. Only for rows = 1.
    """

    rows: Literal[1, 128] = 1
    scale: Fp8Scale = "float32"
    layout: Fp8Layout = "row"
    block: int = 128

    def __post_init__(self) -> None:
        if self.rows == 128 and self.layout == "column":
            raise ValueError("layout='column' is for 1x128 scales; 128x128 scales are row-major")


Format = Nvfp4 | Mxfp4 | Fp8Block

NVFP4 = Nvfp4()
NVFP4_SWIZZLED = Nvfp4(scales="swizzled")
MXFP4 = Mxfp4()
MXFP4_SWIZZLED = Mxfp4(scales="swizzled")
FP8_BLOCK128 = Fp8Block()
FP8_BLOCK128_COLUMN = Fp8Block(layout="column")
FP8_BLOCK128_WEIGHT = Fp8Block(rows=128)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A two-dimensional tensor of `shape` in `format`: codes, block scales and, for NVFP4, the global scale.

    `global_scale` is a float32 tensor of one element on the codes' device, in the direction of quantisation
    (larger codes for a larger value); checkpoints store its inverse.
    """

    values: Tensor
    scales: Tensor
    format: Format
    shape: tuple[int, int]
    global_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.values.nbytes + self.scales.nbytes


def align(n: int, multiple: int) -> int:
    """`n` rounded up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple


def swizzled_size(rows: int, blocks: int) -> int:
    """Entries of a 128x4-swizzled scale tensor, its zero padding included."""
    return align(rows, SWIZZLE_ROWS) * align(blocks, SWIZZLE_COLUMNS)


def empty_fp8_scales(fmt: Fp8Block, rows: int, columns: int, device: torch.device) -> Tensor:
    """Unwritten scales for a (rows, columns) tensor in `fmt`, laid out as the format says."""
    dtype = torch.uint8 if fmt.scale == "ue8m0" else torch.float32
    groups = -(-columns // fmt.block)
    if fmt.rows == 128:
        return torch.empty((-(-rows // 128), groups), dtype=dtype, device=device)
    if fmt.layout == "row":
        return torch.empty((rows, groups), dtype=dtype, device=device)
    padded = align(max(rows, 1), 4)
    return torch.empty((groups, padded), dtype=dtype, device=device).t()[:rows]
