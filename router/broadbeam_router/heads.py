"""Heads of requests, and knowing one again.

Most requests on a connection have the head of the one before, down to the byte, but for the digits of
Content-Length: an SDK sends the same seventeen lines for every call. Such a head need not be parsed and
checked a second time; comparing it takes a ninth of the time.
"""

from __future__ import annotations

import re

import msgspec

MAX_BYTES = 4096  # of a head that is kept, for as long as its connection
MAX_DIGITS = 18  # of a Content-Length; a longer one is for the parser to refuse

_length = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)


class Head(msgspec.Struct, eq=False):
    """`headers` has names in lower case; of a header that came twice, the last. Of a head that is known,
    Content-Length is that of its first request."""

    method: bytes
    path: bytes
    headers: dict[bytes, bytes]
    keep_alive: bool
    chunks: bool  # whether the client understands them (HTTP/1.1)
    key_digest: bytes | None = None  # of the API key in it, once that was looked at


class KnownHead(msgspec.Struct, eq=False):
    """A head that was found good, as the bytes `before` and `after` the digits of its Content-Length."""

    head: Head
    before: bytes
    after: bytes

    def split(self, data: bytes) -> tuple[int, bytes]:
        """The Content-Length in `data`, which begins with `before`, and what comes after the head; 0 as the
        length of what has another head, or not yet the whole of it."""
        digits, after, rest = data[len(self.before) :].partition(self.after)
        if not after or not digits.isdigit() or len(digits) > MAX_DIGITS:
            return 0, b""
        return int(digits), rest


def known_head(data: bytes, head: Head, body_bytes: int) -> KnownHead | None:
    """`head`, which was parsed from the beginning of `data` and has a body of `body_bytes`, to be known
    again; None if it cannot be: without a Content-Length, or if more than a body follows from it."""
    end = data.find(b"\r\n\r\n") + 4
    length = _length.search(data, 0, end)
    if length is None or int(length[1]) != body_bytes or not head.keep_alive or b"expect" in head.headers:
        return None
    return KnownHead(head, data[: length.start(1)], data[length.end(1) : end])
