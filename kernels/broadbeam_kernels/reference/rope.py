"""Oracle of RoPE + quantise + Q write + cache write, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats import E4M3_MAX

if TYPE_CHECKING:
    from ..rope_quantize import LatentCache, Rotary


def rotate(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., rope) rotated by cos_sin (..., rope) = cos | sin; float32."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    if interleaved:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def cast(x: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
    """float32 -> e4m3 of x * multiplier, or x in a 16-bit type."""
    if dtype == torch.float8_e4m3fn:
        return (x * multiplier).clamp(-E4M3_MAX, E4M3_MAX).to(dtype)
    return x.to(dtype)


def rope_quantize(
    q_nope: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    rotary: Rotary,
    kv: LatentCache | None,
    out: Tensor,
    q_multiplier: float,
    k_rope_out: Tensor | None,
) -> Tensor:
    """Writes `out`, the cache and k_rope_out; returns `out`."""
    angles = rotary.cos_sin[rotary.positions.long()]  # (tokens, rope)
    q = torch.cat((q_nope.float(), rotate(q_rope, angles.unsqueeze(1), rotary.interleaved)), dim=-1)
    out.copy_(cast(q, q_multiplier, out.dtype))
    key = rotate(k_rope, angles, rotary.interleaved)
    if k_rope_out is not None:
        k_rope_out.copy_(key)
    if kv is not None:
        rows = torch.cat((kv.kv_c.float(), key), dim=-1)
        kept = kv.slots >= 0
        kv.cache[kv.slots[kept].long()] = cast(rows[kept], kv.multiplier, kv.cache.dtype)
    return out
