"""Which sequences compute which tokens in the next step: continuous batching over a paged cache.

First come, first served. Running sequences decode one token each before any prompt chunk gets the rest of
the budget; waiting ones are admitted while blocks for their whole prompt are free. When a decode finds no
block, the sequence admitted last gives up its own and is computed again later.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

from broadbeam_crds.engine_config import SchedulingConfig
from broadbeam_runtime.attention import Chunk
from broadbeam_runtime.core import FinishReason, Output, Request, TokenLogprob
from broadbeam_runtime.kv.pool import BlockPool
from broadbeam_runtime.sequence import Sequence
from broadbeam_runtime.transfers import Transfers


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are checked against, and how the engine behaves where it has a choice."""

    scheduling: SchedulingConfig
    max_len: int
    vocab: int
    eos_token_ids: tuple[int, ...]
    prefix_reuse: bool = True
    recompute_failed_pulls: bool = False


@dataclass(slots=True)
class Counts:
    """Tokens and events since the start of the process."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_computed: int = 0
    generated: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of one sequence in a step."""

    sequence: Sequence
    count: int

    def chunk(self) -> Chunk:
        s, end = self.sequence, self.sequence.computed + self.count
        return Chunk(s.tokens[s.computed : end], s.computed, s.blocks, sample=end == len(s.tokens))


