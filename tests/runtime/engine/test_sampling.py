"""Choosing tokens: limits, seeds, log-probabilities."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from broadbeam_runtime.core import SamplingParams
from broadbeam_runtime.sampling import Draw, sample, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def tokens(sampling: SamplingParams, draws: int = 400) -> Counter[int]:
    rows = [Draw(sampling, seed=1, index=index) for index in range(draws)]
    return Counter(choice.token_id for choice in sample(LOGITS.expand(draws, -1), rows))


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        pytest.param(SamplingParams(temperature=0), {0}, id="greedy"),
        pytest.param(SamplingParams(temperature=1.0, top_k=2), {0, 1}, id="top_k"),
        pytest.param(
            SamplingParams(temperature=1.0, top_k=9), {0, 1, 2, 3, 4}, id="top_k beyond the vocabulary"
        ),
        pytest.param(SamplingParams(temperature=1.0, top_p=0.5), {0}, id="top_p holds the best token"),
        pytest.param(
            SamplingParams(temperature=1.0, top_p=0.8), {0, 1}, id="top_p holds the one that reaches it"
        ),
        pytest.param(SamplingParams(temperature=1e-4), {0}, id="tiny temperature"),
        pytest.param(SamplingParams(temperature=1.0, top_p=0.9, top_k=1), {0}, id="both"),
    ],
)
def test_only_tokens_within_the_limits_are_drawn(sampling: SamplingParams, possible: set[int]) -> None:
    assert set(tokens(sampling)) == possible


def test_frequencies_follow_the_softmax() -> None:
    counts = tokens(SamplingParams(temperature=0.7), draws=20_000)
    expected = torch.softmax(LOGITS / 0.7, -1)
    for token, probability in enumerate(expected.tolist()):
        assert counts[token] / 20_000 == pytest.approx(probability, abs=0.015)


def test_a_seed_gives_the_same_token_whatever_else_is_in_the_batch() -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    draws = [Draw(SamplingParams(temperature=1.0, top_p=0.9), seed=row, index=3) for row in range(8)]
    together = [choice.token_id for choice in sample(logits, draws)]
    alone = [sample(logits[row : row + 1], [draws[row]])[0].token_id for row in range(8)]
    assert together == alone


def test_uniform_numbers_depend_on_seed_and_index() -> None:
    assert uniform(1, 2) == uniform(1, 2)
    assert len({uniform(seed, index) for seed in range(20) for index in range(20)}) == 400
    assert all(0 <= uniform(5, index) < 1 for index in range(1000))


def test_forbidden_tokens_are_passed_over() -> None:
    (choice,) = sample(LOGITS.unsqueeze(0), [Draw(SamplingParams(temperature=0), 0, 0, forbidden=(0, 1))])
    assert choice.token_id == 2


def test_logprobs_are_those_of_the_raw_logits() -> None:
    how = SamplingParams(temperature=5.0, top_k=1, logprobs=2)
    (choice,) = sample(LOGITS.unsqueeze(0), [Draw(how, 0, 0, forbidden=(1,))])
    expected = torch.log_softmax(LOGITS, -1)
    assert choice.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in choice.top] == [0, 1]
    assert [value for _, value in choice.top] == pytest.approx(expected[:2].tolist())
