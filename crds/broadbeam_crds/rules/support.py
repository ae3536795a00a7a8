"""What is described but not built yet: refused by name, never ignored.

One line of a table for each field; building a feature means deleting its line. Python and CEL are both made
from the line, so the API server and `broadbeam render` refuse alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from broadbeam_crds.rules.rule import Cel, Finding, Rule, cel_list, cel_literal, pool_in_spec_rule
from broadbeam_crds.v1alpha1 import EngineName, Pool, ServingCluster

OURS: Final[tuple[EngineName, ...]] = ("broadbeam", "sim")
VLLM: Final[tuple[EngineName, ...]] = ("vllm",)
_GONE: Final = "vLLM dropped this chunking after 0.17"

Scalar = str | int | bool


@dataclass(frozen=True, slots=True)
class Unbuilt:
    """`field` (wire names, dotted) works with `engines` only when unset or one of `only`; or with all values
    but those of `never`. No engines: the operator itself lacks it."""

    field: str
    engines: tuple[EngineName, ...]
    only: tuple[Scalar, ...] = ()
    never: tuple[Scalar, ...] = ()
    why: str = ""

    @property
    def who(self) -> str:
        return "engine {engine}" if self.engines else "the operator"

    @property
    def limit(self) -> str:
        """Each value once: a count may be written as a number or as text."""
        return " or ".join(dict.fromkeys(map(_text, self.only)))

    @property
    def shows_value(self) -> bool:
        return bool(self.only or self.never)

    def message(self, path: str) -> str:
        value = ": {value}" if self.shows_value else ":"
        limit = f" (only {self.limit})" if self.only else ""
        return f"{path}{value} not supported yet by {self.who}{limit}{f'; {self.why}' if self.why else ''}"

    def finding(self, values: dict[str, Any], engine: EngineName) -> Finding | None:
        if self.engines and engine not in self.engines:
            return None
        found: Any = values
        for key in self.field.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found is None or found in self.only or (self.never and found not in self.never):
            return None
        return {"value": _text(found), "limit": self.limit, "engine": engine}

    def broken(self, root: str) -> str:
        """CEL that is true when the field is used; `root` is what it belongs to."""
        keys = self.field.split(".")
        terms = [f"self.engine.name in {cel_list(self.engines)}"] if self.engines else []
        terms += [f"has({root}.{'.'.join(keys[: i + 1])})" for i in range(len(keys))]
        # No string() here: of an int-or-string it is beyond the cost that the API server allows.
        value = f"{root}.{self.field}"
        if self.only:
            terms.append(" && ".join(f"{value} != {cel_literal(each)}" for each in self.only))
        if self.never:
            terms.append("(" + " || ".join(f"{value} == {cel_literal(each)}" for each in self.never) + ")")
        return " && ".join(terms)

    def cel_values(self, root: str) -> dict[str, str]:
        """CEL for the message's gaps."""
        values = {"engine": "self.engine.name"} if self.engines else {}
        return values | ({"value": self._value(root)} if self.shows_value else {})

    def _value(self, root: str) -> str:
        if len(self.never) == 1:
            return cel_literal(self.never[0])
        # What is not "disabled" is a number, though the API server knows only that it may be either.
        number = "int({})" if self.only == ("disabled",) else "{}"
        return f"string({number.format(f'{root}.{self.field}')})"


