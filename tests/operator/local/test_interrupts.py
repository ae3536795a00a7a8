"""Ctrl-C and kill -9 at every stage of `up` and `demo`: the exit status, and that no process is left."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.operator.local.desk import PROMPT, Desk, until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(r"starting demo", id="at once"),
        pytest.param(r"decode-0-0: starting", id="while pods start"),
        pytest.param(r"decode-0-0 rank 0: loading", id="while ranks load"),
    ],
)
async def test_ctrl_c_before_the_cluster_is_available_exits_130(desk: Desk, moment: str) -> None:
    slow = {"name": "sim", "sim": {"load": "60s"}}
    command = await desk.start("up", desk.manifest(engine=slow))
    await command.until(moment)
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 130
    assert desk.left() == []
    assert "Traceback" not in command.text


@pytest.fixture
def slow_hub() -> Iterator[dict[str, str]]:
    """Environment in which hf:// leads to a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}


HUB = {"name": "m", "source": "hf://acme/model", "maxModelLen": 128}


async def test_ctrl_c_while_a_model_is_fetched_exits_130(desk: Desk, slow_hub: dict[str, str]) -> None:
    path = desk.manifest(engine={"name": "broadbeam"}, model=HUB)
    command = await desk.start("up", path, environment=slow_hub)
    await command.until(r"decode-0-0: fetching model")
    await until(lambda: any(re.search(r"broadbeam_runtime fetch", line) for line in desk.left()))
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 130
    assert desk.left() == []
    assert "Traceback" not in command.text


async def test_ctrl_c_while_the_program_itself_loads_says_nothing(desk: Desk) -> None:
    command = await desk.start("up", desk.manifest())
    maps = Path(f"/proc/{command.process.pid}/maps")
    await until(lambda: "pydantic_core" in maps.read_text())
    command.process.send_signal(signal.SIGINT)
    assert await command.end() in (130, -signal.SIGINT)
    assert "Traceback" not in command.text
    assert desk.left() == []


async def test_ctrl_c_during_the_answer_ends_the_demo(desk: Desk) -> None:
    slow = {"name": "sim", "sim": {"decodeBase": "2s"}}
    command = await desk.start("demo", desk.manifest(engine=slow), "--prompt", PROMPT)
    await command.until(r"asking: ")
    command.process.send_signal(signal.SIGINT)
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 130
    assert desk.left() == []
    assert "Traceback" not in command.text


@pytest.mark.parametrize(
    ("engine", "moment"),
    [
        pytest.param({"name": "sim", "sim": {"load": "60s"}}, r"rank 0: loading", id="while ranks load"),
        pytest.param({"name": "broadbeam"}, r"decode-0-0: fetching model", id="while a model is fetched"),
    ],
)
async def test_kill_9_of_up_leaves_no_process_at_any_stage(
    desk: Desk, slow_hub: dict[str, str], engine: dict[str, Any], moment: str
) -> None:
    command = await desk.start("up", desk.manifest(engine=engine, model=HUB), environment=slow_hub)
    await command.until(moment)
    assert desk.left()
    command.process.kill()
    await command.end()
    await until(lambda: not desk.left())


async def test_kill_9_of_up_leaves_no_process_and_the_next_up_cleans_the_folder(desk: Desk) -> None:
    command = await desk.start("up", desk.manifest())
    await command.until(r"available at")
    assert len(desk.left()) >= 5  # two supervisors, two ranks, the gateway
    command.process.kill()
    await command.end()
    await until(lambda: not desk.left())
    (stale,) = (desk.cache / "run").glob("demo-*")
    other = await desk.start("up", desk.manifest("other"))
    await other.until(r"starting other")
    assert not stale.exists()
