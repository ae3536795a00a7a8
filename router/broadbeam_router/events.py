"""Passing server-sent events on: whole ones only, so that a stream that breaks ends between two events."""

from __future__ import annotations

from broadbeam_router.client import ClientConnection

MAX_EVENT_BYTES = 2**20  # a longer run without an empty line is passed on as it comes


class EventRelay:
    """Hands a client the events of an engine; a part of an event waits for its end."""

    __slots__ = ("_client", "_rest")

    def __init__(self, client: ClientConnection) -> None:
        self._client = client
        self._rest = b""

    def deliver(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith((b"\n\n", b"\r\n\r\n")):
            end = _end_of_events(data)
            if end:
                data, self._rest = data[:end], data[end:]
            elif len(data) < MAX_EVENT_BYTES:
                self._rest = data
                return
        self._client.send_part(data)

    def finish(self) -> None:
        """The engine's stream ended as it should."""
        if self._rest:
            self._client.send_part(self._rest)
        self._client.end_stream()


def _end_of_events(data: bytes) -> int:
    """Where the last whole event of `data` ends; 0 if none does."""
    lf, crlf = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
