"""Which tile an FP8 product takes: the one whose waves over the multiprocessors cost the fewest cycles.

The costs are cycles measured on an H100 under load, where tiles of 128 columns keep two products in flight
(600 for the 512 cycles that the tensor cores need) and wider ones one (870 for 768 at 192). Tiles whose
neighbours share A or B fetch a quarter to a third less from L2, which bounds long sums; alone they waste no
neighbour and wait for none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

SHARED_BYTES = 227 << 10  # what one block may have on sm_90
MOST_STAGES = 8

Shared = Literal["", "a", "b", "ab"]

# Columns of a tile -> cycles of one step (128 of k) with 128 rows.
STEP_CYCLES = {64: 400, 96: 487, 112: 570, 128: 600, 160: 781, 176: 855, 192: 870}
COLUMN_CYCLES = 5.5  # a column, of writing a tile and beginning the next
ALONE = 1.12  # a step where nothing is shared, sums are long and every multiprocessor fetches
TOGETHER = 1.03  # a step of two blocks that wait for each other
LONG = 32  # steps

# The same up to 128 rows, where latency and weight bytes bound it.
FEW_ROWS_STEP_CYCLES = {32: 130, 64: 200}
BLOCK_CYCLES = 8000  # of starting a block: split tiles cannot stay on their multiprocessor
EXCHANGE_CYCLES = 900  # of adding the parts of a split tile


@dataclass(frozen=True, slots=True)
class Tile:
    """Compile-time choices of the kernel, named as there; `group` (a power of two) is the launch's."""

    n: int
    shared: Shared = ""  # what two tiles of a cluster fetch together
    split: int = 1
    a_rows: int = 128
    group: int = 16
    stages: int = MOST_STAGES
    pipeline: int = 0
    turns: int = 0

    @property
    def warpgroups(self) -> int:
        return 2 if self.a_rows > 64 else 1

    @property
    def m(self) -> int:
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def cluster(self) -> int:
        return (1 << len(self.shared)) * self.split

    @property
    def _out_bytes(self) -> int:
        if self.split == 1:
            return self.m * self.n * 2
        return (self.split - 1) * -(-self.n // 8 // self.split) * self.m * 32

    @property
    def _stage_bytes(self) -> int:
        return (self.m + self.n) * 128 + (self.m + 4) * 4 + 16

    @property
    def ring(self) -> int:
        """Stages that fit beside the outgoing tile."""
        return min(self.stages, (SHARED_BYTES - self._out_bytes) // self._stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self._out_bytes + self.ring * self._stage_bytes

    @property
    def box(self) -> int:
        """Columns of an output box: what one swizzle of the shared tile spans."""
        return next(width for width in (64, 32, 16, 8) if self.n % width == 0)

    def clusters(self, rows: int, n: int) -> tuple[int, int]:
        """Rows and columns of clusters that cover an output; a split tile is one cluster."""
        high = self.m * (2 if "b" in self.shared else 1)
        wide = self.n * (2 if "a" in self.shared else 1)
        return -(-rows // high), -(-n // wide)


def _many_rows(shareable: tuple[Shared, ...]) -> list[Tile]:
    return [
        Tile(n, shared, pipeline=1 if n <= 128 else 0, turns=2 if n == 176 else 0)
        for n in STEP_CYCLES
        for shared in shareable
        if n > 64 or not shared
    ]


def _few_rows(rows: int) -> list[Tile]:
    fetched = next(fit for fit in (16, 32, 64, 128) if fit >= rows)
    # One warpgroup has nobody to take turns with, but a second set of registers did not pay (64 rows, H100).
    pipeline = 1 if fetched == 128 else 0
    return [
        Tile(n, split=split, a_rows=fetched, pipeline=pipeline)
        for n in FEW_ROWS_STEP_CYCLES
        for split in (1, 2)
    ]


def _cycles(tile: Tile, rows: int, n: int, steps: int, multiprocessors: int) -> float:
    high, wide = tile.clusters(rows, n)
    waves = -(-high * wide // (multiprocessors // tile.cluster))
    if rows > 128:
        crowded = steps >= LONG and waves > 1
        fetching = TOGETHER if tile.shared else ALONE if crowded else 1.0
        return waves * (steps * STEP_CYCLES[tile.n] * fetching + COLUMN_CYCLES * tile.n)
    step = FEW_ROWS_STEP_CYCLES[tile.n]
    if tile.split == 1:
        return waves * (steps * step + COLUMN_CYCLES * tile.n) + BLOCK_CYCLES
    return waves * (-(-steps // tile.split) * step + BLOCK_CYCLES + EXCHANGE_CYCLES)


@cache
def dense_tile(rows: int, n: int, steps: int, multiprocessors: int) -> Tile:
    """The tile of a product (rows, 128 * steps) @ (n, 128 * steps).T."""
    tiles = _many_rows(("a", "b", "")) if rows > 128 else _few_rows(rows)
    tiles = [tile for tile in tiles if tile.split <= steps]
    return min(tiles, key=lambda tile: _cycles(tile, rows, n, steps, multiprocessors))


@cache
def grouped_tile(rows: int, experts: int, n: int, steps: int, multiprocessors: int) -> Tile:
    """The tile of `rows` rows in all, spread over `experts`: neighbours below may have another expert's B."""
    best = min(
        _many_rows(("a", "")), key=lambda tile: _cycles(tile, max(rows, 129), n, steps, multiprocessors)
    )
    each = max(1, rows // experts // best.m)
    return replace(best, group=min(16, 1 << (each.bit_length() - 1)))
