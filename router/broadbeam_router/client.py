"""One client connection: parses HTTP/1.1 requests, hands them on in order and writes the answers.

Nothing here knows about engines. A request is handed on whole; while it is served, further requests on the
same connection wait, and the socket is read only until one waits, so a client cannot fill memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from broadbeam_crds.gateway_config import LimitsConfig
from broadbeam_router import http1
from broadbeam_router.deadlines import NEVER, Deadlines
from broadbeam_router.errors import (
    SHAPES,
    InternalError,
    RequestError,
    RequestTimeout,
    TooManyRequests,
    error_body,
)
from broadbeam_router.incoming import Request, RequestReader
from broadbeam_router.running import Ended

LINGER_S = 2.0  # how long a refused client may go on sending before its connection is cut


class Source(Protocol):
    """What fills a streamed answer; it is held back while the client does not read."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Work(Protocol):
    """A request that takes time; `id_line` goes into an error's head."""

    @property
    def id_line(self) -> bytes: ...


class Carrier(Protocol):
    """Does the work; `cancel` does nothing once that has ended."""

    def start(self) -> None: ...
    def cancel(self) -> None: ...


W = TypeVar("W", bound=Work)


class Handler(Protocol[W]):
    """Serves requests: answers at once, or gives back work and then, by `carry`, what does it. That calls
    its `ended` exactly once, however it went: with None, with what it raised, or with CancelledError; and
    the connection then calls the handler's. For `check_sender` see RequestReader."""

    def check_sender(self, headers: dict[bytes, bytes]) -> None: ...
    def handle(self, client: ClientConnection, request: Request) -> W | None: ...
    def carry(self, work: W, ended: Ended) -> Carrier: ...
    def ended(self, work: W, error: BaseException | None) -> None: ...


