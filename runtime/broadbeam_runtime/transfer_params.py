"""`kv_transfer_params`, vLLM's field that carries a prompt's KV from a prefill answer to a decode request."""

from __future__ import annotations

from typing import Any

import msgspec

from broadbeam_runtime.api_error import ApiError
from broadbeam_runtime.core import RemotePrefill, TokenLogprob


def parse(
    params: dict[str, Any] | None, prompts: tuple[tuple[int, ...], ...], n: int, can_transfer: bool
) -> tuple[bool, RemotePrefill | None]:
    """(hold the prompt's blocks, where to pull them from) as `kv_transfer_params` says."""
    name = "kv_transfer_params"
    if not params or not (params.get("do_remote_decode") or params.get("do_remote_prefill")):
        return False, None
    if not can_transfer:
        raise ApiError(400, f"{name}: this engine runs without a KV connector (kv_transfer is not set)", name)
    if len(prompts) != 1:
        raise ApiError(400, f"{name} needs exactly one prompt, the request has {len(prompts)}", name)
    if params.get("do_remote_decode"):
        if params.get("do_remote_prefill"):
            raise ApiError(400, f"{name}: do_remote_decode and do_remote_prefill exclude each other", name)
        if n != 1:
            raise ApiError(400, f"n is {n}, a prefill leg (do_remote_decode) needs n = 1", "n")
        return True, None
    return False, _remote_prefill(params, len(prompts[0]))


class _RemoteParams(msgspec.Struct, frozen=True):
    """The fields of `kv_transfer_params` that the server itself reads; connectors check the rest."""

    remote_engine_id: str
    remote_host: str
    remote_port: int
    remote_num_tokens: int | None = None
    remote_request_id: str | None = None
    remote_prefill_cached_tokens: int | None = None
    first_token: _FirstToken | None = None


class _FirstToken(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


def _remote_prefill(params: dict[str, Any], prompt_tokens: int) -> RemotePrefill:
    name = "kv_transfer_params"
    try:
        checked = msgspec.convert(params, _RemoteParams)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"{name}: {error}", name) from error
    count = prompt_tokens if checked.remote_num_tokens is None else checked.remote_num_tokens
    if count != prompt_tokens:
        raise ApiError(
            400, f"{name}.remote_num_tokens is {count}, but the prompt has {prompt_tokens} tokens", name
        )
    first = checked.first_token
    token = TokenLogprob(first.token_id, first.logprob or 0.0, tuple(first.top)) if first else None
    return RemotePrefill(params, count, token, checked.remote_prefill_cached_tokens or 0)


def answer(
    params: dict[str, Any], token_id: int, logprob: TokenLogprob | None, cached_tokens: int
) -> dict[str, Any]:
    """What a prefill answer tells the decode rank: the connector's params and the token sampled here."""
    first = {
        "token_id": token_id,
        "logprob": logprob and logprob.logprob,
        "top": list(logprob.top) if logprob else [],
    }
    return {**params, "first_token": first, "remote_prefill_cached_tokens": cached_tokens}
