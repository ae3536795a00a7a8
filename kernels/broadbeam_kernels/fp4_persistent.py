"""Products with FP4 weights on a Hopper in Gluon, for where `cuda/fp4_gemm.cu` cannot be built.

Weights take the tensor core's row side so that its register operand is theirs: codes become bf16 in registers
and never exist unpacked in memory. One warp keeps packed tiles and activations coming through the bulk copy
engine; two warpgroups own 64 weight rows each.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
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

from .formats import Nvfp4, align
from .fp4_weights import Fp4Weights
from .tuning import Launch, multiprocessors

# One word (8 codes) and the scales of its two rows -> four registers of the tensor core's operand. The codes
# decode to 2^-126 times their value (code 1 a denormal bf16), the scales to 2^117 times theirs; $10 and $11
# stand for the scale's shift and exponent offset.
_DECODE = """{
.reg .b32 a0, a1, a2, a3, t, s0, s1;
.reg .b16 low, high;
prmt.b32 t, $9, 0, 0x4140;
mad.lo.u32 t, t, SCALE, OFFSET;
mov.b32 {low, high}, t;
mov.b32 s0, {low, low};
mov.b32 s1, {high, high};
and.b32 a0, $8, 0x81808180;
shr.u32 t, $8, 8;
and.b32 t, t, 0x00400040;
or.b32 a0, a0, t;
shl.b32 t, $8, 6;
and.b32 a1, t, 0x81C081C0;
shf.l.wrap.b32 t, $8, $8, 12;
and.b32 a2, t, 0x81C081C0;
shl.b32 t, $8, 2;
and.b32 a3, t, 0x81C081C0;
mul.rn.bf16x2 a0, a0, s0;
mul.rn.bf16x2 a1, a1, s1;
mul.rn.bf16x2 a2, a2, s0;
mul.rn.bf16x2 a3, a3, s1;
mov.b32 {$0, $1}, a0;
mov.b32 {$2, $3}, a1;
mov.b32 {$4, $5}, a2;
mov.b32 {$6, $7}, a3;
}"""
# e5m3 scales: shift by 4, exponent + 234; E8M0 scales: shift by 7, exponent + 117 (in both halves).
_DECODE_NVFP4 = gl.constexpr(_DECODE.replace("SCALE", "16").replace("OFFSET", "0x75007500"))
_DECODE_MXFP4 = gl.constexpr(_DECODE.replace("SCALE", "128").replace("OFFSET", "0x3A803A80"))
_CONSTRAINTS = gl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _locate(
    tile, tiles_m, tiles_n, group_ptr, BM: gl.constexpr, BLOCK_ROWS: gl.constexpr, GROUP: gl.constexpr,
    SPLIT: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """A tile's number -> (tile row, tile column, expert, split); expert -1 means: nothing to do."""
    split = tile % SPLIT
    rest = tile // SPLIT
    per_group = GROUP * tiles_n
    group = rest // per_group
    first = group * GROUP
    size = gl.minimum(tiles_m - first, GROUP)
    within = rest - group * per_group
    m = first + within % size
    expert = 0
    if GROUPED:
        expert = gl.load(group_ptr + (m * BM) // BLOCK_ROWS)
    return m, within // size, expert, split


@gluon.jit
def _produce(
    x_desc, code_desc, scale_desc, group_ptr, x_bufs, code_bufs, scale_bufs, full, empty,
    tiles_m, tiles_n, steps,
    BM: gl.constexpr, STAGES: gl.constexpr, BLOCK_ROWS: gl.constexpr, GROUP: gl.constexpr,
    SPLIT: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    BYTES: gl.constexpr = (
        code_desc.block_type.nbytes + scale_desc.block_type.nbytes + 2 * x_desc.block_type.nbytes
    )
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles_m * tiles_n * SPLIT, gl.num_programs(0)):
        m, n, expert, split = _locate(
            tile, tiles_m, tiles_n, group_ptr, BM, BLOCK_ROWS, GROUP, SPLIT, GROUPED
        )
        if expert >= 0:
            block = (expert * tiles_n + n) * steps
            for step in range(split * steps // SPLIT, (split + 1) * steps // SPLIT):
                ready = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(ready, BYTES)
                tma.async_copy_global_to_shared(
                    code_desc, [(block + step) * 8, 0], ready, code_bufs.index(stage)
                )
                tma.async_copy_global_to_shared(
                    scale_desc, [(block + step) * 4, 0], ready, scale_bufs.index(stage)
                )
                tma.async_copy_global_to_shared(x_desc, [m * BM, step * 128], ready, x_bufs.index(stage * 2))
                tma.async_copy_global_to_shared(
                    x_desc, [m * BM, step * 128 + 64], ready, x_bufs.index(stage * 2 + 1)
                )
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _operand(code_buf, scale_buf, part, mma: gl.constexpr, NVFP4: gl.constexpr):
    """A 64 x 64 tile of codes and scales in shared memory -> the tensor core's left operand, in registers."""
    # (warp, g, t, word pair, word): a thread of the warpgroup and its four words.
    thread: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]],
        [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0]],
        [[1, 0, 0, 0, 0], [2, 0, 0, 0, 0]],
        [],
        [4, 8, 4, 2, 2],
    )
    flat: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2]], [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]], [[0, 128], [1, 0]], [], [2, 256]
    )
    words = code_buf.slice(part * 2, 2, dim=0).load(flat).reshape([4, 8, 4, 2, 2])
    words = gl.convert_layout(words, thread, assert_trivial=True)
    if NVFP4:
        four: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2]], [[0, 0], [0, 0], [0, 4], [0, 8], [0, 16]], [[0, 32], [0, 64]], [], [1, 128]
        )
        raw = scale_buf.slice(part, 1, dim=0).load(four).to(gl.int32).reshape([4, 8, 2, 2])
        raw = gl.convert_layout(raw, gl.SliceLayout(2, thread), assert_trivial=True)
        scales = gl.expand_dims(raw, 2)
    else:
        two: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1]], [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]], [[0, 16], [0, 32]], [], [1, 64]
        )
        raw = scale_buf.slice(part, 1, dim=0).load(two).to(gl.int32).reshape([4, 8, 2])
        raw = gl.convert_layout(raw, gl.SliceLayout(2, gl.SliceLayout(4, thread)))
        scales = gl.expand_dims(gl.expand_dims(raw, 2), 4)
    words, scales = gl.broadcast(words, scales)
    asm: gl.constexpr = _DECODE_NVFP4 if NVFP4 else _DECODE_MXFP4
    o0, o1, o2, o3, o4, o5, o6, o7 = gl.inline_asm_elementwise(
        asm,
        _CONSTRAINTS,
        [words, scales],
        dtype=(
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
        ),
        is_pure=True,
        pack=1,
    )
    near = gl.join(gl.join(o0, o1), gl.join(o2, o3))  # (..., pair, row half) of the word's first 8 columns
    far = gl.join(gl.join(o4, o5), gl.join(o6, o7))
    both = gl.join(near, far)  # (warp, g, t, word pair, word, pair, row half, column half)
    tile = both.permute((0, 6, 1, 3, 4, 7, 2, 5)).reshape([64, 64])
    return gl.convert_layout(tile, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def _consume(
    out_desc, alpha_ptr, group_ptr, x_bufs, code_bufs, scale_bufs, out_buf, full, empty,
    tiles_m, tiles_n, steps,
    WARPGROUP: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, BLOCK_ROWS: gl.constexpr,
    GROUP: gl.constexpr, SPLIT: gl.constexpr, GROUPED: gl.constexpr, NVFP4: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n * SPLIT, gl.num_programs(0)):
        m, n, expert, split = _locate(
            tile, tiles_m, tiles_n, group_ptr, BM, BLOCK_ROWS, GROUP, SPLIT, GROUPED
        )
        if expert >= 0:
            acc = gl.zeros([64, BM], gl.float32, mma)
            second = gl.zeros([64, 64], gl.bfloat16, gl.DotOperandLayout(0, mma, 2))
            begin = split * steps // SPLIT
            for step in range(begin, (split + 1) * steps // SPLIT):
                mbarrier.wait(full.index(stage), phase)
                codes = code_bufs.index(stage)
                scales = scale_bufs.index(stage)
                # A tile decodes while the one before it multiplies; waiting for all but the newest product
                # frees the older one's registers and, once it was a stage's last, the stage.
                first = _operand(codes, scales, WARPGROUP, mma, NVFP4)
                token = warpgroup_mma(first, x_bufs.index(stage * 2).permute((1, 0)), acc, is_async=True)
                acc, second = warpgroup_mma_wait(1, deps=[token, second])
                before = gl.where(stage == 0, STAGES - 1, stage - 1)
                mbarrier.arrive(empty.index(before), count=1, pred=step > begin)
                second = _operand(codes, scales, WARPGROUP + 2, mma, NVFP4)
                token = warpgroup_mma(second, x_bufs.index(stage * 2 + 1).permute((1, 0)), acc, is_async=True)
                acc, first = warpgroup_mma_wait(1, deps=[token, first])
                stage, phase = _next(stage, phase, STAGES)
            acc, second = warpgroup_mma_wait(0, deps=[acc, second])
            mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
            alpha = gl.load(alpha_ptr + expert)
            tma.store_wait(0)
            out_buf.store((acc * alpha).to(out_desc.dtype).permute((1, 0)))
            fence_async_shared()
            row = (split * tiles_m + m) * BM
            tma.async_copy_shared_to_global(out_desc, [row, n * 128 + WARPGROUP * 64], out_buf)
    tma.store_wait(0)


@gluon.jit
def _gemm_kernel(
    x_desc, code_desc, scale_desc, out_desc, alpha_ptr, group_ptr, tiles_m, tiles_n, steps,
    BM: gl.constexpr, STAGES: gl.constexpr, BLOCK_ROWS: gl.constexpr, GROUP: gl.constexpr,
    SPLIT: gl.constexpr, GROUPED: gl.constexpr, NVFP4: gl.constexpr, REGISTERS: gl.constexpr,
    FEEDER: gl.constexpr, num_warps: gl.constexpr, maxnreg: gl.constexpr,
):  # fmt: skip
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 2, BM, 64], x_desc.layout)
    code_bufs = gl.allocate_shared_memory(code_desc.dtype, [STAGES, 8, 256], code_desc.layout)
    scale_bufs = gl.allocate_shared_memory(
        scale_desc.dtype, [STAGES, 4, 128 if NVFP4 else 64], scale_desc.layout
    )
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2, BM, 64], out_desc.layout)
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
                out_desc, alpha_ptr, group_ptr, x_bufs, code_bufs, scale_bufs, out_bufs.index(0), full, empty,
                tiles_m, tiles_n, steps,
                gl.constexpr(0), BM, STAGES, BLOCK_ROWS, GROUP, SPLIT, GROUPED, NVFP4,
            )),
            (_consume, (
                out_desc, alpha_ptr, group_ptr, x_bufs, code_bufs, scale_bufs, out_bufs.index(1), full, empty,
                tiles_m, tiles_n, steps,
                gl.constexpr(1), BM, STAGES, BLOCK_ROWS, GROUP, SPLIT, GROUPED, NVFP4,
            )),
            (_produce, (
                x_desc, code_desc, scale_desc, group_ptr, x_bufs, code_bufs, scale_bufs, full, empty,
                tiles_m, tiles_n, steps, BM, STAGES, BLOCK_ROWS, GROUP, SPLIT, GROUPED,
            )),
        ],
        [4, 1],
        [REGISTERS, FEEDER],
    )  # fmt: skip


