"""Heads that come again go past the parser: what is read must be what the parser would have read."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broadbeam_crds.gateway_config import LimitsConfig
from broadbeam_router.errors import BodyTooLarge, MalformedHttp
from broadbeam_router.incoming import Request, RequestReader

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

    def __init__(self, limits: LimitsConfig = LIMITS) -> None:
        self.requests: list[Request] = []
        self.waiting = 0
        self.reader = RequestReader(limits, self.requests.append, self._expected)

    def _expected(self) -> None:
        self.waiting += 1

    def feed(self, *reads: bytes) -> None:
        for read in reads:
            self.reader.feed(read)

    @property
    def bodies(self) -> list[bytes]:
        return [request.body for request in self.requests]


def parsed(data: bytes) -> Request:
    """As a reader reads it that knows no head."""
    noted = Noted()
    noted.feed(data)
    return noted.requests[0]


requests = st.builds(
    post,
    st.binary(max_size=60),
    st.sampled_from(LAYOUTS),
    target=st.sampled_from(TARGETS),
    key=st.sampled_from(KEYS),
) | st.sampled_from(
    [
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        post(b"{}").replace(b": 2", b": 0002"),
        post(b"{}").replace(b"Host", b"hOST"),
        post(b"{}").replace(b"Auth", b"Expect: 100-continue\r\nAuth"),
    ]
)


@given(sent=st.lists(requests, min_size=1, max_size=6), cuts=st.lists(st.integers(0, 800), max_size=10))
def test_requests_are_read_as_if_no_head_were_known(sent, cuts) -> None:
    stream = b"".join(sent)
    noted = Noted()
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    for start, stop in itertools.pairwise(places):
        noted.feed(stream[start:stop])
    assert noted.reader.failure is None
    assert not noted.reader.halfway
    alone = [parsed(data) for data in sent]
    assert noted.bodies == [request.body for request in alone]
    for found, wanted in zip(noted.requests, alone, strict=True):
        assert (found.head.method, found.head.path) == (wanted.head.method, wanted.head.path)
        lengths = [head.headers.pop(b"content-length", None) for head in (found.head, wanted.head)]
        assert (lengths[0] is None) == (lengths[1] is None)
        assert found.head.headers == wanted.head.headers
    assert noted.waiting == sum(b"Expect" in data for data in sent)


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
