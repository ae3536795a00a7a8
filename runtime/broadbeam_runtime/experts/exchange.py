"""Tokens to the ranks that own their experts, and the results back.

A token crosses to a rank once, however many of that rank's experts it goes to; the rank answers with the
weighted sum over its own experts. Three exchanges a layer: counts, rows, results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from broadbeam_runtime.parallel import Group


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows that arrived at this rank, and what `combine` needs to send their results home."""

    x: Tensor  # (rows, hidden)
    experts: Tensor  # (rows, top_k) global ids; those of other ranks included
    weights: Tensor  # (rows, top_k) float32
    sources: Tensor  # (sent rows) the token that each sent row came from
    tokens: int
    send: list[int]
    receive: list[int]


def dispatch(x: Tensor, experts: Tensor, weights: Tensor, group: Group, per_rank: int) -> Dispatched:
    """x (tokens, hidden), experts and weights (tokens, top_k) -> the rows whose experts live here."""
    tokens, hidden = x.shape
    if group.world == 1:
        return Dispatched(x, experts, weights, experts, tokens, [], [])
    goes = torch.zeros(tokens, group.world, dtype=torch.bool, device=x.device)
    goes.scatter_(1, experts // per_rank, True)
    ranks, sources = goes.t().nonzero(as_tuple=True)  # ordered by rank
    send = torch.bincount(ranks, minlength=group.world).tolist()
    receive = group.exchange_counts(send)
    packed = torch.cat([_bytes(x), _bytes(experts.int()), _bytes(weights)], 1)
    arrived = group.exchange_rows(packed[sources], send, receive)
    top_k = experts.shape[1]
    rows, ids, shares = arrived.split([hidden * x.element_size(), 4 * top_k, 4 * top_k], 1)
    return Dispatched(
        x=rows.contiguous().view(x.dtype),
        experts=ids.contiguous().view(torch.int32).long(),
        weights=shares.contiguous().view(torch.float32),
        sources=sources,
        tokens=tokens,
        send=send,
        receive=receive,
    )


def combine(results: Tensor, dispatched: Dispatched, group: Group) -> Tensor:
    """Results (rows, hidden) of the dispatched rows -> their sums (tokens, hidden) at the source."""
    if group.world == 1:
        return results
    back = group.exchange_rows(results, dispatched.receive, dispatched.send)
    total = torch.zeros(dispatched.tokens, results.shape[1], dtype=torch.float32, device=results.device)
    return total.index_add_(0, dispatched.sources, back.float()).to(results.dtype)


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)
