"""The simulator's scheduler: continuous batching over a pool of blocks that hold nothing."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from broadbeam_crds.engine_config import EngineConfig
from broadbeam_runtime.core import (
    TRANSFER_BYTES,
    TRANSFER_S,
    EngineStats,
    FinishReason,
    Output,
    Request,
    TokenLogprob,
)
from broadbeam_runtime.kv.pull import PullConnector
from broadbeam_runtime.sim_blocks import BlockPool, block_keys
from broadbeam_runtime.sim_text import logprob, next_token, seed_of
from broadbeam_runtime.sim_tokenizer import END

# Fields of EngineStats that are counted here as they happen.
COUNTED = (
    "prefix_queries",
    "prefix_hits",
    "external_queries",
    "external_hits",
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "prompt_tokens_transferred",
    "generation_tokens",
    "preemptions",
    "steps",
    "dummy_steps",
    "transfer_failures",
    "leases_expired",
)


@dataclass(slots=True)
class Sequence:
    """A request in the engine. `computed` counts tokens whose KV is in `blocks`."""

    request: Request
    seed: bytes
    tokens: list[int]  # the prompt and what was made
    keys: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    prefill_goal: int = 0  # tokens to compute before the next one can be made
    cached: int = 0
    transferred: int = 0
    pulling: bool = False
    queue_s: float | None = None
    sent: int = 0

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)


class SimScheduler:
    """Owned by the engine's thread. A step is `admit`, `plan`, then `advance` for each item of the plan."""

    def __init__(
        self, config: EngineConfig, pool: BlockPool, max_len: int, connector: PullConnector | None
    ) -> None:
        self._config = config
        self._connector = connector
        self._max_len = max_len
        self._block_size = config.cache.block_size
        self._pool = pool
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._pulling: dict[str, Sequence] = {}
        self._cancelled: dict[str, Sequence] = {}  # aborted pulls that have not ended yet
        self._held: dict[str, list[int]] = {}
        self._outputs: list[Output] = []
        self._counts = dict.fromkeys(COUNTED, 0)
        self._transfer_bytes, self._transfer_s = TRANSFER_BYTES, TRANSFER_S

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        tokens = list(request.prompt_token_ids)
        keys = block_keys(tokens, self._block_size)
        sequence = Sequence(
            request, seed_of(request, self._config.sim.seed), tokens, keys, prefill_goal=len(tokens)
        )
        needed = math.ceil((len(tokens) + 1) / self._block_size)
        if needed > self._pool.total:
            self._finish(
                sequence,
                "error",
                error=f"the prompt needs {needed} KV blocks of {self._block_size} tokens, "
                f"the pool has {self._pool.total}",
            )
            return
        self._waiting.append(sequence)
        if request.remote_prefill is not None and self._connector is not None:
            self._connector.expect(request.id, request.remote_prefill.params)

    def abort(self, aborted: Collection[str]) -> None:
        """End these requests where they run here, and give back what they hold."""
        aborted = set(aborted)
        for request_id in aborted & self._pulling.keys():
            assert self._connector is not None
            self._connector.cancel(request_id)  # its blocks are freed when the pull is reported
            sequence = self._cancelled[request_id] = self._pulling.pop(request_id)
            self._outputs.append(Output(sequence.request.id, (), finish="abort"))
        for sequence in [*self._running, *self._waiting]:
            if sequence.request.id in aborted:
                if (
                    sequence.request.remote_prefill is not None
                    and self._connector is not None
                    and not sequence.blocks
                ):
                    self._connector.cancel(sequence.request.id)
                self._finish(sequence, "abort")
        self._waiting = deque(item for item in self._waiting if item.request.id not in aborted)
        for request_id in aborted & self._held.keys():
            assert self._connector is not None
            self._connector.release(request_id)

    def poll_transfers(self) -> None:
        if self._connector is None:
            return
        for request_id, pulled in self._connector.released():
            self._pool.give_back(self._held.pop(request_id, []))
            self._counts["leases_expired"] += not pulled
        for result in self._connector.pulled():
            if (sequence := self._cancelled.pop(result.request_id, None)) is not None:
                self._release(sequence)
                continue
            sequence = self._pulling.pop(result.request_id)
            if result.error is not None:
                self._pull_failed(sequence, result.error)
            else:
                self._transfer_bytes = self._transfer_bytes.with_value(result.bytes)
                self._transfer_s = self._transfer_s.with_value(result.seconds)
                self._pull_done(sequence)

    def _pull_failed(self, sequence: Sequence, error: str) -> None:
        self._counts["transfer_failures"] += 1
        transfer = self._config.kv_transfer
        if transfer is not None and transfer.load_failure_policy == "recompute":
            self._pool.give_back(sequence.blocks)
            sequence.blocks = []
            sequence.request = replace(sequence.request, remote_prefill=None)
            self._waiting.appendleft(sequence)
        else:
            self._finish(sequence, "error", error=f"KV transfer failed: {error}")

    def _pull_done(self, sequence: Sequence) -> None:
        remote = sequence.request.remote_prefill
        assert remote is not None
        first = remote.first_token
        # Without the first token the last prompt token is computed here again, to sample from it.
        count = len(sequence.tokens) if first else len(sequence.tokens) - 1
        sequence.computed = sequence.transferred = count
        self._counts["prompt_tokens_transferred"] += count
        self._counts["external_hits"] += count
        self._pool.remember(sequence.keys, sequence.blocks)
        self._running.append(sequence)
        if first is not None:
            self._append(sequence, first.token_id, first)

    def admit(self) -> None:
        limit = self._config.scheduling.max_sequences
        while self._waiting and len(self._running) + len(self._pulling) < limit:
            sequence = self._waiting[0]
            if not self._allocate(sequence):
                return
            self._waiting.popleft()
            if sequence.queue_s is None:
                sequence.queue_s = time.monotonic() - sequence.request.arrival_s
            if sequence.request.remote_prefill is not None and not sequence.made:
                self._start_pull(sequence)
            else:
                self._running.append(sequence)

    def _allocate(self, sequence: Sequence) -> bool:
        """Blocks for all tokens so far and one more; prefix reuse leaves at least one token to compute."""
        remote = sequence.request.remote_prefill is not None and not sequence.made
        most = (len(sequence.tokens) - 1) // self._block_size
        shared = [] if remote else self._pool.find(sequence.keys[:most])
        needed = math.ceil((len(sequence.tokens) + 1) / self._block_size)
        blocks = self._pool.take(needed - len(shared), shared)
        if blocks is None:
            return False
        sequence.blocks = blocks
        sequence.computed = sequence.cached = len(shared) * self._block_size
        sequence.prefill_goal = len(sequence.tokens)
        if not remote:
            self._counts["prefix_queries"] += len(sequence.tokens)
            self._counts["prefix_hits"] += sequence.cached
            self._counts["prompt_tokens_cached"] += sequence.cached
        return True

    def _start_pull(self, sequence: Sequence) -> None:
        remote = sequence.request.remote_prefill
        assert remote is not None
        assert self._connector is not None
        self._pulling[sequence.request.id] = sequence
        self._counts["external_queries"] += remote.num_tokens
        wanted = math.ceil(remote.num_tokens / self._block_size)
        self._connector.pull(sequence.request.id, remote.params, sequence.blocks[:wanted])

    def plan(self) -> list[tuple[Sequence, int]]:
        """(sequence, tokens to compute): one for each that decodes, chunks of prompts with what is left."""
        budget = self._config.scheduling.max_batched_tokens
        plan: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._running, key=lambda item: item.prefill_goal - item.computed > 1):
            left = len(sequence.tokens) - sequence.computed
            if (count := min(left, budget)) > 0:
                plan.append((sequence, count))
                budget -= count
        return plan

    def duration_ms(self, plan: list[tuple[Sequence, int]]) -> float:
        sim = self._config.sim
        prefill = sum(count for sequence, count in plan if sequence.computed < sequence.prefill_goal - 1)
        decode = len([sequence for sequence, _ in plan if sequence.computed >= sequence.prefill_goal - 1])
        duration = sim.prefill_base_ms + prefill * sim.prefill_per_token_us / 1000 if prefill else 0.0
        return duration + (sim.decode_base_ms + decode * sim.decode_per_sequence_us / 1000 if decode else 0.0)

    def advance(self, sequence: Sequence, count: int) -> None:
        if not sequence.blocks:
            return  # preempted by a sequence before it in this step
        prompt = len(sequence.request.prompt_token_ids)
        self._counts["prompt_tokens_computed"] += max(
            0, min(sequence.computed + count, prompt) - sequence.computed
        )
        sequence.computed += count
        if sequence.computed < len(sequence.tokens):
            return
        self._pool.remember(sequence.keys, sequence.blocks)
        token = next_token(sequence.seed, sequence.made, sequence.request)
        self._append(sequence, token, logprob(token, sequence.request.sampling.logprobs))

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob) -> None:
        """Give out one token; then finish, or make room for the next."""
        sequence.tokens.append(token)
        self._counts["generation_tokens"] += 1
        sampling, made = sequence.request.sampling, sequence.made
        stops = token in sampling.stop_token_ids or (token == END and not sampling.ignore_eos)
        finish: FinishReason | None = None
        if stops and made >= sampling.min_tokens:
            finish = "stop"
        elif made >= sampling.max_tokens or len(sequence.tokens) >= self._max_len:
            finish = "length"
        self._emit(sequence, token, logprob, finish)
        if finish is not None:
            self._release(sequence)
        elif len(sequence.tokens) >= len(sequence.blocks) * self._block_size:
            self._grow(sequence)

    def _grow(self, sequence: Sequence) -> None:
        """One more block, at the cost of the newest sequence when the pool is full."""
        while (more := self._pool.take(1)) is None:
            victim = self._running[-1]
            self._counts["preemptions"] += 1
            self._release(victim)
            victim.computed = 0
            if victim is sequence and not self._running and not self._held:
                self._finish(
                    sequence, "error", error=f"the KV pool of {self._pool.total} blocks is too small"
                )
                return
            self._waiting.appendleft(victim)
            if victim is sequence:
                return
        sequence.blocks += more

    def _emit(
        self, sequence: Sequence, token: int, logprob: TokenLogprob, finish: FinishReason | None
    ) -> None:
        request = sequence.request
        params: dict[str, Any] | None = None
        if finish is not None and request.hold_blocks and self._connector is not None:
            prompt = len(request.prompt_token_ids)
            held = sequence.blocks[: math.ceil(prompt / self._block_size)]
            params = self._connector.hold(request.id, held, prompt)
            self._held[request.id] = held
            sequence.blocks = sequence.blocks[len(held) :]
        self._outputs.append(
            Output(
                request_id=request.id,
                token_ids=(token,),
                logprobs=(logprob,) if request.sampling.logprobs is not None else (),
                finish=finish,
                stop_token_id=token if finish == "stop" else None,
                cached_tokens=sequence.cached,
                transferred_tokens=sequence.transferred,
                kv_transfer_params=params,
                queue_s=sequence.queue_s or 0.0,
            )
        )

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self._release(sequence)
        self._outputs.append(Output(sequence.request.id, (), finish=reason, error=error))

    def _release(self, sequence: Sequence) -> None:
        self._pool.give_back(sequence.blocks)
        sequence.blocks = []
        if sequence in self._running:
            self._running.remove(sequence)

    def count_step(self, dummy: bool) -> None:
        self._counts["dummy_steps" if dummy else "steps"] += 1

    def take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def fail_all(self, error: str) -> None:
        """The engine stops: every request ends with `error`."""
        for sequence in [*self._running, *self._waiting, *self._pulling.values()]:
            self._outputs.append(Output(sequence.request.id, (), finish="error", error=error))

    def stats(self) -> EngineStats:
        """May be called from any thread."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting) + len(self._pulling),
            kv_usage=1 - self._pool.free / self._pool.total,
            kv_blocks=self._pool.total,
            block_size=self._block_size,
            held_blocks=sum(len(blocks) for blocks in list(self._held.values())),
            kv_bytes=self._pool.total * self._block_size * self._config.sim.kv_bytes_per_token,
            transfer_bytes=self._transfer_bytes,
            transfer_s=self._transfer_s,
            **self._counts,
        )
