"""Properties that every rendered object must have, for every example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broadbeam_crds.conventions import (
    ANNOTATION_CONFIG_HASH,
    ANNOTATION_RANKS,
    GROUP_READY_GATE,
    LABEL_CLUSTER,
    LABEL_COMPONENT,
    LABEL_POOL,
    LABEL_REVISION,
)
from broadbeam_crds.engine_config import EngineConfig
from broadbeam_crds.gateway_config import GatewayConfig
from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster, load_manifest
from broadbeam_operator import names
from broadbeam_operator.accept import refusals
from broadbeam_operator.cluster import CHILD_KINDS, Object, kind_of
from broadbeam_operator.commands import to_yaml
from broadbeam_operator.images import Images
from broadbeam_operator.manifests import manifests, pool_revision

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request) -> ServingCluster:
    return load_manifest(request.param)


def render(cluster: ServingCluster) -> list[Object]:
    return manifests(cluster, Images())


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [obj for obj in objects if obj["kind"] == kind]


def templates(objects: list[Object]) -> list[Object]:
    return [obj["spec"]["template"] for obj in objects if "template" in obj.get("spec", {})]


def test_an_example_is_not_refused(example):
    assert refusals(example) == []


def test_rendering_twice_gives_the_same_bytes(example):
    assert to_yaml(render(example)) == to_yaml(render(load_manifest_again(example)))


def load_manifest_again(cluster: ServingCluster) -> ServingCluster:
    return ServingCluster.model_validate(cluster.wire())


def test_objects_are_known_named_once_and_ordered(example):
    objects = render(example)
    keys = [(kind_of(obj).plural, obj["metadata"]["name"]) for obj in objects]
    assert len(set(keys)) == len(keys)
    order = [CHILD_KINDS.index(kind_of(obj)) for obj in objects]
    assert order == sorted(order)


def test_names_and_labels_are_short_enough(example):
    for obj in render(example):
        limit = 52 if obj["kind"] == "StatefulSet" else 63
        assert len(obj["metadata"]["name"]) <= limit
        assert all(len(value) <= 63 for value in obj["metadata"]["labels"].values())


def test_every_child_carries_the_cluster_and_its_own_hash(example):
    for obj in render(example):
        assert obj["metadata"]["labels"][LABEL_CLUSTER] == example.metadata.name
        assert names.ANNOTATION_APPLIED_HASH in obj["metadata"]["annotations"]


def test_every_child_of_a_stored_cluster_has_it_as_its_owner():
    for obj in render(serving_cluster()):
        assert [owner["uid"] for owner in obj["metadata"]["ownerReferences"]] == ["uid-demo"]


def test_every_selector_finds_its_own_pods_and_no_others(example):
    objects = render(example)
    for obj in [*of_kind(objects, "StatefulSet"), *of_kind(objects, "Deployment")]:
        selector = obj["spec"]["selector"]["matchLabels"].items()
        matched = [each for each in templates(objects) if selector <= each["metadata"]["labels"].items()]
        assert matched == [obj["spec"]["template"]]
        assert LABEL_REVISION not in obj["spec"]["selector"]["matchLabels"]


def test_each_group_is_one_stateful_set_with_a_headless_service(example):
    objects = render(example)
    sets = {obj["metadata"]["name"]: obj for obj in of_kind(objects, "StatefulSet")}
    services = {obj["metadata"]["name"]: obj for obj in of_kind(objects, "Service")}
    assert len(sets) == sum(each.groups for each in example.spec.pools)
    for name, obj in sets.items():
        wanted = example.spec.pool(obj["metadata"]["labels"][LABEL_POOL])
        assert wanted is not None
        assert obj["spec"]["replicas"] == wanted.parallelism.nodes
        assert obj["spec"]["serviceName"] == name
        assert obj["spec"]["podManagementPolicy"] == "Parallel"
        assert obj["spec"]["updateStrategy"] == {"type": "OnDelete"}
        assert services[name]["spec"]["clusterIP"] == "None"
        assert services[name]["spec"]["publishNotReadyAddresses"] is True


def test_engine_pods_wait_for_their_group(example):
    for template in engine_templates(example):
        assert template["spec"]["readinessGates"] == [{"conditionType": GROUP_READY_GATE}]


@pytest.mark.parametrize("given", [None, [], [{"conditionType": "example.com/target"}]])
def test_no_template_takes_the_readiness_gate_away(given):
    cluster = serving_cluster(pools=[pool("both", template={"spec": {"readinessGates": given}})])
    (template,) = engine_templates(cluster)
    assert template["spec"]["readinessGates"] == [{"conditionType": GROUP_READY_GATE}, *(given or [])]


def engine_templates(cluster: ServingCluster) -> list[Object]:
    return [
        each for each in templates(render(cluster)) if each["metadata"]["labels"][LABEL_COMPONENT] == "engine"
    ]


def test_pods_satisfy_the_restricted_profile(example):
    for template in templates(render(example)):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] != 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert set(container["securityContext"]["capabilities"].get("add", [])) <= {"IPC_LOCK"}


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        pytest.param({"kv": {"transfer": {"connector": "nixl"}}}, None, id="nixl between CPU ranks"),
        pytest.param({"kv": {"transfer": {"connector": "tcp"}}}, None, id="tcp"),
    ],
)
def test_cpu_ranks_need_no_capability(fields, added):
    cluster = serving_cluster(**fields)
    for template in engine_templates(cluster):
        assert template["spec"]["containers"][0]["securityContext"]["capabilities"].get("add") == added


@pytest.mark.parametrize(
    ("all_to_all", "connector", "added"),
    [
        pytest.param("auto", None, None, id="plain collectives"),
        pytest.param("deepep-low-latency", None, ["IPC_LOCK"], id="an RDMA all-to-all"),
        pytest.param("auto", "nixl", ["IPC_LOCK"], id="KV over RDMA"),
    ],
)
def test_memory_is_locked_only_for_transports_that_pin_it(all_to_all, connector, added):
    cluster = serving_cluster(
        pools=[gpu_pool(allToAll=all_to_all)],
        engine="vllm",
        **({"kv": {"transfer": {"connector": connector}}} if connector else {}),
    )
    (template,) = engine_templates(cluster)
    assert template["spec"]["containers"][0]["securityContext"]["capabilities"].get("add") == added


def gpu_pool(**fields: Any) -> Any:
    defaults = {
        "accelerator": {"resource": "nvidia.com/gpu", "perNode": 8},
        "parallelism": {"data": 8, "nodes": 1},
    }
    return pool("both", **(defaults | fields))


def test_configs_are_immutable_named_by_their_content_and_mounted(example):
    objects = render(example)
    configs = {obj["metadata"]["name"]: obj for obj in of_kind(objects, "ConfigMap")}
    mounted = set()
    for template in templates(objects):
        name = next(v["configMap"]["name"] for v in template["spec"]["volumes"] if v["name"] == "config")
        mounted.add(name)
        digest = names.digest(configs[name]["data"])
        assert name.endswith(f"-{digest}")
        assert template["metadata"]["annotations"][ANNOTATION_CONFIG_HASH] == digest
        assert configs[name]["immutable"] is True
    assert mounted == set(configs)


def test_configs_are_what_the_processes_read(example):
    kinds = {"engine.json": EngineConfig, "gateway.json": GatewayConfig}
    for obj in of_kind(render(example), "ConfigMap"):
        for file, text in obj["data"].items():
            if file in kinds:
                msgspec.json.decode(text.encode(), type=kinds[file])


def test_every_mount_has_its_volume(example):
    for template in templates(render(example)):
        volumes = {each["name"] for each in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {each["name"] for each in container["volumeMounts"]} <= volumes


def test_the_grace_period_is_longer_than_the_drain(example):
    for template in engine_templates(example):
        assert template["spec"]["terminationGracePeriodSeconds"] > example.spec.engine.drain.seconds


def test_each_http_server_of_a_pod_is_announced(example):
    for template in engine_templates(example):
        ranks = int(template["metadata"]["annotations"][ANNOTATION_RANKS])
        ports = [each["containerPort"] for each in template["spec"]["containers"][0]["ports"]]
        assert ports == [*range(8000, 8000 + ranks), 9000]


def test_pools_ask_for_their_devices(example):
    for template in engine_templates(example):
        wanted = example.spec.pool(template["metadata"]["labels"][LABEL_POOL])
        assert wanted is not None
        limits = template["spec"]["containers"][0]["resources"].get("limits", {})
        device = wanted.accelerator
        assert limits.get(device.resource) == (None if device.resource == "cpu" else str(device.per_node))


def test_nothing_runs_through_a_shell(example):
    for template in templates(render(example)):
        for container in template["spec"]["containers"]:
            assert container["command"][0] in ("broadbeam-runtime", "broadbeam-router", "vllm")


def test_groups_differ_in_their_coordinator_but_not_in_their_revision():
    cluster = serving_cluster(pools=[pool("both", groups=3, data=4, nodes=2)])
    objects = render(cluster)
    configs = [json.loads(obj["data"]["engine.json"]) for obj in of_kind(objects, "ConfigMap")[:3]]
    assert {each["parallel"]["coordinator"] for each in configs} == {
        f"demo-both-{group}-0.demo-both-{group}.default.svc" for group in range(3)
    }
    revisions = {each["metadata"]["labels"][LABEL_REVISION] for each in engine_templates(cluster)}
    assert revisions == {pool_revision(cluster, cluster.spec.pools[0], Images())}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        pytest.param({"groups": 4}, True, id="the number of groups"),
        pytest.param({"scheduling": {"maxSequences": 3}}, False, id="a setting of the engine"),
        pytest.param({"resources": {"cpu": "2"}}, False, id="what a pod asks for"),
    ],
)
def test_the_revision_changes_with_the_pods_and_nothing_else(change, same):
    before = serving_cluster(pools=[pool("both")])
    after = serving_cluster(pools=[pool("both", **change)])
    equal = pool_revision(before, before.spec.pools[0], Images()) == pool_revision(
        after, after.spec.pools[0], Images()
    )
    assert equal is same


def test_the_engine_config_says_what_the_manifest_says():
    cluster = serving_cluster(
        pools=[
            pool("prefill"),
            pool(
                "decode",
                data=4,
                nodes=2,
                kvCache={"memory": "1Gi", "blockSize": 32, "prefixReuse": False},
                scheduling={"maxBatchedTokens": 512, "maxSequences": 9, "streamInterval": 3},
            ),
        ],
        engine={"name": "broadbeam", "dtype": "float32", "threads": 2, "drain": "90s"},
        kv={"transfer": {"connector": "tcp", "lease": "5s", "loadFailurePolicy": "recompute"}},
    )
    config = next(
        json.loads(obj["data"]["engine.json"])
        for obj in of_kind(render(cluster), "ConfigMap")
        if "decode" in obj["metadata"]["name"]
    )
    assert config["role"] == "decode"
    assert config["parallel"] == {
        "data": 4,
        "tensor": 1,
        "nodes": 2,
        "ranks_per_node": 2,
        "coordinator": "demo-decode-0-0.demo-decode-0.default.svc",
        "coordinator_port": 29500,
    }
    assert config["cache"] == {
        "block_size": 32,
        "memory_bytes": 2**30,
        "dtype": "auto",
        "prefix_reuse": False,
    }
    assert config["scheduling"] == {"max_batched_tokens": 512, "max_sequences": 9, "stream_interval": 3}
    assert config["kv_transfer"] == {"connector": "tcp", "lease_s": 5.0, "load_failure_policy": "recompute"}
    assert (config["dtype"], config["threads"], config["drain_s"]) == ("float32", 2, 90.0)


@pytest.mark.parametrize(
    ("source", "volume", "seen"),
    [
        pytest.param("pvc://models/r1", "persistentVolumeClaim", "file:///models/r1", id="a claim"),
        pytest.param("pvc://models", "persistentVolumeClaim", "file:///models", id="a whole claim"),
        pytest.param("hf://a/b", None, "hf://a/b", id="a repository"),
        pytest.param("file:///data/m", None, "file:///data/m", id="a path"),
    ],
)
def test_a_model_volume_becomes_a_path_for_the_engine(source, volume, seen):
    cluster = serving_cluster(pools=[pool("both")], model={"name": "m", "source": source})
    (template,) = engine_templates(cluster)
    found = [set(each) - {"name"} for each in template["spec"]["volumes"] if each["name"] == "model"]
    assert found == ([{volume}] if volume else [])
    config = json.loads(of_kind(render(cluster), "ConfigMap")[0]["data"]["engine.json"])
    assert config["model"]["source"] == seen


def test_an_accelerator_is_found_by_its_vendors_label():
    device = {"resource": "amd.com/gpu", "perNode": 8, "product": "MI300X", "topologyKey": "rack"}
    cluster = serving_cluster(pools=[gpu_pool(accelerator=device)], engine="vllm")
    (template,) = engine_templates(cluster)
    assert template["spec"]["nodeSelector"] == {"amd.com/gpu.product-name": "MI300X"}
    (term,) = template["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "rack"
    assert term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_the_template_of_a_pool_is_laid_over_the_generated_one():
    template = {
        "metadata": {"annotations": {"team": "a"}, "labels": {LABEL_CLUSTER: "stolen"}},
        "spec": {
            "priorityClassName": "high",
            "containers": [{"name": "engine", "resources": {"limits": {"rdma/ib": "8"}}}, {"name": "log"}],
            "volumes": [
                {"name": "cache", "emptyDir": None, "persistentVolumeClaim": {"claimName": "models"}}
            ],
        },
    }
    (found,) = engine_templates(serving_cluster(pools=[pool("both", template=template)]))
    assert found["metadata"]["annotations"]["team"] == "a"
    assert found["metadata"]["labels"][LABEL_CLUSTER] == "demo"
    assert found["spec"]["priorityClassName"] == "high"
    assert [each["name"] for each in found["spec"]["containers"]] == ["engine", "log"]
    assert found["spec"]["containers"][0]["resources"]["limits"] == {"rdma/ib": "8"}
    assert found["spec"]["containers"][0]["command"] == ["broadbeam-runtime"]
    cache = next(each for each in found["spec"]["volumes"] if each["name"] == "cache")
    assert cache == {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}}


@pytest.mark.parametrize(
    ("cpu", "memory", "asked"),
    [
        pytest.param("1.5", "1.5Gi", {"cpu": "1.5", "memory": "1.5Gi"}, id="as they are"),
        pytest.param("0.0001", "1.1Gi", {"cpu": "1m", "memory": "1181116007"}, id="a part counts as one"),
        pytest.param("1.0001", "1500m", {"cpu": "1001m", "memory": "2"}, id="of cores and bytes"),
    ],
)
def test_a_pod_asks_for_what_the_api_server_stores(cpu, memory, asked):
    cluster = serving_cluster(pools=[pool("both", resources={"cpu": cpu, "memory": memory}, kvCache={})])
    (template,) = engine_templates(cluster)
    assert template["spec"]["containers"][0]["resources"]["requests"] == asked


@pytest.mark.parametrize(
    ("kv", "role"),
    [
        pytest.param({"transfer": {"connector": "tcp"}}, "decode", id="it may fetch KV"),
        pytest.param({}, "both", id="it computes its prompts itself"),
    ],
)
def test_a_decode_pool_alone_is_one_that_the_engine_runs(kv, role):
    cluster = serving_cluster(pools=[pool("decode")], kv=kv)
    (config,) = [obj for obj in of_kind(render(cluster), "ConfigMap") if "engine.json" in obj["data"]]
    assert json.loads(config["data"]["engine.json"])["role"] == role
