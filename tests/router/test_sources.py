"""Where endpoints come from: a file, and an API server that lists, watches, expires and fails."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec import convert

from broadbeam_crds.engine_config import encode
from broadbeam_crds.gateway_config import Endpoint, EndpointsFile, KubernetesEndpoints
from broadbeam_router.sources import ApiServer, FileSource
from broadbeam_router.watch import Pod, PodSource, endpoints_of

PREFIX = "serving.broadbeam.io"
RESET = b"reset"  # as an event: the API server's end of the connection is gone


@dataclass
class Noted:
    """Stands for the fleet: what it was told."""

    sets: list[list[Endpoint]] = field(default_factory=list)

    def update(self, endpoints: Any) -> None:
        self.sets.append(list(endpoints))

    @property
    def names(self) -> list[str]:
        return [e.name for e in self.sets[-1] if e.ready] if self.sets else []


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not in time")


# -- a file -------------------------------------------------------------------------------------------


def written(path: Path, *names: str) -> None:
    rows = [
        Endpoint(name=n, host="127.0.0.1", port=1, role="decode", pool="d", group="0", revision="r")
        for n in names
    ]
    path.write_text(encode(EndpointsFile(endpoints=rows)))


def test_the_file_is_read_again_only_when_it_changed(tmp_path) -> None:
    fleet, path = Noted(), tmp_path / "endpoints.json"
    written(path, "a")
    source = FileSource(str(path), fleet)
    for _ in range(3):
        source.refresh()
    assert len(fleet.sets) == 1
    written(tmp_path / "new", "b")
    os.replace(tmp_path / "new", path)
    source.refresh()
    assert fleet.names == ["b"]


@pytest.mark.parametrize("wrong", ["", "{", '{"endpoints":[{"name":1}]}', '{"endpoints":[],"x":1}', None])
def test_a_wrong_or_missing_file_leaves_the_set_as_it_was(tmp_path, wrong, caplog) -> None:
    fleet, path = Noted(), tmp_path / "endpoints.json"
    written(path, "a")
    source = FileSource(str(path), fleet)
    source.refresh()
    if wrong is None:
        path.unlink()
    else:
        path.write_text(wrong)
    for _ in range(5):
        source.refresh()
    assert fleet.names == ["a"]
    complaints = [r for r in caplog.records if "endpoints stay as they were" in r.message]
    assert len(complaints) == 1
    written(path, "a", "b")
    source.refresh()
    assert fleet.names == ["a", "b"]


# -- Kubernetes ---------------------------------------------------------------------------------------


def pod(
    name: str, version: int = 1, ready: str = "True", role: str = "decode", **more: Any
) -> dict[str, Any]:
    labels = {
        f"{PREFIX}/role": role,
        f"{PREFIX}/pool": "pool",
        f"{PREFIX}/group": "3",
        f"{PREFIX}/revision": "1-ab",
    }
    metadata = {
        "name": name,
        "resourceVersion": str(version),
        "labels": labels,
        "annotations": {f"{PREFIX}/ranks-per-node": "2"},
    }
    status = {"podIP": "10.1.2.3", "conditions": [{"type": "Ready", "status": ready, "lastProbeTime": None}]}
    return {"kind": "Pod", "metadata": metadata | more, "spec": {"nodeName": "n"}, "status": status}


def test_a_pod_gives_one_endpoint_per_rank() -> None:
    first, second = endpoints_of(convert(pod("c-d-0-0"), Pod))
    assert first == Endpoint(
        name="c-d-0-0/0", host="10.1.2.3", port=8000, role="decode", pool="pool", group="3", revision="1-ab"
    )
    assert (second.name, second.port, second.ready) == ("c-d-0-0/1", 8001, True)


@pytest.mark.parametrize(
    ("body", "ready"),
    [
        pytest.param(pod("a", ready="False"), False, id="not ready"),
        pytest.param(pod("a", deletionTimestamp="2026-01-01T00:00:00Z"), False, id="being deleted"),
        pytest.param(pod("a") | {"status": {"podIP": "10.0.0.1"}}, False, id="no conditions"),
        pytest.param(pod("a") | {"status": {}}, None, id="no address"),
        pytest.param(pod("a", role="driver"), None, id="another role"),
        pytest.param(pod("a", annotations={f"{PREFIX}/ranks-per-node": "-1"}), None, id="wrong count"),
        pytest.param(pod("a", annotations={f"{PREFIX}/ranks-per-node": "9" * 9}), None, id="a huge count"),
        pytest.param(pod("a", annotations={f"{PREFIX}/ranks-per-node": "9" * 5000}), None, id="no count"),
        pytest.param(pod("a", annotations=None), True, id="no annotation"),
    ],
)
def test_a_pod_is_ready_when_kubernetes_says_so(body, ready) -> None:
    found = endpoints_of(convert(body, Pod))
    assert [e.ready for e in found][:1] == ([] if ready is None else [ready])


class FakeApiServer:
    """Pods by HTTP: answers as scripted, watches as queued."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.version = 100
        self.calls: list[tuple[str, dict[str, str], str]] = []
        self.list_status: list[int] = []
        self.watch_status: list[int] = []
        self.events: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def start(self, account: Path) -> ApiServer:
        account.mkdir()
        (account / "token").write_text("token-1\n")
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/pods", self._pods)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        port = self.runner.addresses[0][1]
        return ApiServer(f"http://127.0.0.1:{port}", str(account))

    async def _pods(self, request: web.Request) -> web.StreamResponse:
        kind = "watch" if "watch" in request.query else "list"
        self.calls.append((kind, dict(request.query), request.headers["Authorization"]))
        statuses = self.list_status if kind == "list" else self.watch_status
        if statuses and (status := statuses.pop(0)) != 200:
            return web.json_response({"kind": "Status", "code": status}, status=status)
        if kind == "list":
            return web.json_response({"metadata": {"resourceVersion": str(self.version)}, "items": self.pods})
        response = web.StreamResponse()
        await response.prepare(request)
        while (event := await self.events.get()) is not None:
            if event == RESET:
                assert request.transport is not None
                request.transport.abort()
            else:
                await response.write(event)
        return response

    def send(self, kind: str, body: dict[str, Any]) -> None:
        line = json.dumps({"type": kind, "object": body}).encode() + b"\n"
        for start in range(0, len(line), 70_000):  # long lines come in several parts
            self.events.put_nowait(line[start : start + 70_000])

    def count(self, kind: str) -> int:
        return sum(call[0] == kind for call in self.calls)


