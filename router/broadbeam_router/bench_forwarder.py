"""The floor that the gateway's cost is measured against: uvloop + httptools, and nothing else.

It parses a request, sends it on over a kept connection to the next of its engines and passes the answer
back in chunks; with two legs it asks two engines one after the other and passes on the second answer, as
for disaggregated serving. No keys, checks, metrics, retries, timeouts, backpressure or choice of endpoint.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import httptools
import uvloop

Address = tuple[str, int]


class Engines:
    def __init__(self, addresses: list[Address], legs: int) -> None:
        self.addresses = addresses
        self.legs = legs
        self.idle: dict[Address, list[Upstream]] = {address: [] for address in addresses}
        self.turn = 0

    def next(self) -> Address:
        self.turn += 1
        return self.addresses[self.turn % len(self.addresses)]


class Client(asyncio.Protocol):
    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.body: list[bytes] = []
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self.body)
        head = (
            b"POST %b HTTP/1.1\r\nHost: e\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (
                self.url,
                len(body),
            )
        )
        self.request = head + body
        self.legs_left = self.engines.legs
        self.next_leg()

    def next_leg(self) -> None:
        self.legs_left -= 1
        address = self.engines.next()
        idle = self.engines.idle[address]
        if idle:
            idle.pop().begin(self, self.request)
        else:
            self.connecting = asyncio.get_running_loop().create_task(self.connect(address))

    async def connect(self, address: Address) -> None:
        loop = asyncio.get_running_loop()
        _, upstream = await loop.create_connection(lambda: Upstream(self.engines.idle[address]), *address)
        upstream.begin(self, self.request)


class Upstream(asyncio.Protocol):
    def __init__(self, idle: list[Upstream]) -> None:
        self.idle = idle
        self.parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def begin(self, client: Client, data: bytes) -> None:
        self.client = client
        self.out: list[bytes] = []
        self.length: bytes | None = None
        self.content_type = b""
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        client = self.client
        self.parser.feed_data(data)
        if self.out:
            client.transport.write(b"".join(self.out))
            self.out.clear()

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            self.length = value
        elif name == b"content-type":
            self.content_type = value

    def on_headers_complete(self) -> None:
        framing = b"Transfer-Encoding: chunked" if self.length is None else b"Content-Length: " + self.length
        self.out.append(
            b"HTTP/1.1 %d OK\r\nContent-Type: %b\r\n%b\r\n\r\n"
            % (self.parser.get_status_code(), self.content_type, framing)
        )

    def on_body(self, body: bytes) -> None:
        self.out.append(body if self.length is not None else b"%x\r\n%b\r\n" % (len(body), body))

    def on_message_complete(self) -> None:
        if self.length is None:
            self.out.append(b"0\r\n\r\n")
        self.idle.append(self)
        if self.client.legs_left:
            self.out.clear()
            self.client.next_leg()


async def serve(port: int, legs: int, addresses: list[Address]) -> None:
    loop = asyncio.get_running_loop()
    engines = Engines(addresses, legs)
    server = await loop.create_server(lambda: Client(engines), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    own_port, legs, *ports = map(int, sys.argv[1:])
    uvloop.run(serve(own_port, legs, [("127.0.0.1", port) for port in ports]))
