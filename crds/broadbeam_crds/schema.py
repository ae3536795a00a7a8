"""The CRD's YAML, made from the models and the rules.

`python -m broadbeam_crds.schema --check` names a generated file that is stale and exits 1; `--write` writes
them. A structural schema has no $ref and no null, so pydantic's JSON schema is rewritten on the way.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from broadbeam_crds.checks import RULES
from broadbeam_crds.conventions import API_GROUP, API_VERSION, KIND, PLURAL
from broadbeam_crds.v1alpha1 import ServingCluster

ROOT: Final = Path(__file__).resolve().parents[2]
FILES: Final = (
    ROOT / "crds" / f"{PLURAL}.yaml",
    ROOT / "charts" / "broadbeam" / "crds" / f"{PLURAL}.yaml",
)
HEADER: Final = "# Generated from crds/broadbeam_crds by `make crds`; do not edit.\n"

Schema = dict[str, Any]

COLUMNS: Final = (
    ("Model", "string", ".spec.model.name"),
    ("Engine", "string", ".spec.engine.name"),
    ("Prefill", "string", ".status.summary.prefill"),
    ("Decode", "string", ".status.summary.decode"),
    ("Status", "string", ".status.summary.state"),
    ("Age", "date", ".metadata.creationTimestamp"),
)


def crd() -> Schema:
    """The CustomResourceDefinition."""
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["bsc"],  # "sc" is StorageClass
        "categories": ["all", "broadbeam"],
    }
    version = {
        "name": API_VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": type_, "jsonPath": path} for name, type_, path in COLUMNS
        ],
        "schema": {"openAPIV3Schema": open_api()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{API_GROUP}"},
        "spec": {"group": API_GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def open_api() -> Schema:
    """The structural schema of one ServingCluster, rules included."""
    raw = ServingCluster.model_json_schema(by_alias=True)
    schema = _structural(raw, raw.get("$defs", {}))
    _add_defaults(schema, ServingCluster)
    properties = schema["properties"]
    # The API server checks these itself; the schema may only name them.
    properties["apiVersion"] = {"type": "string", "description": "Version of this API."}
    properties["kind"] = {"type": "string", "description": f"{KIND}."}
    properties["metadata"] = {"type": "object"}
    schema["required"] = ["spec"]
    scopes = {
        "cluster": schema,
        "spec": properties["spec"],
        "pool": properties["spec"]["properties"]["pools"]["items"],
    }
    for rule in RULES:
        if rule.cel is not None:
            validations = scopes[rule.cel.scope].setdefault("x-kubernetes-validations", [])
            validations.append(_validation(rule.cel.rule, rule.message, rule.cel_message()))
    return schema


def _validation(rule: str, message: str, expression: str) -> Schema:
    if "{" not in message:
        return {"rule": rule, "message": message}
    return {"rule": rule, "messageExpression": expression}


def _structural(node: Schema, definitions: Schema) -> Schema:
    """`node` with references put in place and everything that Kubernetes does not know rewritten."""
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        node = copy.deepcopy(target) | {key: value for key, value in node.items() if key != "$ref"}
    if "anyOf" in node and "x-kubernetes-int-or-string" not in node:
        (inner,) = [each for each in node["anyOf"] if each != {"type": "null"}]
        node = _structural(inner, definitions) | {k: v for k, v in node.items() if k != "anyOf"}
    node = {k: v for k, v in node.items() if k not in ("title", "default", "additionalProperties", "$defs")}
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "exclusiveMinimum" in node and node["exclusiveMinimum"] is not True:
        node |= {"minimum": node["exclusiveMinimum"], "exclusiveMinimum": True}
    if "properties" in node:
        node["properties"] = {k: _structural(v, definitions) for k, v in node["properties"].items()}
    if "items" in node:
        node["items"] = _structural(node["items"], definitions)
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    return node


def _add_defaults(schema: Schema, model: type[BaseModel]) -> None:
    """The models' defaults; an object whose fields all have one defaults to {}, filled by the server."""
    for name, field in model.model_fields.items():
        place = schema["properties"][field.alias or name]
        inner = _model_of(field.annotation)
        if inner is not None:
            _add_defaults(place["items"] if place.get("type") == "array" else place, inner)
        default = _default(field)
        if default is not None:
            place["default"] = default


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True, validated_data={})
    match value:
        case BaseModel():
            return {}
        case [BaseModel(), *_]:
            return [each.wire() for each in value]
        case [] | {} | None:
            return None
        case str() if str(value).isdigit() and type(value) is not str:
            return int(value)
        case str():
            return str(value)
        case _:
            return value


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (found for each in getattr(annotation, "__args__", ()) if (found := _model_of(each)))
    return next(inner, None)


class _Dumper(yaml.SafeDumper):
    """Writes out what is the same in two places, instead of an anchor and an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def text() -> str:
    """The CRD as it is committed."""
    return HEADER + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def stale() -> list[Path]:
    """Generated files that are missing or not what the models say now."""
    wanted = text()
    return [path for path in FILES if not path.exists() or path.read_text(encoding="utf-8") != wanted]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m broadbeam_crds.schema", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="exit 1 if a generated file is stale")
    action.add_argument("--write", action="store_true", help="write the generated files")
    arguments = parser.parse_args()
    for path in stale():
        shown = path.relative_to(ROOT)
        if arguments.check:
            print(f"{shown} is stale; run `make crds`", file=sys.stderr)
            return 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), encoding="utf-8")
        print(f"wrote {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
