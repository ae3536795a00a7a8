"""The real engine: a tiny DeepSeek-V3-style MoE over two prefill and four decode ranks, on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster import Cluster, Serving, eventually, text_of
from manifests import namespace

NAMESPACE = "e2e-wide-ep"
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-wide-ep.yaml"


@pytest.fixture(scope="module")
def wide(operator: Cluster) -> Iterator[Serving]:
    manifest = yaml.safe_load(EXAMPLE.read_text())
    operator.apply(namespace(NAMESPACE))
    operator.kubectl(f"--namespace={NAMESPACE}", "apply", "-f", str(EXAMPLE))
    serving = operator.serving(NAMESPACE, manifest["metadata"]["name"])
    serving.wait_available(150)
    yield serving
    operator.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def test_it_has_two_prefill_and_four_decode_ranks(wide: Serving) -> None:
    ranks = {pool["role"]: pool["readyRanks"] for pool in wide.status["pools"]}

    assert ranks == {"prefill": 2, "decode": 4}


def test_a_streamed_answer_is_the_same_the_second_time(wide: Serving) -> None:
    first = wide.stream("Four ranks share the experts", max_tokens=16, ignore_eos=True)
    second = wide.stream("Four ranks share the experts", max_tokens=16, ignore_eos=True)

    assert len(first) > 1
    assert text_of(first) == text_of(second)


def test_decode_computes_no_prompt_token(wide: Serving) -> None:
    name = "vllm:prompt_tokens_by_source_total"

    answer = wide.ask("A prompt that the prefill ranks compute and the decode ranks fetch")

    assert answer.status == 200, answer.body
    assert wide.pool_metric("prefill", name, source="local_compute") > 0
    assert wide.pool_metric("decode", name, source="local_compute") == 0
    assert wide.pool_metric("decode", name, source="external_kv_transfer") > 0


def test_the_operator_confirms_that_kv_moves(wide: Serving) -> None:
    def confirmed() -> bool:
        return (wide.condition("KVTransferEffective") or {}).get("status") == "True"

    eventually(confirmed, 60, "KVTransferEffective")


def test_deletion_leaves_nothing_behind(wide: Serving) -> None:
    wide.delete()

    eventually(lambda: not wide.leftovers(), 60, "all children gone")
