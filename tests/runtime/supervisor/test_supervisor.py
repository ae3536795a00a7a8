"""Life and death of a pod: progress, readiness, draining, and that nothing survives it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

StartPod = Callable[..., Any]
TWO = {"parallel": {"data": 2, "ranks_per_node": 2}}


def sim(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "engine": "sim",
        "role": "both",
        "model": {"name": "demo", "source": "sim://", "max_model_len": 2048},
        "drain_s": 5,
    }
    return {**base, "sim": {"decode_base_ms": 2, "prefill_base_ms": 1}, **changes}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_readiness_shows_how_far_the_start_is(start_pod: StartPod) -> None:
    pod = start_pod(sim(sim={"load_s": 1.5}))
    pod.wait(lambda: pod.get("/health")[0] == 200)
    state = pod.wait(
        lambda: next((r for r in pod.rank_states() if r["stage"] == "loading" and r["done"]), None)
    )
    assert 0 < state["done"] <= 1
    assert pod.get("/readyz")[0] == 503
    assert pod.get("/v1/models", 8000)[0] == 503
    pod.ready()
    assert pod.get("/v1/models", 8000)[0] == 200


def test_all_ranks_metrics_make_one_valid_page(start_pod: StartPod) -> None:
    pod = start_pod(sim(**TWO)).ready()
    page = pod.get("/metrics")[1]
    heads = [line for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    for rank in ("0", "1"):
        assert f'vllm:num_requests_running{{engine="{rank}",model_name="demo"}}' in page
        assert pod.metric("broadbeam:rank_up", engine=rank) == 1


def test_a_killed_rank_ends_the_pod_with_its_name_and_code(start_pod: StartPod) -> None:
    pod = start_pod(sim(**TWO)).ready()
    first, second = (rank["pid"] for rank in pod.rank_states())
    subprocess.run(["kill", "-9", str(second)], check=True)
    assert pod.process.wait(20) == 1
    assert "rank 1 was killed by SIGKILL" in pod.log.read_text().splitlines()[-1]
    assert not running(first)


def test_killing_the_supervisor_leaves_no_rank_behind(start_pod: StartPod) -> None:
    pod = start_pod(sim(**TWO)).ready()
    pids = [rank["pid"] for rank in pod.rank_states()]
    pod.stop(signal.SIGKILL)
    pod.wait(lambda: not any(running(pid) for pid in pids))


@pytest.mark.parametrize("port", [9000, 8000, 5600], ids=["supervisor", "rank", "side channel"])
def test_a_port_in_use_is_one_clear_line(start_pod: StartPod, port: int) -> None:
    with socket.create_server(("127.231.0.1", port)):
        pod = start_pod(sim(kv_transfer={"connector": "tcp"}), host="127.231.0.1")
        assert pod.process.wait(30) == 1
    log = pod.log.read_text()
    assert f"127.231.0.1:{port}" in log.splitlines()[-1]
    assert "in use" in log.splitlines()[-1]
    assert "Traceback" not in log


@pytest.mark.parametrize("stage", ["starting", "loading"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_during_the_start_leaves_nothing(start_pod: StartPod, number: int, stage: str) -> None:
    pod = start_pod(sim(sim={"load_s": 60}, **TWO))
    pod.wait(lambda: pod.get("/health")[0])
    pids = pod.wait(lambda: [rank["pid"] for rank in pod.rank_states() if rank["pid"]])
    pod.wait(lambda: any(rank["stage"] == stage for rank in pod.rank_states()))
    assert pod.stop(number) == (130 if number == signal.SIGINT else 0)
    assert not any(running(pid) for pid in pids)
    assert "Traceback" not in pod.log.read_text()


@pytest.mark.parametrize("drained", [False, True], ids=["at once", "after a drain"])
def test_a_stop_lets_running_requests_finish_and_refuses_new_ones(start_pod: StartPod, drained: bool) -> None:
    pod = start_pod(sim(sim={"decode_base_ms": 60}, drain_s=60)).ready()
    answers: list[Any] = []
    body = {"model": "demo", "prompt": "x", "max_tokens": 50, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(pod.post("/v1/completions", body)))
    thread.start()
    pod.wait(lambda: pod.metric("vllm:num_requests_running") == 1)
    if drained:
        assert pod.post("/drain", port=9000)[0] == 202
    pod.process.send_signal(signal.SIGTERM)
    pod.wait(lambda: pod.get("/readyz")[0] == 503)
    status, answer = pod.post("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (503, "draining")
    thread.join()
    assert answers[0][0] == 200
    assert answers[0][1]["usage"]["completion_tokens"] == 50
    assert pod.process.wait(20) == 0


def test_a_rank_that_dies_while_the_pod_drains_is_a_failure(start_pod: StartPod) -> None:
    pod = start_pod(sim(sim={"decode_base_ms": 60}, drain_s=60, **TWO)).ready()
    body = {"model": "demo", "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
    thread = threading.Thread(target=lambda: _ask(pod, body))
    thread.start()
    pod.wait(lambda: pod.metric("vllm:num_requests_running") == 1)
    second = pod.rank_states()[1]["pid"]
    pod.process.send_signal(signal.SIGTERM)
    pod.wait(lambda: pod.get("/readyz")[0] == 503)
    subprocess.run(["kill", "-9", str(second)], check=True)
    assert pod.process.wait(30) == 1
    assert "rank 1 was killed by SIGKILL" in pod.log.read_text().splitlines()[-1]
    thread.join()


def _ask(pod: Any, body: dict[str, Any]) -> None:
    try:
        pod.post("/v1/completions", body)
    except OSError:
        return  # the connection breaks, as it should


def test_a_second_signal_does_not_wait(start_pod: StartPod) -> None:
    pod = start_pod(sim(sim={"decode_base_ms": 50}, drain_s=60)).ready()
    body = {"model": "demo", "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
    thread = threading.Thread(target=lambda: _ask(pod, body))
    thread.start()
    pod.wait(lambda: pod.metric("vllm:num_requests_running") == 1)
    pod.process.send_signal(signal.SIGTERM)
    pod.wait(lambda: pod.get("/readyz")[0] == 503)
    pod.process.send_signal(signal.SIGTERM)
    assert pod.process.wait(20) == 0
    thread.join()


def test_drain_refuses_new_requests_and_keeps_the_pod(start_pod: StartPod) -> None:
    pod = start_pod(sim()).ready()
    assert pod.post("/drain", port=9000)[1]["stage"] == "draining"
    pod.wait(lambda: pod.post("/v1/completions", {"model": "demo", "prompt": "x"})[0] == 503)
    assert pod.get("/readyz")[0] == 503
    assert pod.get("/health")[0] == 200


def test_a_model_that_is_not_there_is_one_clear_line(start_pod: StartPod) -> None:
    pod = start_pod(sim(engine="broadbeam", model={"name": "m", "source": "file:///nowhere/at/all"}))
    assert pod.process.wait(60) == 1
    log = pod.log.read_text()
    assert "model file:///nowhere/at/all" in log.splitlines()[-1]
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "engine.json: Input data was truncated", id="broken JSON"),
        pytest.param('{"engine":"sim"}', "missing required field `role`", id="a field is missing"),
        pytest.param(json.dumps(sim(colour=1)), "unknown field `colour`", id="an unknown field"),
        pytest.param(
            json.dumps(sim(parallel={"data": 4, "ranks_per_node": 2})),
            "parallel.data * tensor is 4, but nodes * ranks_per_node is 1 * 2 = 2",
            id="ranks do not add up",
        ),
        pytest.param(
            json.dumps(sim(parallel={"data": 1, "tensor": 2, "ranks_per_node": 2})),
            "parallel.tensor is 2: tensor parallelism is not supported yet by engine sim, it must be 1",
            id="tensor parallelism",
        ),
        pytest.param(json.dumps(sim(role="decode")), "kv_transfer.connector must be set", id="no connector"),
        pytest.param(None, "engine.json: No such file or directory", id="no file"),
    ],
)
def test_a_bad_config_is_one_line_and_status_2(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "engine.json"
    if text is not None:
        path.write_text(text)
    command = [sys.executable, "-m", "broadbeam_runtime", "serve", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_processes_are_small(start_pod: StartPod) -> None:
    pod = start_pod(sim()).ready()
    (rank,) = pod.rank_states()
    for _ in range(3):
        assert pod.post("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 8})[0] == 200
    assert _resident_mib(rank["pid"]) <= 60
    assert _resident_mib(pod.process.pid) <= 60


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
