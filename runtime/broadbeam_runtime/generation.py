"""From the event loop to the engine and back: one HTTP request is one or more sequences of the engine."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from broadbeam_runtime.core import Engine, Output, Request
from broadbeam_runtime.detokenizer import Delta, TextStream
from broadbeam_runtime.metrics import RankMetrics, RequestTimes
from broadbeam_runtime.openai_responses import Choice
from broadbeam_runtime.request_checks import Generation
from broadbeam_runtime.tokenizer import Tokenizer


class GenerationError(Exception):
    """The engine gave up on a request; the message is for the client."""


class Sequences:
    """The sequences of one HTTP request: `deltas` runs them, leaving it early aborts what still runs.

    The siblings of a prompt (n > 1) start after the first one's first token, so that they find its prompt
    in the prefix cache instead of computing it n times; with a remote prefill only the first one pulls.
    """

    def __init__(
        self, client: EngineClient, answer_id: str, wanted: Generation, tokenizer: Tokenizer
    ) -> None:
        self._client = client
        self._queue: asyncio.Queue[Output] = asyncio.Queue()
        self.choices = [
            Choice(index, wanted.prompts[index // wanted.n])
            for index in range(len(wanted.prompts) * wanted.n)
        ]
        # Clients choose X-Request-Id, and the gateway's retries repeat it: ids within the engine are our own.
        unique_id = f"{answer_id}-{secrets.token_hex(4)}"
        self._requests = [self._request(unique_id, wanted, choice) for choice in self.choices]
        self._texts = [TextStream(tokenizer, wanted.text) for _ in self.choices]
        self._times: list[RequestTimes | None] = [None] * len(self.choices)
        self._open: set[int] = set()
        self._n = wanted.n
        self._remote_cached_tokens = wanted.remote_prefill.cached_tokens if wanted.remote_prefill else 0
        self.cached_tokens = 0
        self.kv_transfer_params: dict[str, object] | None = None

    def _request(self, unique_id: str, wanted: Generation, choice: Choice) -> Request:
        sampling, sibling = wanted.sampling, choice.index % wanted.n
        if sampling.seed is not None and sibling:
            sampling = replace(sampling, seed=sampling.seed + sibling)
        return Request(
            id=f"{unique_id}-{choice.index}",
            prompt_token_ids=choice.prompt,
            sampling=sampling,
            arrival_s=time.monotonic(),
            hold_blocks=wanted.hold_blocks,
            remote_prefill=None if sibling else wanted.remote_prefill,
        )

    async def deltas(self) -> AsyncIterator[tuple[Choice, Delta]]:
        """Every delta of every choice until all have finished; GenerationError when the engine fails one."""
        self._submit(range(0, len(self.choices), self._n))
        while self._open:
            output = await self._queue.get()
            index = int(output.request_id.rpartition("-")[2])
            if index not in self._open:
                continue  # it ended by a stop string before the engine knew
            yield self._take(index, output)

    def _submit(self, indexes: Sequence[int]) -> None:
        for index in indexes:
            request = self._requests[index]
            sampling = request.sampling
            self._times[index] = RequestTimes(
                request.arrival_s, len(request.prompt_token_ids), sampling.max_tokens
            )
            self._open.add(index)
            self._client.submit(request, self._queue)

    def _take(self, index: int, output: Output) -> tuple[Choice, Delta]:
        choice, times = self.choices[index], self._times[index]
        assert times is not None
        self._client.metrics.observe(times, output)
        if output.finish == "error":
            self._open.discard(index)
            raise GenerationError(output.error or "the engine failed this request")
        if index % self._n == 0 and not choice.token_ids:
            self._first_output(index, output)
        delta = self._texts[index].push(output)
        choice.add(delta)
        if delta.finish is not None:
            self._open.discard(index)
            self._client.metrics.finish(times, delta.finish)
            self._client.forget(self._requests[index].id, abort=output.finish is None)
        if output.kv_transfer_params is not None:
            self.kv_transfer_params = output.kv_transfer_params
        return choice, delta

    def _first_output(self, index: int, output: Output) -> None:
        # Transferred tokens were computed on the prefill rank, which says how many it had found cached.
        self.cached_tokens += output.cached_tokens or self._remote_cached_tokens
        self._submit(range(index + 1, index + self._n))

    def close(self) -> None:
        """Abort what still runs: the client went away, or one sequence failed."""
        for index in self._open:
            if (times := self._times[index]) is not None:
                self._client.metrics.finish(times, "abort")
            self._client.forget(self._requests[index].id, abort=True)
        self._open.clear()


class EngineClient:
    """Hands requests to the engine and carries each step's outputs over to the event loop in one call."""

    def __init__(self, engine: Engine, metrics: RankMetrics, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._queues: dict[str, asyncio.Queue[Output]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.metrics = metrics

    @property
    def running(self) -> int:
        """Sequences whose answers are not complete."""
        return len(self._queues)

    def submit(self, request: Request, queue: asyncio.Queue[Output]) -> None:
        self._queues[request.id] = queue
        self._idle.clear()
        self._engine.submit(request)

    def forget(self, request_id: str, abort: bool) -> None:
        if self._queues.pop(request_id, None) is not None and abort:
            self._engine.abort(request_id)
        if not self._queues:
            self._idle.set()

    def on_outputs(self, outputs: Sequence[Output]) -> None:
        """The engine's callback, from the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def _dispatch(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if (queue := self._queues.get(output.request_id)) is not None:
                queue.put_nowait(output)

    async def idle(self) -> None:
        """Returns when no sequence runs."""
        await self._idle.wait()
