"""One engine process: its HTTP server from the first moment, its engine as soon as that has loaded."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvloop
from aiohttp import web

from broadbeam_crds.engine_config import ConfigError, EngineConfig
from broadbeam_runtime import resolve
from broadbeam_runtime.core import STOP_TIMEOUT_S, Engine, EngineStats, LoadProgress, RankIdentity
from broadbeam_runtime.generation import EngineClient
from broadbeam_runtime.metrics import RankMetrics
from broadbeam_runtime.progress import reporting
from broadbeam_runtime.server import RankServer, ServedModel
from broadbeam_runtime.settings import RankSettings, family
from broadbeam_runtime.status import Status, StatusPipe
from broadbeam_runtime.tokenizer import HuggingFaceTokenizer, Tokenizer, TokenizerError

log = logging.getLogger("broadbeam.rank")
RESOLVE_TIMEOUT_S = 300.0
# What a person can mend; anything else is a defect and keeps its traceback.
EXPECTED = (ValueError, OSError, MemoryError, RuntimeError)
OnFailure = Callable[[BaseException], None]


def run(settings: RankSettings) -> int:
    """Serve until SIGTERM; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    pipe = StatusPipe(settings.status_fd)
    try:
        return uvloop.run(Rank(settings, pipe).run())
    except EXPECTED as error:
        message = _one_line(error)
        pipe.send(Status("failed", error=message))
        if settings.status_fd is None:  # the supervisor says it otherwise, once
            print(f"broadbeam-runtime: rank {settings.global_rank}: {message}", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    named = isinstance(error, (ValueError, OSError)) and text
    return text if named else f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage during an import of hundreds of thousands of objects that stay: half a second for
    torch. Later searches leave them out."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def create_engine(
    settings: RankSettings,
    config: EngineConfig,
    coordinator: str,
    progress: LoadProgress,
    on_failure: OnFailure,
) -> Engine:
    """The engine that the config names; `coordinator` is the resolved address of the group's node 0."""
    from broadbeam_runtime.kv import connectors

    host = settings.pod.host
    identity = RankIdentity(
        settings.global_rank, settings.local_rank, config.parallel.world_size, host, coordinator
    )
    if config.engine == "sim":
        from broadbeam_runtime.sim import SimEngine

        connector = connectors.simulated(config, host, settings.side_channel_port)
        return SimEngine(config, rank=identity, connector=connector, progress=progress, on_failure=on_failure)
    with uncollected():
        from broadbeam_runtime.engine import TorchEngine

    if settings.model_dir is None:
        raise ConfigError(
            "engine broadbeam needs --model-dir, the directory that `broadbeam-runtime fetch` prints"
        )
    return TorchEngine(
        config,
        rank=identity,
        model_dir=settings.model_dir,
        connector=connectors.create(config, host, settings.side_channel_port),
        progress=progress,
        on_failure=on_failure,
    )


def _tokenizer(engine: Engine) -> Tokenizer:
    info = engine.model
    if info.tokenizer_dir is None:
        from broadbeam_runtime.sim_tokenizer import SimTokenizer

        return SimTokenizer()
    tokenizer = HuggingFaceTokenizer(info.tokenizer_dir)
    if tokenizer.vocab_size > info.vocab_size:
        raise TokenizerError(
            f"{info.tokenizer_dir}/tokenizer.json has {tokenizer.vocab_size} tokens, "
            f"but the model knows {info.vocab_size}: they do not belong together"
        )
    return tokenizer


