"""A ServingCluster on this machine: store, controllers, node and reconcile, started and ended together."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from broadbeam_crds.conventions import (
    ENV_CACHE,
    ENV_HOSTS_FILE,
    GATEWAY_METRICS_PORT,
    LABEL_COMPONENT,
)
from broadbeam_crds.gateway_config import FileEndpoints
from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator import names
from broadbeam_operator.cluster import Object
from broadbeam_operator.kv_effect import HttpMeter, KVWatch
from broadbeam_operator.local import devices
from broadbeam_operator.local.addresses import AddressRange, claimed, port_is_free, reserved_range
from broadbeam_operator.local.controllers import control
from broadbeam_operator.local.node import LocalNode, store_sources
from broadbeam_operator.local.pods import Node, PodProcess, PodRunner, open_runner
from broadbeam_operator.local.progress import Progress, look_at
from broadbeam_operator.local.run_folder import run_folder
from broadbeam_operator.local.store import Store
from broadbeam_operator.manifests.objects import namespace_of
from broadbeam_operator.reconcile import Operator, reconcile

LOCALHOST = "127.0.0.1"
RESYNC_S = 5.0  # a pass without any change: notices KV transfer, which no object shows
SPACING_S = 0.05  # a burst of changes makes one pass
NODE_NAME = "localhost"


class PortInUseError(Exception):
    """The gateway cannot listen; one line that says what to change."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line decided. `secrets`: name of a Secret -> folder whose files are its keys."""

    cache: Path
    bin_dir: Path
    inherited: Mapping[str, str]
    secrets: Mapping[str, Path] = field(default_factory=dict)


@dataclass(slots=True)
class Placement:
    """Gives pods addresses and devices; the first gateway pod gets the address people expect."""

    addresses: AddressRange
    gateway_address: str
    imposed: Mapping[str, str]
    devices: Sequence[str] = ()  # names of those that are ours to give
    _devices: dict[str, str] = field(default_factory=dict)  # device -> address of the pod that has it
    _gateway_taken: bool = False

    def place(self, pod: Object) -> tuple[str, dict[str, str]]:
        """The address of a new pod, and environment that only this machine knows."""
        is_gateway = pod["metadata"]["labels"].get(LABEL_COMPONENT) == names.GATEWAY
        if is_gateway and not self._gateway_taken:
            self._gateway_taken = True
            address = self.gateway_address
        else:
            address = self.addresses.take()
        return address, {**self.imposed, **self._give_devices(pod, address)}

    def release(self, pod: PodProcess) -> None:
        if pod.ip == self.gateway_address:
            self._gateway_taken = False
        else:
            self.addresses.give_back(pod.ip)
        self._devices = {device: ip for device, ip in self._devices.items() if ip != pod.ip}

    def _give_devices(self, pod: Object, address: str) -> dict[str, str]:
        limits = (pod["spec"]["containers"][0].get("resources") or {}).get("limits") or {}
        for resource, variable in devices.VISIBLE_DEVICES.items():
            if count := int(limits.get(resource, 0)):
                free = [device for device in self.devices if device not in self._devices][:count]
                self._devices.update(dict.fromkeys(free, address))
                return {variable: ",".join(free)}
        return {}


@dataclass(slots=True)
class Session:
    """A running local cluster; made by `open_session`."""

    cluster: ServingCluster
    folder: Path
    store: Store
    node: LocalNode
    runner: PodRunner
    http: aiohttp.ClientSession
    url: str
    background: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return namespace_of(self.cluster)

    async def progress(self) -> Progress:
        for task in self.background:
            if task.done():
                task.result()  # a loop that ended has raised
        return await look_at(self.store, self.http, self.namespace, self.cluster.metadata.name)

    def pod(self, name: str) -> PodProcess | None:
        return next((pod for pod in self.node.pods.values() if pod.name == name), None)

    async def change(self, cluster: ServingCluster) -> None:
        """From now on this is what is wanted; of the same name, and with the same gateway."""
        self.cluster = cluster
        await _put(self.store, cluster)

    async def stop(self, grace_s: float) -> None:
        """End every pod, and make no new ones; a second call with less grace shortens the first."""
        for task in self.background:
            task.cancel()
        await self.node.stop_all(grace_s)


