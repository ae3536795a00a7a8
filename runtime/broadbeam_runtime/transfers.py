"""KV blocks that cross ranks, as the scheduler sees them: pulls it waits for, holds it has promised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from broadbeam_runtime.core import TRANSFER_BYTES, TRANSFER_S
from broadbeam_runtime.distribution import Distribution
from broadbeam_runtime.kv.connector import KVConnector
from broadbeam_runtime.kv.pool import BlockPool
from broadbeam_runtime.sequence import Sequence


@dataclass(slots=True)
class TransferCounts:
    """Since the start of the process."""

    bytes: Distribution = TRANSFER_BYTES
    seconds: Distribution = TRANSFER_S
    failures: int = 0
    expired: int = 0
    wanted_tokens: int = 0
    received_tokens: int = 0


@dataclass(slots=True)
class Transfers:
    """Owns the blocks of pulls under way and of holds; both return to the pool through here."""

    connector: KVConnector
    pool: BlockPool
    pulling: dict[str, Sequence] = field(default_factory=dict)
    cancelled: dict[str, Sequence] = field(default_factory=dict)  # blocks still written to by the transport
    held: dict[str, list[int]] = field(default_factory=dict)
    counts: TransferCounts = field(default_factory=TransferCounts)

    @property
    def busy(self) -> bool:
        """Whether `poll` may have something to say."""
        return bool(self.pulling or self.cancelled or self.held)

    @property
    def held_blocks(self) -> int:
        return sum(map(len, self.held.values()))

    def owners(self) -> Iterator[list[int]]:
        """The blocks of every transfer, for the pool's integrity check."""
        for sequence in (*self.pulling.values(), *self.cancelled.values()):
            yield sequence.blocks
        yield from self.held.values()

    def expect(self, sequence: Sequence) -> None:
        """The sequence may have to wait for blocks here; its prefill rank must not give up on it."""
        self.connector.expect(sequence.id, _params(sequence))

    def pull(self, sequence: Sequence) -> None:
        """Start to fill `sequence.blocks` from its prefill rank."""
        self.pulling[sequence.id] = sequence
        self.counts.wanted_tokens += len(sequence.request.prompt_token_ids)
        self.connector.pull(sequence.id, _params(sequence), sequence.blocks)

    def abort(self, request_id: str) -> Sequence | None:
        """Give up a pull or a hold; blocks come back when the transport is done with them."""
        if request_id in self.held:
            self.connector.release(request_id)
        sequence = self.pulling.pop(request_id, None)
        if sequence is not None:
            self.cancelled[request_id] = sequence
            self.connector.cancel(request_id)
        return sequence

    def forget(self, sequence: Sequence) -> None:
        """A waiting sequence was aborted before its pull began; its prefill rank may free its blocks."""
        self.connector.cancel(sequence.id)

    def hold(self, sequence: Sequence) -> dict[str, object]:
        """Keep the finished prompt's blocks for a decode rank; the kv_transfer_params that lead to them."""
        count = self.pool.blocks_for(len(sequence.request.prompt_token_ids))
        self.pool.release(sequence.blocks[count:])
        self.held[sequence.id] = sequence.blocks[:count]
        sequence.blocks = []
        return self.connector.hold(
            sequence.id, self.held[sequence.id], len(sequence.request.prompt_token_ids)
        )

    def poll(self) -> list[tuple[Sequence, str | None]]:
        """Free what was released; the pulls that ended, each with its error if it failed."""
        for request_id, pulled in self.connector.released():
            if (blocks := self.held.pop(request_id, None)) is not None:
                self.pool.release(blocks)
                self.counts.expired += not pulled
        ended = []
        for result in self.connector.pulled():
            if (sequence := self.cancelled.pop(result.request_id, None)) is not None:
                self.pool.release(sequence.blocks)
            elif (sequence := self.pulling.pop(result.request_id, None)) is not None:
                if result.error is None:
                    self.counts.bytes = self.counts.bytes.with_value(result.bytes)
                    self.counts.seconds = self.counts.seconds.with_value(result.seconds)
                else:
                    self.counts.failures += 1
                ended.append((sequence, result.error))
        return ended


def _params(sequence: Sequence) -> dict[str, object]:
    assert sequence.request.remote_prefill
    return sequence.request.remote_prefill.params
