"""What a child process tells its supervisor while it starts: JSON lines on an inherited pipe."""

from __future__ import annotations

import os

import msgspec

MAX_ERROR = 600  # characters; a line stays whole


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """`done` is 0..1 where known; `path` ends a fetch, `ready` a start, `error` says why it failed;
    `running` counts requests while a rank drains."""

    stage: str
    done: float | None = None
    detail: str = ""
    ready: bool = False
    path: str | None = None
    error: str | None = None
    running: int | None = None


class StatusPipe:
    """The child's end. A supervisor that went away is no error: the kernel ends this process then."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._last: Status | None = None

    def send(self, status: Status) -> None:
        """Write `status` unless it repeats the last one. A line is shorter than PIPE_BUF, so it is atomic."""
        if self._fd is None or status == self._last:
            return
        self._last = status
        if status.error is not None and len(status.error) > MAX_ERROR:
            status = msgspec.structs.replace(status, error=status.error[:MAX_ERROR] + " …")
        line = msgspec.json.encode(status)[:4000] + b"\n"
        try:
            os.write(self._fd, line)
        except BrokenPipeError:
            self._fd = None


def decode(line: bytes) -> Status | None:
    """The status of one line; None for a line cut short by a dying child."""
    try:
        return msgspec.json.decode(line, type=Status)
    except msgspec.MsgspecError:
        return None
