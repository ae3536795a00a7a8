"""A manifest as people write it: YAML in, a checked `ServingCluster` out, one clear line when wrong."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from broadbeam_crds.conventions import API_GROUP, API_VERSION, KIND
from broadbeam_crds.v1alpha1.cluster import ServingCluster
from broadbeam_crds.v1alpha1.documents import DocumentError, documents, stored


class ManifestError(ValueError):
    """A manifest that cannot be used; the message is one line with field, value and limit."""


def load_manifest(source: str | Path) -> ServingCluster:
    """The one ServingCluster in a file, or in YAML text (a string with more than one line)."""
    if isinstance(source, str) and "\n" in source:
        return parse_manifest(source, "manifest")
    try:
        text = Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{source}: not text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ManifestError(f"{source}: {error.strerror}") from error
    return parse_manifest(text, str(source))


def parse_manifest(text: str, where: str) -> ServingCluster:
    """`where` names the text in messages."""
    try:
        found = documents(text)
    except DocumentError as error:
        raise ManifestError(f"{where}: {_one_line(str(error))}") from error
    if len(found) != 1:
        raise ManifestError(f"{where}: {len(found)} documents; the limit is one {KIND}")
    return cluster_from(found[0], where)


def cluster_from(document: object, where: str = KIND) -> ServingCluster:
    """A ServingCluster from plain values, such as an object that the API server sent."""
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: not a mapping but {_kind(document)}; expected a {KIND}")
    for field, wanted in (("apiVersion", f"{API_GROUP}/{API_VERSION}"), ("kind", KIND)):
        if document.get(field) != wanted:
            raise ManifestError(f"{where}: {field}: {_shown(document.get(field))} is not {wanted}")
    document = stored(document)
    try:
        return ServingCluster.model_validate(document)
    except ValidationError as error:
        raise ManifestError(f"{where}: {explain(error, document)}") from error


def to_yaml(cluster: ServingCluster) -> str:
    """The cluster as a manifest; loading it gives an equal cluster."""
    return yaml.safe_dump(cluster.wire(), sort_keys=False, allow_unicode=True)


def explain(error: ValidationError, document: object) -> str:
    """The first mistake as `field: what is wrong`, and how many more there are."""
    # An unknown field is often a misspelt one, and then the "missing" beside it is only its echo.
    found = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{_path(found[0]['loc'], document)}: {_reason(found[0])}{more}"


def _path(loc: tuple[int | str, ...], document: object) -> str:
    """spec.pools[decode].groups: list items by their name where they have one."""
    path, value = "", document
    for key in loc:
        value = _member(value, key)
        name = value.get("name") if isinstance(key, int) and isinstance(value, dict) else None
        path += f"[{name or key}]" if isinstance(key, int) else f".{key}"
    return path.lstrip(".")


def _member(value: object, key: int | str) -> object:
    if isinstance(value, dict):
        return value.get(key)
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        return value[key]
    return None


def _reason(error: ErrorDetails) -> str:
    value, limits = _shown(error["input"]), error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "missing; it is required"
        case "extra_forbidden":
            return "unknown field" + _suggestion(error["loc"])
        case "literal_error":
            choices = str(limits["expected"]).replace("'", "").replace(" or ", ", ")
            return f"{value} is not one of {choices}"
        case "greater_than_equal":
            return f"{value} is below the limit {limits['ge']}"
        case "greater_than":
            return f"{value} is not above the limit {limits['gt']:g}"
        case "less_than_equal":
            return f"{value} is above the limit {limits['le']:g}"
        case "string_pattern_mismatch":
            return f"{value} does not match {limits['pattern']}"
        case "string_too_long" | "string_too_short" | "too_long" | "too_short":
            return _length(error)
        case "int_type" | "int_from_float" | "float_type" | "bool_type" | "string_type" as type_:
            wanted = {"int": "an integer", "float": "a number", "bool": "true or false", "string": "text"}
            return f"{value} is not {wanted[type_.split('_')[0]]}"
        case "list_type":
            return f"{value} is not a list"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{value} is not a mapping"
        case _:
            return _one_line(error["msg"])


def _length(error: ErrorDetails) -> str:
    limits, text = error["ctx"], error["type"].startswith("string")
    unit = "characters" if text else "items"
    if "max_length" in limits:
        return (
            f"{_shown(error['input'])} has {len(error['input'])} {unit}; the limit is {limits['max_length']}"
        )
    return f"has {len(error['input'])} {unit}; at least {limits['min_length']} needed"


def _suggestion(loc: tuple[int | str, ...]) -> str:
    model: Any = ServingCluster
    for key in loc[:-1]:
        if isinstance(key, str) and isinstance(model, type) and issubclass(model, BaseModel):
            fields = {each.alias or name: each for name, each in model.model_fields.items()}
            model = _model_in(fields[key].annotation) if key in fields else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return ""
    names = [each.alias or name for name, each in model.model_fields.items()]
    close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def _model_in(annotation: Any) -> Any:
    """The model inside `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_in(each))), None)


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f'"{_one_line(value)}"'
        case dict() | list():
            return _kind(value)
        case _:
            return str(value)


def _kind(value: object) -> str:
    return {"dict": "a mapping", "list": "a list", "str": "text"}.get(type(value).__name__, str(value))


def _one_line(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= 120 else text[:117] + "..."
