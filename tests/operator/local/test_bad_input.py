"""What cannot be served here is one line, and leaves nothing."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.operator.local.desk import PROMPT, Desk

pytestmark = pytest.mark.slow


async def test_a_port_in_use_is_one_line_that_says_what_to_do(desk: Desk) -> None:
    with socket.create_server(("127.0.0.1", desk.port)):
        command = await desk.start("up", desk.manifest())
        assert await command.end() == 1
    assert command.lines == [
        f"broadbeam: port {desk.port} of 127.0.0.1 is in use or not ours to use: choose another with --port, "
        "or set spec.gateway.listeners[0].port"
    ]


async def test_an_engine_that_keeps_crashing_is_one_line_that_says_why_and_its_log(desk: Desk) -> None:
    folder = desk.folder / "model"
    folder.mkdir()
    model = {"name": "m", "source": f"file://{folder}", "maxModelLen": 128}
    command = await desk.start("up", desk.manifest(engine={"name": "broadbeam"}, model=model))
    assert await command.end() == 1
    last, log = command.lines[-2:]
    assert re.match(
        r"broadbeam: demo-\w+-0-0 keeps failing \(restarted 3 times\): .*config\.json is missing", last
    )
    assert "config.json" in Path(log.removeprefix("its log: ")).read_text()
    assert "Traceback" not in command.text
    assert desk.left() == []


async def test_a_model_that_is_not_there_is_one_line(desk: Desk) -> None:
    model = {"name": "m", "source": "file:///no/such/model", "maxModelLen": 128}
    path = desk.manifest(engine={"name": "broadbeam"}, model=model)
    command = await desk.start("up", path)
    assert await command.end() == 1
    assert command.lines == [
        f"broadbeam: {path}: spec.model.source: file:///no/such/model: there is no such file or folder"
    ]


async def test_a_start_that_takes_too_long_ends_with_where_it_was(desk: Desk) -> None:
    slow = {"name": "sim", "sim": {"load": "300s"}}
    command = await desk.start("up", desk.manifest(engine=slow), "--timeout", "4")
    assert await command.end() == 1
    assert re.search(r"broadbeam: not available after 4 s \(--timeout\): demo-\S+ is at: \w+", command.text)
    assert desk.left() == []


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        pytest.param(
            {"model": {"name": "m", "source": "pvc://claim/m", "maxModelLen": 128}},
            1,
            "spec.model.source: pvc://claim/m needs a cluster; here use file://, hf:// or pypi://",
            id="a model in a claim",
        ),
        pytest.param({"pools": []}, 2, "spec.pools: has 0 items; at least 1 needed", id="no pools"),
        pytest.param(
            {"gateway": {"auth": {"secretRef": {"name": "keys"}}}},
            1,
            "spec.gateway.auth.secretRef.name: keys: no such Secret here; give its keys with "
            "--secret keys=FOLDER",
            id="a Secret that is not there",
        ),
    ],
)
async def test_what_cannot_run_here_is_one_line(
    desk: Desk, spec: dict[str, Any], code: int, message: str
) -> None:
    path = desk.manifest(**spec)
    command = await desk.start("up", path)
    assert await command.end() == code
    assert command.lines == [f"broadbeam: {path}: {message}"]


@pytest.mark.parametrize("words", [("up",), ("demo", "--prompt", PROMPT)], ids=["up", "demo"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("spec: [", "line 1: not YAML: expected the node content", id="no YAML"),
        pytest.param("\x00", "not YAML", id="no text"),
        pytest.param("- a", "not a mapping but a list; expected a ServingCluster", id="a list"),
    ],
)
async def test_what_is_no_manifest_is_one_line(
    desk: Desk, words: tuple[str, ...], text: str, message: str
) -> None:
    path = desk.folder / "wrong.yaml"
    path.write_text(text)
    command = await desk.start(words[0], path, *words[1:])
    assert await command.end() == 2
    assert len(command.lines) == 1
    assert command.text.startswith(f"broadbeam: {path}: ")
    assert message in command.text


async def test_a_cache_that_cannot_be_written_is_one_line(desk: Desk) -> None:
    desk.cache.touch()
    command = await desk.start("up", desk.manifest())
    assert await command.end() == 1
    assert command.lines == [f"broadbeam: {desk.cache}/run: Not a directory"]
