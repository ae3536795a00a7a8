"""Choosing tokens: greedy, temperature, top-k, top-p; the same whatever else is in the batch.

Every draw takes one uniform number from a counter, (seed, index of the output token), so a seeded request
gives the same tokens alone, in a batch, after a preemption and when its first token came from another rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from broadbeam_runtime.core import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to sample: how, which draw of its request it is, and the tokens it must not end with yet."""

    sampling: SamplingParams
    seed: int
    index: int
    forbidden: tuple[int, ...] = ()


def sample(logits: Tensor, draws: Rows[Draw]) -> list[TokenLogprob]:
    """One token per row of float32 logits (rows, vocab). Log-probabilities are those of the raw logits
    (before temperature and limits, as vLLM's), and 0 where the request did not ask for any."""
    raw = logits
    if any(draw.forbidden for draw in draws):
        logits = logits.clone()
        for row, draw in enumerate(draws):
            logits[row, list(draw.forbidden)] = float("-inf")
    chosen = logits.argmax(-1)
    for row, draw in enumerate(draws):
        if draw.sampling.temperature > 0:
            chosen[row] = _draw(logits[row], draw)
    tokens: list[int] = chosen.tolist()
    return [
        _logprob(raw[row], token, draw.sampling.logprobs)
        for row, (token, draw) in enumerate(zip(tokens, draws, strict=True))
    ]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _draw(logits: Tensor, draw: Draw) -> Tensor:
    """Inverse of the cumulative distribution at `uniform`, over the tokens that top-k and top-p keep."""
    how = draw.sampling
    if how.top_k or how.top_p < 1:
        count = min(how.top_k or len(logits), len(logits))
        values, tokens = logits.topk(count)
    else:
        values, tokens = logits, None
    probabilities = torch.softmax((values.double() - values.max()) / how.temperature, -1)
    cumulative = probabilities.cumsum(-1)
    if how.top_p < 1:  # the first token past the mass belongs to it
        kept = int((cumulative - probabilities < how.top_p).sum())
        cumulative = cumulative[: max(kept, 1)]
    target = cumulative[-1] * uniform(draw.seed, draw.index)
    position = torch.searchsorted(cumulative, target, right=True).clamp_(max=len(cumulative) - 1)
    return position if tokens is None else tokens[position]


def _logprob(logits: Tensor, token: int, wanted: int | None) -> TokenLogprob:
    if wanted is None:
        return TokenLogprob(token, 0.0)
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(min(wanted, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
