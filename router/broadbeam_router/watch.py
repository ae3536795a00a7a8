"""Engine pods of one cluster, listed and then watched on the Kubernetes API server."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast, get_args

import aiohttp
import msgspec

from broadbeam_crds import conventions as names
from broadbeam_crds.engine_config import Role
from broadbeam_crds.gateway_config import Endpoint, KubernetesEndpoints
from broadbeam_router.fleet import Fleet
from broadbeam_router.sources import ApiServer

log = logging.getLogger(__name__)

WATCH_S = 240  # the server ends a watch after this; then it is resumed
# Bookmarks come about once a minute, so a longer silence is a dead connection.
SILENCE_S = 150.0
FIRST_PAUSE_S = 0.5
LAST_PAUSE_S = 30.0
_ranks = re.compile("[0-9]{1,3}")  # one more digit and their ports would end
BETWEEN_S = 0.2  # between watches, so that a server that ends them at once is not hammered


class Expired(Exception):  # noqa: N818
    """The watch's resourceVersion is too old (410): list again."""


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Condition(msgspec.Struct):
    type: str
    status: str


class PodStatus(msgspec.Struct):
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    conditions: list[Condition] | None = None


class Pod(msgspec.Struct):
    metadata: Metadata
    status: PodStatus = msgspec.field(default_factory=PodStatus)


class PodList(msgspec.Struct):
    metadata: Metadata
    items: list[Pod]


class WatchEvent(msgspec.Struct):
    type: str
    object: msgspec.Raw


class Failure(msgspec.Struct):
    code: int = 0
    message: str = ""


_list = msgspec.json.Decoder(PodList)
_event = msgspec.json.Decoder(WatchEvent)
_pod = msgspec.json.Decoder(Pod)
_failure = msgspec.json.Decoder(Failure)


def endpoints_of(pod: Pod) -> list[Endpoint]:
    """One endpoint per rank; none while the pod has no address. Ready as Kubernetes says, gates included."""
    labels = pod.metadata.labels or {}
    role = labels.get(names.LABEL_ROLE, "")
    ranks = (pod.metadata.annotations or {}).get(names.ANNOTATION_RANKS, "1")
    if role not in get_args(Role) or not _ranks.fullmatch(ranks):
        log.warning("pod %s is left out: role %r, ranks per node %r", pod.metadata.name, role, ranks)
        return []
    if pod.status.pod_ip is None:
        return []
    conditions = {c.type: c.status for c in pod.status.conditions or ()}
    ready = conditions.get("Ready") == "True" and pod.metadata.deletion_timestamp is None
    return [
        Endpoint(
            name=f"{pod.metadata.name}/{rank}",
            host=pod.status.pod_ip,
            port=names.RANK_HTTP_PORT + rank,
            role=cast(Role, role),
            pool=labels.get(names.LABEL_POOL, ""),
            group=labels.get(names.LABEL_GROUP, ""),
            revision=labels.get(names.LABEL_REVISION, ""),
            ready=ready,
        )
        for rank in range(int(ranks))
    ]


class PodSource:
    """Keeps `fleet` equal to the pods; while the API server cannot be reached, the last set stays in use."""

    def __init__(self, where: KubernetesEndpoints, api_server: ApiServer, fleet: Fleet) -> None:
        self._url = f"{api_server.url}/api/v1/namespaces/{where.namespace}/pods"
        self._selector = f"{names.LABEL_CLUSTER}={where.cluster},{names.LABEL_COMPONENT}=engine"
        self._account = Path(api_server.service_account)
        self._fleet = fleet
        self._pods: dict[str, Pod] = {}
        self._version = ""
        self._pause_s = FIRST_PAUSE_S

    async def run(self) -> None:
        while True:
            try:
                async with self._session() as session:
                    await self._list_and_watch(session)
            except Expired:
                self._version = ""
                await asyncio.sleep(BETWEEN_S)
            except (OSError, aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as error:
                log.warning(
                    "watching pods: %s: %s; again in %.1f s", type(error).__name__, error, self._pause_s
                )
                await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
                self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=SILENCE_S)
        if not self._url.startswith("https:"):
            return aiohttp.ClientSession(timeout=timeout)
        trust = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust), timeout=timeout)

    def _headers(self) -> dict[str, str]:
        # Kubernetes renews the token in place, so it is read for every call.
        token = (self._account / "token").read_text().strip()
        return {"Authorization": f"Bearer {token}", "Accept": "application/json"}

    async def _list_and_watch(self, session: aiohttp.ClientSession) -> None:
        if not self._version:
            await self._list(session)
        while True:
            await self._watch(session)
            await asyncio.sleep(BETWEEN_S)

    async def _list(self, session: aiohttp.ClientSession) -> None:
        params = {"labelSelector": self._selector}
        async with session.get(self._url, params=params, headers=self._headers()) as answer:
            answer.raise_for_status()
            pods = _list.decode(await answer.read())
        self._pods = {pod.metadata.name: pod for pod in pods.items}
        self._version = pods.metadata.resource_version
        self._pause_s = FIRST_PAUSE_S
        self._publish()

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        """One watch until the server ends it; Expired when it cannot be resumed."""
        params = {
            "labelSelector": self._selector,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(WATCH_S),
        }
        async with session.get(self._url, params=params, headers=self._headers()) as answer:
            if answer.status == 410:
                raise Expired
            answer.raise_for_status()
            async for line in _lines(answer.content):
                self._pause_s = FIRST_PAUSE_S
                self._take(_event.decode(line))

    def _take(self, event: WatchEvent) -> None:
        if event.type == "ERROR":
            failure = _failure.decode(event.object)
            if failure.code == 410:
                raise Expired
            raise aiohttp.ClientError(f"watch failed with {failure.code}: {failure.message}")
        pod = _pod.decode(event.object)
        self._version = pod.metadata.resource_version
        if event.type == "BOOKMARK":
            return
        if event.type == "DELETED":
            self._pods.pop(pod.metadata.name, None)
        else:
            self._pods[pod.metadata.name] = pod
        self._publish()

    def _publish(self) -> None:
        self._fleet.update(e for pod in self._pods.values() for e in endpoints_of(pod))


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length (StreamReader's own readline refuses long ones, and pods are long)."""
    rest = b""
    async for data in stream.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line:
                yield line
