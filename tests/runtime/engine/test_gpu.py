"""On a CUDA device: `python -m pytest -m gpu tests/runtime/engine`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from tests.runtime.engine.conftest import FAMILIES, IN_FLIGHT, LENGTHS, Model, Served, config, greedy, prompt

from broadbeam_runtime.core import RankIdentity
from broadbeam_runtime.engine import TorchEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def served_on_cuda(model: Model, **changes: Any) -> Served:
    wanted = replace(config(model.directory), device="cuda", **changes)
    return Served(TorchEngine(wanted, rank=RankIdentity(), model_dir=model.directory))


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek-v2"])
def test_answers_on_cuda_are_those_of_transformers_on_the_cpu(
    family: str, make_model: Callable[..., Model]
) -> None:
    model = make_model(family)
    served = served_on_cuda(model)
    prompts = [prompt(length) for length in LENGTHS] + [prompt(length, seed=1) for length in IN_FLIGHT]
    answers = served.run(*(greedy(str(i), p) for i, p in enumerate(prompts)))
    served.engine.stop()
    served.engine.scheduler.check_integrity()
    assert answers == model.expected(prompts, answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_runs_and_batches(family: str, make_model: Callable[..., Model], tmp_path: Path) -> None:
    served = served_on_cuda(make_model(family), dtype="bfloat16")
    start = time.perf_counter()
    answers = served.run(*(greedy(str(i), prompt(n, seed=1), 64) for i, n in enumerate(IN_FLIGHT)))
    rate = sum(map(len, answers)) / (time.perf_counter() - start)
    served.engine.stop()
    print(
        json.dumps({"family": family, "tokens_per_s": round(rate, 1), "device": torch.cuda.get_device_name()})
    )
    assert all(len(answer) == 64 for answer in answers)
