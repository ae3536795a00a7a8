"""Counters of products that split K: zeros that launches share, or their own inside a CUDA graph. No GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from broadbeam_kernels import decode_gemm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    decode_gemm._counters.clear()
    yield
    decode_gemm._counters.clear()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stream that may be capturing."""
    now = SimpleNamespace(cuda_stream=7, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    return now


def test_launches_on_one_stream_share_counters_and_streams_do_not(stream: SimpleNamespace) -> None:
    first = decode_gemm._counter(CPU, 3)
    assert decode_gemm._counter(CPU, 5) is first
    stream.cuda_stream = 8
    assert decode_gemm._counter(CPU, 3) is not first


def test_a_captured_launch_has_zeros_of_its_own_and_leaves_none_behind(stream: SimpleNamespace) -> None:
    stream.capturing = True
    counters = [decode_gemm._counter(CPU, 3) for _ in range(2)]
    assert counters[0].tolist() == [0, 0, 0]
    assert counters[0] is not counters[1]
    stream.capturing = False
    assert decode_gemm._counter(CPU, 3).numel() == decode_gemm.COUNTERS
