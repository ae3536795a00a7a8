"""Heads that come again go past the parser: what is read must be what the parser would have read."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadbeam_crds.gateway_config import LimitsConfig
from broadbeam_router.errors import BodyTooLarge, MalformedHttp
from broadbeam_router.incoming import LESSONS, Request, RequestReader

LIMITS = LimitsConfig(max_body_bytes=1000, max_header_bytes=1000)
TARGETS = (b"/v1/chat/completions", b"/v1/completions")
KEYS = (b"one", b"two")
TARGET = b"POST %(target)b HTTP/1.1\r\n"
KEY = b"Authorization: Bearer %(key)b\r\n"
# The length as clients write it: in the middle, first, and last with blanks around it.
LAYOUTS = (
    TARGET + b"Host: a\r\nContent-Length: %(length)d\r\n" + KEY + b"\r\n",
    TARGET + b"content-length:%(length)d\r\nhost: a\r\n" + KEY + b"\r\n",
    TARGET + b"Host: a\r\n" + KEY + b"CONTENT-LENGTH:\t %(length)d \r\n\r\n",
)


def post(body: bytes, layout: bytes = LAYOUTS[0], target: bytes = TARGETS[0], key: bytes = KEYS[0]) -> bytes:
    return layout % {b"target": target, b"length": len(body), b"key": key} + body


class Noted:
    """A reader and what it read."""

    def __init__(self, limits: LimitsConfig = LIMITS, lessons: int = LESSONS) -> None:
        self.requests: list[Request] = []
        self.waiting = 0
        self.reader = RequestReader(limits, self.requests.append, self._expected, lessons=lessons)

    def _expected(self) -> None:
        self.waiting += 1

    def feed(self, *reads: bytes) -> None:
        for read in reads:
            self.reader.feed(read)

    @property
    def bodies(self) -> list[bytes]:
        return [request.body for request in self.requests]


# Lines that a head may have more of than it needs: most of them change who asks or how the body is framed.
ODD_LINES = (
    b"Authorization: Bearer one",
    b"Authorization: Bearer two",
    b"X-Request-Id: 1",
    b"X-Request-Id: 2",
    b"Connection: close",
    b"Expect: 100-continue",
    b"Transfer-Encoding: chunked",
    b"Content-Length: 3",
    b"X-A: content-length: 5",
    b" folded",
)


@st.composite
def anything(draw) -> bytes:
    """A request that may be good, and may be the start or the end of one to a hasty reader."""
    body = draw(st.sampled_from((b"", b"a", b"\r\n", b"0\r\n\r\n", post(b"a"), b"0123456789ab")))
    length = draw(st.sampled_from((b"Content-Length: %d", b"content-length:\t%d ", b"Content-Length: 00%d")))
    lines = [b"Host: a", length % len(body), *draw(st.lists(st.sampled_from(ODD_LINES), max_size=2))]
    start = draw(st.sampled_from((b"POST %b HTTP/1.1", b"POST %b HTTP/1.0", b"GET %b HTTP/1.1"))) % TARGETS[0]
    return b"\r\n".join((start, *draw(st.permutations(lines)), b"", body))


@st.composite
def repeated_in_reads(draw) -> list[bytes]:
    """What comes on one connection, read by read: a good request again and again, others between."""
    good = post(b"0123456789ab", draw(st.sampled_from(LAYOUTS)))
    others = draw(st.lists(anything(), min_size=1, max_size=2))
    reads: list[bytes] = [good]
    for request in draw(st.lists(st.sampled_from([good, good, *others]), min_size=1, max_size=6)):
        digits = request.lower().find(b"content-length:") + 17
        near = st.integers(digits, min(digits + 3, len(request)))
        cuts = draw(st.just([]) | st.lists(near | st.integers(1, len(request)), max_size=2))
        parts = [request[i:j] for i, j in itertools.pairwise(sorted({0, *cuts, len(request)}))]
        if draw(st.integers(0, 3)) == 0:
            reads[-1] += parts.pop(0)
        reads += parts
    return reads


def as_read(noted: Noted, reads: list[bytes]) -> list[object]:
    """All that a reader tells of `reads`; of a known head, Content-Length is that of its first request."""
    for read in reads:
        if noted.reader.failure is None:
            noted.feed(read)
    told: list[object] = [noted.waiting, noted.reader.halfway, str(noted.reader.failure)]
    for request in noted.requests:
        head = request.head
        headers = {name: value for name, value in head.headers.items() if name != b"content-length"}
        told.append((head.method, head.path, headers, head.keep_alive, head.chunks, request.body))
    return told


@settings(max_examples=400, deadline=None)
@given(repeated_in_reads())
def test_requests_are_read_as_if_no_head_were_known(reads) -> None:
    assert as_read(Noted(), reads) == as_read(Noted(lessons=0), reads)


def test_a_known_head_that_ends_within_its_length_is_waited_for() -> None:
    for layout in LAYOUTS:
        again = post(b"a second body", layout)
        for cut in range(1, len(again)):
            noted = Noted()
            noted.feed(post(b"{}", layout), again[:cut], again[cut:])
            assert noted.bodies == [b"{}", b"a second body"], again[:cut]


def test_line_ends_behind_a_request_are_no_part_of_one() -> None:
    noted = Noted()
    noted.feed(post(b"{}"), b"\r\n")
    assert not noted.reader.halfway
    noted.feed(post(b"again"))
    assert noted.requests[1].head is noted.requests[0].head


@pytest.mark.parametrize(
    "reads",
    [
        pytest.param([post(b"second")], id="whole"),
        pytest.param([post(b"second")[:-6], b"second"], id="head and body apart, as httpx sends them"),
        pytest.param([post(b"second")[:-3], b"o", b"nd"], id="a body in parts"),
        pytest.param([post(b"second") + post(b"third")], id="two in one read"),
        pytest.param(
            [post(b"second")[:-1], b"d" + post(b"third")[:30], post(b"third")[30:]], id="overlapping"
        ),
    ],
)
def test_a_head_that_comes_again_is_the_same_head(reads) -> None:
    noted = Noted()
    noted.feed(post(b"a first body"))
    noted.feed(*reads)
    assert noted.bodies[1] == b"second"
    assert noted.requests[1].head is noted.requests[0].head


def test_an_odd_first_request_does_not_keep_the_others_heads_unknown() -> None:
    noted = Noted()
    noted.feed(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", post(b"{}", key=KEYS[1]), post(b"{}"), post(b"{}"))
    noted.feed(post(b"{}", key=KEYS[1]), post(b"{}"))
    heads = [request.head for request in noted.requests]
    assert heads[2] is heads[3] is heads[5]
    assert heads[4].headers[b"authorization"] == b"Bearer two"


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        pytest.param(post(b"x" * 1001), BodyTooLarge, id="a body over the limit"),
        pytest.param(post(b"").replace(b": 0", b": " + b"9" * 30), MalformedHttp, id="a length over 64 bits"),
        pytest.param(post(b"").replace(b": 0", b": " + b"9" * 5000), MalformedHttp, id="one over Python's"),
        pytest.param(post(b"").replace(b": 0", b": +1"), MalformedHttp, id="a length with a sign"),
        pytest.param(post(b"").replace(b": 0", b": \xb2"), MalformedHttp, id="a superscript"),
        pytest.param(post(b"").replace(b": 0", b": "), MalformedHttp, id="no length"),
        pytest.param(
            post(b"").replace(b": 0", b": 1\r\nContent-Length: 2"), MalformedHttp, id="a second length"
        ),
        pytest.param(
            post(b"").replace(b": 0", b": 1\r\nTransfer-Encoding: chunked"), MalformedHttp, id="a coding"
        ),
    ],
)
def test_what_is_refused_of_a_first_request_is_refused_of_a_later_one(data, failure) -> None:
    noted = Noted()
    noted.feed(post(b"{}"), post(b"{}"), data)
    assert len(noted.requests) == 2
    assert isinstance(noted.reader.failure, failure)


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(post(b"{}").replace(b"1.1", b"1.0"), id="HTTP/1.0"),
        pytest.param(post(b"{}").replace(b"Auth", b"Connection: close\r\nAuth"), id="closing"),
    ],
)
def test_the_head_of_a_last_request_is_not_known_again(first) -> None:
    noted = Noted()
    noted.feed(first, first)
    assert len(noted.requests) == 1 or noted.requests[0].head is not noted.requests[1].head


def test_a_large_head_is_not_kept() -> None:
    noted = Noted(LimitsConfig())
    large = post(b"{}").replace(b"Auth", b"X-Large: %b\r\nAuth" % (b"x" * 5000))
    noted.feed(large, large)
    assert noted.bodies == [b"{}", b"{}"]
    assert noted.requests[0].head is not noted.requests[1].head


def test_half_a_body_is_half_a_request() -> None:
    noted = Noted()
    noted.feed(post(b"{}"), post(b"{}")[:-1])
    assert noted.reader.halfway
    noted.feed(b"}")
    assert not noted.reader.halfway


def test_a_body_in_tiny_chunks_takes_no_more_memory_than_another() -> None:
    noted = Noted(LimitsConfig())
    noted.feed(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunks = b"2\r\nab\r\n" * 1000
    tracemalloc.start()
    for _ in range(100):
        noted.feed(chunks)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2 * 200_000
    noted.feed(b"0\r\n\r\n")
    assert noted.bodies == [b"ab" * 100_000]


def test_a_large_head_is_measured_once_and_not_at_every_byte_of_its_body() -> None:
    class Measured(RequestReader):
        times = 0

        def _head_size(self) -> int:
            self.times += 1
            return super()._head_size()

    requests: list[Request] = []
    reader = Measured(LimitsConfig(max_header_bytes=500), requests.append, lambda: None)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 40 + b"Content-Length: 1000\r\n\r\n"
    )
    reader.feed(head + b"x" * 400)
    for _ in range(600):
        reader.feed(b"x")
    assert [len(request.body) for request in requests] == [1000]
    assert reader.times < 10
