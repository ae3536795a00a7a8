"""One inference request on its way through the gateway."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Literal

from broadbeam_router.client import ClientConnection
from broadbeam_router.errors import InvalidRequest
from broadbeam_router.incoming import Request

Path = Literal["disaggregated", "decode-only", "fallback"]
_request_id = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class Call:
    """`body` holds nothing that steers routing any more; `lines` are the header lines for the engine."""

    client: ClientConnection
    route: str  # "chat" | "completions"
    path: bytes
    body: bytes
    request_id: bytes
    lines: bytes
    started_s: float
    wants_prefill: bool
    way: Path = "decode-only"
    prefill_name: str | None = None
    decode_name: str | None = None
    status: int = 500  # until an answer says otherwise
    first_byte_s: float | None = field(default=None)


def request_id(request: Request) -> bytes:
    """The client's X-Request-Id, or a new one; InvalidRequest if it could not stand in a log or header."""
    given = request.headers.get(b"x-request-id")
    if given is None:
        return b"%032x" % random.getrandbits(128)
    if not _request_id.fullmatch(given):
        shown = given[:64].decode("latin-1")
        raise InvalidRequest(
            f"X-Request-Id must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -, got {shown!r}",
            "x-request-id",
        )
    return given


def echoed_id(request: Request) -> bytes:
    """The header line that repeats a client's valid X-Request-Id; empty without one."""
    given = request.headers.get(b"x-request-id")
    return b"X-Request-Id: %b\r\n" % given if given is not None and _request_id.fullmatch(given) else b""


def engine_lines(request: Request, request_id: bytes) -> bytes:
    """The header lines an engine gets of what the client sent: its trace, and nothing that names a host."""
    lines = b"X-Request-Id: %b\r\n" % request_id
    headers = request.headers
    if b"traceparent" in headers:
        lines += b"traceparent: %b\r\n" % headers[b"traceparent"]
        if b"tracestate" in headers:
            lines += b"tracestate: %b\r\n" % headers[b"tracestate"]
    return lines