POOLS: Final = (
    Unbuilt("parallelism.tensor", OURS, only=(1,)),
    Unbuilt("allToAll", OURS, only=("auto",)),
    Unbuilt("dualBatchOverlap", OURS),
    Unbuilt("expertLoadBalancing", OURS),
    Unbuilt("expertLoadBalancing.strategy", VLLM, only=("auto",), why="vLLM chooses by itself"),
    Unbuilt("expertLoadBalancing.maxMovedFraction", VLLM, why="vLLM cannot bound a rebalancing"),
    Unbuilt("weightOffload", OURS),
    Unbuilt("chunking.moeDataParallel", OURS, only=("disabled",)),
    Unbuilt("chunking.moeActivation", OURS, only=("disabled",)),
    Unbuilt("chunking.output", OURS, only=("disabled",)),
    Unbuilt("chunking.moeDataParallel", VLLM, only=("disabled",), why=_GONE),
    Unbuilt("chunking.moeActivation", VLLM, only=("disabled",), why=_GONE),
    Unbuilt("scheduling.async", OURS, only=(False,)),
    Unbuilt("scheduling.cudaGraph", OURS, only=("auto", "none")),
    Unbuilt("precision.moe", OURS, only=("auto", "bf16", "fp32")),
    Unbuilt("precision.attention", OURS, only=("auto", "bf16", "fp32")),
    Unbuilt("precision.dispatch", OURS, only=("auto", "bf16", "fp32")),
    Unbuilt("precision.kvCache", OURS, only=("auto", "bf16", "fp16", "fp32")),
    Unbuilt("precision.moe", VLLM, never=("fp32", "bf16"), why="vLLM keeps what the checkpoint holds"),
    Unbuilt("precision.attention", VLLM, never=("fp32",)),
    Unbuilt(
        "precision.dispatch", VLLM, only=("auto", "nvfp4"), why="otherwise it follows the experts' format"
    ),
    Unbuilt("precision.kvCache", VLLM, never=("fp32",)),
    Unbuilt("autoscaling", ()),
)
SPEC: Final = (
    Unbuilt("kv.transfer.connector", VLLM, never=("tcp",)),
    Unbuilt("kv.offload", OURS),
    Unbuilt("kv.events", OURS, only=(False,)),
    Unbuilt("engine.threads", VLLM, only=(0,)),
    Unbuilt("objectives", ()),
    Unbuilt("rollout.maxSurge", (), only=(0, "0")),
    Unbuilt("rollout.revisionHistoryLimit", (), only=(5,)),
    Unbuilt("rollout.canary", ()),
    Unbuilt("recovery", ()),
)


def _pool_rule(line: Unbuilt) -> Rule:
    def find(pool: Pool, cluster: ServingCluster) -> Finding | None:
        return line.finding(pool.wire(), cluster.spec.engine.name)

    path = f"spec.pools[{{pool}}].{line.field}"
    return pool_in_spec_rule(line.message(path), find, line.broken("p"), line.cel_values("p"))


def _spec_rule(line: Unbuilt) -> Rule:
    def find(cluster: ServingCluster) -> Iterator[Finding]:
        finding = line.finding(cluster.spec.wire(), cluster.spec.engine.name)
        if finding is not None:
            yield finding

    cel = Cel("spec", f"!({line.broken('self')})", line.cel_values("self"))
    return Rule(line.message(f"spec.{line.field}"), find, cel)


# Engines of ours compute in one type, so a precision may only repeat it.
_TYPES: Final = {"fp32": "float32", "bf16": "bfloat16"}
_CEL_TYPES: Final = "{'fp32': 'float32', 'bf16': 'bfloat16'}"


def _one_type(part: str) -> Rule:
    def find(pool: Pool, cluster: ServingCluster) -> Finding | None:
        engine, chosen = cluster.spec.engine, str(getattr(pool.precision, part))
        if engine.name not in OURS or chosen not in _TYPES or _TYPES[chosen] == engine.dtype:
            return None
        return {"value": chosen, "limit": _TYPES[chosen], "dtype": engine.dtype, "engine": engine.name}

    value, dtypes = f"p.precision.{part}", f"self.engine.name in {cel_list(OURS)}"
    return pool_in_spec_rule(
        f"spec.pools[{{pool}}].precision.{part}: {{value}} needs spec.engine.dtype {{limit}}, which is "
        "{dtype}; engine {engine} computes in one type",
        find,
        f"{dtypes} && {value} in {_CEL_TYPES} && {_CEL_TYPES}[{value}] != self.engine.dtype",
        {
            "value": value,
            "limit": f"{_CEL_TYPES}[{value}]",
            "dtype": "self.engine.dtype",
            "engine": "self.engine.name",
        },
    )


