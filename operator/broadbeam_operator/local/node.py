"""The one node of local mode: runs the store's pods, and writes the names and endpoints that they ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from broadbeam_crds.conventions import (
    ANNOTATION_RANKS,
    LABEL_COMPONENT,
    LABEL_GROUP,
    LABEL_POOL,
    LABEL_REVISION,
    LABEL_ROLE,
    RANK_HTTP_PORT,
)
from broadbeam_crds.engine_config import encode
from broadbeam_crds.gateway_config import Endpoint, EndpointsFile
from broadbeam_operator import names
from broadbeam_operator.cluster import CONFIG_MAP, POD, SERVICE, Kind, Object
from broadbeam_operator.local.environment import Lookup, Manifest, Sources
from broadbeam_operator.local.pods import PodProcess, PodRunner
from broadbeam_operator.local.store import SECRET, Store
from broadbeam_operator.pods import is_ready, leaving


def store_sources(store: Store) -> Sources:
    """ConfigMaps and Secrets of the store, as a pod runner asks for them."""

    def lookup(kind: Kind) -> Lookup:
        async def found(namespace: str, name: str) -> Manifest | None:
            return await store.get(kind, namespace, name)

        return found

    return Sources(lookup(CONFIG_MAP), lookup(SECRET))


class LocalNode:
    """Runs every pod of `store`; `place` gives a pod its address and `release` takes it back.

    `hosts` gets "address name" lines for the pods of headless Services, `endpoints` one entry a rank.
    """

    def __init__(
        self,
        store: Store,
        runner: PodRunner,
        place: Callable[[Object], tuple[str, dict[str, str]]],
        release: Callable[[PodProcess], None],
        hosts: Path,
        endpoints: Path,
    ) -> None:
        self.pods: dict[str, PodProcess] = {}  # by uid
        self._store = store
        self._runner = runner
        self._place = place
        self._release = release
        self._hosts = hosts
        self._endpoints = endpoints
        self._stopping: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Follow the store for ever."""
        seen = -1
        while True:
            seen = await self._store.changed(seen)
            self.observe()

    def observe(self) -> None:
        """One pass: start, tell and stop pods, then write what follows from them."""
        pods = self._store.select(POD)
        for pod in pods:
            self._observe_pod(pod)
        there = {pod["metadata"]["uid"] for pod in pods}
        for uid in self.pods.keys() - there:
            self._begin_stop(uid, None)
        write_if_changed(self._hosts, hosts_lines(pods, self._store.select(SERVICE)))
        write_if_changed(self._endpoints, encode(EndpointsFile(endpoints_of(pods))))

    async def stop_all(self, grace_s: float) -> None:
        """Stop every pod at once; a second call with less grace shortens the first."""
        await asyncio.gather(*(process.stop(grace_s) for process in self.pods.values()))

    def _observe_pod(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if leaving(pod):
            self._begin_stop(uid, pod)
        elif uid not in self.pods:
            self._start(pod)
        else:
            conditions = (pod.get("status") or {}).get("conditions") or ()
            self.pods[uid].set_gates({c["type"]: c["status"] == "True" for c in conditions})

    def _start(self, pod: Object) -> None:
        address, imposed = self._place(pod)

        def changed(process: PodProcess) -> None:
            self._store.set_status(pod, process.status())

        self.pods[pod["metadata"]["uid"]] = self._runner.start(pod, address, changed, imposed=imposed)

    def _begin_stop(self, uid: str, pod: Object | None) -> None:
        if uid in self._stopping:
            return
        process = self.pods.get(uid)
        if process is not None:
            self._stopping[uid] = asyncio.create_task(self._stop(uid, process, pod))
        elif pod is not None:
            self._store.remove(pod)

    async def _stop(self, uid: str, process: PodProcess, pod: Object | None) -> None:
        await self._runner.stop(process)
        self._release(process)
        del self.pods[uid], self._stopping[uid]
        if pod is not None:
            self._store.remove(pod)


def hosts_lines(pods: Sequence[Object], services: Sequence[Object]) -> str:
    """What cluster DNS would answer: pods of headless Services by name, other Services by a ready pod."""
    lines = []
    for pod in pods:
        meta, spec, ip = pod["metadata"], pod["spec"], _ip(pod)
        if ip and spec.get("hostname") and spec.get("subdomain"):
            lines += _names(ip, f"{spec['hostname']}.{spec['subdomain']}", meta["namespace"])
    for service in services:
        if service["spec"].get("clusterIP") != "None":
            selector = (service["spec"].get("selector") or {}).items()
            behind = [p for p in pods if selector <= p["metadata"]["labels"].items() and is_ready(p)]
            lines += [
                line
                for pod in behind[:1]
                for line in _names(_ip(pod), service["metadata"]["name"], service["metadata"]["namespace"])
            ]
    return "".join(lines)


def _names(ip: str, name: str, namespace: str) -> list[str]:
    full = f"{name}.{namespace}.svc"
    return [f"{ip} {each}\n" for each in (full, f"{full}.cluster.local", f"{name}.{namespace}", name)]


def endpoints_of(pods: Sequence[Object]) -> list[Endpoint]:
    """One endpoint a rank of every engine pod that has an address and is not on its way out."""
    return [
        Endpoint(
            name=f"{pod['metadata']['name']}/{rank}",
            host=_ip(pod),
            port=RANK_HTTP_PORT + rank,
            role=labels[LABEL_ROLE],
            pool=labels[LABEL_POOL],
            group=labels[LABEL_GROUP],
            revision=labels.get(LABEL_REVISION, ""),
            ready=is_ready(pod),
        )
        for pod in pods
        if (labels := pod["metadata"]["labels"]).get(LABEL_COMPONENT) == names.ENGINE
        if _ip(pod) and not leaving(pod)
        for rank in range(ranks(pod))
    ]


def ranks(pod: Object) -> int:
    """HTTP endpoints of an engine pod."""
    return int((pod["metadata"].get("annotations") or {}).get(ANNOTATION_RANKS, 1))


def _ip(pod: Object) -> str:
    status: dict[str, Any] = pod.get("status") or {}
    return str(status.get("podIP", ""))


def write_if_changed(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part; an equal one is not touched."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
