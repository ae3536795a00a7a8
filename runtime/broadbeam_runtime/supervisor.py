"""`broadbeam-runtime serve`: prepares the model once, starts the pod's ranks, watches them, speaks for them.

Stages: starting -> fetching model -> starting ranks -> ready -> draining -> stopping, or failed. One rank's
end is the end of the pod: an expert-parallel group cannot go on without it, and starts again as a whole.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from broadbeam_crds.conventions import RANK_HTTP_PORT, SUPERVISOR_PORT
from broadbeam_runtime.child import Child
from broadbeam_runtime.exposition import merge
from broadbeam_runtime.settings import EXIT_INTERRUPTED, PodSettings, family

STOP_GRACE_S = 3.0  # beyond drain_s, before SIGKILL
SCRAPE_TIMEOUT_S = 5.0
EXIT_FAILED = 1


def run(settings: PodSettings) -> int:
    """Serve until SIGTERM (status 0), Ctrl-C (130) or a rank's end (1)."""
    return asyncio.run(Supervisor(settings).run())


def say(message: str) -> None:
    print(f"broadbeam-runtime: {message}", file=sys.stderr, flush=True)


class Supervisor:
    """One pod's ranks and the pod's own HTTP surface."""

    def __init__(self, settings: PodSettings) -> None:
        self._settings = settings
        self._stage = "starting"
        self._failure: str | None = None
        self._ranks: list[Child] = []
        self._fetch: Child | None = None
        self._told: signal.Signals | None = None
        self._stopping = asyncio.Event()
        self._insisted = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, number)
        runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            if not await self._listen(runner):
                return EXIT_FAILED
            await self._live()
        finally:
            await runner.cleanup()
        if self._failure is not None:
            say(self._failure)
            return EXIT_FAILED
        return EXIT_INTERRUPTED if self._told == signal.SIGINT else 0

    async def _listen(self, runner: web.AppRunner) -> bool:
        host = self._settings.host
        try:
            listener = socket.create_server((host, SUPERVISOR_PORT), family=family(host))
        except OSError as error:
            say(f"cannot listen on {host}:{SUPERVISOR_PORT}: {error.strerror}")
            return False
        await web.SockSite(runner, listener).start()
        return True

    # --- life

    async def _live(self) -> None:
        stop = asyncio.create_task(self._stopping.wait())
        life = asyncio.create_task(self._work())
        await asyncio.wait({stop, life}, return_when=asyncio.FIRST_COMPLETED)
        if life.done():
            stop.cancel()
            life.result()
        else:
            life.cancel()
            with suppress(asyncio.CancelledError):
                await life
        await self._stop_children()

    async def _work(self) -> None:
        """Fetch, start, watch; returns when something has failed."""
        model_dir = None
        if self._settings.config.engine != "sim":
            model_dir = await self._prepare()
            if model_dir is None:
                return
        self._stage = "starting ranks"
        ranks = range(self._settings.config.parallel.ranks_per_node)
        self._ranks = [
            Child(f"rank {self._settings.global_rank(i)}", self._arguments(i, model_dir)) for i in ranks
        ]
        for rank in self._ranks:
            await rank.start()
        exits = [asyncio.create_task(rank.exited.wait()) for rank in self._ranks]
        ready = asyncio.create_task(self._announce())
        await asyncio.wait(exits, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        await asyncio.sleep(
            0.1
        )  # a crash often takes several ranks; the first with words of its own is named
        self._failure = self._blame()
        self._stage = "failed"

    async def _announce(self) -> None:
        while not all(rank.status.ready for rank in self._ranks):
            await asyncio.sleep(0.05)
        self._stage = "ready"
        count, host = len(self._ranks), self._settings.host
        ports = f"{RANK_HTTP_PORT}..{RANK_HTTP_PORT + count - 1}" if count > 1 else str(RANK_HTTP_PORT)
        say(f"ready: {self._settings.config.model.name}, {count} rank(s) on {host}:{ports}")

    def _blame(self) -> str:
        ended = [rank for rank in self._ranks if rank.exit_code is not None]
        killed = [rank for rank in ended if rank.exit_code is not None and rank.exit_code < 0]
        culprit = (killed or ended)[0]
        return f"{culprit.name} {culprit.end}"

    async def _prepare(self) -> str | None:
        """The directory of the prepared model; None, with `_failure` set, where there is none."""
        self._stage = "fetching model"
        source = self._settings.config.model.source
        self._fetch = Child("fetch", ["fetch", source, "--cache", self._settings.cache_dir])
        await self._fetch.start()
        await self._fetch.exited.wait()
        status, code = self._fetch.status, self._fetch.exit_code
        if code == 0 and status.path is not None:
            return status.path
        self._failure = f"model {source}: {status.error or self._fetch.end}"
        self._stage = "failed"
        return None

    def _arguments(self, local_rank: int, model_dir: str | None) -> list[str]:
        settings = self._settings
        arguments = ["rank", "--config", settings.config_path, "--host", settings.host]
        arguments += ["--node-index", str(settings.node_index), "--cache", settings.cache_dir]
        arguments += ["--local-rank", str(local_rank)]
        return arguments + (["--model-dir", model_dir] if model_dir else [])

    # --- stopping

    def _on_stop(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            self._insisted.set()  # a second signal does not wait for running requests
            return
        self._told = number
        if any(rank.status.running for rank in self._ranks) or self._stage == "ready":
            say("stopping: running requests may finish; once more to stop now")
        self._stopping.set()

    async def _stop_children(self) -> None:
        children = [*self._ranks, *([self._fetch] if self._fetch is not None else [])]
        if self._failure is not None:
            # The group is broken, so there is nothing to wait for but the error answers.
            await asyncio.gather(*(child.stop(STOP_GRACE_S) for child in children))
            return
        if self._stage in ("ready", "draining"):  # the latter after POST /drain
            self._stage = "draining"
            await self._drain()
            if any(rank.exit_code for rank in self._ranks):
                self._failure = self._blame()
        self._stage = "stopping"
        await asyncio.gather(*(child.stop(STOP_GRACE_S) for child in children))

    async def _drain(self) -> None:
        """All ranks refuse new requests; none leaves before the last of its group has finished: an idle rank
        still takes part in the steps of the others, those of other pods included."""
        deadline = asyncio.get_running_loop().time() + self._settings.config.drain_s
        for rank in self._ranks:
            rank.send_signal(signal.SIGUSR1)
        await self._unless_told(self._all_idle(), deadline)
        if self._settings.config.parallel.nodes > 1 and not self._insisted.is_set():
            for rank in self._ranks:
                rank.send_signal(signal.SIGTERM)  # they leave when the whole group does
            await self._unless_told(self._ranks[0].exited.wait(), deadline)

    async def _unless_told(self, what: Coroutine[Any, Any, Any], deadline: float) -> None:
        """Wait for `what`, but not past the deadline, a second signal or a rank's end."""
        waits = [asyncio.create_task(each) for each in (what, self._insisted.wait())]
        waits += [asyncio.create_task(rank.exited.wait()) for rank in self._ranks]
        left_s = deadline - asyncio.get_running_loop().time()
        await asyncio.wait(waits, timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()

    async def _all_idle(self) -> None:
        while not all(rank.status.running == 0 for rank in self._ranks):
            await asyncio.sleep(0.05)

    # --- HTTP

    def _app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.post("/drain", self._post_drain),
                web.get("/v1/fault_tolerance/status", self._fault_status),
                web.post("/v1/fault_tolerance/apply", self._fault_apply),
            ]
        )
        return app

    def _rank_states(self) -> list[dict[str, Any]]:
        return [
            {
                "rank": self._settings.global_rank(index),
                "port": RANK_HTTP_PORT + index,
                "pid": rank.pid,
                "exit_code": rank.exit_code,
                **{
                    key: value
                    for key, value in msgspec.structs.asdict(rank.status).items()
                    if key in ("stage", "done", "detail", "ready", "running", "error")
                },
            }
            for index, rank in enumerate(self._ranks)
        ]

    def _state(self) -> dict[str, Any]:
        stage, done, detail = self._stage, None, ""
        if stage == "fetching model" and self._fetch is not None:
            status = self._fetch.status
            done, detail = status.done, status.detail
            stage = stage if status.stage == "starting" else status.stage
        ready = self._stage == "ready" and all(rank.exit_code is None for rank in self._ranks)
        state = {"ready": ready, "stage": stage, "done": done, "detail": detail, "ranks": self._rank_states()}
        return state | ({"error": self._failure} if self._failure else {})

    async def _health(self, _: web.Request) -> web.Response:
        return (
            web.Response(status=503, text=f"{self._failure}\n")
            if self._failure
            else web.Response(text="ok\n")
        )

    async def _readyz(self, _: web.Request) -> web.Response:
        state = self._state()
        return _json(state, 200 if state["ready"] else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        pages = await asyncio.gather(*(self._scrape(index) for index in range(len(self._ranks))))
        up = ["# HELP broadbeam:rank_up Whether a rank answers.", "# TYPE broadbeam:rank_up gauge"]
        model = self._settings.config.model.name
        for index, page in enumerate(pages):
            labels = f'engine="{self._settings.global_rank(index)}",model_name="{model}"'
            up.append(f"broadbeam:rank_up{{{labels}}} {0 if page is None else 1}")
        text = merge(["\n".join(up), *(page for page in pages if page is not None)])
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _scrape(self, index: int) -> str | None:
        url = f"http://{_bracketed(self._settings.host)}:{RANK_HTTP_PORT + index}/metrics"
        timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def _post_drain(self, _: web.Request) -> web.Response:
        """Refuse new requests from now on; the process stays until SIGTERM."""
        if self._stage == "ready":
            self._stage = "draining"
            for rank in self._ranks:
                rank.send_signal(signal.SIGUSR1)
        return _json(self._state(), 202)

    async def _fault_status(self, _: web.Request) -> web.Response:
        healthy = self._failure is None
        return _json(
            {"healthy": healthy, "stage": self._stage, "error": self._failure, "ranks": self._rank_states()}
        )

    async def _fault_apply(self, _: web.Request) -> web.Response:
        message = "a group is replaced as a whole; this supervisor cannot change its ranks yet"
        return _json(
            {"error": {"message": message, "type": "not_implemented", "param": None, "code": None}}, 501
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _json(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")
