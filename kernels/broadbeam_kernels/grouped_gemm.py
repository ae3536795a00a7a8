"""Grouped bf16 GEMM: each block of rows times its expert's weights. Tensor cores or weight bytes bound it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import persistent_gemm, portable_gemm
from .contracts import HALF_TYPES, check, check_shape, check_tensor
from .paths import matrix_path
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
    check(k % 8 == 0 and n % 8 == 0, f"k={k}, n={n}: multiples of 8 only")
    check(b.is_contiguous(), "b must be contiguous")
    check(a.stride(1) == 1 and a.stride(0) % 8 == 0, "a's rows must be dense and 16-byte aligned")
    check_tensor("experts", experts, 1, (torch.int32,), like=a)
    block = rows // max(experts.numel(), 1)
    check(rows == block * experts.numel(), f"{experts.numel()} blocks do not divide {rows} rows")
    check(not rows or block in (128, 256), f"blocks of {block} rows, expected 128 or 256")
    if out is None:
        out = torch.empty((rows, n), dtype=a.dtype, device=a.device)
    check_tensor("out", out, 2, (a.dtype,), like=a)
    check_shape("out", out, (rows, n))
    if not out.is_cuda:
        return oracle.grouped_gemm(a, b, experts, block, out)
    if rows and matrix_path(out.device) == "portable":
        portable_gemm.launch(a, b.flatten(0, 1), out, grouping="contiguous", groups=experts, block_rows=block)
    elif rows:
        tile = config("grouped_gemm", out.device, rows=rows, n=n, k=k, block=block)
        persistent_gemm.launch(
            a, b.flatten(0, 1), out, grouping="contiguous", groups=experts, block_rows=block, tile=tile
        )
    return out
