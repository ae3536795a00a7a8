from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broadbeam_crds.conventions import (
    ANNOTATION_RANKS,
    LABEL_COMPONENT,
    LABEL_GROUP,
    LABEL_POOL,
    LABEL_REVISION,
    LABEL_ROLE,
)
from broadbeam_operator.cluster import Object
from broadbeam_operator.local.node import endpoints_of, hosts_lines, write_if_changed


def pod(name: str, ip: str = "127.77.1.1", ready: bool = True, ranks: int = 1, **meta: Any) -> Object:
    labels = {
        LABEL_COMPONENT: "engine",
        LABEL_ROLE: "decode",
        LABEL_POOL: "d",
        LABEL_GROUP: "0",
        LABEL_REVISION: "r1",
    }
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    metadata = {
        "name": name,
        "namespace": "ns",
        "labels": labels,
        "annotations": {ANNOTATION_RANKS: str(ranks)},
    }
    return {
        "metadata": metadata | meta,
        "spec": {"hostname": name, "subdomain": "c-d-0"},
        "status": {"podIP": ip, "conditions": conditions} if ip else {},
    }


def gateway(name: str, ip: str, ready: bool = True) -> Object:
    made = pod(name, ip, ready, labels={LABEL_COMPONENT: "gateway"})
    return made | {"spec": {}}


SERVICE = {
    "metadata": {"name": "c-gateway", "namespace": "ns"},
    "spec": {"selector": {LABEL_COMPONENT: "gateway"}},
}
HEADLESS = {"metadata": {"name": "c-d-0", "namespace": "ns"}, "spec": {"clusterIP": "None", "selector": {}}}


def test_pods_of_headless_services_and_ready_gateways_have_names() -> None:
    pods = [
        pod("c-d-0-0", "127.77.1.1", ready=False),
        pod("c-d-0-1", ip=""),
        gateway("g-0", "127.0.0.1", ready=False),
        gateway("g-1", "127.77.1.9"),
    ]
    lines = hosts_lines(pods, [SERVICE, HEADLESS]).splitlines()
    assert lines == [
        "127.77.1.1 c-d-0-0.c-d-0.ns.svc",
        "127.77.1.1 c-d-0-0.c-d-0.ns.svc.cluster.local",
        "127.77.1.1 c-d-0-0.c-d-0.ns",
        "127.77.1.1 c-d-0-0.c-d-0",
        "127.77.1.9 c-gateway.ns.svc",
        "127.77.1.9 c-gateway.ns.svc.cluster.local",
        "127.77.1.9 c-gateway.ns",
        "127.77.1.9 c-gateway",
    ]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        pytest.param(
            pod("p", ranks=2), [("p/0", 8000, True), ("p/1", 8001, True)], id="one endpoint for each rank"
        ),
        pytest.param(pod("p", ready=False), [("p/0", 8000, False)], id="not ready"),
        pytest.param(pod("p", ip=""), [], id="no address yet"),
        pytest.param(pod("p", deletionTimestamp="now"), [], id="on its way out"),
        pytest.param(gateway("g", "127.0.0.1"), [], id="no engine"),
    ],
)
def test_ranks_of_engine_pods_are_endpoints(found: Object, wanted: list[tuple[str, int, bool]]) -> None:
    endpoints = endpoints_of([found])
    assert [(e.name, e.port, e.ready) for e in endpoints] == wanted
    assert all((e.role, e.pool, e.group, e.revision) == ("decode", "d", "0", "r1") for e in endpoints)


def test_an_equal_file_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_if_changed(path, "a")
    before = path.stat().st_mtime_ns
    write_if_changed(path, "a")
    assert path.stat().st_mtime_ns == before
    write_if_changed(path, "b")
    assert path.read_text() == "b"
