"""What the server refuses, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

TEXT: dict[str, Any] = {"model": "demo", "prompt": "The ship"}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Ahoy"}]}


@pytest.fixture(scope="module")
def pod(start_shared_pod: Callable[..., Any]) -> Any:
    return start_shared_pod().ready()


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        pytest.param("completions", b"{", "not valid JSON", id="broken JSON"),
        pytest.param(
            "completions",
            b'{"prompt":' + b"[" * 10**5,
            "nested too deeply",
            id="nested",
        ),
        pytest.param("completions", {"model": "demo"}, "missing required field `prompt`", id="no prompt"),
        pytest.param(
            "completions", TEXT | {"max_tokens": "7"}, "max_tokens: Expected `int | null`", id="wrong type"
        ),
        pytest.param(
            "completions", TEXT | {"colour": 1}, "colour: this field is not supported", id="unknown field"
        ),
        pytest.param("completions", TEXT | {"echo": True}, "echo = true is not supported yet", id="echo"),
        pytest.param(
            "completions",
            TEXT | {"presence_penalty": 0.5},
            "presence_penalty = 0.5 is not supported yet",
            id="penalty",
        ),
        pytest.param("completions", TEXT | {"logit_bias": {"5": 1}}, "logit_bias = ", id="logit bias"),
        pytest.param(
            "completions", TEXT | {"temperature": 3}, "temperature is 3, it must be between 0 and 2", id="hot"
        ),
        pytest.param("completions", TEXT | {"top_p": 0}, "top_p is 0, it must be above 0", id="top_p"),
        pytest.param("completions", TEXT | {"n": 0}, "n is 0, it must be between 1 and 128", id="n"),
        pytest.param(
            "completions", TEXT | {"max_tokens": 0}, "max_tokens is 0, it must be at least 1", id="max_tokens"
        ),
        pytest.param(
            "completions",
            TEXT | {"logprobs": 99},
            "logprobs is 99, it must be between 0 and 20",
            id="logprobs",
        ),
        pytest.param("completions", TEXT | {"prompt": ""}, "prompt is empty", id="empty prompt"),
        pytest.param("completions", TEXT | {"prompt": []}, "prompt is empty", id="empty list"),
        pytest.param(
            "completions",
            TEXT | {"prompt": [1, 10**6]},
            "token id 1000000, it must be between 0 and",
            id="id",
        ),
        pytest.param("completions", TEXT | {"prompt": [1, "a"]}, "prompt", id="mixed list"),
        pytest.param(
            "completions",
            TEXT | {"stop_token_ids": [10**6], "min_tokens": 2},
            "stop_token_ids holds token id 1000000, it must be between 0 and",
            id="stop token",
        ),
        pytest.param(
            "completions",
            TEXT | {"prompt": [[300]] * 1025, "n": 2},
            "1025 prompts, n = 2 times each: the limit is 2048 answers",
            id="answers",
        ),
        pytest.param(
            "completions",
            TEXT | {"prompt": "sea " * 2**20},
            "the prompt has 4194304 characters, that is 322638 tokens or more, but the model's context is",
            id="long text",
        ),
        pytest.param(
            "completions", TEXT | {"stop": ["a"] * 17}, "stop has 17 strings, the limit is 16", id="stops"
        ),
        pytest.param(
            "completions",
            TEXT | {"prompt": [300] * 3000},
            "the prompt has 3000 tokens, but the model's context is 2048 tokens",
            id="long prompt",
        ),
        pytest.param(
            "completions",
            TEXT | {"prompt": [300] * 2000, "max_tokens": 100},
            "max_tokens is 100 and the prompt has 2000 tokens, together 2100",
            id="long answer",
        ),
        pytest.param(
            "completions", TEXT | {"stream_options": {}}, "stream_options needs stream", id="stream options"
        ),
        pytest.param(
            "completions",
            TEXT | {"kv_transfer_params": {"do_remote_decode": True}},
            "without a KV connector",
            id="kv",
        ),
        pytest.param("chat/completions", CHAT | {"messages": []}, "messages is empty", id="no messages"),
        pytest.param(
            "chat/completions", CHAT | {"messages": [{"content": "a"}]}, "messages[0].role", id="no role"
        ),
        pytest.param(
            "chat/completions",
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: only parts of type text",
            id="image",
        ),
        pytest.param("chat/completions", CHAT | {"tools": [{"type": "function"}]}, "tools = ", id="tools"),
        pytest.param(
            "chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs needs logprobs", id="top_logprobs"
        ),
        pytest.param(
            "chat/completions",
            CHAT | {"response_format": {"type": "json_object"}},
            "response_format = ",
            id="format",
        ),
        pytest.param(
            "chat/completions",
            CHAT | {"chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs must not set messages",
            id="template",
        ),
    ],
)
def test_a_bad_request_is_answered_with_400_and_one_line(
    pod: Any, path: str, body: Any, message: str
) -> None:
    status, answer = pod.post(f"/v1/{path}", body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_neutral_values_of_unsupported_fields_pass(pod: Any) -> None:
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "echo": False,
        "stop": None,
    }
    assert pod.post("/v1/completions", TEXT | neutral)[0] == 200
    neutral = {
        "tools": [],
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "logprobs": False,
        "n": None,
    }
    assert pod.post("/v1/chat/completions", CHAT | {"max_tokens": 2} | neutral)[0] == 200


def test_a_variable_of_the_chat_template_may_have_any_name(pod: Any) -> None:
    assert pod.post("/v1/chat/completions", CHAT | {"chat_template_kwargs": {"self": 1}})[0] == 200


def test_a_body_over_the_limit_is_413(pod: Any) -> None:
    status, answer = pod.post("/v1/completions", b'{"model":"demo","prompt":"' + b"a" * 33 * 2**20 + b'"}')
    assert status == 413
    assert "larger than 33554432 bytes" in answer["error"]["message"]


@pytest.mark.parametrize(("path", "status"), [("/v1/nothing", 404), ("/v1/models", 405)])
def test_errors_of_the_path_have_openais_shape(pod: Any, path: str, status: int) -> None:
    answered, answer = pod.post(path, {})
    assert answered == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_text_survives_tokenise_and_detokenise(pod: Any) -> None:
    text = "Ahoy ⛵ čaj 漢字 the  wide sea\n"
    status, tokens = pod.post("/tokenize", {"model": "demo", "prompt": text})
    assert status == 200
    assert tokens["count"] == len(tokens["tokens"])
    assert pod.post("/detokenize", {"model": "demo", "tokens": tokens["tokens"]})[1] == {"prompt": text}


def test_metrics_name_the_rank_and_the_model(pod: Any) -> None:
    page = pod.get("/metrics", 8000)[1]
    assert 'vllm:num_requests_running{engine="0",model_name="demo"}' in page
    assert json.dumps("demo") in page
