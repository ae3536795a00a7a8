"""`kubectl apply -f examples/laptop.yaml`, as it is: the cluster of `make demo`, from an API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from cluster import Cluster, Serving, eventually
from manifests import namespace

NAMESPACE = "e2e-laptop"
EXAMPLE = Path(__file__).parents[1] / "examples" / "laptop.yaml"
MODEL = "SmolLM2-135M-Instruct"
SOURCES = "vllm:prompt_tokens_by_source_total"


@pytest.fixture(scope="module")
def laptop(operator: Cluster) -> Iterator[Serving]:
    operator.apply(namespace(NAMESPACE))
    operator.kubectl(f"--namespace={NAMESPACE}", "apply", "-f", str(EXAMPLE))
    serving = operator.serving(NAMESPACE, "laptop")
    serving.wait_available(150)
    yield serving
    operator.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture
def client(laptop: Serving) -> Iterator[openai.OpenAI]:
    url = f"{laptop.cluster.url}{laptop.gateway}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def counters(laptop: Serving) -> dict[str, float]:
    return {
        "computed by prefill": laptop.pool_metric("prefill", SOURCES, source="local_compute"),
        "computed by decode": laptop.pool_metric("decode", SOURCES, source="local_compute"),
        "transferred": laptop.pool_metric("decode", SOURCES, source="external_kv_transfer"),
        "bytes": laptop.pool_metric("decode", "broadbeam:kv_transfer_bytes_total"),
    }


def test_get_prints_its_columns(laptop: Serving) -> None:
    header, row = laptop.kubectl("get", "servingclusters").splitlines()

    assert header.split() == ["NAME", "MODEL", "ENGINE", "PREFILL", "DECODE", "STATUS", "AGE"]
    assert row.split()[:6] == ["laptop", MODEL, "broadbeam", "1/1", "1/1", "Available"]


def test_a_question_is_streamed_and_decode_computes_no_prompt_token(
    laptop: Serving, client: openai.OpenAI
) -> None:
    before = counters(laptop)

    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # `kubectl proxy` authenticates, and would pass this one on to the API server.
        extra_headers={"Authorization": openai.Omit()},
    )
    chunks = list(raw.parse())

    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert "sky" in text.lower()
    assert len(chunks) > 10, "it came in pieces"
    assert raw.headers["x-broadbeam-prefill"] == "laptop-prefill-0-0/0"
    assert raw.headers["x-broadbeam-decode"] == "laptop-decode-0-0/0"
    usage, after = chunks[-1].usage, counters(laptop)
    assert usage is not None
    moved = {name: after[name] - before[name] for name in before}
    assert moved.pop("bytes") > 0
    assert moved == {
        "computed by prefill": usage.prompt_tokens,
        "computed by decode": 0,
        "transferred": usage.prompt_tokens,
    }


def test_the_operator_confirms_that_kv_moves(laptop: Serving) -> None:
    def confirmed() -> bool:
        return (laptop.condition("KVTransferEffective") or {}).get("status") == "True"

    eventually(confirmed, 60, "KVTransferEffective")


def test_kubectl_delete_leaves_nothing_behind(laptop: Serving) -> None:
    laptop.kubectl("delete", "-f", str(EXAMPLE))

    eventually(lambda: not laptop.leftovers(), 60, "all children gone")
    assert laptop.cluster.get(laptop.path) is None
