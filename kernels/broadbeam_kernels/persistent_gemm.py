"""The persistent matrix kernel behind every GEMM with many rows: D = A @ B.T on Hopper's tensor cores.

One program per multiprocessor walks the output tiles. One warp keeps a ring of shared-memory stages full
through the bulk tensor copy engine; two warpgroups multiply, each owning half of the tile's rows. With block
scales the product of 128 columns of K lands in fresh registers and is scaled into the accumulator ("promoted"):
while one warpgroup promotes, the other one's product keeps the tensor cores busy, which is why they are separate
partitions and not one of eight warps in lock-step.
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

from .tuning import multiprocessors

Grouping = Literal["dense", "contiguous", "masked"]


@gluon.jit
def _total_tiles(
    tiles_m, tiles_n, group_ptr, experts, BM: gl.constexpr, MASKED: gl.constexpr, EXPERTS: gl.constexpr
):
    if MASKED:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        e = gl.arange(0, EXPERTS, layout=layout)
        count = gl.load(group_ptr + e, mask=e < experts, other=0)
        return gl.sum((count + BM - 1) // BM, axis=0) * tiles_n
    else:
        return tiles_m * tiles_n


@gluon.jit
def _locate(
    tile,
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
    EXPERTS: gl.constexpr,
):
    """A tile's number -> (first row, tile column, expert); expert -1 means: nothing to do."""
    if MASKED:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        e = gl.arange(0, EXPERTS, layout=layout)
        tiles = (gl.load(group_ptr + e, mask=e < experts, other=0) + BM - 1) // BM
        ends = gl.associative_scan(tiles, 0, _add)
        m = tile // tiles_n
        expert = gl.sum((ends <= m).to(gl.int32), axis=0)
        before = gl.sum(gl.where(ends <= m, tiles, 0), axis=0)
        return expert * slots + (m - before) * BM, tile % tiles_n, expert
    else:
        per_group = GROUP * tiles_n
        group = tile // per_group
        first = group * GROUP
        size = gl.minimum(tiles_m - first, GROUP)
        within = tile - group * per_group
        m = first + within % size
        expert = 0
        if CONTIGUOUS:
            expert = gl.load(group_ptr + (m * BM) // BLOCK_ROWS)
        return m * BM, within // size, expert


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _produce(
    a_desc,
    b_desc,
    group_ptr,
    a_bufs,
    b_bufs,
    full,
    empty,
    tiles_m,
    tiles_n,
    steps,
    experts,
    slots,
    expert_rows,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    MASKED: gl.constexpr,
    CONTIGUOUS: gl.constexpr,
    EXPERTS: gl.constexpr,
):
    total = _total_tiles(tiles_m, tiles_n, group_ptr, experts, BM, MASKED, EXPERTS)
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        row, n, expert = _locate(
            tile,
            tiles_m,
            tiles_n,
            group_ptr,
            experts,
            slots,
            BM,
            BLOCK_ROWS,
            GROUP,
            MASKED,
            CONTIGUOUS,
            EXPERTS,
        )
        if expert >= 0:
            b_row = expert * expert_rows + n * BN
            for step in range(steps):
                ready = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(ready, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(a_desc, [row, step * BK], ready, a_bufs.index(stage))
                tma.async_copy_global_to_shared(b_desc, [b_row, step * BK], ready, b_bufs.index(stage))
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _write(c_desc, c_buf, acc, row, column):
    tma.store_wait(0)
    c_buf.store(acc.to(c_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [row, column], c_buf)


@gluon.jit
def _scaled_tile(
    a_scale,
    b_scale,
    in_use,
    a_scale_row,
    a_scale_step,
    a_bufs,
    b_bufs,
    full,
    empty,
    stage,
    phase,
    steps,
    part,
    HALF: gl.constexpr,
    SUB: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    mma: gl.constexpr,
):
    """One output tile: the product of each 128 columns of K, scaled into the accumulators."""
    acc = gl.zeros([64, BN], gl.float32, mma)
    acc2 = acc
    weight = gl.load(b_scale)
    scale = gl.load(a_scale, mask=in_use > 0, other=0.0)
    scale2 = scale
    if SUB == 2:
        scale2 = gl.load(a_scale + 64 * a_scale_row, mask=in_use > 64, other=0.0)
    for step in range(steps):
        # The next step's scales are on their way while this step's product runs: fetched in time, they would
        # stall the warpgroup for a whole trip to L2 before it may issue.
        ahead = gl.minimum(step + 1, steps - 1)
        next_weight = gl.load(b_scale + ahead)
        next_scale = gl.load(a_scale + ahead * a_scale_step, mask=in_use > 0, other=0.0)
        next_scale2 = next_scale
        if SUB == 2:
            low = a_scale + 64 * a_scale_row + ahead * a_scale_step
            next_scale2 = gl.load(low, mask=in_use > 64, other=0.0)
        mbarrier.wait(full.index(stage), phase)
        a = a_bufs.index(stage)
        b = b_bufs.index(stage).permute((1, 0))
        token = warpgroup_mma(a.slice(HALF, 64, dim=0), b, part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[token])
        if SUB == 2:
            acc += part * (scale * weight)[:, None]
            token = warpgroup_mma(a.slice(HALF + 64, 64, dim=0), b, part, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(empty.index(stage), count=1)
            acc2 += part * (scale2 * weight)[:, None]
        else:
            mbarrier.arrive(empty.index(stage), count=1)
            acc += part * (scale * weight)[:, None]
        stage, phase = _next(stage, phase, STAGES)
        weight = next_weight
        scale = next_scale
        scale2 = next_scale2
    return acc, acc2, part, stage, phase


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
    """One output tile with one product always in flight: a stage is handed back when the next one has begun."""
    acc = gl.zeros([64, BN], gl.float32, mma)
    acc2 = acc
    before = stage
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
        mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
        before = stage
        stage, phase = _next(stage, phase, STAGES)
    if SUB == 2:
        acc, acc2 = warpgroup_mma_wait(0, deps=[acc, acc2])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(before), count=1)
    return acc, acc2, stage, phase


@gluon.jit
def _consume(
    c_desc,
    a_scale_ptr,
    b_scale_ptr,
    group_ptr,
    a_bufs,
    b_bufs,
    c_buf,
    full,
    empty,
    tiles_m,
    tiles_n,
    steps,
    experts,
    slots,
    rows,
    a_scale_expert,
    a_scale_row,
    a_scale_step,
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
    EXPERTS: gl.constexpr,
):
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32 if SCALED else 16])
    HALF: gl.constexpr = WARPGROUP * 64 * SUB  # this warpgroup's first row within the tile
    total = _total_tiles(tiles_m, tiles_n, group_ptr, experts, BM, MASKED, EXPERTS)
    stage = 0
    phase = 0
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    if SCALED:
        part = gl.zeros([64, BN], gl.float32, mma)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        row, n, expert = _locate(
            tile,
            tiles_m,
            tiles_n,
            group_ptr,
            experts,
            slots,
            BM,
            BLOCK_ROWS,
            GROUP,
            MASKED,
            CONTIGUOUS,
            EXPERTS,
        )
        if expert >= 0:
            first = row + HALF
            if SCALED:
                local = lane + first
                a_scale = a_scale_ptr
                limit = rows
                if MASKED:
                    local -= expert * slots
                    a_scale += expert * a_scale_expert
                    limit = slots
                b_scale = b_scale_ptr + (expert * b_scale_rows + (n * BN) // 128) * steps
                acc, acc2, part, stage, phase = _scaled_tile(
                    a_scale + local * a_scale_row, b_scale, limit - local, a_scale_row, a_scale_step,
                    a_bufs, b_bufs, full, empty, stage, phase, steps, part, HALF, SUB, BN, STAGES, mma,
                )  # fmt: skip
            else:
                acc, acc2, stage, phase = _plain_tile(
                    a_bufs, b_bufs, full, empty, stage, phase, steps, HALF, SUB, BN, STAGES, mma
                )
            _write(c_desc, c_buf, acc, first, n * BN)
            if SUB == 2:
                _write(c_desc, c_buf, acc2, first + 64, n * BN)
    tma.store_wait(0)


@gluon.jit
def _gemm_kernel(
    a_desc,
    b_desc,
    c_desc,
    a_scale_ptr,
    b_scale_ptr,
    group_ptr,
    tiles_m,
    tiles_n,
    steps,
    experts,
    slots,
    rows,
    expert_rows,
    a_scale_expert,
    a_scale_row,
    a_scale_step,
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
    EXPERTS: gl.constexpr,
    num_warps: gl.constexpr,
):
    a_bufs = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BM, BK], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BN, BK], b_desc.layout)
    c_bufs = gl.allocate_shared_memory(c_desc.dtype, [2, 64, BN], c_desc.layout)
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
                c_desc, a_scale_ptr, b_scale_ptr, group_ptr, a_bufs, b_bufs, c_bufs.index(0), full, empty,
                tiles_m, tiles_n, steps, experts, slots, rows, a_scale_expert, a_scale_row, a_scale_step,
                b_scale_rows, gl.constexpr(0), SUB, BM, BN, STAGES, BLOCK_ROWS, GROUP, SCALED, MASKED, CONTIGUOUS, EXPERTS,
            )),
            (_consume, (
                c_desc, a_scale_ptr, b_scale_ptr, group_ptr, a_bufs, b_bufs, c_bufs.index(1), full, empty,
                tiles_m, tiles_n, steps, experts, slots, rows, a_scale_expert, a_scale_row, a_scale_step,
                b_scale_rows, gl.constexpr(1), SUB, BM, BN, STAGES, BLOCK_ROWS, GROUP, SCALED, MASKED, CONTIGUOUS, EXPERTS,
            )),
            (_produce, (
                a_desc, b_desc, group_ptr, a_bufs, b_bufs, full, empty, tiles_m, tiles_n, steps, experts, slots,
                expert_rows, BM, BN, BK, STAGES, BLOCK_ROWS, GROUP, MASKED, CONTIGUOUS, EXPERTS,
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

    b is (experts * n, k) dense rows. Scaled (FP8) products take a_scales (rows, k / 128), or (experts, slots, k / 128) when masked, in any strides and
    b_scales (experts, n / 128, k / 128) contiguous. `groups`: expert of each `block_rows` rows (contiguous,
    -1 for none), or rows in use of each expert's `slots` rows (masked). `tile`: SUB, BN, STAGES, GROUP.
    """
    scaled = a_scales is not None
    rows, k = a.shape
    n = out.shape[1]
    bm, bn, bk = 128 * tile["SUB"], tile["BN"], 128 // a.element_size()
    experts = b.shape[0] // n
    tiles_m, tiles_n = -(-rows // bm), -(-n // bn)
    grid = min(multiprocessors(a.device.index), tiles_m * tiles_n)
    anything = out if groups is None else groups
    _gemm_kernel[(grid,)](
        _descriptor(a, [bm, bk]),
        _descriptor(b, [bn, bk]),
        _descriptor(out, [64, bn]),
        a_scales if a_scales is not None else anything,
        b_scales if b_scales is not None else anything,
        anything,
        tiles_m,
        tiles_n,
        -(-k // bk),
        experts,
        slots,
        rows,
        n,
        a_scales.stride(0) if a_scales is not None else 0,
        a_scales.stride(-2) if a_scales is not None else 0,
        a_scales.stride(-1) if a_scales is not None else 0,
        -(-n // 128),
        SUB=tile["SUB"],
        BM=bm,
        BN=bn,
        BK=bk,
        STAGES=tile["STAGES"],
        BLOCK_ROWS=max(block_rows, 1),
        GROUP=tile["GROUP"],
        SCALED=scaled,
        MASKED=grouping == "masked",
        CONTIGUOUS=grouping == "contiguous",
        EXPERTS=1 << max(5, (experts - 1).bit_length()),
        num_warps=4,
    )
