"""GPU tests are skipped where there is no CUDA device, CUDA C++ tests where torch brings no compiler."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CUDA_TESTS = ("test_cuda_build.py", "test_fp4_build.py", "test_fp4_gpu.py", "test_fp8_cuda_gpu.py")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # A CPU build of torch comes without cuda-bindings.
    return True if collection_path.name in CUDA_TESTS and find_spec("cuda") is None else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
