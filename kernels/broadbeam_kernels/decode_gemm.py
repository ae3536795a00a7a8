"""The matrix kernel for few rows: weights stream past a handful of tokens, bound by weight bytes.

Weights take the tensor core's row side (64 or 128 of them) and tokens its column side (16 and up), so that
one token wastes no weight bandwidth. Few output tiles would leave most multiprocessors idle, so K is split
over programs; the last one to finish a tile adds the parts in order, which keeps the result deterministic
and the operation one launch.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the bodies of kernels are Triton, not Python: mypy cannot type them)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_counters: dict[tuple[int, int], Tensor] = {}
COUNTERS = 65536  # tiles of a product that splits K


@triton.jit
def _decode_kernel(
    w_desc,
    x_desc,
    w_scale_ptr,
    x_scale_ptr,
    out_ptr,
    part_ptr,
    counter_ptr,
    rows,
    columns,
    steps,
    out_row,
    x_scale_row,
    x_scale_step,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles_n = tl.cdiv(columns, BN)
    tile = tl.program_id(0) // SPLIT
    split = tl.program_id(0) % SPLIT
    n = (tile % tiles_n) * BN
    m = (tile // tiles_n) * BM
    row = m + tl.arange(0, BM)
    acc = tl.zeros((BN, BM), tl.float32)
    first = split * steps // SPLIT
    last = (split + 1) * steps // SPLIT
    w_scale = w_scale_ptr + (n // 128) * steps
    x_scale = x_scale_ptr + row * x_scale_row
    weight = tl.load(w_scale + first)
    token = tl.load(x_scale + first * x_scale_step, mask=row < rows, other=0.0)
    for step in tl.range(first, last, num_stages=STAGES):
        # The next step's scales travel while this step's product runs.
        ahead = tl.minimum(step + 1, last - 1)
        next_weight = tl.load(w_scale + ahead)
        next_token = tl.load(x_scale + ahead * x_scale_step, mask=row < rows, other=0.0)
        w = w_desc.load([n, step * BK])
        x = x_desc.load([m, step * BK])
        acc += tl.dot(w, x.T) * (token * weight)[None, :]
        weight = next_weight
        token = next_token
    column = n + tl.arange(0, BN)
    at = out_ptr + row[None, :] * out_row + column[:, None]
    mask = (row < rows)[None, :] & (column < columns)[:, None]
    if SPLIT == 1:
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        inner = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        parts = part_ptr + tile * (SPLIT * BN * BM) + inner
        tl.store(parts + split * (BN * BM), acc, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's part is written before one thread counts it
        done = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if done == SPLIT - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for i in range(SPLIT):
                total += tl.load(parts + i * (BN * BM), cache_modifier=".cg")
            tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(counter_ptr + tile, 0)


def _counter(device: torch.device, tiles: int) -> Tensor:
    """Zeros that the kernel returns to zero; one buffer per device and stream: streams never share.

    A launch that a CUDA graph captures has zeros of its own: the graph runs on any stream, and what is filled
    while one graph is captured is empty for the next until the first has run.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]


def launch(
    x: Tensor, w: Tensor, out: Tensor, x_scales: Tensor, w_scales: Tensor, tile: dict[str, Any]
) -> None:
    """out (rows, n) = x (rows, k) @ w (n, k).T, both e4m3 with 1x128 and 128x128 scales, already checked.

    `tile`: SPLIT, BN, BM, STAGES, num_warps.
    """
    rows, k = x.shape
    n = w.shape[0]
    bn, bm = tile["BN"], tile["BM"]
    tiles = triton.cdiv(n, bn) * triton.cdiv(rows, bm)
    split = min(tile["SPLIT"], k // 128) if tiles <= COUNTERS else 1
    part = torch.empty(tiles * split * bn * bm if split > 1 else 1, dtype=torch.float32, device=x.device)
    _decode_kernel[(tiles * split,)](
        TensorDescriptor.from_tensor(w, [bn, 128]),
        TensorDescriptor.from_tensor(x, [bm, 128]),
        w_scales,
        x_scales,
        out,
        part,
        _counter(x.device, tiles) if split > 1 else part,
        rows,
        n,
        k // 128,
        out.stride(0),
        x_scales.stride(0),
        x_scales.stride(1),
        SPLIT=split,
        BN=bn,
        BM=bm,
        BK=128,
        STAGES=tile["STAGES"],
        num_warps=tile["num_warps"],
    )
