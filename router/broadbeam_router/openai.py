"""What the gateway reads of an OpenAI request; the rest of the body passes through unread."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from broadbeam_router.errors import InvalidRequest

MAX_CHOICES = 128  # OpenAI's limit of n
MAX_SHOWN = 64  # characters of a wrong value in a message
# Fields by which a client could steer where an engine reads from or which rank runs: never forwarded.
ROUTING_FIELDS = (
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
)
EXTRA_FIELDS = "vllm_xargs"  # vLLM takes any field from this object too

_routing = attrgetter(*ROUTING_FIELDS, EXTRA_FIELDS)
_NO_ROUTING = (UNSET,) * (len(ROUTING_FIELDS) + 1)

Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Tokens = Annotated[int, Meta(ge=1)]


class Fields(msgspec.Struct, kw_only=True):
    """Common to both routes; null means the same as absent."""

    model: str
    stream: bool | None = None
    n: Choices | None = None
    best_of: Choices | None = None
    max_tokens: Tokens | UnsetType | None = UNSET
    max_completion_tokens: Tokens | UnsetType | None = UNSET
    min_tokens: Raw | UnsetType = UNSET
    stream_options: Raw | UnsetType = UNSET
    echo: bool | None = None
    prompt_logprobs: int | None = None
    kv_transfer_params: Raw | UnsetType = UNSET
    ec_transfer_params: Raw | UnsetType = UNSET
    bootstrap_host: Raw | UnsetType = UNSET
    bootstrap_port: Raw | UnsetType = UNSET
    bootstrap_room: Raw | UnsetType = UNSET
    data_parallel_rank: Raw | UnsetType = UNSET
    vllm_xargs: Raw | UnsetType = UNSET

    @property
    def steers(self) -> bool:
        """Whether the client sent one of ROUTING_FIELDS, or an object where one may hide."""
        return _routing(self) != _NO_ROUTING

    @property
    def splits(self) -> bool:
        """Whether prefill and decode may run on two ranks: one kv_transfer_params names the blocks of one
        sequence, and a rank that did not compute a prompt cannot tell its log-probabilities."""
        one_sequence = (self.n or 1) == 1 and (self.best_of or 1) == 1
        return one_sequence and not self.echo and self.prompt_logprobs is None

    @property
    def bare(self) -> bool:
        """Whether nothing says how many tokens to make or how to stream them, so that a prefill leg need
        only add to the body: decoding it and encoding another is a twentieth of what two legs cost."""
        lengths = (self.max_tokens, self.max_completion_tokens, self.min_tokens)
        return all(length is UNSET for length in lengths) and not self.stream and self.stream_options is UNSET


class Message(msgspec.Struct):
    """Any object: what is in it is the engine's to judge."""


class ChatFields(Fields, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]


class CompletionFields(Fields, kw_only=True):
    prompt: Raw

    @property
    def splits(self) -> bool:
        text = bytes(self.prompt)
        several_prompts = text[:1] == b"[" and text[1:].lstrip()[:1] in (b'"', b"[")
        return not several_prompts and super().splits


_chat = msgspec.json.Decoder(ChatFields)
_completion = msgspec.json.Decoder(CompletionFields)
_object = msgspec.json.Decoder(dict[str, Raw])
_where = re.compile(r"^(?P<what>.*?) - at `\$\.(?P<field>\w+)(?P<rest>.*)`$")


def chat_fields(body: bytes) -> ChatFields:
    """The fields of a chat request; InvalidRequest names the field, its value and what is allowed."""
    try:
        _check_utf8(body)
        return _chat.decode(body)
    except (ValueError, RecursionError) as error:
        raise _explained(body, error) from error


def completion_fields(body: bytes) -> CompletionFields:
    """The fields of a completions request; InvalidRequest as in `chat_fields`."""
    try:
        _check_utf8(body)
        fields = _completion.decode(body)
    except (ValueError, RecursionError) as error:
        raise _explained(body, error) from error
    prompt = bytes(fields.prompt)
    if prompt[:1] not in (b'"', b"[") or prompt[1:].lstrip()[:1] == b"]":
        shown = _shown(fields.prompt)
        raise InvalidRequest(
            f"prompt must be a string, or a non-empty array of strings or of token ids, got {shown}", "prompt"
        )
    return fields


def _check_utf8(body: bytes) -> None:
    """Raises UnicodeDecodeError; fields that nobody reads here are not decoded, so this is the only check."""
    if not body.isascii():
        str(body, "utf-8")


def top_level(body: bytes) -> dict[str, Raw]:
    """The members of a JSON object, values as their own bytes. The body was decoded before."""
    return _object.decode(body)


def _shown(value: Raw) -> str:
    text = bytes(value).decode(errors="replace")
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _explained(body: bytes, error: Exception) -> InvalidRequest:
    if not isinstance(error, msgspec.ValidationError):
        return InvalidRequest(
            f"the body is not JSON: {error}" if body else "the body is empty, expected JSON"
        )
    message = str(error)
    place = _where.match(message)
    if place is None:  # no place: the body as a whole, or a missing field
        missing = re.search(r"missing required field `(\w+)`", message)
        if missing is None:
            return InvalidRequest(f"the body must be a JSON object: {message}")
        return InvalidRequest(f"{missing[1]} is required", missing[1])
    field = place["field"]
    try:
        value = _shown(top_level(body)[field])
    except (msgspec.DecodeError, RecursionError) as deeper:  # after the field at fault, the body is broken
        return _explained(body, deeper)
    what = place["what"].replace("`", "").replace("Expected ", "").split(", got")[0]
    return InvalidRequest(f"{field}{place['rest']} must be {what}, got {value}", field)
