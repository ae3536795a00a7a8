"""One gateway process from start to the end of its drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from broadbeam_crds.gateway_config import FileEndpoints, GatewayConfig, KubernetesEndpoints
from broadbeam_router.app import Gateway, MetricsPage
from broadbeam_router.auth import ApiKeys
from broadbeam_router.client import ClientConnection, Handler, Server
from broadbeam_router.deadlines import Deadlines
from broadbeam_router.errors import RequestError
from broadbeam_router.fleet import Fleet
from broadbeam_router.metrics import Metrics
from broadbeam_router.policy import POLICIES
from broadbeam_router.sources import ApiServer, FileSource

log = logging.getLogger(__name__)

KEYS_POLL_S = 1.0
BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the process finds around it, unlike the config, which is the same for all replicas."""

    host: str
    port: int
    metrics_port: int
    api_server: ApiServer | None = None  # where the pods are watched


@dataclass(slots=True)
class Running:
    """A gateway that answers; `followers` are the tasks that keep its view of the world fresh."""

    gateway: Gateway
    fleet: Fleet
    deadlines: Deadlines
    public: Server
    inner: Server
    sockets: list[asyncio.Server]
    followers: list[asyncio.Task[None]]


async def serve(config: GatewayConfig, here: Surroundings) -> None:
    """Serve until SIGTERM or SIGINT and the drain after it.

    Raises ConfigError for keys that cannot be read and OSError for an address that cannot be bound."""
    stop = _stop_signals(asyncio.get_running_loop())
    running = await start(config, here)
    log.info("listening on %s:%d, metrics on port %d", here.host, here.port, here.metrics_port)
    try:
        await _until(stop, running.followers)
        await drain(running, stop, config.timeouts.drain_s)
    finally:
        await shut(running)


async def start(config: GatewayConfig, here: Surroundings) -> Running:
    """Bind and begin to answer."""
    loop = asyncio.get_running_loop()
    keys = ApiKeys(config.auth.keys_dir) if config.auth is not None else None
    deadlines = Deadlines(loop)
    metrics = Metrics()
    fleet = Fleet(loop, deadlines, POLICIES[config.policy], config.ejection_s, metrics.ejected)
    gateway = Gateway(config, fleet, keys, metrics)
    public = _server(loop, gateway, config, deadlines, gateway.refused)
    inner = _server(loop, MetricsPage(gateway), config, deadlines, gateway.refused)
    running = Running(gateway, fleet, deadlines, public, inner, [], [])
    try:
        for server, port in ((public, here.port), (inner, here.metrics_port)):
            running.sockets.append(await _bind(loop, server, here.host, port))
    except OSError:
        await shut(running)
        raise
    running.followers.append(loop.create_task(_follow(config, here, fleet)))
    if keys is not None:
        running.followers.append(loop.create_task(_refresh(keys)))
    return running


async def _bind(loop: asyncio.AbstractEventLoop, server: Server, host: str, port: int) -> asyncio.Server:
    return await loop.create_server(lambda: ClientConnection(server), host, port, backlog=BACKLOG)


def _server(
    loop: asyncio.AbstractEventLoop,
    handler: Handler[Any],
    config: GatewayConfig,
    deadlines: Deadlines,
    on_refusal: Callable[[RequestError], None],
) -> Server:
    return Server(loop, handler, config.limits, config.timeouts.idle_s, deadlines, on_refusal)


def _stop_signals(loop: asyncio.AbstractEventLoop) -> asyncio.Queue[str]:
    stop: asyncio.Queue[str] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.put_nowait, number.name)
    return stop


async def _follow(config: GatewayConfig, here: Surroundings, fleet: Fleet) -> None:
    match config.endpoints:
        case FileEndpoints(path=path):
            await FileSource(path, fleet).run()
        case KubernetesEndpoints() as where:
            from broadbeam_router.watch import PodSource  # aiohttp costs 15 MB that local mode need not pay

            assert here.api_server is not None
            await PodSource(where, here.api_server, fleet).run()


async def _refresh(keys: ApiKeys) -> None:
    while True:
        await asyncio.sleep(KEYS_POLL_S)
        keys.refresh()


async def _until(stop: asyncio.Queue[str], followers: list[asyncio.Task[None]]) -> None:
    """Returns at the first stop signal; a follower that ends has failed, and so has the process."""
    signalled = asyncio.ensure_future(stop.get())
    done, _ = await asyncio.wait([signalled, *followers], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    log.info("%s: draining", signalled.result())


async def drain(running: Running, stop: asyncio.Queue[str], drain_s: float) -> None:
    """Take no new connection, let answers finish; a second stop signal or `drain_s` ends the patience."""
    server = running.public
    running.gateway.draining = server.draining = True
    running.sockets[0].close()
    for connection in list(server.connections):
        connection.drain()
    try:
        async with asyncio.timeout(drain_s):
            while server.connections and stop.empty():
                await asyncio.sleep(0.02)
    except TimeoutError:
        log.warning("cut %d connections after %g s of drain", len(server.connections), drain_s)


async def shut(running: Running) -> None:
    """Cut whatever is left."""
    for follower in running.followers:
        follower.cancel()
    await asyncio.gather(*running.followers, return_exceptions=True)
    for listening in running.sockets:
        listening.close()
    for server in (running.public, running.inner):
        for connection in list(server.connections):
            connection.abort()
    running.fleet.close()
    running.deadlines.stop()
    await asyncio.sleep(0.01)  # so that what was cut hears of it while the loop still runs
