"""Engine vllm: flags that exist, and the shapes in which vLLM runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster, load_manifest
from broadbeam_operator.accept import refusals
from broadbeam_operator.cluster import Object
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import manifests

EXAMPLES = Path(__file__).parents[2] / "examples"
# `vllm serve --help=all` of 0.32.
FLAGS = set(Path(__file__).with_name("vllm_flags.txt").read_text().split())
R1 = {"name": "deepseek-ai/DeepSeek-R1", "source": "hf://deepseek-ai/DeepSeek-R1", "maxModelLen": 8192}


def cluster(
    data: int = 16, nodes: int = 2, tensor: int = 1, role: str = "both", **fields: Any
) -> ServingCluster:
    spec = {key: fields.pop(key) for key in ("kv", "model") if key in fields}
    device = {"resource": "nvidia.com/gpu", "perNode": data * tensor // nodes}
    shape = {"data": data, "tensor": tensor, "nodes": nodes}
    wanted = pool("main", role=role, parallelism=shape, accelerator=device, kvCache={}, **fields)
    return serving_cluster(pools=[wanted], engine="vllm", **({"model": R1} | spec))


def container(found: ServingCluster) -> Object:
    (workload,) = [obj for obj in manifests(found, Images()) if obj["kind"] == "StatefulSet"][:1]
    result: Object = workload["spec"]["template"]["spec"]["containers"][0]
    return result


def value(found: ServingCluster, flag: str) -> str | None:
    arguments = container(found)["args"]
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def environment(found: ServingCluster) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container(found)["env"]}


def files(found: ServingCluster) -> dict[str, Any]:
    (config,) = [obj for obj in manifests(found, Images()) if "node-0.yaml" in obj.get("data", {})][:1]
    return {name: yaml.safe_load(text) for name, text in config["data"].items()}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_flag_is_one_of_vllms(path):
    found = load_manifest(path)
    if found.spec.engine.name != "vllm":
        pytest.skip("another engine")
    for workload in (obj for obj in manifests(found, Images()) if obj["kind"] == "StatefulSet"):
        arguments = workload["spec"]["template"]["spec"]["containers"][0]["args"]
        assert {each for each in arguments if each.startswith("--")} <= FLAGS


def test_several_ranks_a_pod_run_under_vllms_supervisor():
    found = cluster(data=16, nodes=2)
    assert "--data-parallel-multi-port-external-lb" in container(found)["args"]
    assert value(found, "--data-parallel-supervisor-port") == "9000"
    assert value(found, "--data-parallel-size") == "16"
    assert value(found, "--data-parallel-size-local") == "8"
    assert value(found, "--data-parallel-address") == "demo-main-0-0.demo-main-0.default.svc"
    assert value(found, "--config") == "/etc/broadbeam/node-$(BROADBEAM_NODE_INDEX).yaml"
    assert files(found) == {
        "node-0.yaml": {"data-parallel-start-rank": 0},
        "node-1.yaml": {"data-parallel-start-rank": 8},
    }
    assert container(found)["readinessProbe"]["httpGet"] == {"port": 9000, "path": "/readyz"}


def test_one_rank_a_pod_answers_for_itself():
    found = cluster(data=2, nodes=2, tensor=8)
    assert "--data-parallel-multi-port-external-lb" not in container(found)["args"]
    assert files(found) == {
        "node-0.yaml": {"data-parallel-rank": 0},
        "node-1.yaml": {"data-parallel-rank": 1},
    }
    assert container(found)["readinessProbe"]["httpGet"] == {"port": 8000, "path": "/health"}


def test_a_single_rank_is_a_plain_server():
    found = cluster(data=1, nodes=1, tensor=8)
    assert value(found, "--tensor-parallel-size") == "8"
    assert [each for each in container(found)["args"] if each.startswith("--data-parallel")] == []


@pytest.mark.parametrize(
    ("fields", "flag", "text"),
    [
        pytest.param({"allToAll": "deepep-low-latency"}, "--all2all-backend", "deepep_low_latency", id="a2a"),
        pytest.param({"allToAll": "nvlink"}, "--all2all-backend", "flashinfer_nvlink_one_sided", id="nvlink"),
        pytest.param({"allToAll": "auto"}, "--all2all-backend", None, id="vLLM's own a2a"),
        pytest.param({"precision": {"moe": "nvfp4"}}, "--quantization", "modelopt_fp4", id="nvfp4"),
        pytest.param({"precision": {"moe": "mxfp4"}}, "--quantization", "mxfp4", id="mxfp4"),
        pytest.param({"precision": {"kvCache": "fp8"}}, "--kv-cache-dtype", "fp8", id="fp8 cache"),
        pytest.param(
            {"precision": {"attention": "fp8"}},
            "--attention-config",
            '{"use_prefill_query_quantization":true}',
            id="fp8 attention",
        ),
        pytest.param(
            {"expertLoadBalancing": {"redundantExperts": 32, "window": 100, "interval": 200}},
            "--eplb-config",
            '{"window_size":100,"step_interval":200,"num_redundant_experts":32}',
            id="eplb",
        ),
        pytest.param(
            {"allToAll": "nixl", "dualBatchOverlap": {"decodeThreshold": 16}},
            "--dbo-decode-token-threshold",
            "16",
            id="dbo",
        ),
        pytest.param({"weightOffload": {"groupSize": 2}}, "--offload-group-size", "2", id="offload"),
        pytest.param({"scheduling": {"streamInterval": 20}}, "--stream-interval", "20", id="stream interval"),
        pytest.param({"scheduling": {"maxSequences": 64}}, "--max-num-seqs", "64", id="sequences"),
        pytest.param(
            {"scheduling": {"cudaGraph": "full-decode-only"}},
            "--compilation-config",
            '{"cudagraph_mode":"FULL_DECODE_ONLY"}',
            id="graphs",
        ),
    ],
)
def test_a_field_becomes_its_flag(fields, flag, text):
    found = cluster(**fields)
    assert refusals(found) == []
    assert value(found, flag) == text
    assert flag in FLAGS


@pytest.mark.parametrize(
    ("setting", "flag"),
    [(True, "--async-scheduling"), (False, "--no-async-scheduling")],
    ids=["on", "off"],
)
def test_async_scheduling_is_said_only_when_asked(setting, flag):
    assert flag in container(cluster(scheduling={"async": setting}))["args"]
    assert flag not in container(cluster())["args"]


@pytest.mark.parametrize(
    ("role", "kv_role"),
    [("prefill", "kv_producer"), ("decode", "kv_consumer"), ("both", "kv_both")],
)
def test_the_role_of_a_pool_is_that_of_its_kv_connector(role, kv_role):
    found = cluster(role=role, kv={"transfer": {"connector": "nixl", "lease": "45s"}})
    config = json.loads(value(found, "--kv-transfer-config") or "")
    assert config == {
        "kv_connector": "NixlConnector",
        "kv_role": kv_role,
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"kv_lease_duration": 45},
    }
    assert environment(found)["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "$(BROADBEAM_POD_IP)"
    assert environment(found)["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5600"


def test_transfer_and_offload_share_a_connector():
    found = cluster(kv={"transfer": {"connector": "nixl"}, "offload": {"hostMemory": "64Gi"}}, tensor=2)
    config = json.loads(value(found, "--kv-transfer-config") or "")
    both = config["kv_connector_extra_config"]["connectors"]
    assert [each["kv_connector"] for each in both] == ["NixlConnector", "OffloadingConnector"]
    assert both[1]["kv_connector_extra_config"]["cpu_bytes_to_use"] == 2 * 64 * 2**30


def test_a_dense_model_is_served_without_expert_parallelism():
    known = {"name": "SmolLM2-135M-Instruct", "source": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"}
    dense = cluster(data=1, nodes=1, tensor=3, model=known)
    assert "--enable-expert-parallel" not in container(dense)["args"]
    assert "--enable-expert-parallel" in container(cluster())["args"]


def test_vllm_reports_to_nobody():
    found = environment(cluster())
    assert (found["VLLM_NO_USAGE_STATS"], found["DO_NOT_TRACK"]) == ("1", "1")