@pytest.fixture
async def watched(tmp_path):
    api = FakeApiServer()
    api.pods = [pod("a"), pod("b", ready="False")]
    fleet = Noted()
    where = KubernetesEndpoints(namespace="ns", cluster="c")
    source = PodSource(where, await api.start(tmp_path / "account"), fleet)
    task = asyncio.create_task(source.run())
    yield api, fleet
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await api.runner.cleanup()


async def test_pods_are_listed_and_then_watched(watched) -> None:
    api, fleet = watched
    await until(lambda: api.count("watch") == 1)
    assert fleet.names == ["a/0", "a/1"]
    (_, listed, auth), (_, query, _) = api.calls
    assert auth == "Bearer token-1"
    assert listed["labelSelector"] == f"{PREFIX}/cluster=c,{PREFIX}/component=engine"
    assert (query["resourceVersion"], query["allowWatchBookmarks"]) == ("100", "true")
    api.send("MODIFIED", pod("b", 101))
    await until(lambda: fleet.names == ["a/0", "a/1", "b/0", "b/1"])
    api.send("MODIFIED", pod("a", 102, deletionTimestamp="2026-01-01T00:00:00Z"))
    await until(lambda: fleet.names == ["b/0", "b/1"])
    api.send("DELETED", pod("a", 103))
    api.send("ADDED", pod("c", 104, annotations={"big": "x" * 300_000}))
    await until(lambda: fleet.names == ["b/0", "b/1", "c/0"])


