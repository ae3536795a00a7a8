"""The dense feed-forward: SwiGLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from broadbeam_runtime.layers.linear import Linear
from broadbeam_runtime.weights import Weights


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (rows, 2 * width), gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up as one multiplication."""

    def __init__(self, gate_up: Linear, down: Linear):
        self.gate_up, self.down = gate_up, down

    @classmethod
    def load(cls, weights: Weights) -> GatedMLP:
        return cls(Linear.load(weights, "gate_proj", "up_proj"), Linear.load(weights, "down_proj"))

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))
