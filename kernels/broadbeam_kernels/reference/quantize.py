"""Oracles of the formats: codes and scales bit for bit, written for reading rather than speed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    MXFP4,
    NVFP4,
    NVFP4_RANGE,
    SWIZZLE_COLUMNS,
    SWIZZLE_ROWS,
    Fp8Block,
    Mxfp4,
    Nvfp4,
    Quantized,
    align,
    empty_fp8_scales,
)

# A magnitude just above a midpoint takes the upper code; on it, the even one: inclusive where that is upper.
_MIDPOINTS = (
    (0.25, False),
    (0.75, True),
    (1.25, False),
    (1.75, True),
    (2.5, False),
    (3.5, True),
    (5.0, False),
)


def e2m1_codes(x: Tensor) -> Tensor:
    """float -> e2m1 codes (uint8, 0..15), nearest, ties to even, saturating at 6, sign kept on zero."""
    a = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint, inclusive in _MIDPOINTS:
        code += ((a >= midpoint) if inclusive else (a > midpoint)).to(torch.uint8)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def e2m1_values(codes: Tensor) -> Tensor:
    """e2m1 codes (0..15) -> float32."""
    table = torch.tensor((*E2M1_VALUES, *(-v for v in E2M1_VALUES)), device=codes.device)
    return table[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """(rows, columns) codes -> uint8 (rows, columns / 2), element 2i in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """uint8 (rows, columns / 2) -> (rows, columns) codes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)


def swizzle(scales: Tensor) -> Tensor:
    """(rows, blocks) scales -> flat 128x4 tiles, padded with zeros."""
    rows, blocks = scales.shape
    m, k = align(rows, SWIZZLE_ROWS), align(blocks, SWIZZLE_COLUMNS)
    raw = F.pad(scales.view(torch.uint8), (0, k - blocks, 0, m - rows))
    tiles = raw.reshape(m // 128, 4, 32, k // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scales.dtype)


def unswizzle(scales: Tensor, rows: int, blocks: int) -> Tensor:
    """Flat 128x4 tiles -> (rows, blocks) scales."""
    m, k = align(rows, SWIZZLE_ROWS), align(blocks, SWIZZLE_COLUMNS)
    tiles = scales.view(torch.uint8).reshape(m // 128, k // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(m, k)[:rows, :blocks].contiguous().view(scales.dtype)


def _blocks(x: Tensor, size: int) -> Tensor:
    rows, columns = x.shape
    return x.float().reshape(rows, columns // size, size)


def quantize_nvfp4(x: Tensor, fmt: Nvfp4 = NVFP4, global_scale: Tensor | None = None) -> Quantized:
    """NVFP4 codes and scales of (rows, columns); see the public operation for the formula."""
    rows, columns = x.shape
    if global_scale is None:
        amax = x.abs().max().float() if x.numel() else torch.zeros((), device=x.device)
        # (a scalar over a tensor would multiply by a rounded reciprocal)
        global_scale = torch.where(amax > 0, torch.full_like(amax, NVFP4_RANGE) / amax, torch.ones_like(amax))
    g = global_scale.float().reshape(1)
    blocks = _blocks(x, fmt.block)
    scale = g * (blocks.abs().amax(-1) * (1 / 6) if x.numel() else blocks.sum(-1))
    scales = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    decoded = scales.float()
    factor = torch.where(decoded == 0, torch.zeros_like(decoded), 1 / (decoded * (1 / g)))
    scaled = (blocks * factor.unsqueeze(-1)).clamp(-E2M1_MAX, E2M1_MAX)
    stored = swizzle(scales) if fmt.scales == "swizzled" else scales
    return Quantized(pack(e2m1_codes(scaled).reshape(rows, columns)), stored, fmt, (rows, columns), g)


def dequantize_nvfp4(q: Quantized, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in `dtype`."""
    assert isinstance(q.format, Nvfp4)
    assert q.global_scale is not None
    rows, columns = q.shape
    blocks = columns // q.format.block
    scales = unswizzle(q.scales, rows, blocks) if q.format.scales == "swizzled" else q.scales
    values = e2m1_values(unpack(q.values)).reshape(rows, blocks, q.format.block)
    return (values * (scales.float() / q.global_scale).unsqueeze(-1)).reshape(rows, columns).to(dtype)


