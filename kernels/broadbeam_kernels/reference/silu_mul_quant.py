"""Oracle of SiLU-mul-quant: float32 throughout."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import silu

from ..formats import Fp8Block, Quantized
from .quantize import quantize_fp8_block


def product(y: Tensor) -> Tensor:
    """silu(gate) * up in float32, for y = gate | up along the last dimension."""
    gate, up = y.float().chunk(2, dim=-1)
    return silu(gate) * up


def silu_mul_quant(y: Tensor, fmt: Fp8Block) -> Quantized:
    """(rows, 2 * hidden) -> e4m3 (rows, hidden)."""
    return quantize_fp8_block(product(y), fmt)


def silu_mul_quant_masked(
    y: Tensor, count: Tensor, values: Tensor, scales: Tensor, fmt: Fp8Block
) -> tuple[Tensor, Tensor]:
    """Writes the rows below each expert's count into `values` and `scales`, and returns them."""
    row_format = replace(fmt, layout="row")
    for expert, rows in enumerate(count.tolist()):
        q = quantize_fp8_block(product(y[expert, :rows]), row_format)
        values[expert, :rows] = q.values
        scales[expert, :rows] = q.scales
    return values, scales
