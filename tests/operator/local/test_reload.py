"""A manifest edited while its cluster runs: when it is read again, and what needs a new start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from broadbeam_crds.testing import pool, serving_cluster
from broadbeam_crds.v1alpha1 import ServingCluster
from broadbeam_operator.local.reload import ManifestFile, RefusedError, obstacle


class Screen:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class Running:
    def __init__(self, cluster: ServingCluster) -> None:
        self.cluster = cluster

    async def change(self, cluster: ServingCluster) -> None:
        self.cluster = cluster


class Desk:
    """A file, what reading it gives, and what is shown."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("0")
        self.content: ServingCluster | RefusedError = serving_cluster()
        self.reads = 0
        self.session, self.screen = Running(serving_cluster()), Screen()
        self.file = ManifestFile(path, self.read)

    def read(self, _: ServingCluster) -> ServingCluster:
        self.reads += 1
        if isinstance(self.content, RefusedError):
            raise self.content
        return self.content

    def edit(self, text: str, content: ServingCluster | RefusedError) -> None:
        self.path.write_text(text)
        self.content = content

    async def look(self, times: int = 2) -> None:
        for _ in range(times):
            await self.file.look(self.session, self.screen)  # type: ignore[arg-type]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "demo.yaml")


THREE = serving_cluster(pools=[pool("prefill"), pool("decode", groups=3)])


async def test_a_file_that_stays_is_not_read(desk: Desk) -> None:
    await desk.look(5)
    assert desk.reads == 0


async def test_a_change_is_applied_once_it_has_settled(desk: Desk) -> None:
    desk.edit("10", THREE)
    await desk.look(1)
    assert desk.reads == 0
    await desk.look(3)
    assert desk.reads == 1
    assert desk.session.cluster == THREE
    assert desk.screen.said == [f"{desk.path} has changed: applying it"]


async def test_what_is_refused_is_told_once_and_leaves_what_runs(desk: Desk) -> None:
    desk.edit("10", RefusedError(["a: wrong", "b: wrong"], malformed=False))
    await desk.look(4)
    assert desk.screen.said == ["not applied: a: wrong", "not applied: b: wrong"]
    assert desk.session.cluster == serving_cluster()
    desk.edit("200", THREE)
    await desk.look()
    assert desk.session.cluster == THREE


async def test_a_changed_comment_changes_nothing(desk: Desk) -> None:
    desk.edit("10", serving_cluster())
    await desk.look()
    assert (desk.reads, desk.screen.said) == (1, [])


async def test_a_file_that_is_replaced_is_waited_for(desk: Desk) -> None:
    os.replace(desk.path, f"{desk.path}~")
    await desk.look(3)
    assert desk.reads == 0
    desk.edit("10", THREE)
    await desk.look()
    assert desk.session.cluster == THREE


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        pytest.param(serving_cluster("other"), 'metadata.name: "other" is not "demo"', id="another name"),
        pytest.param(
            serving_cluster(namespace="n"), 'metadata.namespace: "n" is not "default"', id="another namespace"
        ),
        pytest.param(serving_cluster(gateway={"policy": "random"}), "spec.gateway", id="its policy"),
        pytest.param(serving_cluster(gateway={"replicas": 2}), "spec.gateway", id="its replicas"),
        pytest.param(serving_cluster(pools=[pool("both")]), "whether prefill is apart", id="no prefill"),
    ],
)
def test_what_moves_the_gateway_needs_a_new_start(wanted: ServingCluster, words: str) -> None:
    found = obstacle(serving_cluster(), wanted)
    assert found is not None
    assert words in found


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"pools": THREE.spec.pools}, id="groups"),
        pytest.param({"engine": "sim"}, id="the engine"),
        pytest.param({"rollout": {"maxUnavailable": 2}}, id="the rollout"),
    ],
)
def test_the_rest_may_change(spec: dict[str, Any]) -> None:
    assert obstacle(serving_cluster(), serving_cluster(**spec)) is None
