"""The matrix product of every GPU that is not a Hopper: D = A @ B.T in plain Triton, FP8, bf16 or fp16.

One body for dense, contiguous grouped and masked grouped products. With few tokens weights take the tensor
core's row side and tokens its column side, which may be as narrow as 16, so that one token wastes nothing.
With 128 tokens to a tile they change sides: a thread of sm_100 holds one row, and were that a weight's it
would hold the scales of all tokens (255 registers and 344 bytes spilled, against 168).

Rows outside an operand are read from its last row and not written, so that no load in the loop needs a mask;
only a K that the step does not divide has one.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import paths
from .tuning import Launch, config

Grouping = Literal["dense", "contiguous", "masked"]

RESERVED = 4096  # bytes of shared memory left for scales and barriers


@triton.jit
def locate(
    tile,
    rows,
    n,
    group_ptr,
    slots,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPING: tl.constexpr,
):
    """A tile's number -> (first row, row after the last, first column, expert); expert -1: nothing to do.

    Tiles go GROUP tile rows at a time, column by column, so that what runs together shares operands in L2.
    """
    tiles_n = tl.cdiv(n, BN)
    start = 0
    end = rows
    expert = 0
    if GROUPING == "masked":
        per_expert = tl.cdiv(slots, BM) * tiles_n
        expert = tile // per_expert
        tile = tile - expert * per_expert
        start = expert * slots
        end = start + tl.load(group_ptr + expert)
    tiles_m = tl.cdiv(end - start, BM)
    group = tile // (GROUP * tiles_n)
    within = tile - group * (GROUP * tiles_n)
    size = tl.maximum(tl.minimum(tiles_m - group * GROUP, GROUP), 1)
    first = start + (group * GROUP + within % size) * BM
    if GROUPING == "contiguous":
        expert = tl.load(group_ptr + first // BLOCK_ROWS)
    if GROUPING == "masked":
        expert = tl.where(tile < tiles_m * tiles_n, expert, -1)
    return first, end, (within // size) * BN, expert


@triton.jit
def e4m3_as_half(code):
    """e4m3 codes (uint8) -> fp16 of 2^-8 times their value, exactly (for GPUs that cannot multiply e4m3)."""
    code = code.to(tl.uint16)
    return (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def exponent(scale):
    """The biased exponent (uint8, an E8M0 scale) of a positive float32 power of two."""
    return (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)


@triton.jit
def _gemm_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    group_ptr,
    rows,
    n,
    eighths,  # k / 8: the compiler learns from the product that rows start on 8 values
    slots,
    a_row_eighths,
    out_row,
    a_scale_expert,
    a_scale_row,
    a_scale_step,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPING: tl.constexpr,
    SCALED: tl.constexpr,
    AS_HALF: tl.constexpr,
    POW2: tl.constexpr,  # scales are powers of two, and the tensor cores apply them
    WHOLE: tl.constexpr,  # BK divides k
):
    first, end, column, expert = locate(
        tl.program_id(0), rows, n, group_ptr, slots, BM, BN, BLOCK_ROWS, GROUP, GROUPING
    )
    if expert >= 0:
        k = eighths * 8
        a_row = a_row_eighths * 8
        token = first + tl.arange(0, BM)
        channel = column + tl.arange(0, BN)
        inner = tl.arange(0, BK)
        # Far places by 64-bit scalars, places within a tile by 32-bit vectors: half the registers.
        row = tl.minimum(token, end - 1)
        a = a_ptr + first.to(tl.int64) * a_row + ((row - first)[:, None] * a_row + inner[None, :])
        b_row = tl.minimum(channel, n - 1) - column
        b = b_ptr + (expert.to(tl.int64) * n + column) * k + (b_row[:, None] * k + inner[None, :])
        steps = tl.cdiv(k, BK)
        TOKENS_LEFT: tl.constexpr = BM >= 128
        acc = tl.zeros((BM, BN) if TOKENS_LEFT else (BN, BM), tl.float32)
        if SCALED:
            if GROUPING == "masked":
                a_scale_ptr += expert.to(tl.int64) * a_scale_expert
                row -= expert * slots
            a_scale = a_scale_ptr + row.to(tl.int64) * a_scale_row
            b_scale = b_scale_ptr + (expert * tl.cdiv(n, 128) + column // 128) * steps
        for step in tl.range(0, steps, num_stages=STAGES):
            if WHOLE:
                x = tl.load(a)
                w = tl.load(b)
            else:
                x = tl.load(a, mask=inner[None, :] < k - step * BK, other=0.0)
                w = tl.load(b, mask=inner[None, :] < k - step * BK, other=0.0)
            if AS_HALF:
                x = e4m3_as_half(x)
                w = e4m3_as_half(w)
            left, right = (x, w.T) if TOKENS_LEFT else (w, x.T)
            if POW2:
                xs = tl.broadcast_to(exponent(tl.load(a_scale + step * a_scale_step))[:, None], (BM, 4))
                ws = tl.full((BN, 4), 0, tl.uint8) + exponent(tl.load(b_scale + step))
                left_scales, right_scales = (xs, ws) if TOKENS_LEFT else (ws, xs)
                acc = tl.dot_scaled(left, left_scales, "e4m3", right, right_scales, "e4m3", acc)
            elif SCALED:
                scale = tl.load(a_scale + step * a_scale_step) * tl.load(b_scale + step)
                acc += tl.dot(left, right) * (scale[:, None] if TOKENS_LEFT else scale[None, :])
            else:
                acc = tl.dot(left, right, acc)
            a += BK
            b += BK
        if AS_HALF:
            acc *= 65536.0
        at = out_ptr + (first.to(tl.int64) * out_row + column)
        value = acc.to(out_ptr.dtype.element_ty)
        if TOKENS_LEFT:
            place = (token - first)[:, None] * out_row + (channel - column)[None, :]
            tl.store(at + place, value, mask=(token < end)[:, None] & (channel < n)[None, :])
        else:
            place = (token - first)[None, :] * out_row + (channel - column)[:, None]
            tl.store(at + place, value, mask=(token < end)[None, :] & (channel < n)[:, None])


def depth(wanted: int, bytes_per_stage: int, device: torch.device) -> int:
    """The table's pipeline depth, or as much of it as the device's shared memory holds."""
    fit = (paths.shared_memory(device) - RESERVED) // bytes_per_stage
    # A product that waits for itself has read its stage before the next load begins: one fewer is held.
    return max(1, min(wanted, fit + (not paths.multiplies_asynchronously(device))))


def tile_count(rows: int, n: int, bm: int, bn: int, experts: int, slots: int) -> int:
    """Programs of a launch: every tile, or every tile that a masked product could need."""
    tiles_m = experts * -(-slots // bm) if slots else -(-rows // bm)
    return tiles_m * -(-n // bn)


def _tile(a: Tensor, per_group: int, pow2: bool) -> Launch:
    width = a.element_size()
    tile = {**config("portable_gemm", a.device, rows=per_group, bytes=width)}
    tile["POW2"] = pow2 and paths.multiplies_block_scaled(a.device)
    if tile["POW2"]:
        tile["BN"] = 128  # rows of the block-scaled instruction
    bytes_per_stage = (tile["BM"] + tile["BN"]) * 128
    as_half = width == 1 and not paths.multiplies_fp8(a.device)
    return {**tile, "STAGES": depth(tile["STAGES"], bytes_per_stage, a.device), "AS_HALF": as_half}


def launch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    grouping: Grouping = "dense",
    groups: Tensor | None = None,
    block_rows: int = 0,
    slots: int = 0,
    pow2: bool = False,
    tile: Launch | None = None,
) -> None:
    """out (rows, n) = a (rows, k) @ b[expert] (n, k).T with the arguments already checked.

    b is (experts * n, k) dense rows. Scaled (FP8) products take a_scales (rows, k / 128), or (experts, slots,
    k / 128) when masked, in any strides, and b_scales (experts, n / 128, k / 128) contiguous. `groups`:
    expert of each `block_rows` rows (contiguous, -1 for none), or rows in use of each expert's `slots` rows
    (masked). `pow2`: all scales are powers of two, which Blackwell's tensor cores apply themselves. `tile`:
    BM, BN, STAGES, GROUP, AS_HALF, POW2, num_warps; by table where none is given.
    """
    rows, k = a.shape
    n = out.shape[1]
    per_group = {"dense": rows, "contiguous": block_rows, "masked": slots}[grouping]
    tile = {**(tile or _tile(a, per_group, pow2))}
    tile["BM"] = min(tile["BM"], block_rows or tile["BM"])
    bk = 128 // a.element_size()
    strides = (0, 0, 0)
    if a_scales is not None:
        strides = (a_scales.stride(0) if slots else 0, a_scales.stride(-2), a_scales.stride(-1))
    _gemm_kernel[(tile_count(rows, n, tile["BM"], tile["BN"], b.shape[0] // n, slots),)](
        a.view(torch.uint8) if tile["AS_HALF"] else a,
        b.view(torch.uint8) if tile["AS_HALF"] else b,
        out,
        a_scales,
        b_scales,
        groups,
        rows,
        n,
        k // 8,
        slots,
        a.stride(0) // 8,
        out.stride(0),
        *strides,
        BK=bk,
        BLOCK_ROWS=max(block_rows, 1),
        GROUPING=grouping,
        SCALED=a_scales is not None,
        WHOLE=k % bk == 0,
        **tile,
    )
