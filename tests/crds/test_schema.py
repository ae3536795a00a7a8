"""The CRD is fresh, structural, described throughout, and says the defaults of the models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from broadbeam_crds import schema
from broadbeam_crds.checks import RULES
from broadbeam_crds.testing import serving_cluster
from broadbeam_crds.v1alpha1 import cluster_from

OPEN_API = schema.open_api()
SPEC = OPEN_API["properties"]["spec"]
# What apiextensions.k8s.io/v1 knows, of what we use.
KEYWORDS = {
    "type", "description", "properties", "required", "items", "enum", "default", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "minItems", "maxItems", "anyOf",
    "x-kubernetes-int-or-string", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations",
}  # fmt: skip
EITHER = [{"type": "integer"}, {"type": "string"}]


def nodes(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, each in node.get("properties", {}).items():
        yield from nodes(each, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")


NODES = dict(nodes(OPEN_API))


def test_the_committed_files_are_fresh() -> None:
    assert [path.name for path in schema.stale()] == []


def test_the_chart_installs_the_same_crd() -> None:
    crd, chart = (yaml.safe_load(path.read_text()) for path in schema.FILES)

    assert crd == chart == schema.crd()


def test_a_stale_file_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(schema, "ROOT", tmp_path)
    monkeypatch.setattr(schema, "FILES", (tmp_path / "crds" / "servingclusters.yaml",))
    monkeypatch.setattr(sys, "argv", ["schema", "--check"])

    assert schema.main() == 1
    assert capsys.readouterr().err == "crds/servingclusters.yaml is stale; run `make crds`\n"

    monkeypatch.setattr(sys, "argv", ["schema", "--write"])
    assert schema.main() == 0
    assert schema.stale() == []


def test_the_command_says_what_it_wants() -> None:
    command = [sys.executable, "-m", "broadbeam_crds.schema"]

    answer = subprocess.run(command, capture_output=True, text=True, check=False)

    assert answer.returncode == 2
    assert "one of the arguments --check --write is required" in answer.stderr


def test_only_keywords_that_kubernetes_knows() -> None:
    unknown = {path: set(node) - KEYWORDS for path, node in NODES.items() if set(node) - KEYWORDS}

    assert not unknown


def test_every_field_has_one_type() -> None:
    for path, node in NODES.items():
        if node.get("x-kubernetes-int-or-string"):
            assert node["anyOf"] == EITHER, path
            assert "type" not in node, path
        else:
            assert isinstance(node["type"], str), path
            assert "anyOf" not in node, path


def test_every_field_is_described() -> None:
    silent = [path for path, node in NODES.items() if not node.get("description") and not path.endswith("[]")]

    assert silent == [".metadata"]


def test_everything_has_a_bound_so_that_rules_have_a_known_cost() -> None:
    for path, node in nodes(SPEC, ".spec"):
        match node.get("type"):
            case "string":
                assert "maxLength" in node or "enum" in node, path
            case "array":
                assert "maxItems" in node, path
            case "integer" | "number":
                assert "minimum" in node, path
                assert "maximum" in node, path


def test_every_list_says_how_it_merges() -> None:
    for path, node in NODES.items():
        if node.get("type") == "array":
            assert node.get("x-kubernetes-list-type") in ("map", "atomic"), path
            for key in node.get("x-kubernetes-list-map-keys", []):
                item = node["items"]
                assert key in item.get("required", []) or "default" in item["properties"][key], path


def test_the_template_is_open_and_nothing_else() -> None:
    open_fields = [path for path, node in NODES.items() if node.get("x-kubernetes-preserve-unknown-fields")]

    assert open_fields == [".spec.pools[].template"]


def test_the_columns_read_plain_fields() -> None:
    for _, _, path in schema.COLUMNS:
        assert path == ".metadata.creationTimestamp" or NODES[path]["type"] == "string"


def defaulted(value: Any, node: dict[str, Any]) -> Any:
    """What the API server stores: defaults put in from the outside to the inside."""
    if isinstance(value, dict) and "properties" in node:
        filled = {
            key: value.get(key, each.get("default"))
            for key, each in node["properties"].items()
            if key in value or "default" in each
        }
        return value | {key: defaulted(each, node["properties"][key]) for key, each in filled.items()}
    if isinstance(value, list):
        return [defaulted(each, node["items"]) for each in value]
    return value


def test_the_api_server_fills_in_what_the_models_would() -> None:
    terse = {
        "model": {"name": "m", "source": "hf://a/m"},
        "pools": [{"name": "a", "role": "prefill"}, {"name": "b"}],
        "kv": {"transfer": {"connector": "nixl"}},
    }
    manifest = serving_cluster().wire() | {"spec": terse}

    stored = manifest | {"spec": defaulted(terse, SPEC)}

    assert cluster_from(stored) == cluster_from(manifest)
    assert stored["spec"]["pools"][1]["parallelism"] == {"data": 1, "tensor": 1, "nodes": 1}
    assert stored["spec"]["gateway"]["listeners"] == [{"name": "http", "port": 8080}]


def test_every_rule_with_cel_is_in_the_schema() -> None:
    validations = [each for node in NODES.values() for each in node.get("x-kubernetes-validations", [])]

    assert len(validations) == sum(rule.cel is not None for rule in RULES)
    assert all(("message" in each) != ("messageExpression" in each) for each in validations)


def test_a_message_in_cel_has_a_value_for_each_gap() -> None:
    for rule in RULES:
        if rule.cel is not None:
            gaps = rule.message.replace("%", "").count("{")
            assert rule.cel_message().replace("%%", "").count("%s") == gaps
