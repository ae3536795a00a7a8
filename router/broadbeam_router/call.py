"""One inference request on its way through the gateway."""

from __future__ import annotations

import random
import re
from typing import Literal

import msgspec

from broadbeam_router.client import ClientConnection
from broadbeam_router.errors import InvalidRequest
from broadbeam_router.heads import Head

Way = Literal["disaggregated", "decode-only", "fallback"]
_request_id = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Call(msgspec.Struct, eq=False):
    """`body` holds nothing that steers routing any more; `id_line` is a header line for both sides and
    `trace_lines` are for the engine. A Struct because making one costs a tenth of a dataclass."""

    client: ClientConnection
    route: str  # "chat" | "completions"
    path: bytes
    body: bytes
    id_line: bytes
    trace_lines: bytes
    started_s: float
    wants_prefill: bool
    bare: bool  # as in Fields
    way: Way = "decode-only"
    prefill_name: str | None = None
    decode_name: str | None = None
    status: int = 500  # until an answer says otherwise
    first_byte_s: float | None = None

    @property
    def request_id(self) -> str:
        return self.id_line.decode()[len("X-Request-Id: ") : -2]

    def route_lines(self) -> bytes:
        """Header lines with the id and with which endpoints made the answer."""
        lines = self.id_line + b"x-broadbeam-route: %b\r\n" % self.way.encode()
        if self.prefill_name is not None:
            lines += b"x-broadbeam-prefill: %b\r\n" % self.prefill_name.encode()
        if self.decode_name is not None:
            lines += b"x-broadbeam-decode: %b\r\n" % self.decode_name.encode()
        return lines


def id_line(head: Head) -> bytes:
    """The header line with the client's X-Request-Id, or a new one; InvalidRequest if it could not stand in
    a log or header."""
    given = head.headers.get(b"x-request-id")
    if given is None:
        return b"X-Request-Id: %032x\r\n" % random.getrandbits(128)
    if not _request_id.fullmatch(given):
        shown = given[:64].decode("latin-1")
        raise InvalidRequest(
            f"X-Request-Id must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -, got {shown!r}",
            "x-request-id",
        )
    return b"X-Request-Id: %b\r\n" % given


def echoed_id(head: Head) -> bytes:
    """The header line that repeats a client's valid X-Request-Id; empty without one."""
    given = head.headers.get(b"x-request-id")
    return b"X-Request-Id: %b\r\n" % given if given is not None and _request_id.fullmatch(given) else b""


def trace_lines(head: Head) -> bytes:
    """The client's W3C trace context as header lines; it has a traceparent."""
    state = head.headers.get(b"tracestate")
    lines = b"traceparent: %b\r\n" % head.headers[b"traceparent"]
    return lines if state is None else b"%btracestate: %b\r\n" % (lines, state)
