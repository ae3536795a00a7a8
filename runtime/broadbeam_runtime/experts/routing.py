"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

import torch
from torch import Tensor

from broadbeam_runtime.models.architecture import Experts


def route(logits: Tensor, shape: Experts, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Router logits (tokens, experts) -> weights (tokens, top_k) float32, expert ids (tokens, top_k).

    `correction` shifts the choice but not the weights (DeepSeek-V3's auxiliary-loss-free balancing).
    With groups, only the experts of the best `top_groups` groups may be chosen.
    """
    wide = logits.float()
    scores = wide.sigmoid() if shape.scoring == "sigmoid" else wide.softmax(-1)
    choice = scores if correction is None else scores + correction
    if shape.groups > 1:
        choice = choice.masked_fill(~_allowed(choice, shape), float("-inf"))
    ids = choice.topk(shape.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if shape.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * shape.scale, ids


def _allowed(choice: Tensor, shape: Experts) -> Tensor:
    grouped = choice.unflatten(1, (shape.groups, -1))
    score = grouped.topk(2, dim=-1).values.sum(-1) if shape.group_score == "top2" else grouped.amax(-1)
    best = torch.zeros_like(score, dtype=torch.bool).scatter_(
        1, score.topk(shape.top_groups, -1).indices, True
    )
    return best.unsqueeze(-1).expand_as(grouped).flatten(1)
