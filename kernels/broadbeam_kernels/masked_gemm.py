"""Masked grouped products: a fixed number of slots per expert, a count of them in use known to the GPU alone.

bf16 weights, and FP4 weights that stay packed. The host never learns the counts, so a CUDA graph can hold the
launch: the bf16 kernel walks the counts itself, the FP4 kernel is given a table of blocks made on the GPU.
Tensor cores or weight bytes bound both, as the contiguous forms.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import persistent_gemm, portable_gemm, scaled_gemm
from .contracts import (
    HALF_TYPES,
    check,
    check_dense,
    check_indices,
    check_multiple,
    check_shape,
    check_tensor,
)
from .fp4_gemm import Weights, grouped_fp4_gemm
from .overlap import begin, early
from .packed_weights import PackedWeights
from .paths import matrix_path, runs_kernels
from .reference import masked_gemm as oracle
from .tuning import config

BLOCKS = (16, 32, 64, 128, 256)  # rows of a block that the contiguous FP4 product takes


@triton.jit
def _used_blocks_kernel(
    count_ptr, table_ptr, total, per_expert, block, ENTRIES: tl.constexpr, OVERLAP: tl.constexpr
):
    begin(OVERLAP)
    index = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    expert = index // per_expert
    used = tl.load(count_ptr + expert, mask=index < total, other=0)
    begins = (index - expert * per_expert) * block
    tl.store(table_ptr + index, tl.where(begins < used, expert, -1), mask=index < total)


def used_blocks(count: Tensor, slots: int, block: int) -> Tensor:
    """int32 (experts * slots / block): the expert of each block of slots, -1 where no slot is in use.

    count int32 (experts,), never read by the host; block divides slots. One launch.
    """
    check(block > 0, f"block={block}, expected at least 1")
    check(slots >= 0 and slots % block == 0, f"blocks of {block} do not divide {slots} slots")
    check_indices("count", count, count, None, 0, 2**31 - 1)
    if not runs_kernels(count):
        return oracle.used_blocks(count, slots, block)
    total = count.numel() * (slots // block)
    table = torch.empty(total, dtype=torch.int32, device=count.device)
    programs = triton.cdiv(total, 1024)
    if programs:
        options = {"ENTRIES": 1024, "num_warps": 4, **early(count.device, programs)}
        _used_blocks_kernel[(programs,)](count, table, total, slots // block, block, **options)
    return table


def masked_gemm(a: Tensor, b: Tensor, count: Tensor, out: Tensor | None = None) -> Tensor:
    """a (experts, slots, k), of which count[e] rows are in use, @ b[e] (n, k).T -> (experts, slots, n).

    bf16 or fp16, a and b contiguous, slots a multiple of 128, k and n of 8; count int32 (experts,). Output
    rows past an expert's count hold anything. Sums in float32.
    """
    check_tensor("a", a, 3, HALF_TYPES)
    experts, slots, k = a.shape
    check_multiple("slots", slots, 128)
    check_tensor("b", b, 3, (a.dtype,), like=a)
    n = b.shape[1]
    check_shape("b", b, (experts, n, k))
    check_multiple("k", k, 8, least=8)
    check_multiple("n", n, 8)
    check_dense("a", a)
    check_dense("b", b)
    check_indices("count", count, a, (experts,), 0, slots)
    if out is None:
        out = torch.empty((experts, slots, n), dtype=a.dtype, device=a.device)
    check_tensor("out", out, 3, (a.dtype,), like=a)
    check_shape("out", out, (experts, slots, n))
    check_dense("out", out)
    if not runs_kernels(out):
        return oracle.masked_gemm(a, b, count, out)
    if out.numel() == 0:
        return out
    rows, weights, result = a.flatten(0, 1), b.flatten(0, 1), out.flatten(0, 1)
    if matrix_path(out.device) == "portable":
        portable_gemm.launch(rows, weights, result, grouping="masked", groups=count, slots=slots)
    else:
        tile = config("masked_gemm", out.device, rows=slots, n=n, k=k)
        persistent_gemm.launch(rows, weights, result, grouping="masked", groups=count, slots=slots, tile=tile)
    return out


def _block(slots: int, expected_rows: int | None) -> int:
    """The smallest block for the rows an expert is expected to have, not so small that looks at blocks cost.

    Of 1024 slots with 16 in use, 64 blocks of 16 an expert took 242 us and 16 of 64 took 163, where 16 slots
    alone take 109 (32 experts, 7168x2048, H100).
    """
    fitting = [block for block in BLOCKS if slots % block == 0]
    wanted = max(64 if expected_rows is None else expected_rows, min(slots // 16, 64))
    return next((block for block in fitting if block >= wanted), fitting[-1])


def masked_fp4_gemm(x: Tensor, w: Weights, count: Tensor, expected_rows: int | None = None) -> Tensor:
    """x (experts, slots, k) bf16, count[e] rows of it in use, times FP4 weights -> (experts, slots, n) bf16.

    x contiguous, slots a multiple of 16; count int32 (experts,). `expected_rows`: about how many an expert
    has (64 where not said), which sets how finely slots are skipped; any count is right. Output rows past
    an expert's count hold anything. Weights and sums as `grouped_fp4_gemm`.
    """
    check_tensor("x", x, 3, (torch.bfloat16,), like=w.codes)
    experts, slots, _ = x.shape
    check_dense("x", x)
    check(x.shape[2] == w.shape[2], f"x has k={x.shape[2]}, the weights have k={w.shape[2]}")
    check(experts == w.shape[0], f"w holds {w.shape[0]} experts, x has {experts}")
    check_indices("count", count, x, (experts,), 0, slots)
    check_multiple("slots", slots, BLOCKS[0])
    if isinstance(w, PackedWeights) and runs_kernels(x):
        out = torch.empty((experts * slots, w.shape[1]), dtype=x.dtype, device=x.device)
        if out.numel():
            scaled_gemm.launch(x.flatten(0, 1), w, out, grouping="masked", groups=count, slots=slots)
        return out.view(experts, slots, w.shape[1])
    table = used_blocks(count, slots, _block(slots, expected_rows))
    return grouped_fp4_gemm(x.flatten(0, 1), w, table, sparse=True).view(experts, slots, w.shape[1])
