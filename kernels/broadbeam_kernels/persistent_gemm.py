"""The persistent matrix kernel behind every GEMM with many rows: D = A @ B.T on Hopper's tensor cores.

One program per multiprocessor walks the output tiles. One warp keeps a ring of shared-memory stages full
through the bulk tensor copy engine; two warpgroups multiply, each owning half of the tile's rows. With block
scales the product of 128 columns of K lands in fresh registers and is scaled into the accumulator
("promoted"): while one warpgroup promotes, the other one's product keeps the tensor cores busy, which is why
they are separate partitions and not one of eight warps in lock-step. The scales of A arrive with the tiles:
fetched by the warpgroups themselves, they stalled every step for a trip to L2 (880 against 1250 TFLOP/s at
4096 x 7168 x 16384, H100).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .formats import align
from .tuning import multiprocessors

Grouping = Literal["dense", "contiguous", "masked"]


@gluon.jit
def _locate(
    tile,
    cursor,
    begin,
    tiles_m,
    tiles_n,
    group_ptr,
    experts,
    slots,
    BM: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    MASKED: gl.constexpr,
    CONTIGUOUS: gl.constexpr,
):
    """A tile's number -> (first row, tile column, expert, cursor, begin); expert -1 means: nothing to do.

    Rows of tiles are taken GROUP at a time, down before across, so that what neighbours read stays in cache.
    Masked tiles are found by walking the experts' counts: `cursor` is the expert whose first tile is number
    `begin`. Tile numbers only grow, so each program walks the counts once.
    """
    expert = 0
    base = 0
    if MASKED:
        tiles_m = (gl.load(group_ptr + gl.minimum(cursor, experts - 1)) + BM - 1) // BM
        while (cursor < experts) & (tile >= begin + tiles_m * tiles_n):
            begin += tiles_m * tiles_n
            cursor += 1
            tiles_m = (gl.load(group_ptr + gl.minimum(cursor, experts - 1)) + BM - 1) // BM
        expert = gl.where(cursor < experts, cursor, -1)
        tile -= begin
        base = expert * slots
    per_group = GROUP * tiles_n
    group = tile // per_group
    first = group * GROUP
    size = gl.maximum(gl.minimum(tiles_m - first, GROUP), 1)  # past the last expert there are none
    within = tile - group * per_group
    row = (first + within % size) * BM
    if CONTIGUOUS:
        expert = gl.load(group_ptr + row // BLOCK_ROWS)
    return base + row, within // size, expert, cursor, begin


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _produce(
    a_desc,
    b_desc,
    scale_desc,
    group_ptr,
    a_bufs,
    b_bufs,
    scale_bufs,
    full,
    empty,
    tiles_m,
    tiles_n,
    steps,
    experts,
    slots,
    expert_rows,
    scale_step,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    SCALED: gl.constexpr,
    MASKED: gl.constexpr,
    CONTIGUOUS: gl.constexpr,
):
    # With few rows only their part of the tile is fetched: what lies outside costs the copy engine time.
    AROWS: gl.constexpr = a_desc.block_type.shape[0]
    SCALE_BYTES: gl.constexpr = AROWS * 4 if SCALED else 0
    stage = 0
    phase = 1
    cursor = 0
    begin = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, n, expert, cursor, begin = _locate(
            tile, cursor, begin, tiles_m, tiles_n, group_ptr, experts, slots,
            BM, BLOCK_ROWS, GROUP, MASKED, CONTIGUOUS,
        )  # fmt: skip
        if expert >= 0:
            b_row = expert * expert_rows + n * BN
            scale_at = row
            if MASKED:  # an expert's scales are (steps, slots)
                scale_at += expert * slots * (steps - 1)
            for step in range(steps):
                ready = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(ready, a_desc.block_type.nbytes + b_desc.block_type.nbytes + SCALE_BYTES)
                tma.async_copy_global_to_shared(
                    a_desc, [row, step * BK], ready, a_bufs.index(stage).slice(0, AROWS, dim=0)
                )
                tma.async_copy_global_to_shared(b_desc, [b_row, step * BK], ready, b_bufs.index(stage))
                if SCALED:
                    at = scale_at + step * scale_step
                    tma.async_copy_global_to_shared(
                        scale_desc, [0, at], ready, scale_bufs.index(stage).slice(0, AROWS, dim=1)
                    )
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _write(c_desc, c_buf, acc, row, column):
    tma.store_wait(0)
    c_buf.store(acc.to(c_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [row, column], c_buf)


@gluon.jit
def _scaled_tile(
    b_scale,
    a_bufs,
    b_bufs,
    scale_bufs,
    full,
    empty,
    stage,
    phase,
    steps,
    part,
    HALF: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    mma: gl.constexpr,
):
    """One output tile: the product of each 128 columns of K, scaled into the accumulators."""
    acc = gl.zeros([64, BN], gl.float32, mma)
    weight = gl.load(b_scale)
    for step in range(steps):
        next_weight = gl.load(b_scale + gl.minimum(step + 1, steps - 1))
        mbarrier.wait(full.index(stage), phase)
        a = a_bufs.index(stage).slice(HALF, 64, dim=0)
        token = warpgroup_mma(a, b_bufs.index(stage).permute((1, 0)), part, use_acc=False, is_async=True)
        scale = scale_bufs.index(stage).reshape([BM]).slice(HALF, 64, dim=0).load(gl.SliceLayout(1, mma))
        part = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(empty.index(stage), count=1)
        acc += part * (scale * weight)[:, None]
        stage, phase = _next(stage, phase, STAGES)
        weight = next_weight
    return acc, part, stage, phase


@gluon.jit
def _plain_tile(
    a_bufs,
    b_bufs,
    full,
    empty,
    stage,
    phase,
    steps,
    HALF: gl.constexpr,
    SUB: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    mma: gl.constexpr,
):
    """One output tile, one product always in flight: a stage is handed back when the next has begun."""
    acc = gl.zeros([64, BN], gl.float32, mma)
    acc2 = acc
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        a = a_bufs.index(stage)
        b = b_bufs.index(stage).permute((1, 0))
        token = warpgroup_mma(a.slice(HALF, 64, dim=0), b, acc, is_async=True)
        if SUB == 2:
            token2 = warpgroup_mma(a.slice(HALF + 64, 64, dim=0), b, acc2, is_async=True)
            acc, acc2 = warpgroup_mma_wait(2, deps=[token, token2])
        else:
            acc = warpgroup_mma_wait(1, deps=[token])
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1, pred=step > 0)
        stage, phase = _next(stage, phase, STAGES)
    if SUB == 2:
        acc, acc2 = warpgroup_mma_wait(0, deps=[acc, acc2])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
    return acc, acc2, stage, phase


@gluon.jit
def _consume(
    c_desc,
    b_scale_ptr,
    group_ptr,
    a_bufs,
    b_bufs,
    scale_bufs,
    c_buf,
    full,
    empty,
    tiles_m,
    tiles_n,
    steps,
    experts,
    slots,
    b_scale_rows,
    WARPGROUP: gl.constexpr,
    SUB: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    SCALED: gl.constexpr,
    MASKED: gl.constexpr,
    CONTIGUOUS: gl.constexpr,
):
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32 if SCALED else 16])
    HALF: gl.constexpr = WARPGROUP * 64 * SUB  # this warpgroup's first row within the tile
    stage = 0
    phase = 0
    cursor = 0
    begin = 0
    if SCALED:
        part = gl.zeros([64, BN], gl.float32, mma)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, n, expert, cursor, begin = _locate(
            tile, cursor, begin, tiles_m, tiles_n, group_ptr, experts, slots,
            BM, BLOCK_ROWS, GROUP, MASKED, CONTIGUOUS,
        )  # fmt: skip
        if expert >= 0:
            if SCALED:
                b_scale = b_scale_ptr + (expert * b_scale_rows + (n * BN) // 128) * steps
                acc, part, stage, phase = _scaled_tile(
                    b_scale, a_bufs, b_bufs, scale_bufs, full, empty, stage, phase, steps, part,
                    HALF, BM, BN, STAGES, mma,
                )  # fmt: skip
            else:
                acc, acc2, stage, phase = _plain_tile(
                    a_bufs, b_bufs, full, empty, stage, phase, steps, HALF, SUB, BN, STAGES, mma
                )
            _write(c_desc, c_buf, acc, row + HALF, n * BN)
            if SUB == 2:
                _write(c_desc, c_buf, acc2, row + HALF + 64, n * BN)
    tma.store_wait(0)


@gluon.jit
def _gemm_kernel(
    a_desc,
    b_desc,
    c_desc,
    scale_desc,
    b_scale_ptr,
    group_ptr,
    tiles_m,
    tiles_n,
    steps,
    experts,
    slots,
    expert_rows,
    scale_step,
    b_scale_rows,
    SUB: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    SCALED: gl.constexpr,
    MASKED: gl.constexpr,
    CONTIGUOUS: gl.constexpr,
    num_warps: gl.constexpr,
):
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BM, BK], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, BK], b_desc.layout)
    c_bufs = gl.allocate_shared_memory(c_desc.dtype, [2, 64, BN], c_desc.layout)
    scale_bufs = b_bufs
    if SCALED:
        scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BM], scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    # Literals and constexprs stay compile-time values only when they are written inside the call.
    gl.warp_specialize(
        [
            (_consume, (
                c_desc, b_scale_ptr, group_ptr, a_bufs, b_bufs, scale_bufs, c_bufs.index(0), full, empty,
                tiles_m, tiles_n, steps, experts, slots, b_scale_rows,
                gl.constexpr(0), SUB, BM, BN, STAGES, BLOCK_ROWS, GROUP, SCALED, MASKED, CONTIGUOUS,
            )),
            (_consume, (
                c_desc, b_scale_ptr, group_ptr, a_bufs, b_bufs, scale_bufs, c_bufs.index(1), full, empty,
                tiles_m, tiles_n, steps, experts, slots, b_scale_rows,
                gl.constexpr(1), SUB, BM, BN, STAGES, BLOCK_ROWS, GROUP, SCALED, MASKED, CONTIGUOUS,
            )),
            (_produce, (
                a_desc, b_desc, scale_desc, group_ptr, a_bufs, b_bufs, scale_bufs, full, empty,
                tiles_m, tiles_n, steps, experts, slots, expert_rows, scale_step,
                BM, BN, BK, STAGES, BLOCK_ROWS, GROUP, SCALED, MASKED, CONTIGUOUS,
            )),
        ],
        [4, 1],
        [232, 32],
    )  # fmt: skip


def _gluon_type(dtype: torch.dtype) -> Any:
    return {
        torch.float8_e4m3fn: gl.float8e4nv,
        torch.bfloat16: gl.bfloat16,
        torch.float16: gl.float16,
    }[dtype]


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _gluon_type(x.dtype))
    return TensorDescriptor.from_tensor(x, block, layout)


def _scale_descriptor(scales: Tensor, block: int) -> tuple[TensorDescriptor, int]:
    """Column-major scales as one flat run, and the distance between columns."""
    rows, groups = scales.shape[-2:]
    readable = scales.stride(-2) == 1 and scales.data_ptr() % 16 == 0
    readable = readable and (groups == 1 or scales.stride(-1) % 4 == 0)
    if not readable or (scales.dim() == 3 and scales.stride(0) != rows * groups):
        # The copy engine faults on columns that do not start on 16 bytes, so columns are padded to them.
        padded = scales.new_empty((*scales.shape[:-2], groups, align(rows, 4)))
        padded[..., :rows] = scales.transpose(-1, -2)
        scales = padded[..., :rows].transpose(-1, -2)
    step = scales.stride(-1) if scales.shape[-1] > 1 else scales.shape[-2]
    length = scales.numel() if scales.dim() == 3 else step * (scales.shape[1] - 1) + scales.shape[0]
    # One row of a matrix, as long as all columns together: a fetch is a run of one column.
    flat = scales.as_strided((1, length), (align(length, 4), 1))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(flat, [1, length], [align(length, 4), 1], [1, block], layout), step


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
    tile: dict[str, int],
) -> None:
    """out (rows, n) = a (rows, k) @ b[expert] (n, k).T with the arguments already checked.

    b is (experts * n, k) dense rows. Scaled (FP8) products take a_scales (rows, k / 128), or (experts, slots,
    k / 128) when masked, and b_scales (experts, n / 128, k / 128) contiguous; a_scales that are not
    column-major are copied first. `groups`: expert of each `block_rows` rows (contiguous, -1 for none), or
    rows in use of each expert's `slots` rows (masked). `tile`: SUB, BN, STAGES, GROUP.
    """
    rows, k = a.shape
    n = out.shape[1]
    bm, bn, bk = 128 * tile["SUB"], tile["BN"], 128 // a.element_size()
    tiles_m, tiles_n = -(-rows // bm), -(-n // bn)
    fetched = min(bm, max(16, 1 << (rows - 1).bit_length()))
    scale_desc, scale_step = _scale_descriptor(a_scales, fetched) if a_scales is not None else (None, 0)
    _gemm_kernel[(min(multiprocessors(a.device.index), tiles_m * tiles_n),)](
        _descriptor(a, [fetched, bk]),
        _descriptor(b, [bn, bk]),
        _descriptor(out, [64, bn]),
        scale_desc,
        b_scales,
        groups,
        tiles_m,
        tiles_n,
        -(-k // bk),
        b.shape[0] // n,
        slots,
        n,
        scale_step,
        -(-n // 128),
        SUB=tile["SUB"],
        BM=bm,
        BN=bn,
        BK=bk,
        STAGES=tile["STAGES"],
        BLOCK_ROWS=max(block_rows, 1),
        GROUP=tile["GROUP"],
        SCALED=a_scales is not None,
        MASKED=grouping == "masked",
        CONTIGUOUS=grouping == "contiguous",
        num_warps=4,
    )
