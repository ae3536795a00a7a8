"""What tests and benchmarks share: relative difference, poison, fresh inputs and a device timer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU we know: each timed call starts cold
CYCLES_PER_S = 2e9  # no GPU we know clocks higher: a hold in cycles lasts at least as long as meant


def relative_difference(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`, in float64; NaN or infinity anywhere gives infinity."""
    got, want = got.double(), want.double()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    norm = float(want.norm().item())
    difference = float((got - want).norm().item())
    return difference / norm if norm else difference


def poison(x: Tensor) -> Tensor:
    """Fill the storage behind `x` with bytes 0xFF (NaN in every float type): what stays unwritten shows."""
    storage = torch.empty(0, dtype=torch.uint8, device=x.device)
    storage.set_(x.untyped_storage())
    storage.fill_(0xFF)
    return x


def gaussian(
    *shape: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int | None = None
) -> Tensor:
    """Random normal values with row-wise magnitudes over three decades, as activations have."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device)
    if len(shape) > 1:
        x *= 10 ** (torch.rand((*shape[:-1], 1), generator=generator, device=device) * 3 - 1.5)
    return x.to(dtype)


def nbytes(*tensors: Tensor) -> int:
    """Bytes the tensors' elements take (not their storage: a view counts what it shows)."""
    return sum(x.numel() * x.element_size() for x in tensors)


class Timer:
    """Median device time of a call, the cache flushed before each; holds the flush buffer."""

    def __init__(self, budget_ms: float = 30.0) -> None:
        self.budget_ms = budget_ms
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def _once(self, fn: Callable[[], object], hold: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(hold)  # the device waits here until the host has queued the call
        start.record()
        fn()
        end.record()
        return start, end

    def median_ms(self, fn: Callable[[], object]) -> float:
        """Milliseconds; the call is warmed up (compiled) first. At least 7 and at most 100 repeats."""
        fn()
        torch.cuda.synchronize()
        began = time.perf_counter()
        fn()
        host_s = time.perf_counter() - began
        torch.cuda.synchronize()
        hold = int(min(2e6, 2 * host_s * CYCLES_PER_S))
        trial = [self._once(fn, hold) for _ in range(3)]
        torch.cuda.synchronize()
        estimate = statistics.median(a.elapsed_time(b) for a, b in trial)
        repeats = int(min(100, max(7, self.budget_ms / (estimate + 0.1 + host_s * 2e3))))
        pairs = [self._once(fn, hold) for _ in range(repeats)]
        torch.cuda.synchronize()
        return float(statistics.median(a.elapsed_time(b) for a, b in pairs))
