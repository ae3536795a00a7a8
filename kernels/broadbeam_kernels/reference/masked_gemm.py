"""Oracles of the masked grouped products."""

from __future__ import annotations

import torch
from torch import Tensor


def used_blocks(count: Tensor, slots: int, block: int) -> Tensor:
    """The expert of each block of slots, -1 where none of its slots is in use."""
    experts = torch.arange(count.numel(), dtype=torch.int32, device=count.device).unsqueeze(1)
    begins = torch.arange(0, slots, block, device=count.device).unsqueeze(0)
    return torch.where(begins < count.unsqueeze(1), experts, torch.full_like(experts, -1)).flatten()


def masked_gemm(a: Tensor, b: Tensor, count: Tensor, out: Tensor) -> Tensor:
    """Writes the rows in use of each expert to `out` (experts, slots, n), sums in float64."""
    for expert, used in enumerate(count.tolist()):
        out[expert, :used] = (a[expert, :used].double() @ b[expert].double().T).to(out.dtype)
    return out
