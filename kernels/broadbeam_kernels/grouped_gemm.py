"""Grouped bf16 GEMM: each block of rows times its expert's weights. Tensor cores or weight bytes bound it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import persistent_gemm, portable_gemm
from .contracts import (
    HALF_TYPES,
    block_rows,
    check,
    check_dense,
    check_indices,
    check_multiple,
    check_rows,
    check_shape,
    check_tensor,
)
from .paths import matrix_path, runs_kernels
from .reference import gemm as oracle
from .tuning import config


def grouped_gemm(a: Tensor, b: Tensor, experts: Tensor, out: Tensor | None = None) -> Tensor:
    """a (rows, k) @ b[experts[i]] (n, k).T for each block i of 128 or 256 rows -> (rows, n), a's type.

    bf16 or fp16, b (experts, n, k) contiguous, k and n multiples of 8; experts int32 (rows / block), -1 for a
    block to skip (its output is not written). Sums in float32.
    """
    check_tensor("a", a, 2, HALF_TYPES)
    rows, k = a.shape
    check_tensor("b", b, 3, (a.dtype,), like=a)
    n = b.shape[1]
    check(b.shape[2] == k, f"b has k={b.shape[2]}, a has k={k}")
    check_multiple("k", k, 8, least=8)
    check_multiple("n", n, 8)
    check_rows("a", a)
    check_dense("b", b)
    check_indices("experts", experts, a, None, -1, b.shape[0] - 1)
    block = block_rows(rows, experts, (128, 256))
    if out is None:
        out = torch.empty((rows, n), dtype=a.dtype, device=a.device)
    check_tensor("out", out, 2, (a.dtype,), like=a)
    check_shape("out", out, (rows, n))
    check_rows("out", out)
    if not runs_kernels(out):
        return oracle.grouped_gemm(a, b, experts, block, out)
    if not out.numel() or not b.numel():
        return out
    if matrix_path(out.device) == "portable":
        portable_gemm.launch(a, b.flatten(0, 1), out, grouping="contiguous", groups=experts, block_rows=block)
    else:
        tile = config("grouped_gemm", out.device, rows=rows, n=n, k=k, block=block)
        persistent_gemm.launch(
            a, b.flatten(0, 1), out, grouping="contiguous", groups=experts, block_rows=block, tile=tile
        )
    return out
