"""OpenAI requests as typed objects; `request_checks.py` refuses by name what this server does not do.

Field names and limits are OpenAI's; `ignore_eos`, `stop_token_ids`, `return_token_ids`, `min_tokens`,
`top_k`, `skip_special_tokens`, `include_stop_str_in_output` and `kv_transfer_params` are vLLM's.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from broadbeam_runtime.api_error import ApiError


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints share. The fields after `kv_transfer_params` must be neutral, or change nothing."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int | None = 1
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = False
    kv_transfer_params: dict[str, Any] | None = None

    frequency_penalty: float | None = 0.0
    presence_penalty: float | None = 0.0
    repetition_penalty: float | None = 1.0
    min_p: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    best_of: int | None = None
    use_beam_search: bool | None = False
    service_tier: Any = None
    user: str | None = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    request_id: str | None = None


class CompletionRequest(GenerateRequest, frozen=True, kw_only=True):
    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None
    add_special_tokens: bool = True


class ChatRequest(GenerateRequest, frozen=True, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    chat_template: str | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


R = TypeVar("R", bound=msgspec.Struct)


def decode(body: bytes, kind: type[R]) -> R:
    """The JSON `body` as a request; ApiError 400 names the field and what was expected."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        name = where.rstrip("`").split("[")[0] or None
        if "unknown field" in message:
            name = message.rpartition("`")[0].rpartition("`")[2]
            raise ApiError(
                400, f"{name}: this field is not supported", name, "unsupported_parameter"
            ) from error
        raise ApiError(400, f"{name}: {message}" if name else message, name) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ApiError(400, "the request body is nested too deeply") from error


def request_id(header: str | None, kind: Literal["cmpl", "chatcmpl"], fresh: str) -> str:
    """`cmpl-X` for the client's X-Request-Id X, where it is printable and at most 128 characters long."""
    usable = header is not None and 0 < len(header) <= 128 and header.isascii() and header.isprintable()
    return f"{kind}-{header if usable else fresh}"
