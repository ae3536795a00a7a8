"""OpenAI requests as typed objects, checked once: what this server does not do is refused by name.

Field names and limits are OpenAI's; `ignore_eos`, `stop_token_ids`, `return_token_ids`, `min_tokens`,
`top_k`, `skip_special_tokens`, `include_stop_str_in_output` and `kv_transfer_params` are vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from broadbeam_runtime import transfer_params
from broadbeam_runtime.api_error import ApiError
from broadbeam_runtime.core import RemotePrefill, SamplingParams
from broadbeam_runtime.detokenizer import TextRules

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Generate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class CompletionRequest(_Generate, frozen=True, kw_only=True):
    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None
    add_special_tokens: bool = True


class ChatRequest(_Generate, frozen=True, kw_only=True):
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


@dataclass(frozen=True, slots=True)
class Generation:
    """What one HTTP request asks of the engine: every prompt, `n` times each."""

    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: SamplingParams
    text: TextRules
    stream: bool
    include_usage: bool
    usage_in_every_chunk: bool
    return_token_ids: bool
    hold_blocks: bool
    remote_prefill: RemotePrefill | None
    context: dict[str, Any] = field(default_factory=dict)


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


def refuse_unsupported(request: CompletionRequest | ChatRequest) -> None:
    """400 for a field that would change the answer in a way this server cannot do; neutral values pass."""
    neutral: dict[str, tuple[Any, ...]] = {
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "repetition_penalty": (None, 1),
        "min_p": (None, 0),
        "logit_bias": (None, {}),
        "response_format": (None, {"type": "text"}),
        "best_of": (None, 1, request.n),
        "use_beam_search": (None, False),
    }
    if isinstance(request, ChatRequest):
        neutral |= {
            "tools": (None, []),
            "functions": (None, []),
            "tool_choice": (None, "none", "auto"),
            "modalities": (None, ["text"]),
            "chat_template": (None,),
        }
    else:
        neutral |= {"echo": (None, False), "suffix": (None, "")}
    for name, values in neutral.items():
        value = getattr(request, name)
        if value not in values:
            shown = msgspec.json.encode(value).decode()
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise ApiError(400, f"{name} = {shown} is not supported yet", name, "unsupported_parameter")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is refused too
        raise ApiError(400, f"{name} is {value:g}, it must be between {low:g} and {high:g}", name)


def _stops(request: _Generate) -> tuple[str, ...]:
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stops) > MAX_STOPS:
        raise ApiError(400, f"stop has {len(stops)} strings, the limit is {MAX_STOPS}", "stop")
    if "" in stops:
        raise ApiError(400, "stop holds an empty string", "stop")
    return stops


def _logprobs(request: CompletionRequest | ChatRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        count, name = request.logprobs, "logprobs"
    else:
        count, name = request.top_logprobs, "top_logprobs"
        if count is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        count = (count or 0) if request.logprobs else None
    if count is not None:
        _between(name, count, 0, MAX_LOGPROBS)
    return count


def generation(
    request: CompletionRequest | ChatRequest,
    prompts: tuple[tuple[int, ...], ...],
    max_model_len: int,
    can_transfer: bool,
) -> Generation:
    """The checked request; ApiError 400 gives the field, its value and the limit."""
    refuse_unsupported(request)
    n = 1 if request.n is None else request.n
    _between("n", n, 1, MAX_CHOICES)
    sampling = _sampling(request, prompts, max_model_len)
    options = request.stream_options or StreamOptions()
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    hold, remote = transfer_params.parse(request.kv_transfer_params, prompts, n, can_transfer)
    if hold and request.stream:
        raise ApiError(400, "a prefill leg (do_remote_decode) cannot be streamed", "stream")
    return Generation(
        prompts=prompts,
        n=n,
        sampling=sampling,
        text=TextRules(
            _stops(request),
            request.include_stop_str_in_output,
            request.min_tokens,
            request.skip_special_tokens,
        ),
        stream=bool(request.stream),
        include_usage=options.include_usage,
        usage_in_every_chunk=options.continuous_usage_stats,
        return_token_ids=bool(request.return_token_ids),
        hold_blocks=hold,
        remote_prefill=remote,
    )


def _sampling(
    request: CompletionRequest | ChatRequest, prompts: tuple[tuple[int, ...], ...], max_model_len: int
) -> SamplingParams:
    wanted, name = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            wanted, name = request.max_completion_tokens, "max_completion_tokens"
    elif wanted is None:
        wanted = 16  # OpenAI's default for completions
    longest = max(len(prompt) for prompt in prompts)
    room = max_model_len - longest
    if room < 1:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens, but the model's context is {max_model_len} tokens "
            "and at least one must be left for the answer",
            "messages" if isinstance(request, ChatRequest) else "prompt",
            "context_length_exceeded",
        )
    if wanted is not None and wanted < 1:
        raise ApiError(400, f"{name} is {wanted}, it must be at least 1", name)
    if wanted is not None and wanted > room:
        raise ApiError(
            400,
            f"{name} is {wanted} and the prompt has {longest} tokens, together {wanted + longest}, "
            f"but the model's context is {max_model_len} tokens",
            name,
            "context_length_exceeded",
        )
    max_tokens = wanted or room
    _between("min_tokens", request.min_tokens, 0, max_tokens)
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    _between("temperature", temperature, 0, 2)
    _between("top_p", top_p, 0, 1)
    if top_p == 0:
        raise ApiError(400, "top_p is 0, it must be above 0", "top_p")
    top_k = request.top_k or 0
    if top_k < -1:
        raise ApiError(400, f"top_k is {top_k}, it must be 0 or -1 (all tokens) or more", "top_k")
    if request.seed is not None:
        _between("seed", request.seed, -(2**63), 2**63 - 1)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        seed=request.seed,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
        logprobs=_logprobs(request),
    )


def request_id(header: str | None, kind: Literal["cmpl", "chatcmpl"], fresh: str) -> str:
    """`cmpl-X` for the client's X-Request-Id X, where it is printable and at most 128 characters long."""
    usable = header is not None and 0 < len(header) <= 128 and header.isascii() and header.isprintable()
    return f"{kind}-{header if usable else fresh}"
