"""Connections to one engine rank: kept alive, one request at a time each, every failure with its kind."""

from __future__ import annotations

import asyncio
import errno
from typing import Literal, Protocol, cast

import httptools
import msgspec

from broadbeam_router import http1
from broadbeam_router.deadlines import NEVER, Deadlines
from broadbeam_router.errors import TooManyRequests
from broadbeam_router.running import Signal

Failure = Literal["connect", "reset", "timeout", "protocol"]
IDLE_S = 4.0  # uvicorn (vLLM) closes after 5 s of silence; leave before it does
JOIN_BYTES = 16384  # smaller bodies are copied behind their head, to be one write
MAX_IDLE = 256  # connections kept per rank
MAX_BUFFERED_BYTES = 64 * 2**20  # of an answer that is not a stream
# The gateway's own want of file descriptors, memory or ports.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)


class UpstreamFailed(Exception):  # noqa: N818
    """`stale`: the connection was kept from an earlier request and died without a byte of an answer, so
    the engine has not seen this one."""

    def __init__(self, kind: Failure, detail: str, stale: bool = False) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.stale = stale


class Sink(Protocol):
    def deliver(self, data: bytes) -> None: ...


class Answer(msgspec.Struct, eq=False):
    """What an engine has answered so far. A Struct because making one is a single call, where resetting as
    many attributes of the connection is a tenth of what a request costs it."""

    status: int = 0
    content_type: bytes = http1.JSON
    retry_after: bytes | None = None
    body: bytes = b""  # of an answer that is no stream, once it is whole
    streaming: bool = False
    begun: bool = False  # a byte of it has come
    framed: bool = False  # it says how long it is; else it ends with the connection
    complete: bool = False
    size: int = 0  # bytes that came before an answer that is no stream was whole


_NO_ANSWER = Answer()


class UpstreamConnection(asyncio.Protocol):
    """One exchange at a time: `send`, then the answer's fields, then for a stream `relay`."""

    __slots__ = (
        "_idle_s", "_now", "_parser", "_parts", "_pool", "_reusable", "_sink", "_waiter",
        "answer", "deadline", "served", "transport",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._now = pool.loop.time
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: Signal | None = None
        self._sink: Sink | None = None
        self._idle_s = 0.0
        self._parts: list[bytes] = []  # of the body, not yet delivered
        self._reusable = True
        self.transport: asyncio.Transport | None = None
        self.deadline = NEVER
        self.served = 0  # exchanges begun on this connection
        self.answer = _NO_ANSWER

    # -- one exchange ---------------------------------------------------------------------------------

    def send(self, head: bytes, body: bytes, first_byte_s: float, idle_s: float) -> Signal:
        """Write a request; resolves when the answer is whole or, for a stream, has its first part.

        Fails with UpstreamFailed."""
        transport = self.transport
        assert transport is not None
        assert self._waiter is None, "one exchange at a time"
        waiter = self._waiter = Signal()
        self.answer = Answer()
        self.served += 1
        self._idle_s = idle_s
        if transport.is_closing():
            self._fail("reset", "the connection was closed")
            return waiter
        self.deadline = self._now() + first_byte_s
        if len(body) < JOIN_BYTES:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)
        return waiter

    def relay(self, sink: Sink) -> Signal:
        """Give `sink` what has come and what will; resolves at the end, fails with UpstreamFailed."""
        self._waiter = Signal()
        self._sink = sink
        if self._parts:
            self._deliver()
        if self.answer.complete:
            self._waiter.set()
        elif self.transport is None or self.transport.is_closing():
            self._fail("reset", "the connection was closed")
        return self._waiter

    def release(self) -> None:
        """The exchange is over: keep the connection if it can serve another, else cut it, which makes the
        engine give the request up."""
        complete = self.answer.complete
        self._sink = self._waiter = None
        self.answer = _NO_ANSWER  # an idle connection must not hold the last one
        self._parts.clear()
        if complete and self._reusable:
            self._pool.keep(self)
        elif self.transport is not None:
            self.deadline = NEVER
            self.transport.abort()

    def pause(self) -> None:
        """Stop reading; the engine's silence is then not its own."""
        if self.transport is not None and not self.transport.is_closing() and not self.answer.complete:
            self.transport.pause_reading()
            self.deadline = NEVER

    def resume(self) -> None:
        if self.transport is not None and not self.transport.is_closing() and not self.answer.complete:
            self.transport.resume_reading()
            self.deadline = self._now() + self._idle_s

    def expire(self) -> None:
        if self._waiter is None:
            self._pool.forget(self)
        else:
            self._fail("timeout", "no byte in time")
        if self.transport is not None:
            self.transport.abort()

    def _fail(self, kind: Failure, detail: str) -> None:
        if self._waiter is not None:
            stale = kind == "reset" and self.served > 1 and not self.answer.begun
            self._waiter.fail(UpstreamFailed(kind, detail, stale))

    def _deliver(self) -> None:
        assert self._sink is not None
        parts, self._parts = self._parts, []
        self._sink.deliver(parts[0] if len(parts) == 1 else b"".join(parts))

    # -- asyncio and the parser -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        self._pool.deadlines.add(self)

    def data_received(self, data: bytes) -> None:
        waiter, answer = self._waiter, self.answer
        if waiter is None or answer.complete:
            self._unasked()
            return
        answer.begun = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._broken(f"not HTTP: {error}")
            return
        if not answer.complete:
            self.deadline = self._now() + self._idle_s
        if self._sink is not None and self._parts:
            self._deliver()
        if answer.complete or (answer.streaming and self._sink is None and self._parts):
            waiter.set()
        elif not answer.streaming:
            answer.size += len(data)
            if answer.size > MAX_BUFFERED_BYTES:
                self._broken(f"an answer larger than {MAX_BUFFERED_BYTES} bytes")

    def _unasked(self) -> None:
        """Bytes that answer nothing: the connection cannot be trusted."""
        self._reusable = False
        if self._waiter is None:
            self._pool.forget(self)
            assert self.transport is not None
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._pool.deadlines.discard(self)
        answer = self.answer
        if not answer.complete and exc is None and answer.status >= 200 and not answer.framed:
            self._complete(answer)
            if self._waiter is not None:
                self._waiter.set()
        elif not answer.complete:
            self._fail("reset", str(exc) if exc else "closed before the answer's end")

    def _broken(self, detail: str) -> None:
        self._fail("protocol", detail)
        assert self.transport is not None
        self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        name, answer = name.lower(), self.answer
        if answer.complete:
            return
        if name == b"content-type":
            answer.content_type = value
        elif name == b"content-length" or name == b"transfer-encoding":
            answer.framed = True
        elif name == b"retry-after":
            answer.retry_after = value

    def on_headers_complete(self) -> None:
        answer = self.answer
        if answer.complete:  # a second answer, after which nothing is trusted
            self._reusable = False
            return
        status = answer.status = self._parser.get_status_code()
        answer.streaming = status == 200 and answer.content_type.startswith(http1.EVENT_STREAM)

    def on_body(self, data: bytes) -> None:
        if not self.answer.complete:
            self._parts.append(data)

    def on_message_complete(self) -> None:
        answer = self.answer
        if answer.complete or answer.status < 200:  # 100 Continue and its like: the answer is still to come
            return
        self._complete(answer)
        self._reusable = self._parser.should_keep_alive()

    def _complete(self, answer: Answer) -> None:
        answer.complete = True
        if not answer.streaming:
            answer.body = b"".join(self._parts)


