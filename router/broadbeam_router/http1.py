"""HTTP/1.1 as bytes: status lines, heads and chunks."""

from __future__ import annotations

from http import HTTPStatus

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream"
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def status_line(status: int) -> bytes:
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status


def response(status: int, content_type: bytes, body: bytes, headers: bytes, keep_alive: bool) -> bytes:
    """A whole response; `headers` are further lines, each with its line end."""
    return b"%bContent-Type: %b\r\nContent-Length: %d\r\n%b%b\r\n%b" % (
        status_line(status),
        content_type,
        len(body),
        headers,
        b"" if keep_alive else b"Connection: close\r\n",
        body,
    )


def stream_head(status: int, content_type: bytes, headers: bytes, keep_alive: bool, chunked: bool) -> bytes:
    """The head of a response whose length is not known; without chunks its end is the connection's."""
    return b"%bContent-Type: %b\r\n%b%b%b\r\n" % (
        status_line(status),
        content_type,
        headers,
        b"Transfer-Encoding: chunked\r\n" if chunked else b"",
        b"" if keep_alive else b"Connection: close\r\n",
    )


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
