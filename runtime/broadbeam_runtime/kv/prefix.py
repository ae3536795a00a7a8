"""Which cached block holds which tokens: a chain of hashes, one per full block."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

ROOT = b""


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a block given the hash of the blocks before it. SHA-256, so that no prompt can be made
    to collide with another's blocks."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class PrefixIndex:
    """Hash -> block, for blocks whose contents are complete; at most one block per hash."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, int] = {}
        self.hashes: dict[int, bytes] = {}

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix."""
        found = []
        for digest in hashes:
            if (block := self.blocks.get(digest)) is None:
                break
            found.append(block)
        return found

    def register(self, block: int, digest: bytes) -> None:
        """`block` now holds what `digest` says; a second block with the same contents stays unknown."""
        if digest not in self.blocks:
            self.blocks[digest] = block
            self.hashes[block] = digest

    def forget(self, block: int) -> None:
        if (digest := self.hashes.pop(block, None)) is not None:
            del self.blocks[digest]

    def __contains__(self, block: int) -> bool:
        return block in self.hashes
