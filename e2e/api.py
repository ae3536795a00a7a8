"""A thin asynchronous client of the Kubernetes API: requests, and list-then-watch that never ends."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

Object = dict[str, Any]

APPLY = "application/apply-patch+yaml"  # JSON is YAML
WATCH_S = 300  # of one watch request; the next follows at once
_LINE_LIMIT = 2**24  # bytes of one watch event


class ApiError(Exception):
    """The API server refused; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """One API server; made by `connect`."""

    def __init__(self, session: aiohttp.ClientSession, server: str) -> None:
        self._session = session
        self._server = server

    async def call(
        self, method: str, path: str, body: Object | None = None, content_type: str = "application/json"
    ) -> Object:
        """One request; ApiError for an answer of 400 and above."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type}
        async with self._session.request(method, self._server + path, data=data, headers=headers) as response:
            answer: Object = await response.json()
            if response.status >= 400:
                raise ApiError(response.status, str(answer.get("message", answer)))
            return answer

    async def apply(self, path: str, body: Object, manager: str) -> Object:
        """Server-side apply, taking over fields that others hold."""
        return await self.call("PATCH", f"{path}?fieldManager={manager}&force=true", body, APPLY)

    async def watch(self, path: str, query: str = "") -> AsyncIterator[tuple[str, Object]]:
        """(SYNC, list), then (ADDED | MODIFIED | DELETED, object) for ever.

        Another SYNC follows whenever the API server cut the watch off and changes may have been missed.
        """
        while True:
            page = await self.call("GET", f"{path}?{query}")
            yield "SYNC", page
            since = page["metadata"]["resourceVersion"]
            options = f"watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_S}&resourceVersion={since}"
            try:
                async for event in self._events(f"{self._server}{path}?{query}&{options}"):
                    if event["type"] == "ERROR":
                        break
                    if event["type"] != "BOOKMARK":
                        yield event["type"], event["object"]
            except aiohttp.ClientError:
                await asyncio.sleep(0.2)

    async def _events(self, url: str) -> AsyncIterator[Object]:
        async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=None)) as response:
            async for line in response.content:
                yield json.loads(line)


@asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[Api]:
    """The API server of a kubeconfig that `control_plane` wrote."""
    config = json.loads(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cafile=cluster["certificate-authority"])
    headers = {"Authorization": f"Bearer {user['token']}", "Accept": "application/json"}
    connector = aiohttp.TCPConnector(ssl=context, limit=0)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, read_bufsize=_LINE_LIMIT
    ) as session:
        yield Api(session, cluster["server"])
