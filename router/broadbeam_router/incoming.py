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
from broadbeam_router.heads import MAX_BYTES, Head, KnownHead, known_head

# The targets of nearly all requests, in which there is nothing to look for.
PLAIN_TARGETS = frozenset((b"/v1/chat/completions", b"/v1/completions"))
# Requests of a connection whose heads are learned, the last one's only, until one comes again: the first may
# be odd (a retry, another route), and where all differ there is nothing to learn.
LESSONS = 8
LARGE_BYTES = 256 * 2**10  # a body above it is asked for only once its head is found good
SINGLE_HEADERS = (b"host", b"authorization", b"x-request-id", b"traceparent", b"tracestate")


Headers = dict[bytes, bytes]


class Request(msgspec.Struct, eq=False):
    head: Head
    body: bytes


class RequestReader:
    """Calls `on_request` for every whole request and `on_expect` when a client waits for 100 Continue, and
    before a large body or one of unknown size `check_sender`, which may raise a RequestError.

    The parser's callbacks only note, and what is noted is looked at once the head is whole. A request whose
    head is known goes past the parser, which then stands between two requests."""

    __slots__ = (
        "_body", "_body_size", "_check_sender", "_fed", "_first", "_headers", "_heads", "_known",
        "_lessons", "_max_body", "_max_head", "_max_known", "_missing", "_on_expect", "_on_request",
        "_open", "_parser", "_progress", "_recent", "_size", "_still", "_url", "failure",
    )  # fmt: skip

    def __init__(
        self,
        limits: LimitsConfig,
        on_request: Callable[[Request], None],
        on_expect: Callable[[], None],
        check_sender: Callable[[Headers], None] = lambda headers: None,
        lessons: int = LESSONS,
    ) -> None:
        self._max_head = limits.max_header_bytes
        self._max_body = limits.max_body_bytes
        self._max_known = min(self._max_body, LARGE_BYTES)
        self._on_request = on_request
        self._on_expect = on_expect
        self._check_sender = check_sender
        self._parser = httptools.HttpRequestParser(self)
        self._body = bytearray()  # and no list: a body may come two bytes at a time
        self._size = 0  # bytes of the read being parsed
        self._fed = 0  # bytes read for the request being read, or somewhat more
        self._still = 0  # bytes since the parser last told of any
        self._progress = (0, 0, 0)
        self._lessons = lessons
        self._first = b""  # how the request being parsed begins, while there are lessons
        self._known: KnownHead | None = None
        self._missing = 0  # bytes of the body of a request with the known head
        self.failure: RequestError | None = None  # sticks: no request is read after it
        self.on_message_begin()
        self._open = False  # the parser is within a request

    def feed(self, data: bytes) -> None:
        """Take what came; `failure` is set when it cannot be served."""
        known = self._known
        if self._missing:
            data = self._take_body(data)
        elif known is not None and not self._fed and data.startswith(known.before):
            length, rest = known.split(data)
            if 0 < length <= self._max_known:
                self._lessons = 0
                self._missing = length
                data = self._take_body(rest)
        if data:
            self._parse(data)

    def _take_body(self, data: bytes) -> bytes:
        """Complete the request with the known head; what comes after it is given back."""
        known, missing = self._known, self._missing
        assert known is not None
        if len(data) < missing:
            self._body += data
            self._missing -= len(data)
            return b""
        body = data[:missing]
        if self._body:
            body = bytes(self._body + body)
            self._body = bytearray()
        self._missing = 0
        self._on_request(Request(known.head, body))
        return data[missing:]

    def _parse(self, data: bytes) -> None:
        size = self._size = len(data)
        if self._lessons and not self._fed:
            self._first = data[:MAX_BYTES]
        self._fed += size
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(MalformedHttp(f"malformed HTTP: {error}"))
        if self._open:
            self._watch_progress(size)
        else:
            self._fed = 0  # whatever came behind a request, line ends that some clients send there

    @property
    def halfway(self) -> bool:
        """Whether a part of a request has come."""
        return self._open or self._missing > 0

    def _watch_progress(self, size: int) -> None:
        """A request is not whole: neither its head nor what the parser swallows unsaid may grow for ever."""
        before, progress = self._progress, (len(self._url), len(self._heads), self._body_size)
        self._still = 0 if progress != before else self._still + size
        self._progress = progress
        if self._still > self._max_head:
            self._fail(self._head_too_large())
        elif self._fed > self._max_head and progress[:2] != before[:2]:
            self._check_head_size()

    # -- called by the parser -------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._open = True
        self._url = b""
        self._heads: list[tuple[bytes, bytes]] = []
        self._body_size = 0
        self._fed = self._size

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._heads.append((name, value))

    def on_headers_complete(self) -> None:
        headers = self._headers = {name.lower(): value for name, value in self._heads}
        if len(headers) != len(self._heads):
            self._check_doubles()
        self._recent = self._parser.get_http_version() == "1.1"
        if b"host" not in headers and self._recent:
            self._fail(MalformedHttp("exactly one Host header is needed", "host"))
        self._check_framing(headers)
        if self._parser.should_upgrade():
            self._fail(MalformedHttp("Upgrade and CONNECT are not supported"))
        if self._fed > self._max_head:
            self._check_head_size()
        if b"expect" in headers and self._recent and self.failure is None:
            self._on_expect()

    def on_body(self, data: bytes) -> None:
        self._body_size += len(data)
        if self._body_size <= self._max_body:
            self._body += data
        else:
            self._fail(self._body_too_large())

    def on_message_complete(self) -> None:
        if self._fed > self._max_head:
            self._check_head_size()  # trailers count too
        if self.failure is not None:
            return
        url = self._url
        head = Head(
            self._parser.get_method(),
            url if url in PLAIN_TARGETS else _path(url),
            self._headers,
            self._recent and self._parser.should_keep_alive(),
            self._recent,
        )
        body = bytes(self._body)
        self._body = bytearray()
        if self._first:
            self._lessons -= 1
            self._known = known_head(self._first, head, len(body))
            self._first = b""
        elif not head.keep_alive:
            self._known = None  # nothing is read after the last request
        self._open = False
        self._fed = 0
        self._on_request(Request(head, body))

    # -- what is noted, looked at ---------------------------------------------------------------------

    def _check_framing(self, headers: Headers) -> None:
        length, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
        if length is not None and int(length) > self._max_body:
            self._fail(self._body_too_large())
        elif coding is not None and coding.lower() != b"chunked":
            self._fail(MalformedHttp("Transfer-Encoding may only be chunked", "transfer-encoding"))
        elif coding is not None or (length is not None and int(length) > LARGE_BYTES):
            try:
                self._check_sender(headers)
            except RequestError as error:
                self._fail(error)

    def _check_doubles(self) -> None:
        names = [name.lower() for name, _ in self._heads]
        for name in SINGLE_HEADERS:
            if names.count(name) > 1:
                self._fail(MalformedHttp(f"header {name.decode()} is given twice", name.decode()))

    def _check_head_size(self) -> None:
        if self._head_size() > self._max_head:
            self._fail(self._head_too_large())

    def _head_size(self) -> int:
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._heads)

    def _fail(self, error: RequestError) -> None:
        self.failure = self.failure or error

    def _head_too_large(self) -> RequestError:
        return HeadersTooLarge(f"the head is larger than {self._max_head} bytes")

    def _body_too_large(self) -> RequestError:
        return BodyTooLarge(f"the body is larger than {self._max_body} bytes")


def _path(url: bytes) -> bytes:
    if not url.startswith(b"/"):  # absolute form, as to a proxy: the host is ignored
        try:
            url = httptools.parse_url(url).path or b"/"
        except httptools.HttpParserInvalidURLError:
            return b""
    return url.partition(b"?")[0]
