from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from broadbeam_operator.cluster import CHILD_KINDS

CHART = Path(__file__).parents[2] / "charts" / "broadbeam"

Render = Callable[..., list[dict[str, Any]]]
Helm = Callable[..., subprocess.CompletedProcess[str]]


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (obj for obj in objects if obj["kind"] == kind)
    return found


def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(one(objects, "Deployment")["spec"]["template"]["spec"])


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (only,) = pod(objects)["containers"]
    return dict(only)


def test_the_chart_passes_a_strict_lint(helm: Helm) -> None:
    answer = helm("lint", "--strict", str(CHART))

    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_defaults_give_one_operator_for_the_whole_cluster(render: Render) -> None:
    objects = render()

    kinds = sorted(obj["kind"] for obj in objects)
    assert kinds == ["ClusterRole", "ClusterRoleBinding", "Deployment", "ServiceAccount"]
    assert one(objects, "Deployment")["spec"]["replicas"] == 1


def test_the_operator_runs_under_the_account_that_is_bound(render: Render) -> None:
    objects = render()

    account = one(objects, "ServiceAccount")["metadata"]
    binding = one(objects, "ClusterRoleBinding")
    assert pod(objects)["serviceAccountName"] == account["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["name"], "namespace": "system"}]
    assert binding["roleRef"]["name"] == one(objects, "ClusterRole")["metadata"]["name"]


def test_the_pod_meets_the_restricted_pod_security_standard(render: Render) -> None:
    objects = render()

    assert pod(objects)["securityContext"]["runAsNonRoot"] is True
    assert pod(objects)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = container(objects)["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_no_rule_uses_a_wildcard_or_reads_secrets(render: Render) -> None:
    for rule in one(render(), "ClusterRole")["rules"]:
        words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert "*" not in words
        assert not words & {"secrets", "pods/exec", "impersonate", "escalate", "bind"}


def test_every_kind_that_the_operator_owns_can_be_written(render: Render) -> None:
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in one(render(), "ClusterRole")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }

    for kind in CHILD_KINDS:
        group = kind.api_version.rpartition("/")[0]
        assert {"list", "create", "patch", "delete"} <= allowed[(group, kind.plural)]


@pytest.mark.parametrize(
    ("values", "argument"),
    [
        pytest.param({"operator": {"logLevel": "debug"}}, "--log-level=debug", id="log level"),
        pytest.param({"operator": {"resyncSeconds": 5}}, "--resync=5", id="resync"),
        pytest.param({"images": {"runtime": "r:1"}}, "--runtime-image=r:1", id="runtime image"),
        pytest.param({"images": {"router": "g:1"}}, "--router-image=g:1", id="router image"),
        pytest.param({"images": {"vllm": "v:1"}}, "--vllm-image=v:1", id="vllm image"),
        pytest.param({"watchNamespaces": ["a"]}, "--namespace=a", id="one namespace"),
    ],
)
def test_a_value_becomes_an_argument_of_the_operator(
    render: Render, values: dict[str, Any], argument: str
) -> None:
    assert argument in container(render(values))["args"]
    assert argument not in container(render())["args"]


def test_metrics_are_on_a_port_of_the_pod(render: Render) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(render())["ports"]}

    assert ports == {"health": 8081, "metrics": 8082}
    assert "--metrics-port=8082" in container(render())["args"]


def test_metrics_can_be_turned_off(render: Render) -> None:
    found = container(render({"operator": {"metrics": {"port": 0}}}))

    assert "--metrics-port=0" in found["args"]
    assert [port["name"] for port in found["ports"]] == ["health"]