def mxfp4_exponents(amax: Tensor) -> Tensor:
    """Biased E8M0 exponents (int32) of blocks whose largest magnitudes are `amax` (float32)."""
    rounded = amax.contiguous().view(torch.int32) + (1 << 21)
    return (((rounded >> 23) & 0xFF) - 2).clamp(0, 254)


def quantize_mxfp4(x: Tensor, fmt: Mxfp4 = MXFP4) -> Quantized:
    """MXFP4 codes and scales of (rows, columns); see the public operation for the formula."""
    rows, columns = x.shape
    blocks = _blocks(x, fmt.block)
    exponents = mxfp4_exponents(blocks.abs().amax(-1) if x.numel() else blocks.sum(-1))
    factor = torch.exp2((127 - exponents).double()).unsqueeze(-1)
    scaled = (blocks.double() * factor).clamp(-E2M1_MAX, E2M1_MAX)
    scales = exponents.to(torch.uint8)
    stored = swizzle(scales) if fmt.scales == "swizzled" else scales
    return Quantized(pack(e2m1_codes(scaled).reshape(rows, columns)), stored, fmt, (rows, columns))


def dequantize_mxfp4(q: Quantized, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in `dtype`."""
    assert isinstance(q.format, Mxfp4)
    rows, columns = q.shape
    blocks = columns // q.format.block
    scales = unswizzle(q.scales, rows, blocks) if q.format.scales == "swizzled" else q.scales
    values = e2m1_values(unpack(q.values)).reshape(rows, blocks, q.format.block)
    factor = torch.exp2((scales.int() - 127).double()).unsqueeze(-1)
    return (values.double() * factor).reshape(rows, columns).to(dtype)


def ceil_pow2(scale: Tensor) -> Tensor:
    """The smallest power of two >= each positive float32, by its bits."""
    bits = scale.contiguous().view(torch.int32)
    exponent = (((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()).clamp(1, 254)
    return (exponent << 23).view(torch.float32)


def fp8_scales(amax: Tensor, fmt: Fp8Block) -> Tensor:
    """float32 scales for blocks whose largest magnitudes are `amax`."""
    scale = amax.float().clamp(min=1e-10) * (1 / E4M3_MAX)
    return scale if fmt.scale == "float32" else ceil_pow2(scale)


def store_scales(scale: Tensor, fmt: Fp8Block, rows: int, columns: int) -> Tensor:
    """float32 scales (groups of rows, groups of columns) in the layout and type that `fmt` asks for."""
    out = empty_fp8_scales(fmt, rows, columns, scale.device)
    out.copy_((scale.contiguous().view(torch.int32) >> 23) if fmt.scale == "ue8m0" else scale)
    return out


def load_scales(scales: Tensor, fmt: Fp8Block) -> Tensor:
    """Stored scales -> float32."""
    return (scales.int() << 23).view(torch.float32) if fmt.scale == "ue8m0" else scales


def _tiles(x: Tensor, rows: int) -> Tensor:
    """(m, n) -> (m / rows, rows, n / 128, 128), padded with zeros."""
    m, n = align(x.shape[0], rows), align(x.shape[1], 128)
    padded = F.pad(x, (0, n - x.shape[1], 0, m - x.shape[0]))
    return padded.reshape(m // rows, rows, n // 128, 128)


def quantize_fp8_block(x: Tensor, fmt: Fp8Block) -> Quantized:
    """e4m3 codes and block scales of (rows, columns); see the public operation for the formula."""
    rows, columns = x.shape
    if not x.numel():
        empty = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
        return Quantized(empty, empty_fp8_scales(fmt, rows, columns, x.device), fmt, (rows, columns))
    tiles = _tiles(x.float(), fmt.rows)
    scale = fp8_scales(tiles.abs().amax((1, 3)), fmt)
    scaled = (tiles / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    codes = scaled.flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn)
    return Quantized(codes.contiguous(), store_scales(scale, fmt, rows, columns), fmt, (rows, columns))


def dequantize_fp8_block(q: Quantized, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in `dtype`."""
    assert isinstance(q.format, Fp8Block)
    rows, columns = q.shape
    tiles = _tiles(q.values.float(), q.format.rows)
    out = tiles * load_scales(q.scales, q.format)[:, None, :, None]
    return out.flatten(2).flatten(0, 1)[:rows, :columns].to(dtype)
