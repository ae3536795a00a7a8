"""One expert-parallel group over two pods, each a supervisor with an address of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from broadbeam_crds import conventions

pytestmark = pytest.mark.slow

StartPod = Callable[..., Any]
Group = Callable[[], list[Any]]
NAME = "demo-decode-0-0.demo-decode-0.default.svc"  # node 0, as a cluster's DNS knows it
HOSTS = [f"127.233.{os.getpid() % 250}.{node + 1}" for node in range(2)]
CONFIG: dict[str, Any] = {
    "engine": "broadbeam",
    "role": "both",
    "model": {"name": "tiny", "source": "tiny://deepseek-v3", "max_model_len": 512},
    "parallel": {"data": 2, "nodes": 2, "ranks_per_node": 1, "coordinator": NAME},
    "cache": {"memory_bytes": 16 << 20},
    "dtype": "float32",
    "threads": 1,
    "drain_s": 60,
}
QUESTION = {"model": "tiny", "prompt": "the wind and the sea", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def group(start_shared_pod: StartPod, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Both pods, ready: started as in a cluster, at once and with node 0 known by name, and started again
    where they have ended."""
    folder = tmp_path_factory.mktemp("group")
    (folder / "hosts").write_text(f"{HOSTS[0]} {NAME}\n")
    pods: list[Any] = []

    def ready() -> list[Any]:
        for pod in pods:
            if pod.process.poll() is not None:
                pod.start()
        if not pods:
            flags = ["--cache", str(folder), "--node-index"]
            pods.extend(start_shared_pod(CONFIG, *flags, str(n), host=host) for n, host in enumerate(HOSTS))
        return [pod.ready() for pod in pods]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(conventions.ENV_HOSTS_FILE, str(folder / "hosts"))
        yield ready


def answer(pod: Any) -> str:
    status, body = pod.post("/v1/completions", QUESTION)
    assert status == 200, body
    return str(body["choices"][0]["text"])


def test_a_lost_rank_ends_both_pods_and_the_group_comes_back(group: Group) -> None:
    first, second = group()
    said = answer(first)
    assert answer(second) == said
    assert first.metric("broadbeam:dummy_steps_total", engine="0") > 0, "for the other pod's request"

    (rank,) = second.rank_states()
    os.kill(rank["pid"], signal.SIGKILL)
    assert second.process.wait(30) == 1
    assert "rank 1 was killed by SIGKILL" in second.log.read_text().splitlines()[-1]
    assert first.post("/v1/completions", QUESTION)[0] == 500
    assert first.process.wait(60) == 1
    assert "rank 0 lost a rank of its group" in first.log.read_text()

    assert [answer(pod) for pod in group()] == [said, said]


def test_pods_that_stop_together_stay_until_the_last_has_answered(group: Group) -> None:
    first, second = group()
    answers: list[tuple[int, Any]] = []
    body = QUESTION | {"max_tokens": 300, "n": 4, "ignore_eos": True}
    thread = threading.Thread(target=lambda: answers.append(first.post("/v1/completions", body)))
    thread.start()
    first.wait(lambda: first.metric("vllm:num_requests_running") == 4)
    for pod in (first, second):
        pod.process.send_signal(signal.SIGTERM)
    thread.join()
    assert answers[0][0] == 200, answers
    assert answers[0][1]["usage"]["completion_tokens"] == 4 * 300
    assert [pod.process.wait(30) for pod in (first, second)] == [0, 0]


def test_a_pod_that_comes_back_alone_makes_an_idle_group_start_again(group: Group) -> None:
    first, second = group()
    (rank,) = second.rank_states()
    os.kill(rank["pid"], signal.SIGKILL)
    assert second.process.wait(30) == 1
    assert first.process.poll() is None, "an idle group has not noticed yet"
    second.start()
    assert second.process.wait(60) == 1
    assert "rank 1 was restarted alone; its group of 2 has to start again" in second.log.read_text()
    assert first.process.wait(60) == 1
    assert "rank 0 lost a rank of its group" in first.log.read_text()