class Scheduler:
    """Owns every live sequence of a rank. Called by the engine thread only."""

    def __init__(self, limits: Limits, pool: BlockPool, transfers: Transfers | None = None):
        self.limits, self.pool, self.transfers = limits, pool, transfers
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.outputs: list[Output] = []
        self.counts = Counts()
        self.stalled = False  # nothing that waits can start until a transfer gives blocks back

    @property
    def has_work(self) -> bool:
        """Whether `schedule` might return something; pulls under way are not work."""
        return bool(self.running) or (bool(self.waiting) and not self.stalled)

    def add(self, request: Request) -> None:
        """Queue a request; one that can never run ends at once with an error output."""
        if error := self._refusal(request):
            self.outputs.append(Output(request.id, (), finish="error", error=error))
            return
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(62)
        sequence = Sequence(request, seed, list(request.prompt_token_ids), self.limits.eos_token_ids)
        sequence.pull = request.remote_prefill is not None
        if sequence.pull and self.transfers:
            self.transfers.expect(sequence)
        self.waiting.append(sequence)
        self.stalled = False

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; nothing happens if it has ended."""
        sequence = self.transfers.abort(request_id) if self.transfers else None
        if sequence is None:
            sequence = next((s for s in (*self.running, *self.waiting) if s.id == request_id), None)
            if sequence is None:
                return
            self._drop(sequence)
        self.stalled = False
        self.outputs.append(Output(request_id, (), finish="abort"))

    def poll(self) -> None:
        """Take in what the transport has finished."""
        if self.transfers is None or not self.transfers.busy:
            return
        free = self.pool.available
        ended = self.transfers.poll()
        self.stalled = self.stalled and not ended and self.pool.available == free
        for sequence, error in ended:
            if error is None:
                self._pulled(sequence)
            elif self.limits.recompute_failed_pulls:
                self.pool.release(sequence.blocks)
                sequence.blocks, sequence.pull = [], False
                self.waiting.appendleft(sequence)
            else:
                self.pool.release(sequence.blocks)
                self.outputs.append(
                    Output(sequence.id, (), finish="error", error=f"KV transfer failed: {error}")
                )

    def schedule(self) -> list[Work]:
        """The next step's work; every sequence in it has blocks for its tokens."""
        budget = self.limits.scheduling.max_batched_tokens
        work: list[Work] = []
        for sequence in [s for s in self.running if s.remaining == 1]:
            if budget and sequence in self.running and self._grow(sequence):
                work.append(Work(sequence, 1))
                budget -= 1
        for sequence in [s for s in self.running if s.remaining > 1]:
            if count := min(sequence.remaining, budget):
                work.append(Work(sequence, count))
                budget -= count
        while budget and (admitted := self._admit_next()):
            if admitted.remaining and admitted in self.running:
                work.append(Work(admitted, min(admitted.remaining, budget)))
                budget -= work[-1].count
        self.stalled = not work
        return work

    def commit(self, work: Items[Work], sampled: dict[int, TokenLogprob]) -> None:
        """Account for a step that ran: `sampled` maps indices of `work` to the tokens chosen."""
        for index, item in enumerate(work):
            sequence = item.sequence
            prompt = len(sequence.request.prompt_token_ids)
            self.counts.prompt_computed += max(
                0, min(prompt, sequence.computed + item.count) - sequence.computed
            )
            self._advance(sequence, sequence.computed + item.count)
            if index in sampled:
                self._emit(sequence, sampled[index])

    def take_outputs(self) -> list[Output]:
        outputs, self.outputs = self.outputs, []
        return outputs

    def live(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting
        if self.transfers:
            yield from self.transfers.pulling.values()

    def check_integrity(self) -> None:
        """Every referenced block has an owner; to be called when idle."""
        owners = [s.blocks for s in (*self.running, *self.waiting)]
        self.pool.check_integrity([*owners, *(self.transfers.owners() if self.transfers else ())])

    def _refusal(self, request: Request) -> str | None:
        prompt = request.prompt_token_ids
        if not prompt:
            return "the prompt is empty"
        if len(prompt) >= self.limits.max_len:
            return f"the prompt has {len(prompt)} tokens, the model takes at most {self.limits.max_len - 1}"
        remote = request.remote_prefill
        first = (remote.first_token.token_id,) if remote and remote.first_token else ()
        if not all(0 <= i < self.limits.vocab for i in (*prompt, *first, *request.sampling.stop_token_ids)):
            return f"the request has a token id outside 0..{self.limits.vocab - 1}"
        if self.transfers is None and (request.hold_blocks or request.remote_prefill):
            return "this engine has no KV connector (kv_transfer is not configured)"
        if remote and remote.num_tokens != len(prompt):
            return f"the prefill rank computed {remote.num_tokens} tokens, the prompt has {len(prompt)}"
        return None

    def _grow(self, sequence: Sequence) -> bool:
        """A block for the sequence's next token, taken from the last admitted if need be; False if that
        was the sequence itself."""
        while len(sequence.blocks) * self.pool.block_size <= sequence.computed:
            if self.pool.available:
                sequence.blocks += self.pool.allocate(1)
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        self.waiting.appendleft(sequence)
        self.counts.preemptions += 1

    def _admit_next(self) -> Sequence | None:
        """Move the first waiting sequence on, if there is room: into a pull or among the running."""
        pulling = len(self.transfers.pulling) if self.transfers else 0
        if not self.waiting or len(self.running) + pulling >= self.limits.scheduling.max_sequences:
            return None
        sequence = self.waiting[0]
        if not (self._start_pull(sequence) if sequence.pull else self._start(sequence)):
            return None
        self.waiting.popleft()
        return sequence

    def _start(self, sequence: Sequence) -> bool:
        size, first_time = self.pool.block_size, sequence.admitted_s is None
        hits: list[int] = []
        if self.limits.prefix_reuse:  # the last token is always computed: its logits are wanted
            hits = self.pool.prefix.match(sequence.full_hashes((len(sequence.tokens) - 1) // size, size))
        self.pool.share(hits)
        need = self.pool.blocks_for(len(sequence.tokens)) - len(hits)
        # A free block for each running sequence, or the newcomer would be the next to be preempted.
        if self.pool.available < need + len(self.running):
            self.pool.release(hits)
            return False
        sequence.blocks = hits + self.pool.allocate(need)
        sequence.computed = len(hits) * size
        if first_time:
            self.counts.prefix_queries += len(sequence.tokens)
            self.counts.prefix_hits += sequence.computed
            sequence.cached_tokens = sequence.computed
        sequence.admitted()
        self.running.append(sequence)
        return True

    def _start_pull(self, sequence: Sequence) -> bool:
        assert self.transfers
        need = self.pool.blocks_for(len(sequence.tokens))
        if self.pool.available < need + len(self.running):
            return False
        sequence.blocks = self.pool.allocate(need)
        sequence.admitted()
        self.transfers.pull(sequence)
        return True

    def _pulled(self, sequence: Sequence) -> None:
        """A prompt's blocks arrived: go on with the prefill rank's token, or compute the last one here."""
        assert self.transfers
        assert sequence.request.remote_prefill
        sequence.pull = False
        prompt, first = len(sequence.tokens), sequence.request.remote_prefill.first_token
        # The prefill leg runs without min_tokens; a stop token it chose may not stand here.
        if first and first.token_id in sequence.draw().forbidden:
            first = None
        sequence.transferred_tokens = prompt if first else prompt - 1
        self.transfers.counts.received_tokens += sequence.transferred_tokens
        self._advance(sequence, sequence.transferred_tokens)
        self.running.append(sequence)
        if first:
            self._emit(sequence, first)

    def _advance(self, sequence: Sequence, computed: int) -> None:
        size, before = self.pool.block_size, sequence.computed // self.pool.block_size
        sequence.computed = computed
        if self.limits.prefix_reuse and computed // size > before:
            hashes = sequence.full_hashes(computed // size, size)
            for index in range(before, computed // size):
                self.pool.prefix.register(sequence.blocks[index], hashes[index])

    def _emit(self, sequence: Sequence, token: TokenLogprob) -> None:
        finish, stop_token = sequence.append(token, self.limits.max_len)
        self.counts.generated += 1
        params = None
        if finish:
            self.running.remove(sequence)
            if sequence.request.hold_blocks and self.transfers:
                params = self.transfers.hold(sequence)
            self.pool.release(sequence.blocks)
            sequence.blocks = []
        self.outputs.append(_output(sequence, token, finish, stop_token, params))

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
            if sequence.pull and self.transfers:
                self.transfers.forget(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []


def _output(
    sequence: Sequence,
    token: TokenLogprob,
    finish: FinishReason | None,
    stop_token: int | None,
    params: dict[str, object] | None,
) -> Output:
    return Output(
        sequence.id,
        (token.token_id,),
        logprobs=(token,) if sequence.request.sampling.logprobs is not None else (),
        finish=finish,
        stop_token_id=stop_token,
        cached_tokens=sequence.cached_tokens,
        transferred_tokens=sequence.transferred_tokens,
        kv_transfer_params=params,
        queue_s=sequence.queue_s,
    )