def test_a_service_monitor_finds_the_operators_port_by_its_service(render: Render) -> None:
    monitor = {"enabled": True, "interval": "10s", "labels": {"release": "prometheus"}}

    objects = render({"monitoring": {"serviceMonitor": monitor}})

    made, service = one(objects, "ServiceMonitor"), one(objects, "Service")
    (endpoint,), (port,) = made["spec"]["endpoints"], service["spec"]["ports"]
    assert endpoint == {"port": port["name"], "interval": "10s"}
    assert made["metadata"]["labels"]["release"] == "prometheus"
    assert made["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert port["targetPort"] in {each["name"] for each in container(objects)["ports"]}


@pytest.mark.parametrize(
    ("image", "rendered"),
    [
        pytest.param({}, "broadbeam/operator:0.1.0", id="the chart's version"),
        pytest.param({"repository": "r/o", "tag": "t"}, "r/o:t", id="a tag"),
        pytest.param(
            {"tag": "t", "digest": f"sha256:{'0' * 64}"},
            f"broadbeam/operator@sha256:{'0' * 64}",
            id="a digest",
        ),
    ],
)
def test_the_image_is_named_by_tag_or_digest(render: Render, image: dict[str, str], rendered: str) -> None:
    assert container(render({"operator": {"image": image}}))["image"] == rendered


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        pytest.param("nodeSelector", {"a": "b"}, "nodeSelector", id="nodeSelector"),
        pytest.param("tolerations", [{"operator": "Exists"}], "tolerations", id="tolerations"),
        pytest.param("affinity", {"nodeAffinity": {}}, "affinity", id="affinity"),
        pytest.param("priorityClassName", "high", "priorityClassName", id="priorityClassName"),
    ],
)
def test_placement_reaches_the_pod(render: Render, name: str, value: object, field: str) -> None:
    assert pod(render({"operator": {name: value}}))[field] == value
    assert field not in pod(render())


def test_extra_environment_reaches_the_container(render: Render) -> None:
    extra = [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]

    assert container(render({"operator": {"extraEnv": extra}}))["env"][-1:] == extra


def test_labels_and_annotations_reach_the_pod(render: Render) -> None:
    values = {"operator": {"podLabels": {"team": "serving"}, "podAnnotations": {"note": "x"}}}

    meta = one(render(values), "Deployment")["spec"]["template"]["metadata"]

    assert meta["labels"]["team"] == "serving"
    assert meta["annotations"]["note"] == "x"


def test_pull_secrets_reach_the_pod(render: Render) -> None:
    assert pod(render({"imagePullSecrets": [{"name": "s"}]}))["imagePullSecrets"] == [{"name": "s"}]


def test_watched_namespaces_get_a_role_each_and_the_cluster_none(render: Render) -> None:
    everywhere = one(render(), "ClusterRole")["rules"]

    objects = render({"watchNamespaces": ["a", "b"]})

    kinds = {obj["kind"] for obj in objects}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}
    roles = [obj for obj in objects if obj["kind"] == "Role"]
    assert [role["metadata"]["namespace"] for role in roles] == ["a", "b"]
    assert all(role["rules"] == everywhere for role in roles)
    bound = [obj["metadata"]["namespace"] for obj in objects if obj["kind"] == "RoleBinding"]
    assert bound == ["a", "b"]


def test_rights_can_be_left_to_somebody_else(render: Render) -> None:
    objects = render({"rbac": {"create": False}, "serviceAccount": {"create": False, "name": "theirs"}})

    assert [obj["kind"] for obj in objects] == ["Deployment"]
    assert pod(objects)["serviceAccountName"] == "theirs"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param({"replicas": 2}, "replicas", id="an unknown value"),
        pytest.param({"operator": {"logLevel": "loud"}}, "logLevel", id="an unknown log level"),
        pytest.param({"watchNamespaces": ["A_b"]}, "watchNamespaces", id="no name of a namespace"),
        pytest.param({"operator": {"image": {"digest": "sha1:0"}}}, "digest", id="no digest"),
        pytest.param({"operator": {"metrics": {"port": 8081}}}, "port", id="the port of the probes"),
        pytest.param(
            {"operator": {"metrics": {"port": 0}}, "monitoring": {"serviceMonitor": {"enabled": True}}},
            "port",
            id="a monitor of no port",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(
    helm: Helm, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))

    answer = helm("template", "bb", str(CHART), f"--values={file}")

    assert answer.returncode != 0
    assert words in answer.stderr


def test_every_value_has_a_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    settings = yaml.safe_load("\n".join(lines))

    bare = [
        line
        for before, line in itertools.pairwise(lines)
        if line.partition(":")[0] in settings
        and not isinstance(settings[line.partition(":")[0]], dict)
        and not before.startswith("#")
    ]
    assert bare == []
