"""The blocks of the paged KV cache: who refers to each, and which to reuse next."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from broadbeam_runtime.kv.prefix import PrefixIndex


class BlockPool:
    """Reference counts and a free list in least-recently-used order.

    A free block keeps its contents, and stays findable in `prefix`, until it is allocated again.
    """

    def __init__(self, blocks: int, block_size: int):
        self.block_size = block_size
        self.references = [0] * blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self.prefix = PrefixIndex()

    def __len__(self) -> int:
        return len(self.references)

    @property
    def available(self) -> int:
        return len(self.free)

    @property
    def usage(self) -> float:
        return 1.0 - len(self.free) / len(self.references)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for the caller alone; there must be that many `available`."""
        assert count <= self.available, f"{count} blocks wanted, {self.available} free"
        taken = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.prefix.forget(block)
            self.references[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each of `blocks`, found through `prefix`."""
        for block in blocks:
            if self.references[block] == 0:
                del self.free[block]
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a sequence's blocks, in its order; the end of a prefix is reused before its beginning."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free[block] = None
                if block not in self.prefix:
                    self.free.move_to_end(block, last=False)

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Every reference is one of `owners`', and a block is free exactly if nobody refers to it."""
        held = Counter(block for blocks in owners for block in blocks)
        for block, count in enumerate(self.references):
            assert count == held[block], f"block {block}: {count} references, {held[block]} owners"
            assert (count == 0) == (block in self.free), (
                f"block {block}: {count} references, free list disagrees"
            )
        for digest, block in self.prefix.blocks.items():
            assert self.prefix.hashes[block] == digest, f"block {block}: its hash is not its own"
