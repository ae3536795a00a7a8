"""The engine's tokens are transformers' tokens, greedy and in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.engine.conftest import FAMILIES, IN_FLIGHT, LENGTHS, MAX_LEN, Model, Served, greedy, prompt

from broadbeam_runtime import tiny

pytestmark = pytest.mark.slow

Start = Callable[..., Served]
Make = Callable[..., Model]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}
PUBLISHED_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LITE_MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_to_short_and_long_prompts_are_those_of_transformers(
    family: str, make_model: Make, serve: Start
) -> None:
    model, served = make_model(family), serve(make_model(family))
    prompts = [prompt(length) for length in LENGTHS]
    answers = served.run(*(greedy(str(len(p)), p) for p in prompts))
    assert answers == model.expected(prompts, answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_requests_in_flight_do_not_disturb_each_other(
    family: str, make_model: Make, serve: Start
) -> None:
    model, served = make_model(family), serve(make_model(family))
    prompts = [prompt(length, seed=1) for length in IN_FLIGHT]
    answers = served.run(*(greedy(str(i), p) for i, p in enumerate(prompts)))
    assert answers == model.expected(prompts, answers)
    assert served.engine.stats().steps < 16 * 12  # they did run together


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param(
            "llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, id="llama3 rope, tied"
        ),
        pytest.param("llama", {"attention_bias": True, "num_key_value_heads": 8}, id="biases, no grouping"),
        pytest.param(
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            id="linear rope",
        ),
        pytest.param(
            "llama",
            {"rope_parameters": None, "rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_theta": 500000.0},
            id="llama 3.2 as published",
        ),
        pytest.param("qwen3-moe", {"mlp_only_layers": [2], "decoder_sparse_step": 2}, id="some layers dense"),
        pytest.param("qwen3-moe", {"norm_topk_prob": False}, id="weights not normalised"),
        pytest.param("deepseek-v3", {"rope_parameters": YARN, "q_lora_rank": None}, id="yarn, full queries"),
        pytest.param(
            "deepseek-v3",
            {"rope_parameters": None, "rope_scaling": PUBLISHED_YARN, "rope_theta": 10000},
            id="r1's yarn as published",
        ),
        pytest.param(
            "deepseek-v3",
            {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "routed_scaling_factor": 2.446}
            | {"first_k_dense_replace": 2, "tie_word_embeddings": True},
            id="moonlight's routing, tied",
        ),
        pytest.param(
            "deepseek-v2",
            {
                "rope_parameters": None,
                "rope_scaling": PUBLISHED_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            }
            | {"rope_theta": 10000},
            id="v2-lite's yarn as published",
        ),
        pytest.param("deepseek-v3", {"rope_interleave": False, "n_shared_experts": 2}, id="rope in halves"),
        pytest.param(
            "deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, id="v2"
        ),
    ],
)
def test_variants_of_the_families_agree_too(
    family: str, changes: dict[str, Any], make_model: Make, serve: Start
) -> None:
    model = make_model(family, changes)
    served = serve(model)
    prompts = [prompt(length, seed=2) for length in (3, 300)]
    answers = served.run(*(greedy(str(len(p)), p, 8) for p in prompts))
    assert answers == model.expected(prompts, answers, 8)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param("mistral", {"sliding_window": None, "head_dim": 48}, id="mistral"),
        pytest.param("qwen2", {"tie_word_embeddings": True}, id="qwen2"),
        pytest.param("qwen3", {"head_dim": 64}, id="qwen3"),
        pytest.param("llama", {"mlp_bias": True, "attention_bias": True}, id="llama with all biases"),
    ],
)
def test_what_transformers_saves_of_the_other_families_is_served_as_it_answers(
    model_type: str, changes: dict[str, Any], serve: Start, tmp_path: Path
) -> None:
    save_random(model_type, changes, tmp_path)
    model = Model(tmp_path)
    prompts = [prompt(length, seed=2) for length in (3, 300)]
    answers = serve(model).run(*(greedy(str(len(p)), p, 8) for p in prompts))
    assert answers == model.expected(prompts, answers, 8)


def save_random(model_type: str, changes: dict[str, Any], directory: Path) -> None:
    """A small model of transformers' own making; biases and norms random too, so that they count."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": tiny.VOCAB}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.1}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes, **heads, **changes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    made.save_pretrained(directory)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_a_prompt_computed_in_chunks_gives_the_same_answer(
    family: str, make_model: Make, serve: Start
) -> None:
    model = make_model(family)
    served = serve(model, scheduling={"max_batched_tokens": 48})
    prompts = [prompt(777), prompt(200)]
    answers = served.run(*(greedy(str(len(p)), p) for p in prompts))
    assert answers == model.expected(prompts, answers)
    assert served.engine.stats().steps >= 977 // 48


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_a_known_prefix_is_not_computed_again(family: str, make_model: Make, serve: Start) -> None:
    model, served = make_model(family), serve(make_model(family))
    first = prompt(200)
    second = first[:150] + prompt(30, seed=3)
    served.run(greedy("first", first))
    computed = served.engine.stats().prompt_tokens_computed
    answer = served.run(greedy("second", second))
    assert answer == model.expected([second], answer)
    assert served.outputs["second"][0].cached_tokens == 144  # nine full blocks of 16
    assert served.engine.stats().prompt_tokens_computed - computed == len(second) - 144


def test_the_same_prompt_again_computes_its_last_block_only(make_model: Make, serve: Start) -> None:
    model, served = make_model("llama"), serve(make_model("llama"))
    served.run(greedy("first", prompt(64)))
    answer = served.run(greedy("again", prompt(64)))
    assert answer == model.expected([prompt(64)], answer)
    assert served.outputs["again"][0].cached_tokens == 48


def test_without_prefix_reuse_everything_is_computed(make_model: Make, serve: Start) -> None:
    served = serve(make_model("llama"), prefix_reuse=False)
    served.run(greedy("first", prompt(64)))
    served.run(greedy("again", prompt(64)))
    assert served.outputs["again"][0].cached_tokens == 0
    assert served.engine.stats().prompt_tokens_computed == 128


@pytest.mark.parametrize("reuse", [True, False], ids=["prefix reuse", "no reuse"])
def test_sequences_preempted_for_lack_of_blocks_give_the_same_answers(
    reuse: bool, make_model: Make, serve: Start
) -> None:
    model = make_model("llama")
    block_bytes = 4 * 16 * 128 * 4
    served = serve(model, memory_bytes=(MAX_LEN // 16) * block_bytes, prefix_reuse=reuse)
    prompts = [prompt(150, seed=10 + i) for i in range(6)]
    answers = served.run(*(greedy(str(i), p, 60) for i, p in enumerate(prompts)))
    assert answers == model.expected(prompts, answers, 60)
    assert served.engine.stats().preemptions > 0


def test_a_cache_in_bfloat16_answers_under_float32_computation(make_model: Make, serve: Start) -> None:
    served = serve(make_model("llama"), dtype="bfloat16")
    assert len(served.run(greedy("a", prompt(64)))[0]) == 12
    assert served.engine.stats().kv_bytes <= 96 << 20
