"""Every rule beyond the types of fields: what breaks it, and what does not."""

from __future__ import annotations

import pytest
from tests.crds.refused import REFUSED, alone, vllm

from broadbeam_crds.checks import RULES, validate
from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster


@pytest.mark.parametrize(
    ("cluster", "message"), [pytest.param(row.cluster, row.message, id=row.name) for row in REFUSED]
)
def test_a_rule_refuses_with_field_value_and_limit(cluster: ServingCluster, message: str) -> None:
    found = {violation.message: violation for violation in validate(cluster)}

    assert message in found, "\n".join(found)
    assert found[message].field == message.partition(": ")[0]


def test_every_rule_is_in_the_table() -> None:
    said = {row.message for row in REFUSED}
    silent = [
        rule.message
        for rule in RULES
        if not any({v.message for v in rule.check(row.cluster)} & said for row in REFUSED)
    ]

    assert not silent


@pytest.mark.parametrize(
    "cluster",
    [
        pytest.param(serving_cluster(), id="prefill and decode"),
        pytest.param(serving_cluster(pools=[pool()]), id="decode alone"),
        pytest.param(serving_cluster(pools=[pool("decode", groups=0)]), id="no groups for now"),
        pytest.param(serving_cluster(engine="sim"), id="simulated"),
        pytest.param(serving_cluster(rollout={"maxUnavailable": "50%"}), id="half of the groups at once"),
        pytest.param(alone(chunking={"moeDataParallel": "disabled"}), id="chunking off"),
        pytest.param(alone(scheduling={"async": False, "cudaGraph": "none"}), id="what is so anyway"),
        pytest.param(alone(template={"spec": {"hostNetwork": True}}), id="a template"),
        pytest.param(
            serving_cluster(
                pools=[pool(precision={"moe": "bf16"})], engine={"name": "broadbeam", "dtype": "bfloat16"}
            ),
            id="a precision that repeats the type",
        ),
        pytest.param(vllm(dualBatchOverlap={}, allToAll="deepep-low-latency"), id="overlap by DeepEP"),
        pytest.param(
            vllm(
                dualBatchOverlap={},
                allToAll="allgather-reducescatter",
                accelerator={"resource": "amd.com/gpu", "perNode": 4},
            ),
            id="overlap on ROCm",
        ),
        pytest.param(vllm(expertLoadBalancing={"redundantExperts": 4}), id="copies that share out"),
        pytest.param(vllm(kv={"offload": {"hostMemory": "64Gi"}, "events": True}), id="vLLM and offload"),
        pytest.param(vllm(model={"name": "new", "source": "hf://a/new"}, data=3), id="an unknown model"),
    ],
)
def test_a_cluster_that_can_be_built_is_accepted(cluster: ServingCluster) -> None:
    assert validate(cluster) == []


def test_all_that_is_wrong_is_said_at_once() -> None:
    cluster = alone(data=3, nodes=2, dualBatchOverlap={}, autoscaling={"maxGroups": 2})

    fields = [violation.field for violation in validate(cluster)]

    assert fields == [
        "spec.pools[main].parallelism",
        "spec.pools[main].parallelism",
        "spec.pools[main].dualBatchOverlap",
        "spec.pools[main].autoscaling",
    ]


def test_a_violation_carries_value_and_limit_for_programs() -> None:
    (violation,) = validate(vllm(weightOffload={"groupSize": 2, "numInGroup": 3}))

    assert (violation.field, violation.value, violation.limit) == (
        "spec.pools[main].weightOffload.numInGroup",
        "3",
        "2",
    )
