"""The mixture-of-experts feed-forward of a layer, its experts sharded over the group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from broadbeam_runtime.experts.exchange import Dispatched, combine, dispatch
from broadbeam_runtime.experts.routing import route
from broadbeam_runtime.layers.mlp import GatedMLP, swiglu
from broadbeam_runtime.models.architecture import Architecture
from broadbeam_runtime.parallel import Group
from broadbeam_runtime.weights import Weights


class Mixture:
    """route -> dispatch -> this rank's experts -> combine, plus the shared experts."""

    def __init__(self, weights: Weights, shape: Architecture, group: Group):
        assert shape.experts
        self.shape, self.group = shape.experts, group
        self.per_rank = shape.experts.count // group.world
        # DeepSeek routes in float32 whatever the model's dtype, Qwen in the model's.
        wide = torch.float32 if shape.latent else None
        self.router = weights.tensor("gate.weight", wide)
        corrected = "gate.e_score_correction_bias" in weights
        self.correction = weights.tensor("gate.e_score_correction_bias", torch.float32) if corrected else None
        self.experts = LocalExperts(weights.at("experts"), self.per_rank * group.rank, self.per_rank)
        self.shared = GatedMLP.load(weights.at("shared_experts")) if self.shape.shared else None

    def __call__(self, x: Tensor) -> Tensor:
        share, ids = route(F.linear(x.to(self.router.dtype), self.router), self.shape, self.correction)
        arrived = dispatch(x, ids, share, self.group, self.per_rank)
        out = combine(self.experts(arrived), arrived, self.group)
        return out if self.shared is None else out + self.shared(x)


class LocalExperts:
    """Experts first ... first + count - 1 as stacks: (count, 2 * width, hidden), (count, hidden, width)."""

    def __init__(self, weights: Weights, first: int, count: int):
        self.first, self.count = first, count
        ids = range(first, first + count)
        self.gate_up = torch.stack([weights.rows([f"{i}.gate_proj", f"{i}.up_proj"]) for i in ids])
        self.down = torch.stack([weights.tensor(f"{i}.down_proj.weight") for i in ids])

    def __call__(self, arrived: Dispatched) -> Tensor:
        """The weighted sum over this rank's experts of each row, (rows, hidden)."""
        local = arrived.experts.flatten() - self.first
        slots = torch.where((local >= 0) & (local < self.count), local, self.count)
        order = slots.argsort(stable=True)  # by expert; those of other ranks last
        counts = torch.bincount(slots, minlength=self.count + 1)[: self.count].tolist()
        rows, shares = order // arrived.experts.shape[1], arrived.weights.flatten()[order].unsqueeze(1)
        out = torch.zeros_like(arrived.x)
        start = 0
        for expert, size in enumerate(counts):
            if size:
                part = slice(start, start + size)
                hidden = swiglu(F.linear(arrived.x[rows[part]], self.gate_up[expert]))
                result = F.linear(hidden, self.down[expert]) * shares[part]
                out.index_add_(0, rows[part], result.to(out.dtype))
                start += size
        return out
