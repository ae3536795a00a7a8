"""Reading HTTP/1.1 requests out of a byte stream: whole ones, within limits, with one possible reading only.

llhttp refuses what could be read in two ways (both lengths, folded headers, bare line feeds); what it leaves
open (hosts, codings, upgrades, sizes) is refused here.
"""

from __future__ import annotations

from collections.abc import Callable

import httptools
import msgspec

from broadbeam_crds.gateway_config import LimitsConfig
from broadbeam_router.errors import BodyTooLarge, HeadersTooLarge, MalformedHttp, RequestError

KEPT_HEADERS = frozenset((b"authorization", b"x-request-id", b"traceparent", b"tracestate"))


class Request(msgspec.Struct, eq=False):
    """`headers` holds KEPT_HEADERS only; everything else a client sends in a head ends here."""

    method: bytes
    path: bytes
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool
    chunks: bool  # whether the client understands them (HTTP/1.1)


class RequestReader:
    """Calls `on_request` for every whole request and `on_expect` when a client waits for 100 Continue."""

    __slots__ = (
        "_body", "_body_size", "_expects", "_head_size", "_headers", "_hosts", "_limits", "_on_expect",
        "_on_request", "_parser", "_recent", "_seen", "_still", "_url", "failure",
    )  # fmt: skip

    def __init__(
        self, limits: LimitsConfig, on_request: Callable[[Request], None], on_expect: Callable[[], None]
    ) -> None:
        self._limits = limits
        self._on_request = on_request
        self._on_expect = on_expect
        self._parser = httptools.HttpRequestParser(self)
        self._seen = 0  # bytes that the parser has told of
        self._still = 0  # bytes since it last told of any
        self.failure: RequestError | None = None  # sticks: no request is read after it
        self.on_message_begin()

    def feed(self, data: bytes) -> None:
        """Take what came; `failure` is set when it cannot be served."""
        seen = self._seen
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(MalformedHttp(f"malformed HTTP: {error}"))
        self._still = 0 if self._seen != seen else self._still + len(data)
        if self._still > self._limits.max_header_bytes or self._head_size > self._limits.max_header_bytes:
            self._fail(self._head_too_large())

    @property
    def halfway(self) -> bool:
        """Whether a part of a request has come."""
        return bool(self._url) or self._still > 0

    # -- called by the parser -------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_size = 0
        self._head_size = 0
        self._hosts = 0
        self._expects = False

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._seen += 1
        self._head_size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Runs for every header: what can wait for the head's end does.
        self._seen += 1
        self._head_size += len(name) + len(value) + 4
        name = name.lower()
        if name in KEPT_HEADERS:
            if name in self._headers:
                self._fail(MalformedHttp(f"header {name.decode()} is given twice", name.decode()))
            self._headers[name] = value
        elif name == b"host":
            self._hosts += 1
        elif name == b"content-length":
            if int(value) > self._limits.max_body_bytes:
                self._fail(self._body_too_large())
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                self._fail(MalformedHttp("Transfer-Encoding may only be chunked", "transfer-encoding"))
        elif name == b"expect":
            self._expects = True

    def on_headers_complete(self) -> None:
        self._recent = self._parser.get_http_version() == "1.1"
        if self._head_size > self._limits.max_header_bytes:
            self._fail(self._head_too_large())
        if self._hosts != 1 and (self._recent or self._hosts > 1):
            self._fail(MalformedHttp("exactly one Host header is needed", "host"))
        if self._parser.should_upgrade():
            self._fail(MalformedHttp("Upgrade and CONNECT are not supported"))
        if self._expects and self.failure is None:
            self._on_expect()

    def on_body(self, data: bytes) -> None:
        self._seen += 1
        self._body_size += len(data)
        if self._body_size > self._limits.max_body_bytes:
            self._fail(self._body_too_large())
        elif self.failure is None:
            self._body.append(data)

    def on_message_complete(self) -> None:
        if self._head_size > self._limits.max_header_bytes:  # trailers count too
            self._fail(self._head_too_large())
        if self.failure is not None:
            return
        body, url = self._body, self._url
        request = Request(
            self._parser.get_method(),
            url if url.startswith(b"/") and b"?" not in url else _path(url),
            self._headers,
            body[0] if len(body) == 1 else b"".join(body),
            self._recent and self._parser.should_keep_alive(),
            self._recent,
        )
        self._url, self._body = b"", []
        self._on_request(request)

    def _fail(self, error: RequestError) -> None:
        self.failure = self.failure or error

    def _head_too_large(self) -> RequestError:
        return HeadersTooLarge(f"the head is larger than {self._limits.max_header_bytes} bytes")

    def _body_too_large(self) -> RequestError:
        return BodyTooLarge(f"the body is larger than {self._limits.max_body_bytes} bytes")


def _path(url: bytes) -> bytes:
    if not url.startswith(b"/"):  # absolute form, as to a proxy: the host is ignored
        try:
            url = httptools.parse_url(url).path or b"/"
        except httptools.HttpParserInvalidURLError:
            return b""
    return url.partition(b"?")[0]
