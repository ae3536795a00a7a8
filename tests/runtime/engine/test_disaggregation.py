"""Prefill on one engine, decode on another, the blocks crossing through a connector."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.runtime.engine.conftest import LENGTHS, Model, Served, greedy, prompt
from tests.runtime.engine.fake_connector import FakeConnector

from broadbeam_runtime.core import RemotePrefill, Request, SamplingParams, TokenLogprob

Start = Callable[..., Served]
Make = Callable[..., Model]


def remote(served: Served, name: str, tokens: int, with_token: bool = True) -> RemotePrefill:
    """What the decode leg learns from the prefill leg's last output."""
    last = served.outputs[name][-1]
    params = last.kv_transfer_params
    assert params
    token = last.logprobs[0] if last.logprobs else TokenLogprob(last.token_ids[0], 0.0)
    return RemotePrefill(params, tokens, token if with_token else None)


def drained(served: Served) -> bool:
    for _ in range(500):
        if served.engine.stats().held_blocks == 0 and served.engine.stats().kv_usage == 0.0:
            return True
        served.engine.abort("nobody")  # a message makes the engine refresh its stats
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "deepseek-v3"])
@pytest.mark.parametrize("with_token", [True, False], ids=["first token sent", "first token computed again"])
def test_decode_goes_on_from_blocks_that_another_rank_computed(
    family: str, with_token: bool, make_model: Make, serve: Start
) -> None:
    model, wire = make_model(family), {}
    prefill = serve(model, FakeConnector("p", wire))
    decode = serve(model, FakeConnector("d", wire))
    prompts = {str(length): prompt(length) for length in LENGTHS}
    prefill.run(*(greedy(name, p, 1, hold_blocks=True) for name, p in prompts.items()))
    assert prefill.engine.stats().held_blocks == sum(-(-length // 16) for length in LENGTHS)
    answers = decode.run(
        *(
            greedy(name, p, 12, remote_prefill=remote(prefill, name, len(p), with_token))
            for name, p in prompts.items()
        )
    )
    assert answers == model.expected(prompts.values(), answers)
    computed = 0 if with_token else len(prompts)
    assert decode.engine.stats().prompt_tokens_computed == computed
    assert decode.engine.stats().prompt_tokens_transferred == sum(LENGTHS) - computed
    assert decode.outputs["777"][0].transferred_tokens == 777 - (not with_token)
    assert drained(prefill)


def test_a_seeded_request_draws_the_same_tokens_on_two_ranks_as_on_one(
    make_model: Make, serve: Start
) -> None:
    model, wire = make_model("llama"), {}
    prefill, decode = serve(model, FakeConnector("p", wire)), serve(model, FakeConnector("d", wire))
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=7, ignore_eos=True, logprobs=2)
    alone = Request("alone", prompt(64), sampling, 0.0)
    expected = prefill.run(alone)
    prefill.run(replace(alone, id="a", sampling=replace(sampling, max_tokens=1), hold_blocks=True))
    assert decode.run(replace(alone, id="a", remote_prefill=remote(prefill, "a", 64))) == expected
    first, whole = decode.outputs["a"][0].logprobs[0], prefill.outputs["alone"][0].logprobs[0]
    assert first.token_id == whole.token_id
    assert first.logprob == pytest.approx(whole.logprob, abs=1e-4)
    assert len(first.top) == 2


def test_a_stop_token_from_the_prefill_rank_is_not_taken_before_min_tokens(
    make_model: Make, serve: Start
) -> None:
    model, wire = make_model("llama"), {}
    prefill, decode = serve(model, FakeConnector("p", wire)), serve(model, FakeConnector("d", wire))
    prefill.run(greedy("a", prompt(64), 1, hold_blocks=True))
    (stop,) = prefill.tokens("a")
    sampling = SamplingParams(
        max_tokens=6, min_tokens=3, temperature=0, stop_token_ids=(stop,), ignore_eos=True
    )
    (tokens,) = decode.run(Request("a", prompt(64), sampling, 0.0, remote_prefill=remote(prefill, "a", 64)))
    assert stop not in tokens[:3]
    assert decode.engine.stats().prompt_tokens_computed == 1


def test_a_failed_pull_ends_the_request_with_the_reason(make_model: Make, serve: Start) -> None:
    model, wire = make_model("llama"), {}
    prefill = serve(model, FakeConnector("p", wire))
    decode = serve(model, FakeConnector("d", wire, fault="no route to 10.0.0.1"))
    prefill.run(greedy("a", prompt(64), 1, hold_blocks=True))
    decode.engine.submit(greedy("a", prompt(64), remote_prefill=remote(prefill, "a", 64)))
    decode.wait("a")
    assert decode.outputs["a"][-1].error == "KV transfer failed: no route to 10.0.0.1"
    assert drained(decode)
    assert decode.engine.stats().transfer_failures == 1
    prefill.engine.connector.expire("a")  # type: ignore[union-attr]
    assert drained(prefill)
    assert prefill.engine.stats().leases_expired == 1


def test_a_failed_pull_is_computed_here_if_the_policy_says_so(make_model: Make, serve: Start) -> None:
    model, wire = make_model("llama"), {}
    decode = serve(model, FakeConnector("d", wire, fault="gone"))
    decode.engine.scheduler.limits = replace(decode.engine.scheduler.limits, recompute_failed_pulls=True)
    answer = decode.run(greedy("a", prompt(64), remote_prefill=RemotePrefill({"remote": "p"}, 64)))
    assert answer == model.expected([prompt(64)], answer)
    assert decode.engine.stats().prompt_tokens_computed == 64


def test_blocks_of_an_aborted_pull_stay_until_the_transport_is_done(make_model: Make, serve: Start) -> None:
    wire: dict[str, FakeConnector] = {}
    connector = FakeConnector("d", wire, stuck=True)
    decode = serve(make_model("llama"), connector)
    decode.engine.submit(greedy("a", prompt(64), remote_prefill=RemotePrefill({"remote": "p"}, 64)))
    while "a" not in connector.open:
        time.sleep(0.01)
    decode.engine.abort("a")
    decode.wait("a")
    assert decode.outputs["a"][-1].finish == "abort"
    assert drained(decode)


def test_a_pull_that_finds_no_blocks_waits_and_is_announced(make_model: Make, serve: Start) -> None:
    """Everything but a few blocks is held by a prefill here, until its lease expires."""
    model, wire = make_model("llama"), {}
    other = serve(model, FakeConnector("p", wire))
    connector = FakeConnector("d", wire)
    small = serve(model, connector, memory_bytes=64 * 4 * 16 * 128 * 4)
    other.run(greedy("b", prompt(200), 1, hold_blocks=True))
    small.run(greedy("a", prompt(1000), 1, hold_blocks=True))
    small.engine.submit(greedy("b", prompt(200), remote_prefill=remote(other, "b", 200)))
    while "b" not in connector.expected:
        time.sleep(0.01)
    steps = small.engine.stats().steps
    time.sleep(0.05)
    assert small.engine.stats().steps == steps  # nobody spins
    connector.expire("a")
    small.wait("b")
    answer = [small.tokens("b")]
    assert answer == model.expected([prompt(200)], answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"hold_blocks": True}, "has no KV connector", id="hold"),
        pytest.param({"remote_prefill": RemotePrefill({}, 64)}, "has no KV connector", id="pull"),
    ],
)
def test_a_leg_without_a_connector_is_refused(
    changes: dict[str, Any], message: str, make_model: Make, serve: Start
) -> None:
    served = serve(make_model("llama"))
    served.engine.submit(greedy("a", prompt(64), **changes))
    served.wait("a")
    assert message in (served.outputs["a"][-1].error or "")


def test_a_prompt_of_another_length_than_was_prefilled_is_refused(make_model: Make, serve: Start) -> None:
    served = serve(make_model("llama"), FakeConnector("d", {}))
    served.engine.submit(greedy("a", prompt(64), remote_prefill=RemotePrefill({}, 63)))
    served.wait("a")
    assert served.outputs["a"][-1].error == "the prefill rank computed 63 tokens, the prompt has 64"
