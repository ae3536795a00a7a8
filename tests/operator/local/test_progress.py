from __future__ import annotations

import io
import shlex
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from broadbeam_crds.conventions import LABEL_COMPONENT, LABEL_GROUP, LABEL_POOL
from broadbeam_operator.cluster import Object
from broadbeam_operator.local.exposition import samples, total
from broadbeam_operator.local.progress import Progress, Throughput, pod_progress, throughput
from broadbeam_operator.local.up import curl
from broadbeam_operator.local.view import Clock, LineView, can_redraw, lines, table, tokens_per_s

PAGE = """\
# HELP vllm:generation_tokens_total Tokens.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="a \\"b\\" {c}"} 5.0
vllm:generation_tokens_total{engine="1",model_name="m"} 7
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 1
vllm:prompt_tokens_by_source_total{engine="0",source="external_kv_transfer"} 1.2e+02
broadbeam:kv_transfer_bytes_total{connector="tcp"} 1048576
up 1
"""


def test_counters_of_all_ranks_are_added_up() -> None:
    found = samples(PAGE)
    assert total(found, "vllm:generation_tokens_total") == 12
    assert total(found, "vllm:generation_tokens_total", engine="1") == 7
    assert total(found, "up") == 1
    assert total(found, "absent") == 0
    assert throughput(found) == Throughput(
        generated_tokens=12, transferred_tokens=120, computed_tokens=1, transferred_bytes=2**20
    )


def engine_pod(state: Object, last: Object | None = None, ready: bool = False, restarts: int = 0) -> Object:
    container = {"restartCount": restarts, "state": state, "lastState": last or {}}
    labels = {LABEL_COMPONENT: "engine", LABEL_POOL: "decode", LABEL_GROUP: "0"}
    conditions = [{"type": "Ready", "status": str(ready)}]
    return {
        "metadata": {"name": "p", "labels": labels},
        "status": {"podIP": "127.77.1.1", "conditions": conditions, "containerStatuses": [container]},
    }


RUNNING: Object = {"running": {}}
ENDED: Object = {"terminated": {"exitCode": 3}}
BACK_OFF: Object = {"waiting": {"reason": "CrashLoopBackOff"}}
UNCONFIGURED: Object = {"waiting": {"reason": "CreateContainerConfigError", "message": "no x"}}


@pytest.mark.parametrize(
    ("pod", "answer", "line"),
    [
        pytest.param(engine_pod(RUNNING), None, "starting", id="nothing answers yet"),
        pytest.param(
            {**engine_pod(RUNNING), "metadata": {"name": "p", "labels": {LABEL_COMPONENT: "gateway"}}},
            None,
            "waiting for engines",
            id="a gateway without engines",
        ),
        pytest.param(
            engine_pod(RUNNING), {"stage": "downloading", "done": 0.49}, "downloading 25%", id="a share"
        ),
        pytest.param(
            engine_pod(RUNNING), {"stage": "ready", "ready": True}, "waiting for its group", id="gated"
        ),
        pytest.param(engine_pod(RUNNING, ready=True), {"stage": "ready"}, "ready", id="ready"),
        pytest.param(
            engine_pod(RUNNING, ENDED, restarts=2),
            {"stage": "starting ranks"},
            "starting ranks (restarts: 2)",
            id="restarted",
        ),
        pytest.param(
            engine_pod(BACK_OFF, ENDED, restarts=1), None, "exited with code 3 (restarts: 1)", id="back-off"
        ),
        pytest.param(engine_pod(UNCONFIGURED), None, "no x", id="a missing ConfigMap"),
    ],
)
def test_a_pod_is_told_in_a_few_words(pod: Object, answer: Object | None, line: str) -> None:
    now = Progress(0.0, pods=(pod_progress(pod, answer),))
    assert list(lines(now)) == [("p", line)]
    assert render(now)


def rank(number: int, **state: Any) -> dict[str, Any]:
    return {"rank": number, "ready": False, "stage": "loading weights", "done": None, "detail": ""} | state


def test_ranks_have_lines_of_their_own_until_their_pod_is_ready() -> None:
    answer = {"stage": "starting ranks", "ranks": [rank(4, done=0.8), rank(5, ready=True, stage="serving")]}
    now = Progress(0.0, pods=(pod_progress(engine_pod(RUNNING), answer),))
    assert list(lines(now))[1:] == [("p rank 4", "loading weights 75%")]
    text = render(now)
    assert "loading weights 80%" in text
    assert "127.77.1.1" in text


def test_a_narrow_terminal_still_says_what_each_pod_is_doing() -> None:
    pod = replace(pod_progress(engine_pod(RUNNING), None), name="laptop-decode-0-0", group="laptop-decode-0")
    text = render(Progress(0.0, pods=(replace(pod, stage="downloading", done=0.49),)), width=50)
    assert "downloading" in text
    assert "49%" in text


def render(now: Progress, width: int = 140) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table(now, width))
    return out.getvalue()


def test_a_line_is_printed_only_when_it_changes() -> None:
    out = io.StringIO()
    view = LineView(Console(file=out, width=80), Clock())
    for _ in range(3):
        view.show(Progress(0.0, pods=(pod_progress(engine_pod(RUNNING), None),)))
    view.show(Progress(0.0, pods=(pod_progress(engine_pod(RUNNING, ready=True), None),)))
    assert [line.partition("] ")[2] for line in out.getvalue().splitlines()] == ["p: starting", "p: ready"]


def test_a_pod_that_went_away_has_a_last_line_and_one_that_comes_again_its_first() -> None:
    out = io.StringIO()
    view = LineView(Console(file=out, width=80), Clock())
    there = Progress(0.0, pods=(pod_progress(engine_pod(RUNNING, ready=True), None),))
    for now in (there, Progress(1.0), Progress(2.0), there):
        view.show(now)
    said = [line.partition("] ")[2] for line in out.getvalue().splitlines()]
    assert said == ["p: ready", "p: gone", "p: ready"]


def test_speed_is_what_was_generated_between_two_looks() -> None:
    def at(seconds: float, tokens: float) -> Progress:
        return Progress(seconds, throughput=Throughput(generated_tokens=tokens))

    assert tokens_per_s(at(1, 100), at(3, 150)) == 25
    assert tokens_per_s(at(1, 100), at(2, 5)) == 0


@pytest.mark.parametrize(
    ("terminal", "name", "can"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_a_table_is_redrawn_only_where_it_can_be(terminal: bool, name: str, can: bool) -> None:
    assert can_redraw(Console(force_terminal=terminal, _environ={"TERM": name})) == can


def test_the_line_to_paste_is_safe_in_a_shell() -> None:
    words = shlex.split(curl("http://127.0.0.1:8080", "it's $(here)", "k'1"))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8080/v1/chat/completions"]
    assert "Authorization: Bearer k'1" in words
    assert '"model": "it\'s $(here)"' in words[-1]