class Rank:
    """The lifetime of one rank process."""

    def __init__(self, settings: RankSettings, pipe: StatusPipe) -> None:
        self._settings = settings
        self._pipe = pipe
        self._engine: Engine | None = None
        config = settings.config
        transfer = config.kv_transfer
        self._metrics = RankMetrics(
            settings.global_rank, config.model.name, transfer.connector if transfer else None, self._stats
        )
        self._server = RankServer(
            config.model.name,
            config.model.source,
            transfer is not None,
            config.scheduling.stream_interval,
            self._metrics,
        )
        self._client: EngineClient | None = None
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()

    def _stats(self) -> EngineStats:
        return EngineStats() if self._engine is None else self._engine.stats()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_stop)
        loop.add_signal_handler(signal.SIGINT, self._on_stop_now)
        loop.add_signal_handler(signal.SIGUSR1, self._on_drain)
        self._loop = loop
        threading.excepthook = lambda args: self._on_failure(args.exc_value or args.exc_type())
        runner = web.AppRunner(
            self._server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await runner.setup()
        try:
            await web.SockSite(runner, _listen(self._settings)).start()
            await self._serve()
        finally:
            await runner.cleanup()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, self._patience_s())
        return 1 if self._server.failure else 0

    async def _serve(self) -> None:
        """Load, then serve until told to stop; a stop while loading gives up at once."""
        stopping = asyncio.create_task(self._stop.wait())
        loading = asyncio.create_task(self._load())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            # The loading thread cannot be interrupted (a read, a collective): the process ends under it.
            sys.stderr.flush()
            os._exit(0)
        loading.result()
        await stopping
        await self._drained()

    async def _load(self) -> None:
        progress = LoadProgress()
        with reporting(progress, self._pipe):
            engine, tokenizer = await asyncio.to_thread(self._start_engine, progress)
        assert self._client is not None
        self._server.serve(ServedModel(engine.model, tokenizer, self._client))
        self._pipe.send(Status("ready", ready=True))
        log.info("ready on %s:%d", self._settings.pod.host, self._settings.http_port)

    def _start_engine(self, progress: LoadProgress) -> tuple[Engine, Tokenizer]:
        """In a thread: everything that blocks."""
        engine = create_engine(
            self._settings, self._settings.config, self._coordinator(progress), progress, self._on_failure
        )
        tokenizer = _tokenizer(engine)
        self._engine = engine
        client = self._client = EngineClient(engine, self._metrics, self._loop)
        engine.start(client.on_outputs)
        return engine, tokenizer

    def _coordinator(self, progress: LoadProgress) -> str:
        parallel, pod = self._settings.config.parallel, self._settings.pod
        if parallel.nodes == 1 or pod.node_index == 0:
            return pod.host  # this pod's rank 0
        progress.stage, progress.detail = "resolving", parallel.coordinator
        return resolve.wait_for(parallel.coordinator, pod.hosts_file, RESOLVE_TIMEOUT_S)

    def _on_failure(self, error: BaseException) -> None:
        """From an engine's or connector's thread: the process ends with its last words."""
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
        self._loop.call_soon_threadsafe(self._fail, f"the engine stopped: {_one_line(error)}")

    def _fail(self, message: str) -> None:
        self._server.failure = message
        self._pipe.send(Status("failed", error=message))
        log.error("rank %d: %s", self._settings.global_rank, message)
        # Give the error answers that the engine's last outputs caused a moment to leave.
        asyncio.get_running_loop().call_later(0.2, self._on_stop_now)

    # --- stopping

    def _patience_s(self) -> float:
        """How long this rank steps on for those of other pods that still answer."""
        config = self._settings.config
        alone = config.parallel.nodes == 1 or self._stop_now.is_set()
        return STOP_TIMEOUT_S if alone else config.drain_s

    def _on_stop(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._server.draining = True
        self._stop.set()

    def _on_stop_now(self) -> None:
        self._server.draining = True
        self._stop_now.set()
        self._stop.set()

    def _on_drain(self) -> None:
        self._server.draining = True
        self._report_running()

    def _report_running(self) -> None:
        running = self._client.running if self._client is not None else 0
        self._pipe.send(Status("draining", running=running))
        if running:
            asyncio.get_running_loop().call_later(0.2, self._report_running)

    async def _drained(self) -> None:
        """Until running requests have finished, `drain_s` has passed, or somebody insists."""
        if self._client is None or self._stop_now.is_set():
            return
        waits: set[asyncio.Task[Any]] = {
            asyncio.create_task(self._client.idle()),
            asyncio.create_task(self._stop_now.wait()),
        }
        _, pending = await asyncio.wait(
            waits, timeout=self._settings.config.drain_s, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if self._client.running:
            log.warning("stopping with %d requests unfinished", self._client.running)


def _listen(settings: RankSettings) -> socket.socket:
    """The rank's socket; OSError says which port is taken."""
    host, port = settings.pod.host, settings.http_port
    try:
        return socket.create_server((host, port), family=family(host), backlog=1024)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
