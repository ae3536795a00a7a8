"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from broadbeam_runtime.weights import Weights


class RMSNorm:
    """x / rms(x) * weight over the last axis, the mean in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps

    @classmethod
    def load(cls, weights: Weights, name: str, eps: float) -> RMSNorm:
        return cls(weights.tensor(f"{name}.weight"), eps)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)
