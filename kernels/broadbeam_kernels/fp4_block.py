"""FP4 blocks: the kernels of NVFP4 and MXFP4, which differ in a block's scale and in nothing else.

Bound by memory: 2 bytes in and 0.53 to 0.56 out per value; the codes' arithmetic (see `codes`) comes next. A
program takes a run of scales in the order in which they are stored, so that scales leave in whole lines in
both layouts and no width wastes lanes; a scale's number says which row and block it is of.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import codes
from .contracts import paired
from .formats import Mxfp4, Nvfp4, Quantized, swizzled_size
from .overlap import begin, early
from .tuning import config


@triton.jit
def _place(index, BLOCKS_ROW: tl.constexpr, SWIZZLED: tl.constexpr):
    """Row and block of the scale that is stored as number `index`."""
    if SWIZZLED:  # the inverse of `codes.swizzled_offset`
        TILES: tl.constexpr = (BLOCKS_ROW + 3) // 4
        tile = index >> 9
        tile_row = tile // TILES
        row = tile_row * 128 + ((index >> 2) & 3) * 32 + ((index >> 4) & 31)
        block = (tile - tile_row * TILES) * 4 + (index & 3)
    else:
        row = index // BLOCKS_ROW
        block = index - row * BLOCKS_ROW
    return row, block


@triton.jit
def _nvfp4_scale(amax, g, inverse_g):
    """(e4m3 scale, what to multiply values by, a magnitude that becomes 6.5)."""
    scale = codes.e4m3(g * (amax * (1.0 / 6.0)))
    decoded = scale.to(tl.float32)
    step = decoded * inverse_g
    return scale, tl.where(decoded == 0.0, 0.0, codes.reciprocal(step)), step * 6.5


@triton.jit
def _mxfp4_scale(amax):
    """(biased exponent, what to multiply values by): amax rounded to a power of two, less e2m1's own 2.

    Mantissas from 1.75 up round up, so that no value comes above 7, and amax's exponent never reaches 254.
    """
    rounded = amax.to(tl.int32, bitcast=True) + (1 << 21)
    exponent = tl.maximum((rounded >> 23) - 2, 0)
    return exponent.to(tl.uint8), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _global_scale(maxima_ptr, maxima, MAXIMA: tl.constexpr):
    part = tl.arange(0, MAXIMA)
    largest = tl.max(tl.load(maxima_ptr + part, mask=part < maxima, other=0.0), axis=0)
    return tl.where(largest > 0, tl.div_rn(2688.0, largest), 1.0)


@triton.jit
def _quantize_kernel(
    x_ptr,  # int32 view: pairs of 16-bit values
    codes_ptr,
    scales_ptr,
    global_ptr,  # NVFP4: float32 g, read, or written where MAXIMA
    maxima_ptr,
    maxima,
    rows,
    words,  # pairs in a row of x; beyond them, up to BLOCKS_ROW blocks, the row is zero
    row_words,
    total,
    NVFP4: tl.constexpr,
    BF16: tl.constexpr,
    SWIZZLED: tl.constexpr,
    FLAT: tl.constexpr,  # dense rows, nothing to pad, linear scales: a block's number is its place
    PADDED: tl.constexpr,
    BLOCKS_ROW: tl.constexpr,
    MAXIMA: tl.constexpr,  # 0, or a power of two >= maxima: g comes from the tensor's maxima
    OVERLAP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    if not MAXIMA:
        begin(OVERLAP)
    program = tl.program_id(0)
    if MAXIMA:  # backwards, because the caches hold what the maxima read last
        program = tl.num_programs(0) - 1 - program
    index = program * BLOCKS + tl.arange(0, BLOCKS)
    WORDS: tl.constexpr = 8 if NVFP4 else 16
    word = tl.arange(0, WORDS)[None, :]
    inside = index < total
    place = index
    at = index.to(tl.int64)[:, None] * WORDS + word
    mask = inside[:, None]
    if not FLAT:
        row, block = _place(index, BLOCKS_ROW, SWIZZLED)
        place = row * BLOCKS_ROW + block
        inside = inside & (row < rows) & (block < BLOCKS_ROW)
        word_in_row = block[:, None] * WORDS + word
        at = row.to(tl.int64)[:, None] * row_words + word_in_row
        mask = inside[:, None] & (word_in_row < words) if PADDED else inside[:, None]
    # What is read leaves the caches to what is written, which the next launch wants: 1 to 7 % on an H100.
    pairs = tl.load(x_ptr + at, mask=mask, other=0, eviction_policy="evict_first")
    amax = codes.pair_amax(pairs, 1, BF16)
    if NVFP4:
        if MAXIMA:
            begin(OVERLAP)  # not before: what the maxima are of was there when their launch began
            g = _global_scale(maxima_ptr, maxima, MAXIMA)
            if tl.program_id(0) == 0:
                tl.store(global_ptr, g)
        else:
            g = tl.load(global_ptr)
        scale, factor, limit = _nvfp4_scale(amax, g, codes.reciprocal(g))
    else:
        scale, factor = _mxfp4_scale(amax)
        limit = tl.full((BLOCKS,), float("inf"), tl.float32)
    packed = codes.e2m1_pack(pairs, factor, limit, BF16)
    out = place.to(tl.int64)[:, None] * WORDS + word
    tl.store(codes_ptr + out, packed, mask=inside[:, None])
    tl.store(scales_ptr + index, scale, mask=index < total)  # a block of padding has scale 0


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    global_ptr,
    out_ptr,  # int32 view: pairs of 16-bit values
    total,
    NVFP4: tl.constexpr,
    BF16: tl.constexpr,
    SWIZZLED: tl.constexpr,
    BLOCKS_ROW: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    begin(OVERLAP)
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = index < total
    WORDS: tl.constexpr = 8 if NVFP4 else 16
    at = index.to(tl.int64)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    code = tl.load(codes_ptr + at, mask=inside[:, None], other=0).to(tl.int32)
    scale_at = index
    if SWIZZLED:
        row, block = _place(index, BLOCKS_ROW, False)
        scale_at = codes.swizzled_offset(row, block, (BLOCKS_ROW + 3) // 4)
    if NVFP4:
        scale = tl.load(scales_ptr + scale_at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.div_rn(scale, tl.load(global_ptr))
    else:
        exponent = tl.load(scales_ptr + scale_at, mask=inside, other=0).to(tl.int32)
        scale = tl.where(exponent == 0, 1 << 22, exponent << 23).to(
            tl.float32, bitcast=True
        )  # 2^-127: a denormal
    low = codes.e2m1_value(code) * scale[:, None]
    high = codes.e2m1_value(code >> 4) * scale[:, None]
    tl.store(out_ptr + at, codes.pack_pair(low, high, BF16), mask=inside[:, None])


def quantize_blocks(
    x: Tensor,
    columns: int,
    fmt: Nvfp4 | Mxfp4,
    global_scale: Tensor | None = None,
    maxima: Tensor | None = None,
) -> Quantized:
    """x (rows, n) bf16 or fp16, followed by zero columns up to `columns`, in `fmt`; one launch.

    NVFP4 takes its global scale, or the maxima (float32) of x's parts, from which it computes it.
    """
    x = paired(x)
    rows, n = x.shape
    blocks = columns // fmt.block
    nvfp4, swizzled = isinstance(fmt, Nvfp4), fmt.scales == "swizzled"
    values = torch.empty((rows, columns // 2), dtype=torch.uint8, device=x.device)
    shape = (swizzled_size(rows, blocks),) if swizzled else (rows, blocks)
    scales = torch.empty(shape, dtype=torch.float8_e4m3fn if nvfp4 else torch.uint8, device=x.device)
    total = scales.numel()
    if maxima is not None:
        global_scale = torch.empty(1, dtype=torch.float32, device=x.device)
    flat = x.is_contiguous() and n == columns and not swizzled
    facts = {"swizzled": swizzled, "maxima": maxima is not None}
    tuned = config("nvfp4_quantize" if nvfp4 else "mxfp4_quantize", x.device, **facts)
    programs = triton.cdiv(total, tuned["BLOCKS"])
    if programs:
        _quantize_kernel[(programs,)](
            x.view(torch.int32),
            values,
            scales,
            x if global_scale is None else global_scale,
            x if maxima is None else maxima,
            0 if maxima is None else maxima.numel(),
            rows,
            n // 2,
            x.stride(0) // 2,
            total,
            NVFP4=nvfp4,
            BF16=x.dtype == torch.bfloat16,
            SWIZZLED=swizzled,
            FLAT=flat,
            PADDED=n != columns,
            BLOCKS_ROW=1 if flat else blocks,  # flat rows of any width share a compilation
            MAXIMA=0 if maxima is None else triton.next_power_of_2(maxima.numel()),
            **early(x.device, programs),
            **tuned,
        )
    return Quantized(values, scales, fmt, (rows, columns), global_scale)


def dequantize_blocks(q: Quantized, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in `dtype`, bf16 or fp16; one launch."""
    assert isinstance(q.format, Nvfp4 | Mxfp4)
    rows, columns = q.shape
    out = torch.empty((rows, columns), dtype=dtype, device=q.values.device)
    blocks = columns // q.format.block
    nvfp4, swizzled = isinstance(q.format, Nvfp4), q.format.scales == "swizzled"
    tuned = config("nvfp4_dequantize" if nvfp4 else "mxfp4_dequantize", out.device)
    programs = triton.cdiv(rows * blocks, tuned["BLOCKS"])
    if programs:
        _dequantize_kernel[(programs,)](
            q.values.contiguous(),
            q.scales.contiguous(),
            q.values if q.global_scale is None else q.global_scale,
            out.view(torch.int32),
            rows * blocks,
            NVFP4=nvfp4,
            BF16=dtype == torch.bfloat16,
            SWIZZLED=swizzled,
            BLOCKS_ROW=blocks if swizzled else 1,
            **early(out.device, programs),
            **tuned,
        )
    return out
