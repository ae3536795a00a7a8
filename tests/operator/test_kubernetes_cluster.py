"""The REST client against a server that answers as Kubernetes does: paths, bodies, pages, errors."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import pytest
import yaml
from aiohttp import web

from broadbeam_operator.cluster import (
    CONFIG_MAP,
    POD,
    ROLE,
    SERVING_CLUSTER,
    STATEFUL_SET,
    ClusterError,
    kind_of,
)
from broadbeam_operator.kubernetes_cluster import connect, credentials, path

STATUS = {"kind": "Status", "message": 'configmaps "x" is forbidden: user "y" cannot get it'}


class Api:
    """Records requests and gives prepared answers, the first that matches method and path."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str, object]] = []
        self.answers: dict[tuple[str, str], list[tuple[int, object]]] = {}

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.requests.append(
            (request.method, request.path_qs, request.content_type, json.loads(body) if body else None)
        )
        self.token = request.headers.get("Authorization")
        waiting = self.answers.get((request.method, request.path), [])
        status, answer = waiting.pop(0) if waiting else (200, {})
        return web.json_response(answer, status=status) if answer != "" else web.Response(status=status)


@asynccontextmanager
async def served(tmp_path, api):
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", api.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server = f"http://127.0.0.1:{runner.addresses[0][1]}"
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": server}}],
                "users": [{"name": "u", "user": {"token": "secret"}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    try:
        async with connect(await credentials(str(kubeconfig))) as cluster:
            yield cluster
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("kind", "namespace", "name", "url"),
    [
        (POD, "a", "p", "/api/v1/namespaces/a/pods/p"),
        (STATEFUL_SET, "a", None, "/apis/apps/v1/namespaces/a/statefulsets"),
        (SERVING_CLUSTER, None, None, "/apis/serving.broadbeam.io/v1alpha1/servingclusters"),
        (ROLE, "a", "r", "/apis/rbac.authorization.k8s.io/v1/namespaces/a/roles/r"),
    ],
)
def test_paths_are_kubernetes(kind, namespace, name, url):
    assert path(kind, namespace, name) == url


async def test_an_object_that_is_not_there_is_none(tmp_path):
    api = Api()
    api.answers["GET", "/api/v1/namespaces/a/pods/p"] = [(404, STATUS)]
    async with served(tmp_path, api) as cluster:
        assert await cluster.get(POD, "a", "p") is None
    assert api.token == "Bearer secret"


async def test_a_long_list_is_read_page_by_page_and_filled_in(tmp_path):
    api = Api()
    url = "/api/v1/namespaces/a/pods"
    api.answers["GET", url] = [
        (200, {"metadata": {"continue": "next"}, "items": [{"metadata": {"name": "one"}}]}),
        (200, {"metadata": {}, "items": [{"metadata": {"name": "two"}}]}),
    ]
    async with served(tmp_path, api) as cluster:
        found = await cluster.list(POD, "a", {"x/y": "z", "k": "v"})
    assert [each["metadata"]["name"] for each in found] == ["one", "two"]
    assert {kind_of(each) for each in found} == {POD}
    assert [request[1] for request in api.requests] == [
        f"{url}?limit=500&labelSelector=x/y%3Dz,k%3Dv",
        f"{url}?limit=500&labelSelector=x/y%3Dz,k%3Dv&continue=next",
    ]


async def test_apply_is_server_side_and_forced(tmp_path):
    api = Api()
    obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "a"}}
    async with served(tmp_path, api) as cluster:
        await cluster.apply(obj)
        assert cluster.writes == 1
    assert api.requests == [
        (
            "PATCH",
            "/api/v1/namespaces/a/configmaps/c?fieldManager=broadbeam-operator&force=true",
            "application/apply-patch+yaml",
            obj,
        )
    ]


async def test_what_must_be_new_is_sent_with_a_version_that_nothing_has(tmp_path):
    api, meta = Api(), {"name": "c", "namespace": "a"}
    api.answers["PATCH", "/api/v1/namespaces/a/configmaps/c"] = [(409, STATUS)]
    async with served(tmp_path, api) as cluster:
        with pytest.raises(ClusterError) as caught:
            await cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}, new=True)
    assert caught.value.status == 409
    assert api.requests[0][3]["metadata"] == {**meta, "resourceVersion": "1"}
    assert "resourceVersion" not in meta


@pytest.mark.parametrize(("status", "done"), [(200, True), (404, False), (409, False)])
async def test_delete_tells_whether_there_was_one(tmp_path, status, done):
    api = Api()
    api.answers["DELETE", "/api/v1/namespaces/a/configmaps/c"] = [(status, STATUS)]
    async with served(tmp_path, api) as cluster:
        assert await cluster.delete(CONFIG_MAP, "a", "c", uid="u") is done
    assert api.requests[0][3] == {
        "kind": "DeleteOptions",
        "apiVersion": "v1",
        "propagationPolicy": "Background",
        "preconditions": {"uid": "u"},
    }


async def test_the_status_and_conditions_of_what_is_gone_are_nothing_to_do(tmp_path):
    api = Api()
    api.answers["PATCH", f"{path(SERVING_CLUSTER, 'a', 'c')}/status"] = [(404, STATUS)]
    api.answers["PATCH", f"{path(POD, 'a', 'p')}/status"] = [(404, STATUS)]
    async with served(tmp_path, api) as cluster:
        await cluster.apply_status(SERVING_CLUSTER, "a", "c", {"url": "x"})
        await cluster.patch_pod_condition("a", "p", {"type": "t", "status": "True"})
    assert [request[3] for request in api.requests] == [
        {
            "apiVersion": "serving.broadbeam.io/v1alpha1",
            "kind": "ServingCluster",
            "metadata": {"name": "c", "namespace": "a"},
            "status": {"url": "x"},
        },
        {"status": {"conditions": [{"type": "t", "status": "True"}]}},
    ]


async def test_an_event_names_what_it_is_about(tmp_path):
    api = Api()
    about = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "a", "uid": "u"}}
    async with served(tmp_path, api) as cluster:
        await cluster.emit_event(about, "Warning", "Degraded", "x" * 2000)
    event = api.requests[0][3]
    assert event["involvedObject"]["uid"] == "u"
    assert (event["type"], event["reason"], len(event["message"])) == ("Warning", "Degraded", 1024)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(STATUS, STATUS["message"], id="in the server's words"),
        pytest.param("", "GET /api/v1/namespaces/a/pods/p: HTTP 403", id="without words"),
    ],
)
async def test_a_refusal_is_an_error_with_its_status(tmp_path, answer, words):
    api = Api()
    api.answers["GET", "/api/v1/namespaces/a/pods/p"] = [(403, answer)]
    async with served(tmp_path, api) as cluster:
        with pytest.raises(ClusterError) as caught:
            await cluster.get(POD, "a", "p")
    assert (str(caught.value), caught.value.status) == (words, 403)


async def test_a_server_that_is_not_there_is_an_error_in_one_line(tmp_path):
    async with served(tmp_path, Api()) as cluster:
        cluster._base = "http://127.0.0.1:1"
        with pytest.raises(ClusterError) as caught:
            await cluster.get(POD, "a", "p")
    assert "\n" not in str(caught.value)
    assert caught.value.status == 0


@pytest.mark.parametrize("text", ["", "[]", "a: b"], ids=["empty", "a list", "no kubeconfig"])
async def test_a_useless_kubeconfig_is_an_error(tmp_path, text):
    file = tmp_path / "kubeconfig"
    file.write_text(text)
    with pytest.raises(ClusterError, match="kubeconfig"):
        await credentials(str(file))
