"""Prefill and decode as real servers, the KV crossing by NIXL or TCP: every answer equals transformers'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.engine.conftest import IN_FLIGHT, LENGTHS, prompt
from tests.runtime.reference import NEW_TOKENS, Model, Tokens

from broadbeam_runtime import checkpoint

pytestmark = pytest.mark.slow

StartPod = Callable[..., Any]
PROMPTS = [prompt(length) for length in LENGTHS]
TOGETHER = [prompt(length, seed=1) for length in IN_FLIGHT]
BY_SOURCE = "vllm:prompt_tokens_by_source_total"


@dataclass(frozen=True)
class Group:
    """One pod; request i goes to its rank i % ranks."""

    pod: Any
    ranks: int

    def ask(self, index: int, tokens: Tokens, **changes: Any) -> dict[str, Any]:
        body = {
            "model": "tiny",
            "prompt": list(tokens),
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        status, answer = self.pod.post("/v1/completions", body | changes, rank=index % self.ranks)
        assert status == 200, answer
        return dict(answer)


@dataclass(frozen=True)
class Pair:
    """A prefill group, a decode group, and what their answers must equal."""

    model: Model
    prefill: Group
    decode: Group

    def answer(self, index: int, tokens: Tokens, prefilled: int = 1) -> list[int]:
        """The two legs, as the gateway sends them; the first may make more tokens than its one."""
        hold = {"do_remote_decode": True}
        first = self.prefill.ask(index, tokens, max_tokens=prefilled, kv_transfer_params=hold)
        whole = self.decode.ask(index, tokens, kv_transfer_params=first["kv_transfer_params"])
        return list(whole["choices"][0]["token_ids"])

    def answers(self, prompts: list[Tokens]) -> list[list[int]]:
        """All in flight at once."""
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(self.answer, range(len(prompts)), prompts))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_of(cache: Path) -> Callable[[str], Model]:
    return functools.cache(lambda family: Model(checkpoint.prepare(f"tiny://{family}", cache)))


def settings(family: str, role: str, connector: str, ranks: int) -> dict[str, Any]:
    return {
        "engine": "broadbeam",
        "role": role,
        "model": {"name": "tiny", "source": f"tiny://{family}", "max_model_len": 1024},
        "parallel": {"data": ranks, "ranks_per_node": ranks},
        "cache": {"memory_bytes": 48 << 20},
        "kv_transfer": {"connector": connector},
        "dtype": "float32",
        "threads": 1,
        "drain_s": 0,
    }


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("llama", "nixl", 1, 1), id="llama-nixl"),
        pytest.param(("llama", "tcp", 1, 1), id="llama-tcp"),
        pytest.param(("qwen3-moe", "nixl", 1, 1), id="qwen3-moe-nixl"),
        pytest.param(("deepseek-v3", "nixl", 1, 1), id="deepseek-v3-nixl"),
        pytest.param(("deepseek-v3", "nixl", 2, 4), id="deepseek-v3-nixl-on-2-and-4-ranks"),
    ],
)
def pair(
    request: pytest.FixtureRequest,
    start_shared_pod: StartPod,
    cache: Path,
    model_of: Callable[[str], Model],
) -> Iterator[Pair]:
    family, connector, prefill_ranks, decode_ranks = request.param
    groups = [
        Group(start_shared_pod(settings(family, role, connector, ranks), "--cache", str(cache)), ranks)
        for role, ranks in (("prefill", prefill_ranks), ("decode", decode_ranks))
    ]
    for group in groups:
        group.pod.ready()
    yield Pair(model_of(family), *groups)
    for group in groups:
        group.pod.stop()


def test_the_decode_group_goes_on_where_the_prefill_group_ended(pair: Pair) -> None:
    for index, tokens in enumerate(PROMPTS):
        answer = pair.answer(index, tokens)
        assert [answer] == pair.model.expected([tokens], [answer]), f"{len(tokens)} tokens"
        assert answer == pair.prefill.ask(index, tokens)["choices"][0]["token_ids"], "by one server alone"
    assert pair.decode.pod.metric(BY_SOURCE, source="local_compute") == 0


def test_a_prefill_leg_of_several_tokens_passes_on_the_first(pair: Pair) -> None:
    answer = pair.answer(0, PROMPTS[2], prefilled=3)
    assert [answer] == pair.model.expected([PROMPTS[2]], [answer])


def test_sixteen_requests_in_flight_are_answered_as_if_alone_and_all_blocks_are_freed(pair: Pair) -> None:
    prefill, decode = pair.prefill.pod, pair.decode.pod
    before = decode.metric(BY_SOURCE, source="external_kv_transfer")
    answers = pair.answers(TOGETHER)
    assert answers == pair.model.expected(TOGETHER, answers)
    assert decode.metric(BY_SOURCE, source="external_kv_transfer") - before == sum(IN_FLIGHT)
    assert decode.metric(BY_SOURCE, source="local_compute") == 0
    prefill.wait(lambda: prefill.metric("broadbeam:held_blocks") == 0)
    for pod in (prefill, decode):
        pod.wait(lambda pod=pod: pod.metric("vllm:kv_cache_usage_perc") == 0)
        assert pod.metric("broadbeam:kv_transfer_failures_total") == 0
        assert pod.metric("broadbeam:kv_leases_expired_total") == 0
