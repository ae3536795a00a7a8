"""The one door to every format: `quantize(x, fmt)` and `dequantize(q)`."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from .formats import Format, Fp8Block, Mxfp4, Nvfp4, Quantized
from .fp8_block import dequantize_fp8_block, quantize_fp8_block
from .mxfp4 import dequantize_mxfp4, quantize_mxfp4
from .nvfp4 import dequantize_nvfp4, quantize_nvfp4


def quantize(x: Tensor, fmt: Format) -> Quantized:
    """(rows, columns) bf16 or fp16 -> `fmt`; NVFP4's global scale is computed from `x`."""
    match fmt:
        case Nvfp4():
            return quantize_nvfp4(x, fmt)
        case Mxfp4():
            return quantize_mxfp4(x, fmt)
        case Fp8Block():
            return quantize_fp8_block(x, fmt)
        case _:
            assert_never(fmt)


def dequantize(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What the codes stand for, (rows, columns) in `dtype` (bf16 or fp16)."""
    match q.format:
        case Nvfp4():
            return dequantize_nvfp4(q, dtype)
        case Mxfp4():
            return dequantize_mxfp4(q, dtype)
        case Fp8Block():
            return dequantize_fp8_block(q, dtype)
        case _:
            assert_never(q.format)
