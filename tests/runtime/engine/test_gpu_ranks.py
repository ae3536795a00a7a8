"""Ranks on a machine's GPUs, one each, NCCL between them: `python -m pytest -m gpu tests/runtime/engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.runtime.engine.conftest import IN_FLIGHT, LENGTHS, Model, prompt
from tests.runtime.engine.test_expert_parallel import Ranks, spread

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
    model, world = make_model(family), len(ranks.processes)
    ranks.start(model, 29640 + len(family), device="cuda")
    prompts = [prompt(length) for length in LENGTHS] + [prompt(length, seed=1) for length in IN_FLIGHT]
    answers = {
        name: tokens for rank in ranks.ask(spread(prompts, world, 12)) for name, tokens in rank.items()
    }
    in_order = [answers[f"{i}"] for i in range(len(prompts))]
    assert in_order == model.expected(prompts, in_order)
    lonely, *_ = ranks.ask([{"run": {"alone": (prompt(200), 12)}}, *[{"cpu": 0.01}] * (world - 1)])
    assert [lonely["alone"]] == model.expected([prompt(200)], [lonely["alone"]])
    assert all(rank["stopped"] for rank in ranks.ask([{"stop": True}] * world))


def test_a_gpus_rank_that_dies_ends_the_others_with_a_message(
    ranks: Ranks, make_model: Callable[..., Model]
) -> None:
    ranks.start(make_model("qwen3-moe"), 29660, device="cuda")
    survivor, *_, victim = ranks.processes
    victim.kill()
    ranks.tell(survivor, {"run": {"a": (prompt(64), 12)}})
    _, errors = survivor.communicate(timeout=60)
    assert "rank 0 lost a rank of its group" in errors
    assert survivor.returncode == 70