@dataclass(slots=True)
class Server:
    """What the connections of one listening socket share."""

    loop: asyncio.AbstractEventLoop
    handler: Handler[Any]
    limits: LimitsConfig
    idle_s: float
    deadlines: Deadlines
    on_refusal: Callable[[RequestError], None]  # of what never became a request
    connections: set[ClientConnection] = field(default_factory=set)
    draining: bool = False
    now: Callable[[], float] = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.loop.time


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_begun", "_carrier", "_chunked", "_keep_alive", "_paused", "_queue", "_reader", "_refused",
        "_request", "_server", "_source", "_stream_head", "_transport", "_unread", "_work", "deadline",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        self._server = server
        check_sender = server.handler.check_sender
        self._reader = RequestReader(server.limits, self._take, self._expected, check_sender)
        self._queue: deque[Request | RequestError] = deque()
        self._request: Request | None = None  # being served
        self._work: Work | None = None
        self._carrier: Carrier | None = None
        self._source: Source | None = None
        self._stream_head: bytes | None = None  # of a started stream, until its first part is written
        self._chunked = True
        self._keep_alive = True
        self._begun = False  # a part of a request has come, and none is served
        self._paused = False  # the client does not read what was written
        self._unread = 0  # bytes of it when last looked at
        self._refused = False  # nothing further is read from this client

    # -- the connection -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = self._server
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        self.deadline = server.now() + server.idle_s
        server.connections.add(self)
        server.deadlines.add(self)
        if len(server.connections) > server.limits.max_connections:
            self._refuse(TooManyRequests(f"more than {server.limits.max_connections} connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.deadlines.discard(self)
        self._refused = True
        self._queue.clear()
        if self._carrier is not None:
            self._carrier.cancel()

    def expire(self) -> None:
        """Too long silent: half a request gets 408, an idle or stalled connection is cut."""
        unread = self._transport.get_write_buffer_size()
        if self._paused and unread < self._unread:  # slow, but reading
            self._unread = unread
            self.deadline = self._server.now() + self._server.idle_s
            return
        if self._request is None and not self._refused and self._reader.halfway:
            self._refuse(RequestTimeout(f"no whole request within {self._server.idle_s:g} s"))
        elif self._paused or self._refused:
            self._transport.abort()
        else:
            self._transport.close()  # and not abort: the kernel may still hold a part of the last answer

    def drain(self) -> None:
        """Close when the request being served or read, if any, is answered."""
        if self._request is None and not self._queue and not self._reader.halfway:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    # -- reading --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        reader = self._reader
        reader.feed(data)
        if reader.failure is not None:
            self._refuse(reader.failure)
        elif self._request is None and not self._begun and reader.halfway:
            self._begun = True
            self.deadline = self._server.now() + self._server.idle_s

    def _take(self, request: Request) -> None:
        if self._request is None and not self._queue and not self._paused:
            self._start(request)
        else:
            self._queue.append(request)
            self._transport.pause_reading()

    def _expected(self) -> None:
        if self._request is None:
            self._transport.write(http1.CONTINUE)

    # -- one request after the other ------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        self._request = request
        self._keep_alive = request.head.keep_alive and not self._server.draining
        self._begun = False
        self.deadline = NEVER
        handler = self._server.handler
        try:
            work = self._work = handler.handle(self, request)
        except Exception as error:  # the outermost frame of a request
            self._fault(error)
            return
        if work is not None:
            carrier = self._carrier = handler.carry(work, self._served)
            carrier.start()

    def _served(self, error: BaseException | None) -> None:
        """The work came to its end, in the same breath as its answer: the next cannot have begun."""
        work = self._work
        assert work is not None
        self._work = None
        self._server.handler.ended(work, error)
        if error is None:
            return
        if isinstance(error, RequestError):
            self.respond_error(error, work.id_line)
        elif isinstance(error, asyncio.CancelledError):
            self._transport.abort()
        else:
            self._fault(error, work.id_line)

    def _fault(self, error: BaseException, headers: bytes = b"") -> None:
        context = {"message": "a request failed inside the gateway", "exception": error}
        self._server.loop.call_exception_handler(context)
        self.respond_error(InternalError("the gateway failed; its log says why"), headers)

    def _finish(self) -> None:
        """The answer is written: take up what waits, or close."""
        self._request = self._carrier = self._source = self._stream_head = None
        server = self._server
        if not self._keep_alive or server.draining:
            self._transport.close()
        elif self._queue:
            server.loop.call_soon(self._next)
        else:
            self.deadline = server.now() + server.idle_s

    def _next(self) -> None:
        """Take up what waits, unless the client leaves its answers unread: they would fill memory."""
        if self._queue and self._request is None and not (self._paused or self._transport.is_closing()):
            waiting = self._queue.popleft()
            if not self._queue and not self._refused:
                self._transport.resume_reading()
            if isinstance(waiting, RequestError):
                self._answer_refused(waiting)
            else:
                self._start(waiting)

    def _refuse(self, error: RequestError) -> None:
        """Answer `error` when its turn comes, and read no more requests from this client."""
        self._refused = True
        if self._request is None and not self._queue:
            self._answer_refused(error)
        else:
            self._queue.append(error)

    def _answer_refused(self, error: RequestError) -> None:
        # The client may still be sending: cutting now would destroy the answer before it is read.
        self._server.on_refusal(error)
        shape = SHAPES[type(error)]
        self._transport.write(
            http1.response(shape.status, http1.JSON, error_body(error), shape.headers, keep_alive=False)
        )
        self._transport.write_eof()
        self.deadline = self._server.now() + LINGER_S

    # -- answering ------------------------------------------------------------------------------------

    def respond(
        self, status: int, body: bytes, content_type: bytes = http1.JSON, headers: bytes = b""
    ) -> None:
        """The whole answer to the request being served."""
        assert self._request is not None, "a request is answered once"
        data = http1.response(status, content_type, body, headers, self._keep_alive)
        if self._request.head.method == b"HEAD":
            data = data[: len(data) - len(body)]
        if not self._transport.is_closing():  # it may be, and connection_lost still to come
            self._transport.write(data)
        self._finish()

    def respond_error(self, error: RequestError, headers: bytes = b"") -> None:
        """`error` as an answer; in a stream that has begun, as its last event, after which the connection
        is closed without the end that would make it look complete."""
        if self._request is None or self._transport.is_closing():
            return
        if self._source is None or self._stream_head is not None:
            shape = SHAPES[type(error)]
            self.respond(shape.status, error_body(error), headers=shape.headers + headers)
        else:
            event = b"data: %b\n\n" % error_body(error)
            self._transport.write(http1.chunk(event) if self._chunked else event)
            self._request = None
            self._transport.close()

    def start_stream(self, status: int, content_type: bytes, headers: bytes, source: Source) -> None:
        """Begin an answer of unknown length; nothing is sent before its first part."""
        assert self._request is not None
        self._chunked = self._request.head.chunks
        self._keep_alive = self._keep_alive and self._chunked
        self._stream_head = http1.stream_head(status, content_type, headers, self._keep_alive, self._chunked)
        self._source = source
        if self._paused:
            source.pause()

    def take_back_stream(self) -> bool:
        """Undo `start_stream`; False once its first part is written."""
        if self._stream_head is None:
            return False
        self._stream_head = self._source = None
        return True

    def send_part(self, data: bytes) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._stream_head is not None:
            data = self._stream_head + data
            self._stream_head = None
        self._write(data)

    def end_stream(self) -> None:
        end = http1.LAST_CHUNK if self._chunked else b""
        self._write((self._stream_head or b"") + end)
        self._finish()

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def pause_writing(self) -> None:
        self._paused = True
        self._unread = self._transport.get_write_buffer_size()
        self.deadline = self._server.now() + self._server.idle_s
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        self._paused = False
        self.deadline = NEVER if self._request else self._server.now() + self._server.idle_s
        if self._source is not None:
            self._source.resume()
        self._next()
