"""One gateway process from start to the end of its drain."""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass

from broadbeam_crds.gateway_config import FileEndpoints, GatewayConfig, KubernetesEndpoints
from broadbeam_router.app import Gateway, MetricsPage
from broadbeam_router.auth import ApiKeys
from broadbeam_router.client import ClientConnection, Handler, Server
from broadbeam_router.deadlines import Deadlines
from broadbeam_router.fleet import Fleet
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


async def serve(config: GatewayConfig, here: Surroundings) -> None:
    """Serve until SIGTERM or SIGINT and the drain after it.

    Raises ConfigError for keys that cannot be read and OSError for an address that cannot be bound."""
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    keys = ApiKeys(config.auth.keys_dir) if config.auth is not None else None
    fleet = Fleet(loop, deadlines, POLICIES[config.policy], config.ejection_s)
    gateway = Gateway(config, fleet, keys)
    public = _server(loop, gateway, config, deadlines)
    inner = _server(loop, MetricsPage(gateway), config, deadlines)
    stop = _stop_signals(loop)
    sockets = [
        await loop.create_server(lambda: ClientConnection(public), here.host, here.port, backlog=BACKLOG),
        await loop.create_server(lambda: ClientConnection(inner), here.host, here.metrics_port),
    ]
    followers = [loop.create_task(_follow(config, here, fleet))]
    if keys is not None:
        followers.append(loop.create_task(_refresh(keys)))
    log.info("listening on %s:%d, metrics on port %d", here.host, here.port, here.metrics_port)
    try:
        await _until(stop, followers)
        await _drain(gateway, public, sockets[0], stop, config.timeouts.drain_s)
    finally:
        await _shut(followers, [public, inner], sockets, fleet, deadlines)


def _server(
    loop: asyncio.AbstractEventLoop, handler: Handler, config: GatewayConfig, deadlines: Deadlines
) -> Server:
    return Server(loop, handler, config.limits, config.timeouts.idle_s, deadlines, set())


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


async def _drain(
    gateway: Gateway, server: Server, listening: asyncio.Server, stop: asyncio.Queue[str], drain_s: float
) -> None:
    gateway.draining = server.draining = True
    listening.close()
    for connection in list(server.connections):
        connection.drain()
    try:
        async with asyncio.timeout(drain_s):
            while server.connections and stop.empty():
                await asyncio.sleep(0.02)
    except TimeoutError:
        log.warning("cut %d connections after %g s of drain", len(server.connections), drain_s)


async def _shut(
    followers: list[asyncio.Task[None]],
    servers: list[Server],
    sockets: list[asyncio.Server],
    fleet: Fleet,
    deadlines: Deadlines,
) -> None:
    for follower in followers:
        follower.cancel()
    await asyncio.gather(*followers, return_exceptions=True)
    for listening in sockets:
        listening.close()
    for server in servers:
        for connection in list(server.connections):
            connection.abort()
    fleet.close()
    deadlines.stop()
    await asyncio.sleep(0)  # aborted connections tell their protocols on the loop's next turn