_VLLM_CANNOT_LOAD: Final = ("pypi", "tiny")
_SCHEME: Final = "self.model.source.split('://')[0]"


def _source(cluster: ServingCluster) -> Iterator[Finding]:
    scheme = cluster.spec.model.source.partition("://")[0]
    if cluster.spec.engine.name == "vllm" and scheme in _VLLM_CANNOT_LOAD:
        yield {"value": scheme}


def _listeners(cluster: ServingCluster) -> Iterator[Finding]:
    count = len(cluster.spec.gateway.listeners)
    if count > 1:
        yield {"value": count, "limit": 1}


_VLLM_OVERLAP: Final = ("deepep-low-latency", "deepep-high-throughput", "nixl")
_VLLM_FP4_DISPATCH: Final = ("nvlink", "deepep-low-latency")


def _overlap_backend(pool: Pool, cluster: ServingCluster) -> Finding | None:
    on_rocm = pool.accelerator.resource == "amd.com/gpu" and pool.all_to_all == "allgather-reducescatter"
    if cluster.spec.engine.name != "vllm" or pool.dual_batch_overlap is None or on_rocm:
        return None
    return None if pool.all_to_all in _VLLM_OVERLAP else {"value": pool.all_to_all, "limit": _VLLM_OVERLAP}


def _fp4_dispatch_backend(pool: Pool, cluster: ServingCluster) -> Finding | None:
    if cluster.spec.engine.name != "vllm" or pool.precision.dispatch != "nvfp4":
        return None
    if pool.all_to_all in _VLLM_FP4_DISPATCH:
        return None
    return {"value": pool.all_to_all, "limit": _VLLM_FP4_DISPATCH}


def _text(value: object) -> str:
    """A value as CEL's string() writes it; objects are not shown."""
    match value:
        case bool():
            return "true" if value else "false"
        case str() | int():
            return str(value)
        case _:
            return ""


RULES: Final = (
    *map(_pool_rule, POOLS),
    *map(_spec_rule, SPEC),
    *map(_one_type, ("moe", "attention", "dispatch")),
    Rule(
        "spec.model.source: {value}:// not supported by engine vllm; use hf, pvc, oci or file",
        _source,
        Cel(
            "spec",
            f"self.engine.name != 'vllm' || !({_SCHEME} in {cel_list(_VLLM_CANNOT_LOAD)})",
            {"value": _SCHEME},
        ),
    ),
    Rule(
        "spec.gateway.listeners: {value} listeners not supported yet by the operator; the limit is {limit}",
        _listeners,
        Cel(
            "spec",
            "size(self.gateway.listeners) <= 1",
            {"value": "string(size(self.gateway.listeners))", "limit": "'1'"},
        ),
    ),
    pool_in_spec_rule(
        "spec.pools[{pool}].allToAll: {value} cannot overlap on engine vllm; dualBatchOverlap needs "
        f"{', '.join(_VLLM_OVERLAP[:-1])} or {_VLLM_OVERLAP[-1]}",
        _overlap_backend,
        "self.engine.name == 'vllm' && has(p.dualBatchOverlap) && "
        f"!(p.allToAll in {cel_list(_VLLM_OVERLAP)}) && "
        "!(p.accelerator.resource == 'amd.com/gpu' && p.allToAll == 'allgather-reducescatter')",
        {"value": "p.allToAll"},
    ),
    pool_in_spec_rule(
        "spec.pools[{pool}].allToAll: {value} cannot carry precision.dispatch nvfp4 on engine vllm; use "
        f"{' or '.join(_VLLM_FP4_DISPATCH)}",
        _fp4_dispatch_backend,
        "self.engine.name == 'vllm' && p.precision.dispatch == 'nvfp4' && "
        f"!(p.allToAll in {cel_list(_VLLM_FP4_DISPATCH)})",
        {"value": "p.allToAll"},
    ),
)
