"""What the copy engine is told of a matrix: where its boxes lie, how they are swizzled in shared memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

from .nvrtc import checked

_TYPES = {
    torch.float8_e4m3fn: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
}
_SWIZZLES = {
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    32: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
}


@lru_cache(maxsize=4096)
def _encoded(
    pointer: int, rows: int, columns: int, stride_bytes: int, dtype: torch.dtype, box: tuple[int, int]
) -> Any:
    return checked(
        driver.cuTensorMapEncodeTiled(
            _TYPES[dtype],
            2,
            pointer,
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(stride_bytes)],
            [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            _SWIZZLES.get(box[1] * dtype.itemsize, driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def tensor_map(x: Tensor, box: tuple[int, int]) -> Any:
    """`x` (rows, columns), dense rows, moved in boxes of (rows, columns) swizzled over their width."""
    return _encoded(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0) * x.element_size(), x.dtype, box)
