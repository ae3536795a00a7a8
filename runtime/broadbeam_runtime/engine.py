"""The torch engine: one rank's model, cache and scheduler, driven by a thread of its own."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from broadbeam_crds.engine_config import ConfigError, EngineConfig
from broadbeam_runtime.attention import Chunk, make_plan
from broadbeam_runtime.checkpoint import CheckpointError
from broadbeam_runtime.core import (
    STOP_TIMEOUT_S,
    TRANSFER_BYTES,
    TRANSFER_S,
    EngineStats,
    LoadProgress,
    ModelInfo,
    OnOutputs,
    Output,
    RankIdentity,
    Request,
    TokenLogprob,
)
from broadbeam_runtime.kv.connector import KVConnector, PoolLayout
from broadbeam_runtime.kv.memory import cache_dtype, make_cache
from broadbeam_runtime.kv.pool import BlockPool
from broadbeam_runtime.models.architecture import read_architecture
from broadbeam_runtime.models.decoder import Decoder, compute_dtype
from broadbeam_runtime.parallel import Group, GroupError, Lockstep
from broadbeam_runtime.sampling import sample
from broadbeam_runtime.scheduler import Limits, Scheduler, Work
from broadbeam_runtime.transfers import Transfers
from broadbeam_runtime.weights import Files, Weights

EXIT_ENGINE_FAILED = 70

Message = Request | str | None  # a new request, the id of one to abort, or only a wake-up


def end_process(error: BaseException) -> None:
    """What a failed engine does unless told otherwise: one line (a defect keeps its traceback), then the
    process ends, so that its supervisor starts the group again."""
    if not isinstance(error, GroupError):
        traceback.print_exception(error)
    print(f"engine failed: {error}", file=sys.stderr, flush=True)
    os._exit(EXIT_ENGINE_FAILED)


class TorchEngine:
    """Serves a model directory on one rank; see `core.Engine`.

    The constructor reads only config.json, so that `model` is known at once; `start` loads, joins the
    group and passes a canary token. ConfigError, CheckpointError and GroupError say what is wrong.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        rank: RankIdentity,
        model_dir: str | Path,
        connector: KVConnector | None = None,
        progress: LoadProgress | None = None,
        on_failure: Callable[[BaseException], None] = end_process,
    ):
        self.config, self.rank, self.connector = config, rank, connector
        self.progress, self.on_failure = progress or LoadProgress(), on_failure
        self.device = _device(config, rank)
        self.files = Path(model_dir)
        self.shape = read_architecture(self.files)
        self.max_len = config.model.max_model_len or self.shape.max_len
        if self.max_len > self.shape.max_len:
            raise ConfigError(
                f"model.max_model_len is {self.max_len}, the model's own limit is {self.shape.max_len}"
            )
        if self.shape.experts and self.shape.experts.count % rank.world:
            raise ConfigError(
                f"parallel.data is {rank.world}: the model's {self.shape.experts.count} experts cannot be "
                "spread evenly over so many ranks"
            )
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.stopping = False
        self.steps = self.dummy_steps = 0
        self.thread: threading.Thread | None = None
        self.snapshot = EngineStats()

    @property
    def model(self) -> ModelInfo:
        return ModelInfo(self.max_len, self.shape.vocab, self.shape.eos_token_ids, str(self.files))

    def start(self, on_outputs: OnOutputs) -> None:
        self.on_outputs = on_outputs
        torch.set_num_threads(
            self.config.threads or max(1, (os.cpu_count() or 1) // self.config.parallel.ranks_per_node)
        )
        # In a thread that ends: each thread that multiplies keeps OpenMP workers of its own, and with more of
        # them than cores none waits awake for the next operation (`settings.OPENMP`).
        with ThreadPoolExecutor(1, "load") as loader:
            loader.submit(self._prepare).result()
        self._report("ready", 1.0)
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def _prepare(self) -> None:
        """Everything that comes before the first request."""
        self._choose_device()
        group = Group(self.rank, self.config.parallel.coordinator_port, self.device)
        self._load(group)
        self._report("joining", None, f"rank {group.rank} of {group.world}")
        group.join()
        self.lockstep = Lockstep(group, self._wake)
        self._report("canary")
        self._canary()

    def submit(self, request: Request) -> None:
        self.inbox.put(request)

    def abort(self, request_id: str) -> None:
        self.inbox.put(request_id)

    def stats(self) -> EngineStats:
        return self.snapshot

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Finish what runs and leave, together with the rest of the group where it stops too."""
        self.stopping = True
        self._wake()
        if self.thread and self.thread is not threading.current_thread():
            self.thread.join(timeout_s)
        if self.connector:
            self.connector.stop()

    def step(self) -> None:
        """One pass over the model: schedule, run, account. Without work of its own a rank runs a pass of
        no tokens, so that its peers' exchanges find it."""
        work = self.scheduler.schedule()
        sampled = self._forward(work)
        self.scheduler.commit(work, sampled)
        self.steps += bool(work)
        self.dummy_steps += not work

    def _run(self) -> None:
        self._choose_device()
        try:
            while not self.lockstep.finished:
                self._turn()
        except Exception as error:
            self._fail(error)

    def _choose_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # the current device is the thread's own

    def _turn(self) -> None:
        self.scheduler.poll()
        has_work = self.scheduler.has_work
        if self.lockstep.must_step(has_work, self.stopping):
            self.step()
            self._deliver()
            self._receive(block=False)
        else:
            self._deliver()
            if not self.lockstep.finished:
                self._receive(block=True)

    @torch.inference_mode()
    def _forward(self, work: list[Work]) -> dict[int, TokenLogprob]:
        plan = make_plan(
            [item.chunk() for item in work], self.config.cache.block_size, self.device, self.dtype
        )
        logits = self.decoder(plan, self.cache)
        tokens = sample(logits, [work[index].sequence.draw() for index in plan.sampled])
        return dict(zip(plan.sampled, tokens, strict=True))

    def _receive(self, block: bool) -> None:
        """Take in requests and aborts; if `block`, wait for one, or for the connector to have news."""
        try:
            message = self.inbox.get(block)
            while True:
                if isinstance(message, Request):
                    self.scheduler.add(message)
                elif isinstance(message, str):
                    self.scheduler.abort(message)
                message = self.inbox.get_nowait()
        except queue.Empty:
            pass

    def _deliver(self) -> None:
        self.snapshot = self._stats()
        if outputs := self.scheduler.take_outputs():
            self.on_outputs(outputs)

    def _report(self, stage: str, done: float | None = None, detail: str = "") -> None:
        self.progress.stage, self.progress.done, self.progress.detail = stage, done, detail

    def _wake(self) -> None:
        self.inbox.put(None)

    def _load(self, group: Group) -> None:
        def on_layer(index: int) -> None:
            self._report("loading", (index + 1) / self.shape.layers, f"layer {index + 1}")

        self.dtype = compute_dtype(self.shape, self.config.dtype, self.device)
        weights = Weights(Files(self.files), self.dtype, self.device)
        with torch.inference_mode():
            self.decoder = Decoder(self.shape, weights, group, self.max_len, on_layer)
        self.weight_bytes = weights.loaded_bytes
        self.cache = make_cache(
            self.config, self.shape, self.max_len, cache_dtype(self.config, self.dtype), self.device
        )
        pool = BlockPool(len(self.cache), self.config.cache.block_size)
        transfers = Transfers(self.connector, pool) if self.connector else None
        if self.connector:
            self.connector.wake = self._wake
            self.connector.start(self.cache.view(len(self.cache), -1).view(torch.uint8), self._layout())
        self.scheduler = Scheduler(self._limits(), pool, transfers)

    def _layout(self) -> PoolLayout:
        block = self.cache[0]
        return PoolLayout(
            model=self.config.model.name,
            dtype=str(self.cache.dtype).removeprefix("torch."),
            block_size=self.config.cache.block_size,
            block_bytes=block.nbytes,
            layers=self.shape.layers,
            width=self.shape.kv_width,
        )

    def _limits(self) -> Limits:
        transfer = self.config.kv_transfer
        return Limits(
            scheduling=self.config.scheduling,
            max_len=self.max_len,
            vocab=self.shape.vocab,
            eos_token_ids=self.shape.eos_token_ids,
            prefix_reuse=self.config.cache.prefix_reuse,
            recompute_failed_pulls=transfer is not None and transfer.load_failure_policy == "recompute",
        )

    @torch.inference_mode()
    def _canary(self) -> None:
        """One token through this rank's layers and every rank's experts; its block is free afterwards."""
        token = (self.shape.eos_token_ids or (0,))[0]
        plan = make_plan(
            [Chunk([token], 0, [0], sample=True)], self.config.cache.block_size, self.device, self.dtype
        )
        if not self.decoder(plan, self.cache).isfinite().all():
            raise CheckpointError(f"{self.files}: the canary token gave logits that are not finite")

    def _fail(self, error: Exception) -> None:
        lost = [
            Output(s.id, (), finish="error", error=f"the engine failed: {error}")
            for s in self.scheduler.live()
        ]
        self.on_outputs(lost)
        self.on_failure(error)

    def _stats(self) -> EngineStats:
        scheduler, pool, transfers = self.scheduler, self.scheduler.pool, self.scheduler.transfers
        moved = transfers.counts if transfers else None
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + (len(transfers.pulling) if transfers else 0),
            kv_usage=pool.usage,
            kv_blocks=len(pool),
            block_size=pool.block_size,
            prefix_queries=scheduler.counts.prefix_queries,
            prefix_hits=scheduler.counts.prefix_hits,
            external_queries=moved.wanted_tokens if moved else 0,
            external_hits=moved.received_tokens if moved else 0,
            prompt_tokens_computed=scheduler.counts.prompt_computed,
            prompt_tokens_cached=scheduler.counts.prefix_hits,
            prompt_tokens_transferred=moved.received_tokens if moved else 0,
            generation_tokens=scheduler.counts.generated,
            preemptions=scheduler.counts.preemptions,
            steps=self.steps,
            dummy_steps=self.dummy_steps,
            held_blocks=transfers.held_blocks if transfers else 0,
            transfer_bytes=moved.bytes if moved else TRANSFER_BYTES,
            transfer_s=moved.seconds if moved else TRANSFER_S,
            transfer_failures=moved.failures if moved else 0,
            leases_expired=moved.expired if moved else 0,
            weight_bytes=self.weight_bytes,
            kv_bytes=self.cache.nbytes,
        )


def _device(config: EngineConfig, rank: RankIdentity) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if rank.local_rank >= count:
        raise ConfigError(
            f"device is cuda and this is local rank {rank.local_rank}, but the machine has {count} GPUs"
        )
    torch.cuda.set_device(rank.local_rank)
    return torch.device("cuda", rank.local_rank)
