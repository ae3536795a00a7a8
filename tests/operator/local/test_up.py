"""`broadbeam up` and `demo` as a person runs them: real processes, the simulator as the engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from pathlib import Path

import aiohttp
import pytest
import yaml
from tests.operator.local.desk import BROADBEAM, PROMPT, Desk

pytestmark = pytest.mark.slow


async def test_a_demo_answers_over_prefill_and_decode_and_leaves_nothing(desk: Desk) -> None:
    command = await desk.start("demo", desk.manifest(), "--prompt", PROMPT, "--max-tokens", "8")
    assert await command.end() == 0, command.text
    assert re.search(r"prefilled by +demo-prefill-0-0/0", command.text)
    assert re.search(r"decoded by +demo-decode-0-0/0", command.text)
    tokens = re.search(r"prompt tokens +(\d+)", command.text)
    assert tokens is not None
    assert re.search(rf"moved by KV transfer +{tokens[1]} tokens", command.text)
    assert re.search(r"generated +8 tokens", command.text)
    assert desk.left() == []
    assert list((desk.cache / "run").glob("demo-*")) == []


async def test_up_serves_until_ctrl_c_and_leaves_nothing(desk: Desk) -> None:
    command = await desk.start("up", desk.manifest())
    url = (await command.until(r"available at (http://\S+)"))[1]
    curl = (await command.until(r"curl -N (\S+) .* -d '(.*)'"))[2]
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=json.loads(curl)) as response,
    ):
        assert response.status == 200
        assert "[DONE]" in await response.text()
    assert desk.left()
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 0
    assert desk.left() == []
    assert "Traceback" not in command.text


async def test_a_killed_rank_comes_back_with_its_group(desk: Desk) -> None:
    command = await desk.start("up", desk.manifest())
    await command.until(r"Ctrl-C stops it")
    os.kill(desk.pid_of(r"broadbeam_runtime rank .*decode"), signal.SIGKILL)
    await command.until(r"(?s)decode-0-0 was restarted; it said last:.*rank 0 was killed by SIGKILL")
    await command.until(r"decode-0-0: ready \(restarts: 1\)")
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 0


async def test_a_changed_manifest_is_applied_and_a_wrong_one_is_told(desk: Desk) -> None:
    path = desk.manifest()
    command = await desk.start("up", path)
    await command.until(r"Ctrl-C stops it")
    first = desk.pid_of(r"broadbeam_runtime rank .*prefill")

    path.write_text("spec: [")
    await command.until(rf"not applied: {path}: line 1: not YAML")
    desk.manifest(gateway={"policy": "random"})
    await command.until(rf"not applied: {path}: spec.gateway, .* stop and start again")
    desk.manifest(engine={"name": "sim", "drain": "0s"}, autoscaling=1)
    await command.until(rf"not applied: {path}: spec.autoscaling: unknown field")
    assert desk.pid_of(r"broadbeam_runtime rank .*prefill") == first

    pools = yaml.safe_load(desk.manifest().read_text())["spec"]["pools"]
    desk.manifest(pools=[pools[0], pools[1] | {"groups": 2}])
    await command.until(rf"{path} has changed: applying it")
    await command.until(r"demo-decode-1-0: ready")
    assert desk.pid_of(r"broadbeam_runtime rank .*prefill") == first
    command.process.send_signal(signal.SIGINT)
    assert await command.end() == 0
    assert desk.left() == []


async def test_two_clusters_at_once_keep_apart_whatever_their_caches(tmp_path: Path, desk: Desk) -> None:
    """Started together, so that neither sees the other's ports before it chooses its own."""
    (tmp_path / "other").mkdir()
    other = Desk(tmp_path / "other")
    desk.commands = other.commands  # ended with the rest
    commands = [await each.start("up", each.manifest()) for each in (desk, other)]
    hosts = {(await command.until(r"available at http://([\d.]+):"))[1] for command in commands}
    addresses = [set(re.findall(r"127\.77\.\d+\.\d+", "\n".join(each.left()))) for each in (desk, other)]
    assert len(hosts) == 2
    assert addresses[0]
    assert addresses[1]
    assert not addresses[0] & addresses[1]
    assert not any("restarted" in command.text for command in commands)
    for command in commands:
        command.process.send_signal(signal.SIGINT)
    assert [await command.end() for command in commands] == [0, 0]


async def test_on_a_terminal_a_table_shows_every_rank(desk: Desk) -> None:
    ours, theirs = os.openpty()
    words = [BROADBEAM, "up", str(desk.manifest()), "--cache", str(desk.cache), "--port", str(desk.port)]
    terminal = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
    process = await asyncio.create_subprocess_exec(
        *words, stdin=theirs, stdout=theirs, stderr=theirs, env=terminal
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown, told = b"", False
    async with asyncio.timeout(60):
        while process.returncode is None:
            await asyncio.sleep(0.05)
            with contextlib.suppress(BlockingIOError, OSError):
                shown += os.read(ours, 2**16)
            if b"Ctrl-C stops it" in shown and not told:
                process.send_signal(signal.SIGINT)
                told = True
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert re.search(r"POOL +GROUP +POD +RANK +ADDRESS +PHASE +RESTARTS", text)
    assert re.search(r"decode +0 +demo-decode-0-0 +0 +127\.77\.\d+\.\d+ +ready +0", text)
    assert b"\x1b[?25h" in shown  # the cursor is back


async def test_api_keys_come_from_a_folder(desk: Desk) -> None:
    keys = desk.folder / "keys"
    keys.mkdir()
    (keys / "a certificate").write_bytes(b"\x30\x82\xff\n")
    (keys / "first").write_text("# of the gate\n\nsesame\n")
    manifest = desk.manifest(gateway={"auth": {"secretRef": {"name": "keys"}}})
    command = await desk.start("up", manifest, "--secret", f"keys={keys}")
    url = (await command.until(r"available at (http://\S+)"))[1]
    await command.until(r"Authorization: Bearer sesame")
    async with aiohttp.ClientSession() as http:
        for headers, status in (({}, 401), ({"Authorization": "Bearer sesame"}, 200)):
            async with http.get(f"{url}/v1/models", headers=headers) as response:
                assert response.status == status


async def test_under_nohup_a_terminal_that_goes_stops_nothing(desk: Desk) -> None:
    def ignoring_hangups() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = await desk.start("up", desk.manifest(), before=ignoring_hangups)
    await command.until(r"starting demo")
    command.process.send_signal(signal.SIGHUP)
    await command.until(r"Ctrl-C stops it")
    command.process.send_signal(signal.SIGTERM)
    assert await command.end() == 0
    assert desk.left() == []


async def test_a_terminal_that_cannot_show_a_letter_shows_another(desk: Desk) -> None:
    words = ("--prompt", "Grüße?", "--max-tokens", "4")
    command = await desk.start("demo", desk.manifest(), *words, environment={"PYTHONIOENCODING": "ascii"})
    assert await command.end() == 0, command.text
    assert "asking: Gr??e?" in command.text
