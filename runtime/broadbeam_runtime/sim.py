"""The simulator: an engine without a model. Deterministic text, a timing model, real continuous batching.

What a cluster sees of an engine is real: limits of sequences and KV blocks, prefix reuse, preemption,
lock-step of the group's ranks, leases and pulls between prefill and decode. Only the numbers are made up.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from broadbeam_runtime.core import (
    EngineStats,
    FinishReason,
    LoadProgress,
    ModelInfo,
    OnOutputs,
    Output,
    Request,
    TokenLogprob,
)
from broadbeam_runtime.kv.connector import PoolLayout
from broadbeam_runtime.kv.pull import PullConnector
from broadbeam_runtime.lockstep import Coordinator, Group, GroupError
from broadbeam_runtime.settings import RankSettings
from broadbeam_runtime.sim_blocks import BlockPool, block_keys
from broadbeam_runtime.sim_tokenizer import END, FIRST_WORD, SPECIAL, WORDS, SimTokenizer

DEFAULT_KV_TOKENS = 65_536  # the pool when cache.memory_bytes is not set
DEFAULT_MODEL_LEN = 8192
MEAN_LENGTH = 64  # tokens after which an answer ends on average, unless told to ignore it
JOIN_TIMEOUT_S = 300.0
IDLE_WAIT_S = 0.5


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


class SimEngine:
    """`core.Engine` without torch; `connector` is None where KV is not transferred."""

    def __init__(
        self,
        settings: RankSettings,
        coordinator: str,
        connector: PullConnector | None,
        progress: LoadProgress,
    ) -> None:
        self._config = config = settings.config
        self._settings = settings
        self._connector = connector
        self._progress = progress
        self._coordinator_host = coordinator
        self._info = ModelInfo(
            max_model_len=config.model.max_model_len or DEFAULT_MODEL_LEN,
            vocab_size=SimTokenizer().vocab_size,
            eos_token_ids=(END,),
            tokenizer_dir=None,
        )
        self._block_size = config.cache.block_size
        self._block_bytes = config.sim.kv_bytes_per_token * self._block_size
        blocks = (
            config.cache.memory_bytes or DEFAULT_KV_TOKENS * config.sim.kv_bytes_per_token
        ) // self._block_bytes
        if blocks < 1:
            raise ValueError(
                f"cache.memory_bytes is {config.cache.memory_bytes}, one block of {self._block_size} tokens "
                f"needs {self._block_bytes}"
            )
        self._pool = BlockPool(blocks, config.cache.prefix_reuse)
        parallel = config.parallel
        self._group = Group(
            settings.global_rank,
            parallel.world_size,
            coordinator,
            parallel.coordinator_port,
            config.sim.stall_s,
        )
        self._group.on_call = self._wake
        if connector is not None:
            connector.wake = self._wake
        self._work = threading.Condition()
        self._submitted: deque[Request] = deque()
        self._aborted: deque[str] = deque()
        self._stopping = False
        self._poked = False
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._pulling: dict[str, Sequence] = {}
        self._held: dict[str, list[int]] = {}
        self._outputs: list[Output] = []
        self._on_outputs: OnOutputs = lambda outputs: None
        self._counts: dict[str, float] = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
        self._thread: threading.Thread | None = None

    # --- core.Engine

    @property
    def model(self) -> ModelInfo:
        return self._info

    def start(self, on_outputs: OnOutputs) -> None:
        """Pretend to load, join the group, and pass one step through it."""
        self._on_outputs = on_outputs
        self._load()
        parallel = self._config.parallel
        if self._settings.global_rank == 0 and parallel.world_size > 1:
            Coordinator(self._settings.pod.host, parallel.coordinator_port, parallel.world_size)
        self._progress.stage, self._progress.done = "joining the group", None
        self._group.join(JOIN_TIMEOUT_S)
        if self._connector is not None:
            self._connector.start(None, self._layout())  # type: ignore[arg-type]  # nothing is stored
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

    def stop(self) -> None:
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        if self._connector is not None:
            self._connector.stop()

    def stats(self) -> EngineStats:
        counts = {
            name: int(value) for name, value in self._counts.items() if name not in ("kv_usage", "transfer_s")
        }
        held = sum(len(blocks) for blocks in list(self._held.values()))
        live = {
            "running": len(self._running),
            "waiting": len(self._waiting) + len(self._pulling) + len(self._submitted),
            "kv_blocks": self._pool.total,
            "block_size": self._block_size,
            "held_blocks": held,
            "kv_bytes": self._pool.total * self._block_bytes,
        }
        usage = 1 - self._pool.free / self._pool.total
        return EngineStats(**{**counts, **live}, kv_usage=usage, transfer_s=self._counts["transfer_s"])

    # --- loading

    def _load(self) -> None:
        self._progress.stage = "loading weights"
        start, load_s = time.monotonic(), self._config.sim.load_s
        while (elapsed := time.monotonic() - start) < load_s and not self._stopping:
            self._progress.done = elapsed / load_s
            time.sleep(min(0.05, load_s - elapsed))

    def _layout(self) -> PoolLayout:
        return PoolLayout(
            model=self._config.model.name,
            dtype="simulated",
            block_size=self._block_size,
            block_bytes=self._block_bytes,
            layers=1,
            width=self._config.sim.kv_bytes_per_token,
        )

    # --- the engine thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._admit_submitted()
                self._take_aborts()
                self._take_transfers()
                self._step()
                self._send()
            self._group.leave()
        except GroupError as error:
            self._fail_all(str(error))
            raise

    def _wait(self) -> bool:
        """Until there is something to do; False to stop."""
        with self._work:
            if not self._running:
                self._work.wait_for(self._stirred, IDLE_WAIT_S)
            self._poked = False
            return not self._stopping

    def _stirred(self) -> bool:
        return bool(self._poked or self._submitted or self._aborted or self._stopping or self._group.called)

    def _wake(self) -> None:
        with self._work:
            self._poked = True
            self._work.notify()

    def _admit_submitted(self) -> None:
        with self._work:
            fresh, self._submitted = self._submitted, deque()
        for request in fresh:
            sequence = self._sequence(request)
            needed = math.ceil((len(sequence.tokens) + 1) / self._block_size)
            if needed > self._pool.total:
                self._finish(
                    sequence,
                    "error",
                    error=f"the prompt needs {needed} KV blocks of {self._block_size} tokens, "
                    f"the pool has {self._pool.total}",
                )
                continue
            self._waiting.append(sequence)
            if request.remote_prefill is not None and self._connector is not None:
                self._connector.expect(request.id, request.remote_prefill.params)

    def _sequence(self, request: Request) -> Sequence:
        tokens = list(request.prompt_token_ids)
        sampling = request.sampling
        chance = request.id if sampling.temperature > 0 and sampling.seed is None else (sampling.seed or 0)
        text = f"{self._config.sim.seed}:{chance if sampling.temperature > 0 else 0}:{tokens}"
        seed = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return Sequence(request, seed, tokens, block_keys(tokens, self._block_size), prefill_goal=len(tokens))

    def _take_aborts(self) -> None:
        with self._work:
            aborted, self._aborted = set(self._aborted), deque()
        if not aborted:
            return
        for request_id in aborted & self._pulling.keys():
            assert self._connector is not None
            self._connector.cancel(request_id)  # its blocks are freed when the pull is reported
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

    def _take_transfers(self) -> None:
        if self._connector is None:
            return
        for request_id, pulled in self._connector.released():
            self._pool.give_back(self._held.pop(request_id, []))
            self._counts["leases_expired"] += not pulled
        for result in self._connector.pulled():
            sequence = self._pulling.pop(result.request_id)
            self._counts["transfer_bytes"] += result.bytes
            self._counts["transfer_s"] += result.seconds
            if result.error is not None:
                self._pull_failed(sequence, result.error)
            else:
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

    def _step(self) -> None:
        """One lock-step: admit, plan, spend the time that the slowest rank needs, make tokens."""
        self._admit()
        plan = self._plan()
        if not plan and not self._group.called:
            return
        started = time.monotonic()
        duration_ms = self._group.step(self._duration_ms(plan))
        time.sleep(max(0.0, duration_ms / 1000 - (time.monotonic() - started)))
        self._counts["steps" if plan else "dummy_steps"] += 1
        for sequence, count in plan:
            self._advance(sequence, count)

    def _admit(self) -> None:
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

    def _plan(self) -> list[tuple[Sequence, int]]:
        """(sequence, tokens to compute): one for each that decodes, chunks of prompts with what is left."""
        budget = self._config.scheduling.max_batched_tokens
        plan: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._running, key=lambda item: item.prefill_goal - item.computed > 1):
            left = len(sequence.tokens) - sequence.computed
            if (count := min(left, budget)) > 0:
                plan.append((sequence, count))
                budget -= count
        return plan

    def _duration_ms(self, plan: list[tuple[Sequence, int]]) -> float:
        sim = self._config.sim
        prefill = sum(count for sequence, count in plan if sequence.computed < sequence.prefill_goal - 1)
        decode = len([sequence for sequence, _ in plan if sequence.computed >= sequence.prefill_goal - 1])
        duration = sim.prefill_base_ms + prefill * sim.prefill_per_token_us / 1000 if prefill else 0.0
        return duration + (sim.decode_base_ms + decode * sim.decode_per_sequence_us / 1000 if decode else 0.0)

    def _advance(self, sequence: Sequence, count: int) -> None:
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
        token = self._next_token(sequence)
        self._append(sequence, token, self._logprob(sequence, token))

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob) -> None:
        """Give out one token; then finish, or make room for the next."""
        sequence.tokens.append(token)
        self._counts["generation_tokens"] += 1
        sampling, made = sequence.request.sampling, sequence.made
        stops = token in sampling.stop_token_ids or (token == END and not sampling.ignore_eos)
        finish: FinishReason | None = None
        if stops and made >= sampling.min_tokens:
            finish = "stop"
        elif made >= sampling.max_tokens or len(sequence.tokens) >= self._info.max_model_len:
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

    def _send(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._on_outputs(outputs)

    def _fail_all(self, error: str) -> None:
        for sequence in [*self._running, *self._waiting, *self._pulling.values()]:
            self._outputs.append(Output(sequence.request.id, (), finish="error", error=error))
        self._send()

    # --- pseudo-text

    def _digest(self, sequence: Sequence) -> bytes:
        return hashlib.blake2b(sequence.made.to_bytes(8, "little"), key=sequence.seed, digest_size=8).digest()

    def _next_token(self, sequence: Sequence) -> int:
        """A word, or the end; the same for the same prompt, seed and position, whoever prefilled."""
        digest = self._digest(sequence)
        sampling = sequence.request.sampling
        may_end = sequence.made + 1 > sampling.min_tokens and not sampling.ignore_eos and sequence.made > 0
        if may_end and int.from_bytes(digest[:4], "little") % MEAN_LENGTH == 0:
            return END
        word = int.from_bytes(digest[4:], "little") % len(WORDS)
        return FIRST_WORD + word + (len(WORDS) if sequence.made else 0)

    def _logprob(self, sequence: Sequence, token: int) -> TokenLogprob:
        wanted = sequence.request.sampling.logprobs
        if not wanted:
            return TokenLogprob(token, -0.5)
        others = (
            (token + step - len(SPECIAL)) % (self._info.vocab_size - len(SPECIAL))
            for step in range(1, wanted)
        )
        top = [(token, -0.5), *((len(SPECIAL) + other, -1.5 - rank) for rank, other in enumerate(others))]
        return TokenLogprob(token, -0.5, tuple(top))
