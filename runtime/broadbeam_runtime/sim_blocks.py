"""The simulator's KV pool: counts blocks, and remembers which prefixes they hold, as a real pool does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


def block_keys(tokens: Sequence[int], block_size: int) -> list[int]:
    """One chained key for every full block of `tokens`."""
    keys: list[int] = []
    key = 0
    for start in range(0, len(tokens) - block_size + 1, block_size):
        key = hash((key, *tokens[start : start + block_size]))
        keys.append(key)
    return keys


class BlockPool:
    """Blocks by id. A full prompt block keeps its key after it is freed, until it is needed again."""

    def __init__(self, blocks: int, reuse: bool) -> None:
        self.total = blocks
        self._reuse = reuse
        self._unused = list(range(blocks - 1, -1, -1))
        self._users = [0] * blocks
        self._key_of: dict[int, int] = {}
        self._block_of: dict[int, int] = {}
        self._reusable: OrderedDict[int, None] = (
            OrderedDict()
        )  # free blocks that still hold a prefix, oldest first

    @property
    def free(self) -> int:
        return len(self._unused) + len(self._reusable)

    def find(self, keys: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known prefix of `keys`."""
        found: list[int] = []
        for key in keys if self._reuse else ():
            if (block := self._block_of.get(key)) is None:
                break
            found.append(block)
        return found

    def take(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """`shared` and `count` more blocks; None, and nothing taken, if there are not that many."""
        reserved = sum(1 for block in shared if block in self._reusable)
        if count > self.free - reserved:
            return None
        for block in shared:
            self._reusable.pop(block, None)
            self._users[block] += 1
        return [*shared, *(self._fresh() for _ in range(count))]

    def _fresh(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._users[block] = 1
        return block

    def remember(self, keys: Sequence[int], blocks: Sequence[int]) -> None:
        """`blocks` now hold the prefix of `keys`; the first block of a key keeps it."""
        for key, block in zip(keys, blocks, strict=False):
            if self._reuse and key not in self._block_of and block not in self._key_of:
                self._block_of[key], self._key_of[block] = block, key

    def give_back(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):  # the end of a prefix is evicted before its beginning
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was freed twice"
            if self._users[block]:
                continue
            if block in self._key_of:
                self._reusable[block] = None
            else:
                self._unused.append(block)