@triton.jit
def _sum_kernel(part_ptr, out_ptr, total, stride, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(SPLIT):
        value += tl.load(part_ptr + i * stride + at, mask=at < total, other=0.0)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at < total)


def _plain(x: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=x.element_size() * 8, rank=2)
    return TensorDescriptor.from_tensor(x, block, layout)


def _swizzled(x: Tensor, block: list[int]) -> TensorDescriptor:
    kind = gl.float32 if x.dtype == torch.float32 else gl.bfloat16
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, kind))


def launch(x: Tensor, w: Fp4Weights, experts: Tensor | None, block: int, out: Tensor, tile: Launch) -> None:
    """out (rows, n) = x (rows, k) @ w[expert] (n, k).T, with the arguments already checked.

    `experts` int32 (rows / block), -1 to skip a block, or None: one expert for all rows. `tile`: BM, STAGES,
    GROUP, SPLIT, RESIDENT.
    """
    rows, k = x.shape
    n = w.shape[1]
    nvfp4 = isinstance(w.format, Nvfp4)
    bm, split = min(tile["BM"], block or tile["BM"]), min(tile["SPLIT"], k // 128)
    tiles_m, tiles_n = triton.cdiv(rows, bm), align(n, 128) // 128
    target = out
    if split > 1:
        target = torch.empty((split * tiles_m * bm, n), dtype=torch.float32, device=x.device)
    resident = tile["RESIDENT"]
    _gemm_kernel[(min(multiprocessors(x.device.index) * resident, tiles_m * tiles_n * split),)](
        _swizzled(x, [bm, 64]),
        _plain(w.codes.view(-1, 256), [8, 256]),
        _plain(w.scales.view(-1, 128 if nvfp4 else 64), [4, 128 if nvfp4 else 64]),
        _swizzled(target, [bm, 64]),
        w.alpha,
        experts,
        tiles_m,
        tiles_n,
        k // 128,
        BM=bm,
        STAGES=tile["STAGES"],
        BLOCK_ROWS=max(block, 1),
        GROUP=tile["GROUP"],
        SPLIT=split,
        GROUPED=experts is not None,
        NVFP4=nvfp4,
        # Few accumulators leave registers for a second program on each multiprocessor, whose decoding
        # hides the waits of the first. Else all warps get the same: where the feeding warp gives its
        # registers away, ptxas finds too few for products in flight and waits for each one.
        REGISTERS=168 if resident == 1 else 104,
        FEEDER=168 if resident == 1 else 32,
        num_warps=4,
        maxnreg=168 if resident == 1 else 80,
    )
    if split > 1:
        _sum_kernel[(triton.cdiv(out.numel(), 1024),)](
            target, out, out.numel(), tiles_m * bm * n, SPLIT=split, BLOCK=1024
        )
