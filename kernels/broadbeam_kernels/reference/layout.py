"""Oracles of the operations that mostly move values: concatenate, pad, finalize."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..formats import Fp8Block, Mxfp4, Nvfp4, Quantized
from .quantize import quantize_fp8_block, quantize_mxfp4, quantize_nvfp4


def concat_mla_k(k_nope: Tensor, k_rope: Tensor, out: Tensor) -> Tensor:
    """Writes k_nope | broadcast k_rope into `out`."""
    nope = k_nope.shape[-1]
    out[..., :nope] = k_nope
    out[..., nope:] = k_rope
    return out


def pad_quant(
    x: Tensor, columns: int, fmt: Nvfp4 | Mxfp4 | Fp8Block, global_scale: Tensor | None = None
) -> Quantized:
    """`x` with zero columns appended up to `columns`, quantised."""
    padded = F.pad(x, (0, columns - x.shape[1]))
    match fmt:
        case Nvfp4():
            return quantize_nvfp4(padded, fmt, global_scale)
        case Mxfp4():
            return quantize_mxfp4(padded, fmt)
        case Fp8Block():
            return quantize_fp8_block(padded, fmt)


def finalize(y: Tensor, rows: Tensor, weights: Tensor, columns: int) -> Tensor:
    """out[t] = sum over j of weights[t, j] * y[rows[t, j], :columns]; row -1 adds nothing. float32 sums."""
    picked = (
        y[rows.clamp(min=0).long(), :columns].float() if y.shape[0] else y.new_zeros((*rows.shape, columns))
    )
    scale = weights.float() * (rows >= 0)
    return (picked * scale.unsqueeze(-1)).sum(1).to(y.dtype)