@asynccontextmanager
async def open_session(cluster: ServingCluster, settings: Settings) -> AsyncIterator[Session]:
    """Run `cluster` on this machine; at the end, and whatever happens, no process of it is left.

    Raises PortInUseError, AddressError.
    """
    port = cluster.spec.gateway.listeners[0].port
    localhost = localhost_is_free(port)
    namespace = namespace_of(cluster)
    runs = settings.cache / "run"
    with (
        reserved_range() as addresses,
        claimed(LOCALHOST) as ours,  # of two that start at once, one has it
        run_folder(runs, cluster.metadata.name) as folder,
    ):
        hosts, endpoints = folder / "hosts", folder / "endpoints.json"
        imposed = {ENV_HOSTS_FILE: str(hosts), ENV_CACHE: str(settings.cache)}
        gateway = LOCALHOST if localhost and ours else addresses.take()
        given = devices.ours(settings.inherited, devices.count())
        placement = Placement(addresses, gateway, imposed, given)
        store = Store()
        node_settings = Node(
            NODE_NAME, folder / "pods", store_sources(store), settings.bin_dir, settings.inherited
        )
        async with open_runner(node_settings) as runner, aiohttp.ClientSession() as http:
            node = LocalNode(store, runner, placement.place, placement.release, hosts, endpoints)
            url = f"http://{placement.gateway_address}:{port}"
            session = Session(cluster, folder, store, node, runner, http, url)
            _fill(store, namespace, settings.secrets)
            await _put(store, cluster)
            operator = Operator(store, KVWatch(HttpMeter(http)), endpoints=FileEndpoints(path=str(endpoints)))
            session.background = [
                asyncio.create_task(node.run(), name="node"),
                asyncio.create_task(control(store), name="controllers"),
                asyncio.create_task(
                    _reconcile(operator, store, namespace, cluster.metadata.name), name="operator"
                ),
            ]
            try:
                yield session
            finally:
                await session.stop(grace_s=0)
                await asyncio.gather(*session.background, return_exceptions=True)


def localhost_is_free(port: int, is_free: Callable[[str, int], bool] = port_is_free) -> bool:
    """Whether the gateway can have 127.0.0.1; not when another gateway has its metrics port there.

    Raises PortInUseError when `port` itself, which people ask for, is taken.
    """
    if not is_free(LOCALHOST, port):
        raise PortInUseError(
            f"port {port} of {LOCALHOST} is in use or not ours to use: choose another with --port, "
            "or set spec.gateway.listeners[0].port"
        )
    return is_free(LOCALHOST, GATEWAY_METRICS_PORT)


def _fill(store: Store, namespace: str, secrets: Mapping[str, Path]) -> None:
    for name, folder in secrets.items():
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        data = {path.name: base64.b64encode(path.read_bytes()).decode() for path in files}
        secret = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "data": data}
        store.create({**secret, "metadata": {"name": name, "namespace": namespace}})


async def _put(store: Store, cluster: ServingCluster) -> None:
    """As `kubectl apply` does."""
    wire = cluster.wire()
    wire.pop("status", None)
    meta = {**wire["metadata"], "namespace": namespace_of(cluster)}
    await store.apply({**wire, "metadata": meta})


async def _reconcile(operator: Operator, store: Store, namespace: str, name: str) -> None:
    """Look again after every change, and now and then without one."""
    seen = -1
    while True:
        seen = await store.changed(seen, RESYNC_S)
        await reconcile(operator, namespace, name)
        await asyncio.sleep(SPACING_S)