async def test_a_watch_that_ends_goes_on_where_it_was(watched) -> None:
    api, fleet = watched
    api.send("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": "777"}})
    api.events.put_nowait(None)
    await until(lambda: api.count("watch") == 2)
    assert api.calls[-1][1]["resourceVersion"] == "777"
    assert api.count("list") == 1
    assert fleet.names == ["a/0", "a/1"]


async def test_a_watch_that_breaks_within_an_event_goes_on_behind_the_last_whole_one(watched) -> None:
    api, fleet = watched
    await until(lambda: api.count("watch") == 1)
    api.send("MODIFIED", pod("b", 101))
    await until(lambda: fleet.names == ["a/0", "a/1", "b/0", "b/1"])
    api.events.put_nowait(b'{"type":"DELETED","object":{"metadata":{"name":"a","resourceVersion":"102"')
    api.events.put_nowait(RESET)
    await until(lambda: api.count("watch") == 2)
    assert api.calls[-1][1]["resourceVersion"] == "101"
    assert api.count("list") == 1
    assert fleet.names == ["a/0", "a/1", "b/0", "b/1"]


async def test_events_that_come_twice_change_nothing_more(watched) -> None:
    api, fleet = watched
    for kind, body in (("ADDED", pod("c", 101)), ("DELETED", pod("b", 102)), ("DELETED", pod("a", 103))):
        api.send(kind, body)
        api.send(kind, body)
    await until(lambda: fleet.names == ["c/0", "c/1"])
    api.send("MODIFIED", pod("d", 104))
    await until(lambda: fleet.names == ["c/0", "c/1", "d/0", "d/1"])


@pytest.mark.parametrize("how", ["event", "status"])
async def test_an_expired_watch_lists_again(watched, how) -> None:
    api, fleet = watched
    await until(lambda: api.count("watch") == 1)
    api.pods, api.version = [pod("z")], 200
    if how == "event":
        api.send("ERROR", {"kind": "Status", "code": 410, "message": "too old"})
    else:
        api.watch_status = [410]
        api.events.put_nowait(None)
    await until(lambda: fleet.names == ["z/0", "z/1"])
    await until(lambda: api.calls[-1][0] == "watch" and api.calls[-1][1]["resourceVersion"] == "200")


async def test_trouble_leaves_the_set_as_it_was_and_is_tried_again(watched, caplog) -> None:
    api, fleet = watched
    await until(lambda: api.count("watch") == 1)
    api.watch_status = [500, 403]
    api.send("ERROR", {"kind": "Status", "code": 500, "message": "etcd is sad"})
    await until(lambda: api.count("watch") >= 4)
    assert fleet.names == ["a/0", "a/1"]
    assert "etcd is sad" in caplog.text
    assert "token-1" not in caplog.text


async def test_a_renewed_token_is_used(watched, tmp_path) -> None:
    api, _ = watched
    await until(lambda: api.count("watch") == 1)
    (tmp_path / "account" / "token").write_text("token-2")
    api.events.put_nowait(None)
    await until(lambda: api.count("watch") == 2)
    assert api.calls[-1][2] == "Bearer token-2"


async def test_an_api_server_that_is_away_at_first_is_waited_for(tmp_path) -> None:
    api, fleet = FakeApiServer(), Noted()
    api.list_status = [503, 429]
    api.pods = [pod("a")]
    server = await api.start(tmp_path / "account")
    task = asyncio.create_task(
        PodSource(KubernetesEndpoints(namespace="ns", cluster="c"), server, fleet).run()
    )
    await until(lambda: fleet.names == ["a/0", "a/1"])
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await api.runner.cleanup()
