"""What an engine refuses at its start, and how it reports, aborts and stops."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace as changed
from tests.runtime.engine.conftest import Model, Served, config, greedy, prompt

from broadbeam_crds.engine_config import CacheConfig, ConfigError, ModelConfig, ParallelConfig
from broadbeam_runtime.checkpoint import CheckpointError
from broadbeam_runtime.core import LoadProgress, RankIdentity, SamplingParams
from broadbeam_runtime.engine import TorchEngine
from broadbeam_runtime.kv.memory import container_bytes, free_bytes
from broadbeam_runtime.rank import uncollected

Start = Callable[..., Served]
Make = Callable[..., Model]


def start(model: Model, /, **changes: Any) -> None:
    wanted = changed(config(model.directory), **changes)
    TorchEngine(wanted, rank=RankIdentity(), model_dir=model.directory).start(lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"cache": CacheConfig(memory_bytes=1 << 20)},
            "is 1.0 MiB, but one sequence of model.max_model_len = 1024 tokens needs 2.0 MiB",
            id="too little for one sequence",
        ),
        pytest.param(
            {"cache": CacheConfig(memory_bytes=1 << 50)},
            "cache.memory_bytes is 1,073,741,824.0 MiB, but only",
            id="more than there is",
        ),
        pytest.param({"cache": CacheConfig(dtype="fp8")}, "cache.dtype fp8 is not supported yet", id="fp8"),
        pytest.param(
            {"model": ModelConfig(name="m", source="", max_model_len=5000)},
            "model.max_model_len is 5000, the model's own limit is 4096",
            id="longer than the model",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_numbers(
    changes: dict[str, Any], message: str, make_model: Make
) -> None:
    with pytest.raises(ConfigError) as caught:
        start(make_model("llama"), **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "free"), [("1000", 1000 - (900 - 500 - 200)), ("max", None), (None, None)], ids=str
)
def test_pages_of_files_do_not_count_against_a_containers_limit(
    limit: str | None, free: int | None, tmp_path: Path
) -> None:
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 100\nactive_file 200\ninactive_file 500\nshmem 100\n")
    assert container_bytes(tmp_path) == free


def test_the_ranks_of_a_pod_share_its_memory(make_model: Make) -> None:
    free = free_bytes(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"MiB, for each of 4 ranks, but only"):
        start(
            make_model("llama"),
            cache=CacheConfig(memory_bytes=free // 2),
            parallel=ParallelConfig(ranks_per_node=4),
        )


def test_experts_that_do_not_divide_over_the_ranks_are_refused(make_model: Make) -> None:
    model = make_model("qwen3-moe")
    with pytest.raises(ConfigError, match="16 experts cannot be spread evenly"):
        TorchEngine(config(model.directory), rank=RankIdentity(world=3), model_dir=model.directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('{"model_type": "mamba"}', "model_type 'mamba' is not served", id="family"),
        pytest.param('{"model_type": "llama"}', "num_attention_heads is missing", id="missing field"),
        pytest.param(
            '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}',
            r"quantization_config is awq with weight_block_size None; served: fp8 with \[128, 128\]",
            id="quantised otherwise",
        ),
        pytest.param(
            '{"model_type": "mistral", "sliding_window": 4096}',
            "sliding_window is 4096; served: None",
            id="window",
        ),
        pytest.param("{", "config.json", id="no JSON"),
    ],
)
def test_a_model_that_is_not_served_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        TorchEngine(config(tmp_path), rank=RankIdentity(), model_dir=tmp_path)


def test_a_missing_tensor_is_named(make_model: Make, tmp_path: Path) -> None:
    source = make_model("llama").directory
    (tmp_path / "config.json").write_text(
        (source / "config.json").read_text().replace('layers": 4', 'layers": 5')
    )
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    engine = TorchEngine(config(tmp_path), rank=RankIdentity(), model_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.4.self_attn.q_proj.weight is missing"):
        engine.start(lambda _: None)


def test_progress_ends_with_ready(make_model: Make) -> None:
    model, progress = make_model("llama"), LoadProgress()
    engine = TorchEngine(
        config(model.directory), rank=RankIdentity(), model_dir=model.directory, progress=progress
    )
    assert engine.model.eos_token_ids == (2,)
    engine.start(lambda _: None)
    engine.stop()
    assert (progress.stage, progress.done) == ("ready", 1.0)


def test_an_abort_ends_a_running_request_and_frees_it(make_model: Make, serve: Start) -> None:
    served = serve(make_model("llama"))
    served.engine.submit(greedy("a", prompt(64), 900))
    served.wait_for_output("a", 3)
    served.engine.abort("a")
    served.wait("a")
    assert served.outputs["a"][-1].finish == "abort"
    served.run(greedy("b", prompt(5)))
    assert served.engine.stats().running == 0


def test_stop_tokens_and_logprobs_reach_the_output(make_model: Make, serve: Start) -> None:
    model = make_model("llama")
    served = serve(model)
    (answer,) = served.run(greedy("whole", prompt(64)))
    assert [answer] == model.expected([prompt(64)], [answer])
    sampling = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(answer[3],), logprobs=1)
    served.run(replace(greedy("a", prompt(64)), sampling=sampling))
    last = served.outputs["a"][-1]
    assert (last.finish, last.stop_token_id, served.tokens("a")) == ("stop", answer[3], answer[:4])
    assert all(output.logprobs[0].top[0][0] == output.token_ids[0] for output in served.outputs["a"])


def test_stats_count_tokens_and_memory(make_model: Make, serve: Start) -> None:
    served = serve(make_model("llama"))
    served.run(greedy("a", prompt(64)))
    stats = served.engine.stats()
    assert (stats.prompt_tokens_computed, stats.generation_tokens, stats.steps) == (64, 12, 12)
    assert stats.kv_bytes == stats.kv_blocks * stats.block_size * 4 * 128 * 4
    assert stats.weight_bytes == 3_279_104 * 4


def test_an_import_without_a_search_for_garbage_leaves_the_search_on() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
