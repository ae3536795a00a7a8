"""From an OpenAI request to what the engine is asked: checked once, what cannot be done refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from broadbeam_runtime import transfer_params
from broadbeam_runtime.api_error import ApiError
from broadbeam_runtime.core import ModelInfo, RemotePrefill, SamplingParams
from broadbeam_runtime.detokenizer import TextRules
from broadbeam_runtime.openai_api import ChatRequest, CompletionRequest, GenerateRequest, StreamOptions

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_SEQUENCES = 2048  # prompts * n of one request


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


def check_ids(ids: list[int], vocab_size: int, name: str) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ApiError(
                400, f"{name} holds token id {token}, it must be between 0 and {vocab_size - 1}", name
            )


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN is refused too
        raise ApiError(400, f"{name} is {value:g}, it must be between {low:g} and {high:g}", name)


def _stops(request: GenerateRequest) -> tuple[str, ...]:
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
    model: ModelInfo,
    can_transfer: bool,
) -> Generation:
    """The checked request; ApiError 400 gives the field, its value and the limit."""
    refuse_unsupported(request)
    n = 1 if request.n is None else request.n
    _between("n", n, 1, MAX_CHOICES)
    if len(prompts) * n > MAX_SEQUENCES:
        raise ApiError(
            400, f"{len(prompts)} prompts, n = {n} times each: the limit is {MAX_SEQUENCES} answers", "prompt"
        )
    check_ids(request.stop_token_ids or [], model.vocab_size, "stop_token_ids")
    sampling = _sampling(request, prompts, model.max_model_len)
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
