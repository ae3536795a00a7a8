"""Rotary position embedding with the scalings of Llama 3 and YaRN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from broadbeam_runtime.models.architecture import Rope


class RotaryTable:
    """cos and sin for every position of a model, (positions, dim) each, both halves filled.

    The sine's first half is negated, so that rotating is `x * cos + swapped(x) * sin`.
    """

    def __init__(self, rope: Rope, dim: int, positions: int, device: torch.device, dtype: torch.dtype):
        angles = torch.outer(torch.arange(positions).float(), inverse_frequencies(rope, dim))
        factor = attention_factor(rope)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.cos = torch.cat([cos, cos], -1).to(device, dtype)
        self.sin = torch.cat([-sin, sin], -1).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (tokens, 1, dim) of `positions` (tokens)."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + dim/2) of x (tokens, heads, dim)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1), as DeepSeek stores them; the result has the even elements first.

    Queries and keys are permuted alike, so their products are what the interleaved order gives.
    """
    return rotate(torch.cat([x[..., 0::2], x[..., 1::2]], -1), cos, sin)


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """(dim / 2) radians per position."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2).float() / dim))
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain, dim)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by (YaRN's temperature; 1 for the others)."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    wavelength = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = ((rope.original_max_len / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: Rope, plain: Tensor, dim: int) -> Tensor:
    """NTK-by-parts (Peng et al. 2023, eq. 23): a ramp between interpolated and plain frequencies."""

    def dimension(rotations: float) -> float:
        return dim * math.log(rope.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2).float() - low) / span).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)
