"""The real openai client against one rank of either engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from tests.runtime.conftest import hung_up

CHAT: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Ahoy, captain"}],
    "temperature": 0,
}
TEXT: dict[str, Any] = {"model": "demo", "prompt": "The ship sails", "temperature": 0}
LONG: dict[str, Any] = {"max_tokens": 2000, "n": 16, "extra_body": {"ignore_eos": True}}  # many seconds


TINY: dict[str, Any] = {
    "engine": "broadbeam",
    "role": "both",
    "model": {"name": "demo", "source": "tiny://llama?seed=0", "max_model_len": 2048},
    "cache": {"memory_bytes": 2**27},
    "dtype": "float32",
    "threads": 1,
}


@pytest.fixture(scope="module", params=[None, TINY], ids=["sim", "torch"])
def pod(request: pytest.FixtureRequest, start_shared_pod: Callable[..., Any], tmp_path_factory: Any) -> Any:
    return start_shared_pod(request.param, "--cache", str(tmp_path_factory.mktemp("cache"))).ready()


@pytest.fixture
def client(pod: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=pod.url("/v1"), api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_answer_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, max_tokens=12)
    stream = client.chat.completions.create(
        **CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_completion_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(**TEXT, max_tokens=12)
    chunks = list(client.completions.create(**TEXT, max_tokens=12, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_text_ends_before_the_stop_string(client: openai.OpenAI, stream: bool) -> None:
    full = client.completions.create(**TEXT, max_tokens=12).choices[0].text
    word = full[len(full) // 2 :][:3]
    options: dict[str, Any] = {**TEXT, "max_tokens": 12, "stop": ["nowhere", word]}
    if stream:
        chunks = list(client.completions.create(**options, stream=True))
        text, last = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0]
    else:
        last = client.completions.create(**options).choices[0]
        text = last.text
    assert text == full[: full.index(word)]
    assert last.finish_reason == "stop"
    assert last.stop_reason == word  # type: ignore[attr-defined]


def test_n_answers_with_a_seed_differ_and_repeat(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {**TEXT, "temperature": 1.0, "max_tokens": 8, "n": 3, "seed": 7}
    first = client.completions.create(**options)
    again = client.completions.create(**options)
    texts = [choice.text for choice in sorted(first.choices, key=lambda c: c.index)]
    assert len(set(texts)) == 3
    assert texts == [choice.text for choice in sorted(again.choices, key=lambda c: c.index)]


def test_several_answers_share_the_prompts_blocks_and_have_log_probabilities_of_their_own(
    client: openai.OpenAI, pod: Any
) -> None:
    def hits() -> float:
        return float(pod.metric("vllm:prompt_tokens_by_source_total", source="local_cache_hit"))

    ask: dict[str, Any] = {
        "model": "demo",
        "prompt": list(range(300, 400)),
        "temperature": 1.0,
        "max_tokens": 8,
        "logprobs": 2,
    }
    before = hits()
    together = client.completions.create(**ask, n=3, seed=7).choices
    assert hits() - before == 2 * 96, "six full blocks of 16 for each but the first"
    for index, choice in enumerate(together):
        alone = client.completions.create(**ask, n=1, seed=7 + index).choices[0]
        assert alone.logprobs is not None
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == alone.logprobs.tokens
        assert choice.logprobs.token_logprobs == pytest.approx(alone.logprobs.token_logprobs, abs=1e-4)
    assert len({choice.text for choice in together}) == 3


def test_a_list_of_prompts_gives_an_answer_to_each(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt=["one", "two"], n=2, max_tokens=4, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    one = client.completions.create(model="demo", prompt="one", max_tokens=4, temperature=0)
    assert answer.choices[0].text == answer.choices[1].text == one.choices[0].text


def test_token_ids_go_in_and_come_out(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo",
        prompt=[300, 301, 302],
        max_tokens=4,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    assert answer.choices[0].prompt_token_ids == [300, 301, 302]  # type: ignore[attr-defined]
    assert len(answer.choices[0].token_ids) == 4  # type: ignore[attr-defined]


def test_chat_logprobs_carry_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, max_tokens=3, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 3
    for item in logprobs.content:
        assert bytes(item.bytes or []).decode(errors="replace") == item.token
        assert len(item.top_logprobs) == 2


def test_completion_logprobs_line_up_with_the_text(client: openai.OpenAI) -> None:
    choice = client.completions.create(**TEXT, max_tokens=5, logprobs=1).choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert tokens is not None
    assert offsets is not None
    assert "".join(tokens) == choice.text
    assert [
        choice.text[offset:].startswith(token) for token, offset in zip(tokens, offsets, strict=True)
    ] == [True] * 5


def test_a_request_id_is_kept(pod: Any, client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        **TEXT, max_tokens=1, extra_headers={"X-Request-Id": "abc"}
    )
    assert raw.headers["x-request-id"] == "abc"
    assert raw.parse().id == "cmpl-abc"


def test_min_tokens_puts_off_the_end(client: openai.OpenAI) -> None:
    answer = client.completions.create(**TEXT, max_tokens=400, extra_body={"min_tokens": 300})
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 300


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("demo", 2048)  # type: ignore[attr-defined]


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model `other` does not exist"):
        client.completions.create(model="other", prompt="x")


def test_a_cancelled_stream_frees_the_request(pod: Any, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {**TEXT, **LONG}
    with client.completions.create(**options, stream=True) as stream:
        next(iter(stream))
        assert pod.metric("vllm:num_requests_running") >= 1
    pod.wait(lambda: pod.metric("vllm:num_requests_running") == 0)
    assert pod.metric("vllm:kv_cache_usage_perc") == 0
    assert pod.metric("vllm:request_success_total", finished_reason="abort") >= 1


def test_a_client_that_hangs_up_without_a_stream_frees_the_request(pod: Any) -> None:
    aborted = pod.metric("vllm:request_success_total", finished_reason="abort")
    with hung_up(pod, TEXT | {"max_tokens": 2000, "n": 16, "ignore_eos": True}):
        pod.wait(lambda: pod.metric("vllm:num_requests_running") >= 1)
    pod.wait(lambda: pod.metric("vllm:num_requests_running") == 0)
    assert pod.metric("vllm:request_success_total", finished_reason="abort") > aborted
