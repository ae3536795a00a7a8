"""The bodies of the two legs of a disaggregated request (vLLM's two-step protocol).

The prefill rank gets the request with one token to make and the order to keep its KV blocks; the decode
rank gets the request as the client sent it and, verbatim, what the prefill rank said about the blocks.
"""

from __future__ import annotations

from contextlib import suppress

import msgspec
from msgspec import Raw

from broadbeam_router.openai import EXTRA_FIELDS, ROUTING_FIELDS, top_level

_encode = msgspec.json.Encoder().encode
_KEEP_BLOCKS = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
_ADDED = b'"max_tokens":1,"kv_transfer_params":' + _KEEP_BLOCKS
_PREFILL = {"stream": Raw(b"false"), "max_tokens": Raw(b"1"), "kv_transfer_params": Raw(_KEEP_BLOCKS)}
_NOT_FOR_PREFILL = frozenset(("stream_options", "min_tokens"))


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: Raw = Raw(b"null")


_answer = msgspec.json.Decoder(_PrefillAnswer)


def stripped(body: bytes) -> bytes:
    """`body` without the fields by which a client could steer routing."""
    members = top_level(body)
    for name in ROUTING_FIELDS:
        members.pop(name, None)
    if EXTRA_FIELDS in members:
        with suppress(msgspec.ValidationError):  # no object: the engine refuses it
            extra = top_level(bytes(members[EXTRA_FIELDS]))
            members[EXTRA_FIELDS] = Raw(_encode({k: v for k, v in extra.items() if k not in ROUTING_FIELDS}))
    return _encode(members)


def prefill_body(body: bytes, bare: bool) -> bytes:
    """`body` (already stripped; `bare` as in Fields) as the prefill rank gets it."""
    if bare:
        return _with(body, _ADDED)
    members = top_level(body)
    for name in _NOT_FOR_PREFILL & members.keys():
        del members[name]
    if "max_completion_tokens" in members:
        members["max_completion_tokens"] = _PREFILL["max_tokens"]
    members.update(_PREFILL)
    return _encode(members)


def decode_body(body: bytes, params: bytes) -> bytes:
    """`body` (already stripped) with the KV blocks to start from."""
    return _with(body, b'"kv_transfer_params":' + params)


def _with(body: bytes, members: bytes) -> bytes:
    """`body`, a non-empty object, with `members` before its last brace."""
    return b"%b,%b}" % (body[: body.rindex(b"}")], members)


def transfer_params(answer: bytes) -> bytes | None:
    """kv_transfer_params of a prefill answer as its own bytes; None if there are none.

    Raises msgspec.MsgspecError if the answer is not JSON."""
    params = bytes(_answer.decode(answer).kv_transfer_params)
    return None if params in (b"null", b"{}") else params
