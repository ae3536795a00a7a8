"""NVFP4 and MXFP4 weight GEMM, plain and grouped: packed weights, bf16 or FP8 activations.

At decode sizes the packed weights' bytes bound it, at prefill sizes the bf16 tensor cores. Codes become bf16
in registers (exactly: a code times an e4m3 scale has six significant bits) and are multiplied there.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import fp4_persistent, scaled_gemm
from .contracts import (
    block_rows,
    check,
    check_indices,
    check_multiple,
    check_quantized,
    check_rows,
    check_tensor,
)
from .formats import Fp8Block, Quantized
from .fp4_weights import Fp4Weights
from .fp8_block import dequantize_fp8_block
from .packed_weights import PackedWeights
from .paths import matrix_path, runs_kernels
from .portable_gemm import Grouping
from .reference import gemm as oracle
from .tuning import Launch, config

Weights = Fp4Weights | PackedWeights

log = logging.getLogger(__name__)


@cache
def _cuda() -> ModuleType | None:
    """The launcher of the CUDA C++ kernel; None, said once, without NVRTC and the driver's bindings."""
    try:
        from .cuda import fp4_gemm as native
    except ImportError as error:
        log.warning("CUDA C++ kernels cannot be built, Triton's stand in: %s", error)
        return None
    return native


def _launch_cuda(
    x: Tensor, w: Fp4Weights, experts: Tensor | None, block: int, out: Tensor, tile: Launch
) -> bool:
    native = _cuda()
    if native is None:
        return False
    chosen = native.Tile(**tile)
    if experts is None:
        chosen = native.spread(chosen, x, w.shape[1])
    return bool(native.launch(x, w, experts, block, out, chosen))


def _launch(
    x: Tensor, w: Weights, experts: Tensor | None, block: int, out: Tensor, sparse: bool = False
) -> None:
    if isinstance(w, PackedWeights):
        grouping: Grouping = "dense" if experts is None else "contiguous"
        scaled_gemm.launch(x, w, out, grouping=grouping, groups=experts, block_rows=block)
        return
    check(
        matrix_path(x.device) == "hopper", "w is laid out for a Hopper: prepare it on the GPU that reads it"
    )
    operation = "fp4_gemm" if experts is None else "grouped_fp4_gemm"
    rows, (count, n, k) = x.shape[0], w.shape
    facts = {"rows": rows, "each": rows // count, "n": n, "k": k, "block": block}
    tile = config(f"cuda_{operation}", x.device, **facts) | ({"group": 1} if sparse else {})
    if not _launch_cuda(x, w, experts, block, out, tile):
        tuned = config(operation, x.device, **facts) | ({"GROUP": 1} if sparse else {})
        fp4_persistent.launch(x, w, experts, block, out, tuned)


def _activations(x: Tensor | Quantized, w: Weights) -> Tensor:
    if isinstance(x, Quantized):
        check_quantized("x", x, Fp8Block)
        # One rounding to bf16 (2^-9) on values that carry e4m3's 2^-4.
        x = dequantize_fp8_block(x, torch.bfloat16)
    check_tensor("x", x, 2, (torch.bfloat16,), like=w.codes)
    check(x.shape[1] == w.shape[2], f"x has k={x.shape[1]}, the weights have k={w.shape[2]}")
    check_rows("x", x)
    check_multiple("n", w.shape[1], 8)
    return x


def fp4_gemm(x: Tensor | Quantized, w: Weights) -> Tensor:
    """x (rows, k) bf16 or FP8 1x128 @ w (n, k).T, w prepared NVFP4 or MXFP4 of one expert -> (rows, n) bf16.

    Weights enter exactly; sums in float32. n a multiple of 8. Semantics: W4A16 as Marlin has it. On a Hopper
    codes, scales and alpha of w may be read before the launch ahead of this one has ended: who writes them in
    place waits for the GPU, or launches something of torch's, before the next product.
    """
    check(w.shape[0] == 1, f"w holds {w.shape[0]} experts, expected 1 (see grouped_fp4_gemm)")
    x = _activations(x, w)
    out = torch.empty((x.shape[0], w.shape[1]), dtype=x.dtype, device=x.device)
    if not runs_kernels(x):
        return oracle.fp4_gemm(x, w, None, 0, out)
    if out.numel():
        _launch(x, w, None, 0, out)
    return out


def grouped_fp4_gemm(x: Tensor | Quantized, w: Weights, experts: Tensor, sparse: bool = False) -> Tensor:
    """Each block of rows of x (rows, k) times its expert's weights -> (rows, n) bf16.

    experts int32 (rows / block), -1 for a block to skip (its output is not written); blocks of 16, 32, 64,
    128 or 256 rows: decode packs its few tokens per expert into small blocks. `sparse`: many blocks are
    skipped, at even distances perhaps. Tiles then go row by row: in groups of four rows, of which one is in
    use, a quarter of 132 multiprocessors gets all the work (2070 us where 589 are due, H100).
    """
    x = _activations(x, w)
    check_indices("experts", experts, x, None, -1, w.shape[0] - 1)
    block = block_rows(x.shape[0], experts, (16, 32, 64, 128, 256))
    out = torch.empty((x.shape[0], w.shape[1]), dtype=x.dtype, device=x.device)
    if not runs_kernels(x):
        return oracle.fp4_gemm(x, w, experts, block, out)
    if out.numel():
        _launch(x, w, experts, block, out, sparse)
    return out
