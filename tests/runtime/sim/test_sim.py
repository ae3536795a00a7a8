"""The simulator behaves like an engine of a wide-EP group, prefill and decode apart included."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.runtime.conftest import hung_up

from broadbeam_runtime.sim_blocks import BlockPool, block_keys
from broadbeam_runtime.sim_tokenizer import SimTokenizer

pytestmark = pytest.mark.slow

StartPod = Callable[..., Any]
GROUPS = (
    (f"127.232.{os.getpid() % 250}.{n}", f"127.232.{os.getpid() % 250}.{n + 1}") for n in range(1, 250, 2)
)
ASK: dict[str, Any] = {
    "model": "demo",
    "prompt": "the wind and the sea " * 12,
    "temperature": 0,
    "max_tokens": 16,
}


def sim(role: str = "both", **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "engine": "sim",
        "role": role,
        "model": {"name": "demo", "source": "sim://", "max_model_len": 2048},
        "sim": {"decode_base_ms": 1, "prefill_base_ms": 1},
        "kv_transfer": {"connector": "nixl", "lease_s": 30},
        "drain_s": 1,
    }
    return {**base, **changes}


def prefill_leg(pod: Any, body: dict[str, Any]) -> Any:
    status, answer = pod.post(
        "/v1/completions", body | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
    )
    assert status == 200, answer
    return answer["kv_transfer_params"]


def test_prefill_and_decode_apart_answer_as_one(start_pod: StartPod) -> None:
    prefill, decode = start_pod(sim("prefill")), start_pod(sim("decode"))
    prefill.ready(), decode.ready()
    whole = prefill.post("/v1/completions", ASK)[1]["choices"][0]["text"]
    params = prefill_leg(prefill, ASK)
    assert prefill.metric("broadbeam:held_blocks") > 0
    status, answer = decode.post("/v1/completions", ASK | {"kv_transfer_params": params})
    assert (status, answer["choices"][0]["text"]) == (200, whole)
    prompt = answer["usage"]["prompt_tokens"]
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == prompt
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 0
    prefill.wait(lambda: prefill.metric("broadbeam:held_blocks") == 0)


def test_of_several_answers_one_pulls_and_the_others_find_its_prompt(start_pod: StartPod) -> None:
    prefill, decode = start_pod(sim("prefill")), start_pod(sim("decode"))
    prefill.ready(), decode.ready()
    params = prefill_leg(prefill, ASK)
    status, answer = decode.post("/v1/completions", ASK | {"kv_transfer_params": params, "n": 3})
    assert status == 200, answer
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    prompt = answer["usage"]["prompt_tokens"]
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer") == prompt
    assert decode.metric("vllm:prompt_tokens_by_source_total", source="local_cache_hit") >= 2 * (prompt - 16)


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_client_that_hangs_up_during_the_pull_frees_its_request(start_pod: StartPod, policy: str) -> None:
    slow = {"decode_base_ms": 1, "prefill_base_ms": 1, "transfer_gbit_s": 0.02}
    transfer = {"connector": "nixl", "load_failure_policy": policy}
    prefill, decode = start_pod(sim("prefill")), start_pod(sim("decode", sim=slow, kv_transfer=transfer))
    prefill.ready(), decode.ready()
    leg = ASK | {"kv_transfer_params": prefill_leg(prefill, ASK), "max_tokens": 1000, "ignore_eos": True}
    with hung_up(decode, leg):
        decode.wait(lambda: decode.metric("vllm:num_requests_waiting") == 1)
    decode.wait(lambda: decode.metric("vllm:kv_cache_usage_perc") == 0)
    assert decode.metric("vllm:num_requests_waiting") == 0
    assert decode.metric("vllm:generation_tokens_total") == 0
    assert decode.metric("vllm:request_success_total", finished_reason="abort") == 1


def test_an_unclaimed_prompt_is_freed_when_its_lease_ends(start_pod: StartPod) -> None:
    pod = start_pod(sim("prefill", kv_transfer={"connector": "nixl", "lease_s": 0.5})).ready()
    prefill_leg(pod, ASK)
    pod.wait(lambda: pod.metric("broadbeam:kv_leases_expired_total") == 1)
    assert pod.metric("broadbeam:held_blocks") == 0


@pytest.mark.parametrize(("policy", "status"), [("fail", 500), ("recompute", 200)])
def test_a_lost_prefill_rank_follows_the_policy(start_pod: StartPod, policy: str, status: int) -> None:
    transfer = {"connector": "nixl", "load_failure_policy": policy}
    prefill, decode = start_pod(sim("prefill")), start_pod(sim("decode", kv_transfer=transfer))
    prefill.ready(), decode.ready()
    params = prefill_leg(prefill, ASK)
    decode.post("/v1/completions", ASK | {"kv_transfer_params": params})
    stale = prefill_leg(prefill, ASK)
    prefill.stop(signal.SIGKILL)
    answered, answer = decode.post("/v1/completions", ASK | {"kv_transfer_params": stale})
    assert answered == status, answer
    assert decode.metric("broadbeam:kv_transfer_failures_total") == 1
    assert decode.post("/v1/completions", ASK)[0] == 200


def test_an_idle_rank_joins_the_steps_of_a_busy_one(start_pod: StartPod) -> None:
    pod = start_pod(sim(parallel={"data": 2, "ranks_per_node": 2})).ready()
    assert pod.post("/v1/completions", ASK)[0] == 200
    # The answer may leave before the other rank has counted the last step.
    steps = pod.metric("broadbeam:steps_total", engine="0")
    pod.wait(lambda: pod.metric("broadbeam:dummy_steps_total", engine="1") == steps)


def test_a_rank_that_hangs_stalls_the_group_until_it_is_noticed(start_pod: StartPod) -> None:
    settings = {"decode_base_ms": 1, "prefill_base_ms": 1, "stall_s": 1}
    pod = start_pod(sim(sim=settings, parallel={"data": 2, "ranks_per_node": 2})).ready()
    subprocess.run(["kill", "-STOP", str(_pid(pod, 1))], check=True)
    try:
        status, answer = pod.post("/v1/completions", ASK)
        assert status == 500
        assert "did not join a step within 1 s" in answer["error"]["message"]
        assert pod.process.wait(20) == 1
    finally:
        pod.stop(signal.SIGKILL)


@pytest.mark.parametrize("lost", [0, 1], ids=["the coordinator", "another rank"])
def test_a_pod_that_comes_back_alone_makes_an_idle_group_start_again(start_pod: StartPod, lost: int) -> None:
    hosts = next(GROUPS)
    group = {"data": 2, "nodes": 2, "ranks_per_node": 1, "coordinator": hosts[0]}
    pods = [
        start_pod(sim(parallel=group, kv_transfer=None), "--node-index", str(node), host=host)
        for node, host in enumerate(hosts)
    ]
    for pod in pods:
        pod.ready()
    pods[lost].stop(signal.SIGKILL)
    pods[lost].start()
    assert pods[1 - lost].process.wait(60) == 1
    words = "rank 0 is gone" if lost == 0 else "rank 1 was restarted alone; its group of 2 has to start again"
    assert words in pods[1 - lost].log.read_text().splitlines()[-1]
    if lost:
        assert pods[lost].process.wait(60) == 1
        assert words in pods[lost].log.read_text().splitlines()[-1]


def _pid(pod: Any, rank: int) -> int:
    import json

    return int(json.loads(pod.get("/readyz")[1])["ranks"][rank]["pid"])


def test_more_requests_than_fit_all_finish(start_pod: StartPod) -> None:
    config = sim(
        cache={"block_size": 16, "memory_bytes": 16 * 64 * 10},
        scheduling={"max_sequences": 4},
        sim={"decode_base_ms": 1, "prefill_base_ms": 1, "kv_bytes_per_token": 64},
    )
    pod = start_pod(config).ready()
    answers: list[int] = []
    body = {"model": "demo", "prompt": "the sea", "max_tokens": 60, "ignore_eos": True}
    threads = [
        threading.Thread(target=lambda: answers.append(pod.post("/v1/completions", body)[0]))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 12
    assert pod.metric("vllm:num_preemptions_total") > 0
    assert pod.metric("vllm:kv_cache_usage_perc") == 0


def test_a_prompt_larger_than_the_pool_is_an_error(start_pod: StartPod) -> None:
    config = sim(cache={"memory_bytes": 16 * 64 * 4}, sim={"kv_bytes_per_token": 64})
    pod = start_pod(config).ready()
    status, answer = pod.post("/v1/completions", {"model": "demo", "prompt": [300] * 200})
    assert status == 500
    assert "needs 13 KV blocks of 16 tokens, the pool has 4" in answer["error"]["message"]


def test_a_repeated_prompt_is_found_in_the_cache(start_pod: StartPod) -> None:
    pod = start_pod(sim()).ready()
    cached = [
        pod.post("/v1/completions", ASK)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached[0] == 0
    assert cached[1] >= 16


@pytest.mark.parametrize("text", ["", "Ahoy", " the  sea ", "čaj 漢字 ⛵\n\t", "<|user|>hi<|end|>", "don't"])
def test_the_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = SimTokenizer()
    assert tokenizer.decode(tokenizer.encode(text, False), False) == text


def test_a_pool_gives_out_each_block_once_and_takes_all_back() -> None:
    pool = BlockPool(8, reuse=True)
    keys = block_keys(list(range(64)), 16)
    first = pool.take(4)
    assert first is not None
    pool.remember(keys, first)
    assert pool.take(5) is None
    pool.give_back(first)
    assert pool.find(keys) == first
    shared = pool.take(2, first[:2])
    assert shared is not None
    assert shared[:2] == first[:2]
    assert pool.free == 4
    rest = pool.take(4)
    assert rest is not None
    assert not set(rest) & set(shared)
    assert pool.find(keys) == first[:2]
