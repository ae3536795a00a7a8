"""Ranks on a machine's GPUs, one each, NCCL between them: `python -m pytest -m gpu tests/runtime/engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.runtime.engine.conftest import Model
from tests.runtime.engine.test_expert_parallel import (
    Ranks,
    assert_a_lost_rank_ends_the_others,
    assert_answers_are_those_of,
)

GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason=f"needs 2 CUDA devices, found {GPUS}")]


@pytest.fixture(scope="module", params=sorted({2, GPUS}), ids="{} GPUs".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.end()


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3"])
def test_experts_on_other_gpus_give_the_answers_of_transformers_on_the_cpu(
    family: str, ranks: Ranks, make_model: Callable[..., Model]
) -> None:
    ranks.start(make_model(family), 29640 + len(family), device="cuda")
    assert_answers_are_those_of(make_model(family), ranks)
    assert all(rank["stopped"] for rank in ranks.ask([{"stop": True}] * len(ranks.processes)))


def test_a_gpus_rank_that_dies_ends_the_others_with_a_message(
    ranks: Ranks, make_model: Callable[..., Model]
) -> None:
    ranks.start(make_model("qwen3-moe"), 29660, device="cuda")
    assert_a_lost_rank_ends_the_others(ranks)
