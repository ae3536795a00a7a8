"""The other two processes of the benchmark: an engine that answers at once, and clients that ask.

    python -m broadbeam_router.bench_load engine PORT CHUNKS
    python -m broadbeam_router.bench_load clients PORT REQUESTS CONCURRENCY RATE stream|whole|new-heads KEY

RATE is requests per second in all, 0 for as many as will go; with new-heads, every request has an id of its
own. The clients print one JSON line: requests, chunks and seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import cast

import httptools
import uvloop

PROMPT = "The quick brown fox jumps over the lazy dog. " * 42  # a body of about 2 KB
LENGTHS = 16  # of the prompts: no client's bodies are all of one length
# What the openai client 3.54 sends.
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nAccept-Encoding: gzip, deflate\r\n"
    b"Connection: keep-alive\r\nauthorization: Bearer %b\r\naccept: application/json\r\n"
    b"content-type: application/json\r\nuser-agent: OpenAI/Python 3.54.0\r\nx-stainless-lang: python\r\n"
    b"x-stainless-package-version: 3.54.0\r\nx-stainless-os: Linux\r\nx-stainless-arch: x64\r\n"
    b"x-stainless-runtime: CPython\r\nx-stainless-runtime-version: 3.11.7\r\nx-stainless-async: false\r\n"
    b"x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n%bContent-Length: %d\r\n\r\n"
)
# What uvicorn, vLLM's server, puts before an answer.
SERVED = b"HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 03:00:00 GMT\r\nserver: uvicorn\r\n"
EVENT = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1795428244,
    "model": "m",
    "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
}
ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1795428244,
    "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": " word" * 64}, "finish_reason": "length"}
    ],
    "usage": {"prompt_tokens": 400, "completion_tokens": 64, "total_tokens": 464},
    "kv_transfer_params": {
        "do_remote_prefill": True,
        "remote_block_ids": [list(range(25))],
        "remote_host": "a",
    },
}


class Engine(asyncio.Protocol):
    """Answers a stream with one write per event, a loop turn apart, as engines do."""

    def __init__(self, chunks: int) -> None:
        event = b"data: " + json.dumps(EVENT).encode() + b"\n\n"
        body = json.dumps(ANSWER).encode()
        self.chunk = b"%x\r\n%b\r\n" % (len(event), event)
        self.head = (
            SERVED + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        length = b"content-length: %d\r\n" % len(body)
        self.whole = b"".join((SERVED, length, b"content-type: application/json\r\n\r\n", body))
        self.chunks = chunks
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if b'"stream":true' in self.body[:200]:
            self.transport.write(self.head)
            self.task = asyncio.get_running_loop().create_task(self.stream())
        else:
            self.transport.write(self.whole)
        self.body = b""

    async def stream(self) -> None:
        for _ in range(self.chunks):
            self.transport.write(self.chunk)
            await asyncio.sleep(0.002)
        self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


class Asker(asyncio.Protocol):
    """Sends its next request when it has the answer to the last, and not before its time."""

    def __init__(self, requests: list[bytes], left: list[int], pause_s: float) -> None:
        self.requests = requests
        self.left = left
        self.pause_s = pause_s
        self.done = asyncio.Event()
        self.parser = httptools.HttpResponseParser(self)
        self.chunks = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def start(self, at_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.next_s = at_s
        self.loop.call_at(at_s, self.ask)

    def ask(self) -> None:
        if self.left[0] == 0:
            self.transport.close()
            self.done.set()
            return
        self.left[0] -= 1
        self.transport.write(self.requests[self.left[0] % len(self.requests)])

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_headers_complete(self) -> None:
        if self.parser.get_status_code() != 200:
            raise SystemExit(f"status {self.parser.get_status_code()}")

    def on_body(self, body: bytes) -> None:
        self.chunks += body.count(b"data: ")

    def on_message_complete(self) -> None:
        self.next_s = max(self.next_s + self.pause_s, self.loop.time())
        if self.pause_s:
            self.loop.call_at(self.next_s, self.ask)
        else:
            self.ask()


async def engine(port: int, chunks: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Engine(chunks), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def request(number: int, kind: str, key: str) -> bytes:
    message = {"role": "user", "content": PROMPT[number % LENGTHS :]}
    fields = {"model": "m", "stream": kind == "stream", "messages": [message]}
    body = json.dumps(fields, separators=(",", ":")).encode()
    own = b"x-request-id: %032x\r\n" % number if kind == "new-heads" else b""
    return HEAD % (key.encode(), own, len(body)) + body


async def clients(port: int, requests: int, concurrency: int, rate: float, kind: str, key: str) -> None:
    loop = asyncio.get_running_loop()
    different = requests if kind == "new-heads" else LENGTHS
    sent = [request(number, kind, key) for number in range(different)]
    left = [requests]
    pause_s = concurrency / rate if rate else 0.0
    askers = [Asker(sent, left, pause_s) for _ in range(concurrency)]
    start_s = time.perf_counter()
    for index, asker in enumerate(askers):
        await loop.create_connection(lambda asker=asker: asker, "127.0.0.1", port)  # type: ignore[misc]
        asker.start(loop.time() + pause_s * index / concurrency)
    for asker in askers:
        await asker.done.wait()
    seconds = time.perf_counter() - start_s
    chunks = sum(asker.chunks for asker in askers)
    print(json.dumps({"requests": requests, "chunks": chunks, "seconds": seconds}))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["engine", port, chunks]:
            uvloop.run(engine(int(port), int(chunks)))
        case ["clients", port, requests, concurrency, rate, kind, key]:
            uvloop.run(clients(int(port), int(requests), int(concurrency), float(rate), kind, key))
        case _:
            sys.exit(__doc__)
