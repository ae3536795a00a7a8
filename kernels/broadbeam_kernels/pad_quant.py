"""Pad + quant: zero columns appended up to a kernel-friendly width and the whole row quantised, one launch.

Bound by memory: the padded copy of the input that two launches would write and read again never exists. The
kernels are those that quantise, told that a row ends early.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contracts import HALF_TYPES, check, check_multiple, check_size, check_tensor, launches
from .formats import FP8_BLOCK128, Fp8Block, Mxfp4, Quantized
from .fp4_block import quantize_blocks
from .fp8_block import quantize_rows
from .reference import layout as oracle


def pad_quant(x: Tensor, columns: int, fmt: Fp8Block | Mxfp4 = FP8_BLOCK128) -> Quantized:
    """x (rows, n) bf16 or fp16 -> (rows, columns >= n) in `fmt`, the added columns zero.

    columns is a multiple of 128; n is even for MXFP4. fmt: FP8 with 1x128 scales, or MXFP4 with linear ones.
    gpt-oss needs it: hidden 2880 becomes 3072.
    """
    check_tensor("x", x, 2, HALF_TYPES)
    n = x.shape[1]
    check(columns >= n, f"columns={columns} is less than x's {n}")
    check_multiple("columns", columns, 128)
    check_size(x.shape[0], columns, fmt.block)
    if isinstance(fmt, Fp8Block):
        check(fmt.rows == 1, f"fmt has {fmt.rows}x128 scales, expected 1x128")
    else:
        check(isinstance(fmt, Mxfp4), f"fmt is {fmt}, expected FP8 1x128 or MXFP4")
        check(fmt.scales == "linear", f"fmt has {fmt.scales} scales, expected linear ones")
        check(n % 2 == 0, f"x has {n} columns: MXFP4 needs an even number")
    if not launches(x, *((torch.float8_e4m3fn,) if isinstance(fmt, Fp8Block) else ())):
        return oracle.pad_quant(x, columns, fmt)
    if isinstance(fmt, Fp8Block):
        return quantize_rows(x, columns, fmt)
    return quantize_blocks(x, columns, fmt)
