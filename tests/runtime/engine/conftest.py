"""Tiny models, transformers' answers to compare with, and engines that are stopped after the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runtime.reference import NEW_TOKENS, Model, Tokens

from broadbeam_crds.engine_config import CacheConfig, EngineConfig, ModelConfig, SchedulingConfig
from broadbeam_runtime import tiny
from broadbeam_runtime.core import Output, RankIdentity, Request, SamplingParams
from broadbeam_runtime.engine import TorchEngine

MAX_LEN = 1024
LENGTHS = (1, 5, 64, 200, 777)
IN_FLIGHT = tuple(3 + 17 * i for i in range(16))
FAMILIES = ("llama", "qwen3-moe", "deepseek-v3")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # a second one would spend its time waiting awake: the models are tiny


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    made: dict[str, Model] = {}

    def make(name: str, changes: dict[str, Any] | None = None) -> Model:
        key = f"{name}{sorted((changes or {}).items())}"
        if key not in made:
            directory = tmp_path_factory.mktemp(name)
            tiny.build(name, 0, directory, changes)
            made[key] = Model(directory)
        return made[key]

    return make


def prompt(length: int, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(8, tiny.VOCAB, (length,), generator=generator).tolist())


def greedy(name: str, tokens: Tokens, count: int = NEW_TOKENS, **changes: Any) -> Request:
    sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return Request(name, tokens, sampling, time.monotonic(), **changes)


class Served:
    """An engine and what it has put out; `wait` until some requests have ended."""

    def __init__(self, engine: TorchEngine):
        self.engine = engine
        self.outputs: dict[str, list[Output]] = {}
        self.news = threading.Condition()
        engine.start(self._collect)

    def _collect(self, outputs: Sequence[Output]) -> None:
        with self.news:
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
            self.news.notify_all()

    def wait(self, *ids: str) -> None:
        with self.news:
            ended = self.news.wait_for(lambda: all(self.finished(i) for i in ids), 60)
        assert ended, f"unfinished: {[i for i in ids if not self.finished(i)]}, {self.engine.stats()}"

    def wait_for_output(self, name: str, count: int = 1) -> None:
        with self.news:
            assert self.news.wait_for(lambda: len(self.outputs.get(name, [])) >= count, 60)

    def finished(self, name: str) -> bool:
        return bool(self.outputs.get(name)) and self.outputs[name][-1].finish is not None

    def run(self, *requests: Request) -> list[list[int]]:
        for request in requests:
            self.engine.submit(request)
        self.wait(*(request.id for request in requests))
        errors = {r.id: self.outputs[r.id][-1].error for r in requests if self.outputs[r.id][-1].error}
        assert not errors
        return [self.tokens(request.id) for request in requests]

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start an engine on a model; afterwards every block must have its owner, and the engine stops."""
    running: list[Served] = []

    def start(model: Model, connector: Any = None, scheduling: Any = None, **cache: Any) -> Served:
        engine = TorchEngine(
            config(model.directory, scheduling, **cache),
            rank=RankIdentity(),
            model_dir=model.directory,
            connector=connector,
            on_failure=failures.append,
        )
        running.append(Served(engine))
        return running[-1]

    failures: list[BaseException] = []
    yield start
    for served in running:
        served.engine.stop()
        served.engine.scheduler.check_integrity()
    assert not failures


def config(directory: Path, scheduling: dict[str, Any] | None = None, **cache: Any) -> EngineConfig:
    return EngineConfig(
        engine="broadbeam",
        role="both",
        model=ModelConfig(name="tiny", source=f"file://{directory}", max_model_len=MAX_LEN),
        cache=CacheConfig(**({"memory_bytes": 96 << 20} | cache)),
        scheduling=SchedulingConfig(**(scheduling or {})),
        dtype="float32",
        threads=1,
    )
