"""A ServingCluster's life on a real API server: served, looked at, scaled, changed, deleted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broadbeam_crds.conventions import GATEWAY_METRICS_PORT
from broadbeam_operator.pods import is_ready
from cluster import Cluster, Serving, eventually, text_of
from manifests import namespace, simulated

NAMESPACE = "e2e-serving"


@pytest.fixture(scope="module")
def sim(operator: Cluster) -> Iterator[Serving]:
    operator.apply(namespace(NAMESPACE))
    operator.apply(simulated(NAMESPACE))
    serving = operator.serving(NAMESPACE, "sim")
    serving.wait_available()
    yield serving
    operator.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def test_a_streamed_answer_is_the_same_the_second_time(sim: Serving) -> None:
    first = sim.stream("What floats?", max_tokens=12)
    second = sim.stream("What floats?", max_tokens=12)

    assert len(first) > 1
    assert text_of(first)
    assert text_of(first) == text_of(second)


def test_metrics_prove_prefill_and_decode_apart(sim: Serving) -> None:
    def counters() -> dict[str, float]:
        gateway = sim.pods(component="gateway")[0]["metadata"]["name"]
        paths, sources = "broadbeam_gateway_paths_total", "vllm:prompt_tokens_by_source_total"
        return {
            "disaggregated": sim.metric(gateway, GATEWAY_METRICS_PORT, paths, path="disaggregated"),
            "computed by prefill": sim.pool_metric("prefill", sources, source="local_compute"),
            "computed by decode": sim.pool_metric("decode", sources, source="local_compute"),
            "transferred": sim.pool_metric("decode", sources, source="external_kv_transfer"),
        }

    before = counters()
    answer = sim.ask("How far is the harbour from the lighthouse, " * 8)
    after = counters()

    tokens = answer.json["usage"]["prompt_tokens"]
    assert {name: after[name] - before[name] for name in before} == {
        "disaggregated": 1,
        "computed by prefill": tokens,
        "computed by decode": 0,
        "transferred": tokens,
    }


def test_get_prints_useful_columns(sim: Serving) -> None:
    header, row = sim.kubectl("get", "servingclusters").splitlines()

    assert header.split() == ["NAME", "MODEL", "ENGINE", "PREFILL", "DECODE", "STATUS", "AGE"]
    assert row.split()[:6] == ["sim", "sim/harbour", "sim", "1/1", "1/1", "Available"]


def test_transitions_are_told_as_events(sim: Serving) -> None:
    about = f"--field-selector=involvedObject.kind=ServingCluster,involvedObject.name={sim.name}"
    reasons = sim.kubectl("get", "events", about, "--output=jsonpath={.items[*].reason}").split()

    assert {"Accepted", "Progressing", "Available", "Complete"} <= set(reasons)


def test_a_pool_is_scaled_and_scaled_back(sim: Serving) -> None:
    old = {pod["metadata"]["uid"] for pod in sim.pods()}

    sim.patch({"op": "replace", "path": "/spec/pools/1/groups", "value": 2})
    status = sim.wait_available()

    assert status["summary"]["decode"] == "2/2"
    assert {pod["metadata"]["labels"]["serving.broadbeam.io/group"] for pod in sim.pods(pool="decode")} == {
        "0",
        "1",
    }
    assert old < {pod["metadata"]["uid"] for pod in sim.pods()}, "what ran went on running"

    sim.patch({"op": "replace", "path": "/spec/pools/1/groups", "value": 1})
    sim.wait_available()

    eventually(lambda: len(sim.pods(pool="decode")) == 1, 30, "the second group is gone")
    assert {pod["metadata"]["uid"] for pod in sim.pods()} == old


def test_a_changed_field_replaces_the_groups_of_its_pool(sim: Serving) -> None:
    before = {pool: identity(sim, pool) for pool in ("prefill", "decode")}

    sim.patch({"op": "add", "path": "/spec/pools/1/scheduling/maxSequences", "value": 8})
    status = sim.wait_available()

    after = {pool: identity(sim, pool) for pool in ("prefill", "decode")}
    assert after["prefill"] == before["prefill"]
    assert after["decode"].isdisjoint(before["decode"])
    revisions = {pool["name"]: pool["revision"] for pool in status["pools"]}
    assert {revision for _, revision in after["decode"]} == {revisions["decode"]}
    assert sim.ask("Still there?").status == 200


def test_a_change_takes_no_more_groups_than_the_rollout_allows(sim: Serving) -> None:
    sim.patch(
        {"op": "add", "path": "/spec/rollout", "value": {"maxUnavailable": 2}},
        {"op": "replace", "path": "/spec/pools/0/groups", "value": 3},
    )
    sim.wait_available()
    before, fewest = identity(sim, "prefill"), 3

    sim.patch({"op": "add", "path": "/spec/pools/0/scheduling/maxSequences", "value": 9})

    def rolled() -> bool:
        nonlocal fewest
        fewest = min(fewest, sum(map(is_ready, sim.pods(pool="prefill"))))
        return len(identity(sim, "prefill") - before) == 3

    eventually(rolled, 60, "all groups are new")
    sim.wait_available()
    assert fewest == 1

    sim.patch({"op": "replace", "path": "/spec/pools/0/groups", "value": 1})
    sim.wait_available()


def identity(sim: Serving, pool: str) -> set[tuple[str, str]]:
    """(uid, revision) of a pool's pods."""
    found = [pod["metadata"] for pod in sim.pods(pool=pool)]
    return {(meta["uid"], meta["labels"]["serving.broadbeam.io/revision"]) for meta in found}


def test_a_wrong_request_is_answered_in_one_clear_line(sim: Serving) -> None:
    answer = sim.ask("x", model="nobody/knows")

    assert answer.status == 404
    assert "nobody/knows" in answer.json["error"]["message"]


def test_what_only_the_operator_can_check_is_refused_in_the_status(sim: Serving) -> None:
    manifest = simulated(NAMESPACE, "long")
    manifest["spec"]["model"] |= {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "maxModelLen": 9000}
    sim.cluster.apply(manifest)
    refused = sim.cluster.serving(NAMESPACE, "long")

    condition = eventually(lambda: refused.condition("Accepted"), 20, "the operator has looked")

    assert condition["status"] == "False"
    assert "spec.model.maxModelLen: 9000 tokens are above the " in condition["message"]
    assert refused.pods() == []
    refused.delete()
