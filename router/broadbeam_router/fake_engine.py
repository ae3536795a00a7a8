"""An engine rank that computes nothing, for tests and the benchmark: real sockets, scripted behaviour."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httptools


@dataclass(frozen=True, slots=True)
class Script:
    """What the engine does with one request. `cut_after` counts streamed events, 0 being the head alone;
    "nothing" cuts the connection before a byte, "half" in the middle of the body or of the next event."""

    status: int = 200
    words: tuple[str, ...] = ("Hel", "lo")
    delay_s: float = 0.0
    gap_s: float = 0.0  # between events
    cut_after: int | None = None
    cut: str | None = None  # "nothing" | "half"
    body: bytes | None = None  # instead of an OpenAI answer
    headers: bytes = b""
    raw: bytes | None = None  # the whole answer, byte for byte
    close: bool = False  # after the answer


@dataclass(slots=True)
class Seen:
    """One request as it reached the engine."""

    path: str
    headers: dict[str, str]
    body: bytes
    ended: str = "running"  # "answered" | "aborted" (the gateway left) | "cut" (the engine did)

    @property
    def json(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.body)
        return fields

    @property
    def is_prefill(self) -> bool:
        return bool((self.json.get("kv_transfer_params") or {}).get("do_remote_decode"))


@dataclass(slots=True)
class FakeEngine:
    """Serves until `stop`. `script` decides per request; `seen` is what came."""

    name: str = "engine"
    script: Callable[[Seen], Script] = lambda seen: Script()
    host: str = "127.0.0.1"
    port: int = 0
    keep_seen: bool = True
    seen: list[Seen] = field(default_factory=list)
    connections: set[_Connection] = field(default_factory=set)
    accepted: int = 0
    _server: asyncio.Server | None = None

    async def start(self) -> FakeEngine:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Like a killed process: the port refuses, every connection is reset."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    @property
    def running(self) -> int:
        return sum(seen.ended == "running" for seen in self.seen)


class _Connection(asyncio.Protocol):
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self._current: Seen | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.on_message_begin()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        self._engine.connections.add(self)
        self._engine.accepted += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.connections.discard(self)
        self._writable.set()
        if self._current is not None and self._current.ended == "running":
            self._current.ended = "aborted"
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._path = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        seen = Seen(self._path.decode(), self._headers, b"".join(self._body))
        if self._engine.keep_seen:
            self._engine.seen.append(seen)
        self._current = seen
        self._task = asyncio.get_running_loop().create_task(self._answer(seen, self._engine.script(seen)))

    async def _answer(self, seen: Seen, script: Script) -> None:
        if script.delay_s:
            await asyncio.sleep(script.delay_s)
        if script.cut == "nothing":
            self._cut(seen)
        elif script.raw is not None:
            self.transport.write(script.raw)
            seen.ended = "answered"
        elif script.status == 200 and script.body is None and seen.json.get("stream"):
            await self._stream(seen, script)
        else:
            self._whole(seen, script)
        if script.close and not self.transport.is_closing():
            self.transport.close()

    def _whole(self, seen: Seen, script: Script) -> None:
        body = script.body if script.body is not None else _answer_body(seen, script, self._engine.name)
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n" % (
            script.status,
            len(body),
            script.headers,
        )
        if script.cut == "half":
            self.transport.write(head + body[: len(body) // 2])
            self._cut(seen)
        else:
            self.transport.write(head + body)
            seen.ended = "answered"

    async def _stream(self, seen: Seen, script: Script) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        cut_after = 0 if script.cut == "half" and script.cut_after is None else script.cut_after
        for index, event in enumerate((*_events(seen, script, self._engine.name), b"data: [DONE]\n\n")):
            if index == cut_after:
                if script.cut == "half":
                    self._chunk(event[: len(event) // 2])
                self._cut(seen)
                return
            if script.gap_s:
                await asyncio.sleep(script.gap_s)
            await self._writable.wait()
            self._chunk(event)
        self.transport.write(b"0\r\n\r\n")
        seen.ended = "answered"

    def _chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _cut(self, seen: Seen) -> None:
        """Close once what was written is sent; a reset could overtake it."""
        seen.ended = "cut"
        self.transport.close()


def _answer_body(seen: Seen, script: Script, name: str) -> bytes:
    fields = seen.json
    if script.status != 200:
        return json.dumps(
            {"error": {"message": f"{name} says {script.status}", "code": script.status}}
        ).encode()
    text = "".join(script.words)
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": len(script.words),
        "total_tokens": 3 + len(script.words),
    }
    answer: dict[str, Any] = {"id": seen.headers.get("x-request-id"), "created": 1, "model": fields["model"]}
    if "chat" in seen.path:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        answer |= {"object": "chat.completion", "choices": [choice], "usage": usage}
    else:
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        answer |= {"object": "text_completion", "choices": [choice], "usage": usage}
    if seen.is_prefill:
        answer["kv_transfer_params"] = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": name,
            "remote_block_ids": [[1, 2, 3]],
            "remote_host": "10.0.0.1",
            "remote_port": 5600,
        }
    return json.dumps(answer).encode()


def _events(seen: Seen, script: Script, name: str) -> list[bytes]:
    model = seen.json["model"]
    events = []
    for word in script.words:
        if "chat" in seen.path:
            kind = "chat.completion.chunk"
            choice: dict[str, Any] = {"index": 0, "delta": {"content": word}, "finish_reason": None}
        else:
            kind = "text_completion"
            choice = {"index": 0, "text": word, "finish_reason": None, "logprobs": None}
        event = {"id": name, "object": kind, "created": 1, "model": model, "choices": [choice]}
        events.append(b"data: " + json.dumps(event).encode() + b"\n\n")
    return events