class Pool:
    """The kept connections to one address, the last used first."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deadlines: Deadlines, host: str, port: int) -> None:
        self.loop = loop
        self.deadlines = deadlines
        self._host = host
        self._port = port
        self._idle: list[UpstreamConnection] = []
        self._closed = False

    def open(self) -> None:
        self._closed = False

    def take(self) -> UpstreamConnection | None:
        return self._idle.pop() if self._idle else None

    async def connect(self, timeout_s: float) -> UpstreamConnection:
        """A new connection; UpstreamFailed("connect") if there is none in time, TooManyRequests if this
        process can have no more."""
        task = self.loop.create_task(self._connect(timeout_s))  # asyncio.timeout needs one
        try:
            return await task
        except asyncio.CancelledError:
            task.add_done_callback(_abandon)
            task.cancel()
            raise

    async def _connect(self, timeout_s: float) -> UpstreamConnection:
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await self.loop.create_connection(
                    lambda: UpstreamConnection(self), self._host, self._port
                )
        except TimeoutError:
            raise UpstreamFailed("connect", f"no connection in {timeout_s:g} s") from None
        except OSError as error:
            if error.errno in EXHAUSTED:  # no fault of the engine
                raise TooManyRequests(f"no further connection can be made: {error.strerror}") from error
            raise UpstreamFailed("connect", error.strerror or str(error)) from error
        return connection

    def keep(self, connection: UpstreamConnection) -> None:
        if self._closed or len(self._idle) >= MAX_IDLE:
            assert connection.transport is not None
            connection.transport.close()
            return
        connection.deadline = self.loop.time() + IDLE_S
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Keep no connection any more; those in use end with their exchange."""
        self._closed = True
        self.cut_idle()

    def cut_idle(self) -> None:
        for connection in self._idle:
            assert connection.transport is not None
            connection.transport.close()
        self._idle.clear()


def _abandon(connecting: asyncio.Task[UpstreamConnection]) -> None:
    """Nobody waits for this connection any more; it may have been made all the same."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().release()
