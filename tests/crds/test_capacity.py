"""Parameter counts against the published ones, and memory against arithmetic done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broadbeam_crds.capacity import GIB, Capacity, capacities, device_bytes, devices_per_node
from broadbeam_crds.model_shapes import SHAPES, kv_width, parameters, shape_of
from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import Model, load_manifest

EXAMPLES = Path(__file__).parents[2] / "examples"


def capacity(example: str, name: str) -> Capacity:
    return next(c for c in capacities(load_manifest(EXAMPLES / example)) if c.pool == name)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        pytest.param("deepseek-r1", 671.0, id="DeepSeek-R1"),
        pytest.param("deepseek-v3", 671.0, id="DeepSeek-V3"),
        pytest.param("deepseek-v2-lite", 15.7, id="DeepSeek-V2-Lite"),
        pytest.param("kimi-k2-instruct", 1026.4, id="Kimi-K2"),
        pytest.param("gpt-oss-120b", 116.8, id="gpt-oss-120b"),
        pytest.param("gpt-oss-20b", 20.9, id="gpt-oss-20b"),
        pytest.param("qwen3-235b-a22b", 235.1, id="Qwen3-235B"),
        pytest.param("qwen3-30b-a3b", 30.5, id="Qwen3-30B"),
        pytest.param("smollm2-135m", 0.1345, id="SmolLM2-135M"),
    ],
)
def test_the_counted_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert parameters(SHAPES[name]).total / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        pytest.param("deepseek-r1", 37.0, id="DeepSeek-R1"),
        pytest.param("deepseek-v2-lite", 2.4, id="DeepSeek-V2-Lite"),
        pytest.param("gpt-oss-120b", 5.13, id="gpt-oss-120b"),
        pytest.param("gpt-oss-20b", 3.61, id="gpt-oss-20b"),
        pytest.param("qwen3-235b-a22b", 22.0, id="Qwen3-235B"),
    ],
)
def test_the_active_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert parameters(SHAPES[name]).active / 1e9 == pytest.approx(billions, rel=0.025)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        pytest.param("deepseek-r1", 61 * 576, id="latent attention"),
        pytest.param("gpt-oss-120b", 36 * 2 * 8 * 64, id="grouped queries"),
        pytest.param("smollm2-135m", 30 * 2 * 3 * 64, id="a small model"),
    ],
)
def test_the_cache_of_a_token_is_as_wide_as_attention_makes_it(name: str, elements: int) -> None:
    assert kv_width(SHAPES[name]) == elements


@pytest.mark.parametrize(
    ("name", "source", "known"),
    [
        pytest.param("deepseek-ai/DeepSeek-R1", "pvc://models/r1", "deepseek-r1", id="by its name"),
        pytest.param("chat", "hf://Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", id="by its repository"),
        pytest.param("anything", "tiny://deepseek-v3?seed=3", "tiny-deepseek-v3", id="by its recipe"),
        pytest.param("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "hf://a/b", None, id="not by a prefix"),
    ],
)
def test_a_model_is_known(name: str, source: str, known: str | None) -> None:
    assert shape_of(Model(name=name, source=source)) == (SHAPES[known] if known else None)


def test_the_manifest_knows_better() -> None:
    given: dict[str, Any] = {"layers": 1, "hiddenSize": 8, "vocabularySize": 9, "attentionHeads": 1}
    cluster = serving_cluster(model={"name": "deepseek-r1", "source": "hf://a/b", "architecture": given})

    shape = shape_of(cluster.spec.model)

    assert shape is not None
    assert shape.layers == 1


def test_experts_and_their_copies_are_shared_out() -> None:
    prefill, decode = (capacity("deepseek-r1-h200.yaml", name) for name in ("prefill", "decode"))

    assert (prefill.ranks, prefill.expert_parallel, prefill.experts_per_rank) == (16, 16, (256 + 32) // 16)
    assert (decode.ranks, decode.pods, decode.experts_per_rank) == (32, 4, (256 + 32) // 32)


def test_weights_of_deepseek_r1_in_fp8() -> None:
    decode = capacity("deepseek-r1-h200.yaml", "decode")
    one_expert, scales = 3 * 7168 * 2048, 1 + 4 / 16384

    assert decode.expert_bytes == pytest.approx(58 * 9 * one_expert * scales)
    # Attention 11.4, dense and shared layers 3.7 billion in FP8; embeddings 1.85 billion in BF16.
    assert decode.replicated_bytes == pytest.approx((11.41 + 3.74 + 2 * 1.96) * 1e9, rel=0.01)
    assert decode.fits


def test_weight_offload_makes_two_gb200_enough() -> None:
    cluster = load_manifest(EXAMPLES / "deepseek-r1-gb200.yaml")
    prefill = capacities(cluster)[0]
    without = cluster.spec.pools[0].model_copy(update={"weight_offload": None})
    heavy = capacities(
        cluster.model_copy(update={"spec": cluster.spec.model_copy(update={"pools": [without]})})
    )[0]
    one_layer = 128 * 3 * 7168 * 2048 * 0.5625

    assert heavy.expert_bytes == pytest.approx(58 * one_layer)
    assert heavy.fits is False
    # Layers 1, 3, ... 59; of these 29 have experts, and one slot holds the layer that is fetched.
    assert prefill.offloaded_bytes == pytest.approx((29 - 1) * one_layer)
    assert prefill.fits


def test_the_tokens_that_fit_follow_from_what_the_device_has_left() -> None:
    serve = capacity("gpt-oss-120b-b200.yaml", "serve")
    assert serve.weight_bytes is not None

    assert serve.kv_bytes == 179 * GIB - serve.weight_bytes
    assert serve.kv_bytes_per_token == 36 * 2 * 8 * 64  # one byte each
    assert serve.kv_tokens == serve.kv_bytes // 36864


def test_the_tokens_that_fit_follow_from_the_memory_that_was_given() -> None:
    decode = capacity("laptop.yaml", "decode")

    assert decode.kv_bytes_per_token == 30 * 2 * 3 * 64 * 4
    assert decode.kv_tokens == 256 * 2**20 // 46080
    assert decode.weight_bytes == pytest.approx(134.5e6 * 4, rel=0.01)
    assert decode.experts_per_rank is None


def test_tensor_parallelism_cuts_heads_but_not_latent_attention() -> None:
    def cache(model: str, tensor: int) -> int | None:
        cut = pool("both", parallelism={"tensor": tensor}, accelerator={"perNode": tensor})
        cluster = serving_cluster(
            pools=[cut], engine="vllm", model={"name": model, "source": f"hf://x/{model}"}
        )
        return capacities(cluster)[0].kv_bytes_per_token

    assert cache("gpt-oss-120b", 4) == (cache("gpt-oss-120b", 1) or 0) // 4
    assert cache("gpt-oss-120b", 16) == (cache("gpt-oss-120b", 1) or 0) // 8  # it has 8 heads to share out
    assert cache("deepseek-r1", 8) == cache("deepseek-r1", 1)


@pytest.mark.parametrize(
    ("product", "gib"),
    [
        pytest.param("NVIDIA-H100-80GB-HBM3", 79, id="H100"),
        pytest.param("NVIDIA-H200", 140, id="H200"),
        pytest.param("NVIDIA-B200", 179, id="B200"),
        pytest.param("NVIDIA-GB200", 185, id="GB200 is not a B200"),
        pytest.param("AMD_Instinct_MI300X_OAM", 191, id="MI300X"),
        pytest.param("Abacus-3000", None, id="unknown"),
        pytest.param(None, None, id="not given"),
    ],
)
def test_the_memory_of_a_product_is_known(product: str | None, gib: int | None) -> None:
    device = {"perNode": 1} | ({"product": product} if product else {})

    assert device_bytes(pool(accelerator=device)) == (gib * GIB if gib else None)


@pytest.mark.parametrize(
    ("product", "devices"),
    [
        pytest.param("NVIDIA-GB200", 4, id="a tray of a rack"),
        pytest.param("NVIDIA-H200", 8, id="a server"),
        pytest.param("NVIDIA-L40S", None, id="servers differ"),
        pytest.param(None, None, id="not given"),
    ],
)
def test_the_devices_of_a_usual_server_are_known(product: str | None, devices: int | None) -> None:
    device = {"perNode": 1} | ({"product": product} if product else {})

    assert devices_per_node(pool(accelerator=device)) == devices


def test_ranks_on_cpus_share_the_memory_of_their_pod() -> None:
    shared = pool(data=4, resources={"memory": "8Gi"})

    assert device_bytes(shared) == 2 * GIB


@pytest.mark.parametrize(
    ("engine", "resource", "dtype", "value_bytes"),
    [
        pytest.param("broadbeam", "cpu", "auto", 4, id="float32 on CPUs, whatever the checkpoint holds"),
        pytest.param("broadbeam", "nvidia.com/gpu", "auto", 2, id="the checkpoint's on a GPU"),
        pytest.param("broadbeam", "cpu", "bfloat16", 2, id="what the manifest says"),
        pytest.param("vllm", "cpu", "auto", 2, id="another engine"),
    ],
)
def test_weights_and_cache_are_counted_in_the_type_that_the_engine_takes(
    engine: str, resource: str, dtype: str, value_bytes: int
) -> None:
    laptop = load_manifest(EXAMPLES / "laptop.yaml")
    (found,) = capacities(
        serving_cluster(
            pools=[pool(accelerator={"resource": resource, "perNode": 1})],
            engine={"name": engine, "dtype": dtype},
            model={"name": laptop.spec.model.name, "source": laptop.spec.model.source},
        )
    )

    assert found.kv_bytes_per_token == 30 * 2 * 3 * 64 * value_bytes
    assert found.weight_bytes == pytest.approx(134.5e6 * value_bytes, rel=0.01)


def test_an_unknown_model_is_counted_but_not_weighed() -> None:
    (found,) = capacities(
        serving_cluster(pools=[pool(data=4, nodes=2, groups=3)], model={"name": "x", "source": "hf://a/x"})
    )

    assert (found.total_ranks, found.total_pods, found.expert_parallel) == (12, 6, 4)
    assert (found.weight_bytes, found.kv_tokens, found.fits, found.needed_bytes) == (None, None, None, None)


def test_the_simulator_is_weighed_as_what_it_stands_for() -> None:
    decode = capacity("sim.yaml", "decode")

    assert decode.kv_bytes_per_token == 70272
    assert decode.experts_per_rank == 32
    assert decode.fits is None
