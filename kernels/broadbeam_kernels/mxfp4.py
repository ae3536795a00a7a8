"""MXFP4: quantise to and from e2m1 codes with a power-of-two scale for 32 values."""

from __future__ import annotations

import torch
from torch import Tensor

from .contracts import (
    HALF_TYPES,
    check_multiple,
    check_quantized,
    check_size,
    check_tensor,
    check_type,
    launches,
)
from .formats import MXFP4, Mxfp4, Quantized
from .fp4_block import dequantize_blocks, quantize_blocks
from .reference import quantize as oracle


def quantize_mxfp4(x: Tensor, fmt: Mxfp4 = MXFP4) -> Quantized:
    """(rows, columns) bf16 or fp16 -> MXFP4; columns a multiple of 32.

    scale = 2^e with e the exponent of the block's amax (mantissas of 1.75 and more round up) minus 2;
    code = e2m1(x / scale), nearest, ties to even. Source: vLLM `nvfp4_emulation_utils.py`, UE8M0.
    """
    check_tensor("x", x, 2, HALF_TYPES)
    columns = x.shape[1]
    check_multiple("columns", columns, fmt.block)
    check_size(x.shape[0], columns, fmt.block)
    if not launches(x):
        return oracle.quantize_mxfp4(x, fmt)
    return quantize_blocks(x, columns, fmt)


def dequantize_mxfp4(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """MXFP4 -> (rows, columns) bf16 or fp16: x = code * 2^(b - 127), exact in float32."""
    check_quantized("q", q, Mxfp4)
    check_type("dtype", dtype, HALF_TYPES)
    if not launches(q.values):
        return oracle.dequantize_mxfp4(q, dtype)
    return dequantize_blocks(q, dtype)
