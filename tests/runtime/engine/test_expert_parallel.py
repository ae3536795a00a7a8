"""Ranks as processes: attention is data-parallel, experts are spread over all, gloo on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.engine.conftest import IN_FLIGHT, LENGTHS, Model, Tokens, prompt

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


class Ranks:
    """The processes of one group. `ask` sends every rank a command, then reads all answers."""

    def __init__(self, world: int):
        self.host = f"127.78.{os.getpid() % 250}.{world}"
        command = [sys.executable, "-m", "tests.runtime.engine.rank_process"]
        self.processes = [
            subprocess.Popen(
                [*command, str(rank), str(world), self.host],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]

    def start(self, model: Model, port: int, **options: Any) -> None:
        self.ask([{"start": {"model": str(model.directory), "port": port, **options}}] * len(self.processes))

    def ask(self, commands: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for process, command in zip(self.processes, commands, strict=True):
            self.tell(process, command)
        return [self.answer(process) for process in self.processes]

    def tell(self, process: subprocess.Popen[str], command: dict[str, Any]) -> None:
        assert process.stdin
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()

    def answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        return json.loads(line)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.end()


def spread(prompts: list[Tokens], world: int, count: int) -> list[dict[str, Any]]:
    """One command per rank, prompt i on rank i % world."""
    return [
        {"run": {f"{i}": (p, count) for i, p in enumerate(prompts) if i % world == rank}}
        for rank in range(world)
    ]


def assert_answers_are_those_of(model: Model, ranks: Ranks) -> None:
    world = len(ranks.processes)
    prompts = [prompt(length) for length in LENGTHS] + [prompt(length, seed=1) for length in IN_FLIGHT]
    answers = {
        name: tokens for rank in ranks.ask(spread(prompts, world, 12)) for name, tokens in rank.items()
    }
    in_order = [answers[f"{i}"] for i in range(len(prompts))]
    assert in_order == model.expected(prompts, in_order)
    # Rank 0 alone is asked: the others join with passes of no tokens.
    lonely, *_ = ranks.ask([{"run": {"alone": (prompt(200), 12)}}, *[{"cpu": 0.01}] * (world - 1)])
    assert [lonely["alone"]] == model.expected([prompt(200)], [lonely["alone"]])


def assert_a_lost_rank_ends_the_others(ranks: Ranks) -> None:
    survivor, *_, victim = ranks.processes
    victim.kill()
    ranks.tell(survivor, {"run": {"a": (prompt(64), 12)}})
    _, errors = survivor.communicate(timeout=60)
    assert "rank 0 lost a rank of its group" in errors
    assert survivor.returncode == 70


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3"])
def test_experts_on_other_ranks_give_the_same_answers(
    family: str, ranks: Ranks, make_model: Callable[..., Model]
) -> None:
    model, world = make_model(family), len(ranks.processes)
    ranks.start(model, 29600 + len(family))
    assert_answers_are_those_of(model, ranks)
    # The answer leaves rank 0 before its peers have accounted for the pass that made it, so the first window
    # may see the end of that pass; an idle group takes no further one.
    ranks.ask([{"cpu": 1.0}] * world)
    idle = ranks.ask([{"cpu": 1.0}] * world)
    assert all(rank["cpu"] < 0.2 and rank["dummy_steps"] == 0 for rank in idle), idle
    assert all(rank["stopped"] for rank in ranks.ask([{"stop": True}] * world))


def test_a_rank_that_dies_ends_the_others_with_a_message(
    ranks: Ranks, make_model: Callable[..., Model]
) -> None:
    ranks.start(make_model("qwen3-moe"), 29620)
    assert_a_lost_rank_ends_the_others(ranks)
