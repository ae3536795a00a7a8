"""The simulator: an engine without a model. Deterministic text, a timing model, real continuous batching.

What a cluster sees of an engine is real: limits of sequences and KV blocks, prefix reuse, preemption,
lock-step of the group's ranks, leases and pulls between prefill and decode. Only the numbers are made up.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from broadbeam_crds.engine_config import ConfigError, EngineConfig
from broadbeam_runtime.core import (
    STOP_TIMEOUT_S,
    EngineStats,
    LoadProgress,
    ModelInfo,
    OnOutputs,
    RankIdentity,
    Request,
)
from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.pull import PullConnector
from broadbeam_runtime.lockstep import Coordinator, Group, GroupError
from broadbeam_runtime.sim_blocks import BlockPool
from broadbeam_runtime.sim_scheduler import SimScheduler
from broadbeam_runtime.sim_tokenizer import END, VOCABULARY

DEFAULT_KV_TOKENS = 65_536  # the pool when cache.memory_bytes is not set
DEFAULT_MODEL_LEN = 8192
JOIN_TIMEOUT_S = 300.0
IDLE_WAIT_S = 0.5


class SimEngine:
    """`core.Engine` without torch; `connector` is None where KV is not transferred."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        rank: RankIdentity,
        connector: PullConnector | None,
        progress: LoadProgress,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self._rank = rank
        self._connector = connector
        self._progress = progress
        self._on_failure = on_failure
        max_len = config.model.max_model_len or DEFAULT_MODEL_LEN
        self._info = ModelInfo(max_len, VOCABULARY, (END,), tokenizer_dir=None)
        pool = BlockPool(_blocks(config), config.cache.prefix_reuse)
        self._scheduler = SimScheduler(config, pool, max_len, connector)
        self._group = Group(
            rank.global_rank,
            rank.world,
            rank.coordinator,
            config.parallel.coordinator_port,
            config.sim.stall_s,
        )
        self._group.on_call = self._wake
        if connector is not None:
            connector.wake = self._wake
        self._work = threading.Condition()
        self._submitted: deque[Request] = deque()
        self._aborted: deque[str] = deque()
        self._stopping = self._poked = False
        self._on_outputs: OnOutputs = lambda outputs: None
        self._thread: threading.Thread | None = None

    @property
    def model(self) -> ModelInfo:
        return self._info

    def start(self, on_outputs: OnOutputs) -> None:
        """Pretend to load, join the group, and pass one step through it."""
        self._on_outputs = on_outputs
        self._load()
        if self._rank.global_rank == 0 and self._rank.world > 1:
            Coordinator(self._rank.host, self._config.parallel.coordinator_port, self._rank.world)
        self._progress.stage, self._progress.done = "joining", None
        self._group.join(JOIN_TIMEOUT_S)
        if self._connector is not None:
            self._connector.start(None, self._layout())
        self._progress.stage = "canary"
        self._group.step(self._config.sim.decode_base_ms)
        self._thread = threading.Thread(target=self._run, name="sim-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        with self._work:
            self._submitted.append(request)
            self._work.notify()

    def abort(self, request_id: str) -> None:
        with self._work:
            self._aborted.append(request_id)
            self._work.notify()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if self._connector is not None:
            self._connector.stop()

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        return replace(stats, waiting=stats.waiting + len(self._submitted))

    def _load(self) -> None:
        self._progress.stage = "loading"
        start, load_s = time.monotonic(), self._config.sim.load_s
        while (elapsed := time.monotonic() - start) < load_s and not self._stopping:
            self._progress.done = elapsed / load_s
            time.sleep(min(0.05, load_s - elapsed))

    def _layout(self) -> PoolLayout:
        block_size, width = self._config.cache.block_size, self._config.sim.kv_bytes_per_token
        return PoolLayout(self._config.model.name, "simulated", block_size, block_size * width, 1, width)

    # --- the engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._take_in()
                self._scheduler.poll_transfers()
                self._step()
                self._deliver()
            self._group.leave()
        except GroupError as error:
            self._scheduler.fail_all(str(error))
            self._deliver()
            self._on_failure(error)

    def _wait(self) -> bool:
        """Until there is something to do; False to stop."""
        with self._work:
            if not self._scheduler.running:
                self._work.wait_for(self._stirred, IDLE_WAIT_S)
            self._poked = False
            return not self._stopping

    def _stirred(self) -> bool:
        return bool(self._poked or self._submitted or self._aborted or self._stopping or self._group.called)

    def _wake(self) -> None:
        with self._work:
            self._poked = True
            self._work.notify()

    def _take_in(self) -> None:
        with self._work:
            submitted, self._submitted = self._submitted, deque()
            aborted, self._aborted = self._aborted, deque()
        for request in submitted:
            self._scheduler.add(request)
        if aborted:
            self._scheduler.abort(aborted)

    def _step(self) -> None:
        """One lock-step: admit, plan, spend the time that the slowest rank needs, make tokens."""
        self._scheduler.admit()
        plan = self._scheduler.plan()
        if not plan and not self._group.called:
            return
        started = time.monotonic()
        duration_ms = self._group.step(self._scheduler.duration_ms(plan))
        time.sleep(max(0.0, duration_ms / 1000 - (time.monotonic() - started)))
        self._scheduler.count_step(dummy=not plan)
        for sequence, count in plan:
            self._scheduler.advance(sequence, count)
        if not self._scheduler.running:
            self._wake()  # what ended may have freed blocks that a waiting request needs

    def _deliver(self) -> None:
        if outputs := self._scheduler.take_outputs():
            self._on_outputs(outputs)


def _blocks(config: EngineConfig) -> int:
    block_bytes = config.sim.kv_bytes_per_token * config.cache.block_size
    memory_bytes = config.cache.memory_bytes
    if memory_bytes is None:
        memory_bytes = DEFAULT_KV_TOKENS * config.sim.kv_bytes_per_token
    if memory_bytes < block_bytes:
        raise ConfigError(
            f"cache.memory_bytes is {memory_bytes}, but one block of {config.cache.block_size} tokens "
            f"needs {block_bytes}"
        )
    return memory_bytes // block_bytes
