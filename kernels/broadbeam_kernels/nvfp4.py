"""NVFP4: quantise to and from e2m1 codes with e4m3 scales of 16 values and one float32 global scale.

A computed global scale takes two launches: the first reads the tensor and leaves the maxima of its parts, the
second has every program take their maximum, and walks the tensor backwards, from what the caches still hold.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes
from .contracts import (
    HALF_TYPES,
    check_global_scale,
    check_multiple,
    check_quantized,
    check_size,
    check_tensor,
    check_type,
    launches,
    paired,
)
from .formats import NVFP4, NVFP4_RANGE, Nvfp4, Quantized
from .fp4_block import dequantize_blocks, quantize_blocks
from .overlap import early, release, wait
from .reference import quantize as oracle
from .tuning import config


@triton.jit
def _maxima_kernel(
    x_ptr,  # int32 view: pairs of 16-bit values
    maxima_ptr,
    columns,
    row_words,
    total,
    BF16: tl.constexpr,
    FLAT: tl.constexpr,
    OVERLAP: tl.constexpr,
    WORDS: tl.constexpr,
):
    wait(OVERLAP)
    best = tl.zeros((WORDS // 8,), tl.float32)
    for start in tl.range(tl.program_id(0) * WORDS, total, tl.num_programs(0) * WORDS):
        index = start + tl.arange(0, WORDS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        at = index
        if not FLAT:
            row = index // columns
            at = row.to(tl.int64) * row_words + (index - row * columns)
        words = tl.load(x_ptr + at, mask=index < total, other=0)
        best = tl.maximum(best, codes.pair_amax(words, 1, BF16))
    release(OVERLAP)
    tl.store(maxima_ptr + tl.program_id(0), tl.max(best, axis=0))


MOST_WORDS = 1 << 30  # that one launch counts through: past 2^31 its 32-bit loop would begin anew


def _maxima(x: Tensor) -> Tensor:
    """Largest magnitudes (float32) of some parts of x, which is not empty and whose values come in pairs."""
    rows = max(1, 2 * MOST_WORDS // x.shape[1])
    if x.shape[0] > rows:
        return torch.cat([_maxima(part) for part in x.split(rows)])
    words = x.numel() // 2
    tuned = dict(config("amax", x.device))
    programs = min(triton.cdiv(words, tuned["WORDS"]), tuned.pop("PROGRAMS"))
    out = torch.empty(programs, dtype=torch.float32, device=x.device)
    _maxima_kernel[(programs,)](
        x.view(torch.int32),
        out,
        x.shape[1] // 2,
        x.stride(0) // 2,
        words,
        BF16=x.dtype == torch.bfloat16,
        FLAT=x.is_contiguous(),
        **early(x.device, programs),
        **tuned,
    )
    return out


def amax(x: Tensor) -> Tensor:
    """Largest magnitude of a (rows, columns) bf16 or fp16 tensor, as a float32 tensor of one element."""
    check_tensor("x", x, 2, HALF_TYPES)
    check_size(x.shape[0], x.shape[1], NVFP4.block)
    if x.numel() == 0:
        return torch.zeros(1, device=x.device)
    if not launches(x) or x.shape[1] % 2:
        return x.abs().max().float().reshape(1)
    return _maxima(paired(x)).amax().reshape(1)


def global_scale(x: Tensor) -> Tensor:
    """NVFP4 global scale of a tensor: 448 * 6 / amax, 1 for a tensor of zeros (float32, one element)."""
    largest = amax(x)
    # A scalar over a tensor would multiply by a rounded reciprocal; this divides.
    return torch.where(largest > 0, torch.full_like(largest, NVFP4_RANGE) / largest, torch.ones_like(largest))


def quantize_nvfp4(x: Tensor, fmt: Nvfp4 = NVFP4, global_scale: Tensor | None = None) -> Quantized:
    """(rows, columns) bf16 or fp16 -> NVFP4; columns a multiple of 16.

    With g the global scale (computed from `x` as 2688 / amax when not given):
    scale = e4m3(g * (amax_block * (1/6))); code = e2m1(x * (1 / (scale * (1/g)))), nearest, ties to even.
    Source: vLLM `nvfp4_emulation_utils.py`, with exact reciprocals.
    """
    check_tensor("x", x, 2, HALF_TYPES)
    columns = x.shape[1]
    check_multiple("columns", columns, fmt.block)
    check_size(x.shape[0], columns, fmt.block)
    if global_scale is not None:
        check_global_scale("global_scale", global_scale, x)
    if not launches(x, torch.float8_e4m3fn):
        return oracle.quantize_nvfp4(x, fmt, global_scale)
    if global_scale is not None:
        return quantize_blocks(x, columns, fmt, global_scale.to(torch.float32).reshape(1))
    if x.numel() == 0:
        return quantize_blocks(x, columns, fmt, torch.ones(1, device=x.device))
    x = paired(x)  # once: the quantising launch reads x before it waits, so nothing may write x in between
    return quantize_blocks(x, columns, fmt, maxima=_maxima(x))


def dequantize_nvfp4(q: Quantized, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """NVFP4 -> (rows, columns) bf16 or fp16: x = code * (scale / g), rounded to float32, then to `dtype`."""
    check_quantized("q", q, Nvfp4)
    check_type("dtype", dtype, HALF_TYPES)
    if not launches(q.values, torch.float8_e4m3fn):
        return oracle.dequantize_nvfp4(q, dtype)
    return dequantize_blocks(q, dtype)
