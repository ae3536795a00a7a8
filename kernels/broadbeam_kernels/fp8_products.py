"""Which kernel multiplies FP8 by FP8 on a GPU: CUDA C++ or Gluon on a Hopper, plain Triton elsewhere."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from . import decode_gemm, persistent_gemm, portable_gemm
from .paths import matrix_path
from .portable_gemm import Grouping
from .tuning import config

log = logging.getLogger(__name__)

FEW_ROWS = 32  # up to here weights stream past tokens, and the tensor core's row side is theirs (decode_gemm)


@cache
def _cuda() -> ModuleType | None:
    """The launcher of the CUDA C++ kernel; None, said once, without NVRTC and the driver's bindings."""
    try:
        from .cuda import fp8_gemm
    except ImportError as error:
        log.warning("CUDA C++ kernels cannot be built, Triton's stand in: %s", error)
        return None
    return fp8_gemm


def _launch_triton(a: Tensor, b: Tensor, out: Tensor, grouping: Grouping, **operands: Any) -> None:
    operation = {"dense": "fp8_gemm", "contiguous": "grouped_fp8_gemm", "masked": "masked_fp8_gemm"}[grouping]
    rows = operands["slots"] if grouping == "masked" else a.shape[0]
    facts = {"rows": rows, "n": out.shape[1], "k": a.shape[1], "block": operands["block_rows"]}
    tile = config(operation, out.device, **facts)
    if tile.get("KIND") == "decode":
        decode_gemm.launch(a, b, out, operands["a_scales"], operands["b_scales"], tile)
    else:
        persistent_gemm.launch(a, b, out, grouping=grouping, tile=tile, **operands)


def launch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    a_scales: Tensor,
    b_scales: Tensor,
    grouping: Grouping = "dense",
    groups: Tensor | None = None,
    block_rows: int = 128,
    slots: int = 0,
    pow2: bool = False,
) -> None:
    """out (rows, n) = a (rows, k) @ b[expert] (n, k).T, e4m3, with the arguments already checked.

    Operands as `persistent_gemm.launch` takes them; `pow2`: all scales are powers of two.
    """
    operands: dict[str, Any] = {
        "a_scales": a_scales,
        "b_scales": b_scales,
        "groups": groups,
        "block_rows": block_rows,
        "slots": slots,
    }
    if matrix_path(out.device) == "portable":
        portable_gemm.launch(a, b, out, grouping=grouping, pow2=pow2, **operands)
        return
    streams = grouping == "dense" and out.shape[0] <= FEW_ROWS
    cuda = None if streams else _cuda()
    if cuda is None or not cuda.launch(a, b, out, grouping=grouping, **operands):
        _launch_triton(a, b, out, grouping, **operands)
