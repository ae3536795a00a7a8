from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop

from broadbeam_crds.engine_config import encode
from broadbeam_crds.gateway_config import (
    Endpoint,
    EndpointsFile,
    FileEndpoints,
    GatewayConfig,
    TimeoutsConfig,
)
from broadbeam_router.fake_engine import FakeEngine
from broadbeam_router.fleet import Member
from broadbeam_router.serve import Running, Surroundings, shut, start

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PATIENT = TimeoutsConfig(connect_s=20, prefill_s=20, first_byte_s=20, idle_s=20, drain_s=1)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, object]:
    """The tests run on the loop that the gateway runs on."""
    return {"uvloop": uvloop.new_event_loop}


@dataclass
class Rig:
    """A gateway in this process on real sockets, in front of fake engines."""

    running: Running
    engines: dict[str, FakeEngine]
    port: int
    metrics_port: int
    http: aiohttp.ClientSession
    endpoints: Path
    roles: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __getitem__(self, name: str) -> FakeEngine:
        return self.engines[name]

    def member(self, name: str) -> Member:
        return next(m for m in self.running.fleet.members() if m.name == name)

    async def chat(self, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.post(CHAT, msgspec.json.encode(body), headers)

    async def completion(self, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        return await self.post(
            COMPLETIONS, msgspec.json.encode({"model": "m", "prompt": "hi", **fields}), headers
        )

    async def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
        async with self.http.post(self.url + path, data=body, headers=headers) as answer:
            return await Answer.of(answer)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        async with self.http.get(self.url + path, headers=headers) as answer:
            return await Answer.of(answer)

    async def metric(self, name: str, **labels: str) -> float:
        """The value of a metric as a scrape sees it; 0 if it is not there."""
        async with self.http.get(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        for line in lines:
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == f"broadbeam_gateway_{name}" and all(w in series for w in wanted):
                return float(value)
        return 0.0

    async def raw(self, data: bytes, until: bytes | None = None) -> bytes:
        """What comes back for `data`, up to the end of the connection or to `until`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = b""
        async with asyncio.timeout(10):
            while until is None or until not in answer:
                part = await reader.read(65536)
                if not part:
                    break
                answer += part
        writer.close()
        return answer

    async def settled(self) -> None:
        """Wait until nothing is in flight; what stays is a leak."""
        await eventually(lambda: not self.in_flight(), lambda: f"still in flight: {self.in_flight()}")

    def in_flight(self) -> dict[str, int]:
        counts = {m.name: m.in_flight for m in self.running.fleet.members()}
        counts["gateway"] = self.running.gateway.in_flight
        assert all(count >= 0 for count in counts.values()), counts
        return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    async def of(cls, answer: aiohttp.ClientResponse) -> Answer:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        try:
            return cls(answer.status, headers, await answer.read())
        except aiohttp.ClientPayloadError:
            return cls(answer.status, {**headers, "truncated": "yes"}, b"")

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error


async def eventually(
    condition: Callable[[], bool], complaint: Callable[[], str] = lambda: "not in time"
) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(complaint())


RigFactory = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def rig_of(tmp_path: Path) -> AsyncIterator[RigFactory]:
    """`await rig_of({"d": "decode", …}, field=value, …)` starts engines and a gateway with that config."""
    rigs: list[Rig] = []

    async def build(roles: dict[str, str], revisions: dict[str, str] | None = None, **fields: Any) -> Rig:
        engines = {name: await FakeEngine(name).start() for name in roles}
        file = tmp_path / f"endpoints-{len(rigs)}.json"
        write_endpoints(file, engines, roles, revisions or {})
        defaults: dict[str, Any] = {
            "cluster": "c",
            "models": ["m"],
            "endpoints": FileEndpoints(path=str(file)),
            "disaggregated": "prefill" in roles.values(),
            "route_headers": True,
            "timeouts": PATIENT,
        }
        running = await start(GatewayConfig(**(defaults | fields)), Surroundings("127.0.0.1", 0, 0))
        port, metrics_port = (s.sockets[0].getsockname()[1] for s in running.sockets)
        rig = Rig(running, engines, port, metrics_port, aiohttp.ClientSession(), file, roles)
        rigs.append(rig)
        ready = sum(1 for _ in roles)
        await eventually(lambda: len(running.fleet.prefill) + len(running.fleet.decode) == ready)
        return rig

    yield build
    for rig in rigs:
        await rig.http.close()
        await rig.settled()
        await shut(rig.running)
        for engine in rig.engines.values():
            await engine.stop()


def write_endpoints(
    file: Path, engines: dict[str, FakeEngine], roles: dict[str, str], revisions: dict[str, str]
) -> None:
    listed = [
        Endpoint(
            name=name,
            host=engine.host,
            port=engine.port,
            role=roles[name],  # type: ignore[arg-type]
            pool=roles[name],
            group="0",
            revision=revisions.get(name, "r"),
        )
        for name, engine in engines.items()
    ]
    new = file.with_suffix(".new")
    new.write_text(encode(EndpointsFile(endpoints=listed)))
    new.rename(file)
