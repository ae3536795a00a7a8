"""Oracle of residual add + RMSNorm (+ quant), in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Fp8Block, Quantized
from .quantize import quantize_fp8_block


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, fmt: Fp8Block | None
) -> Tensor | Quantized:
    """Updates `residual` in place and returns the normalised rows or their codes."""
    z = x
    if residual is not None:
        residual.copy_(x.float() + residual.float())
        z = residual
    z = z.float()
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + epsilon) * weight.float()
    return y.to(x.dtype) if fmt is None else quantize_fp8_block(y, fmt)
