"""Which tile an FP8 product takes: the one whose waves over the multiprocessors cost the fewest cycles.

The costs are cycles measured on an H100 under load. Tiles up to 128 columns keep two products in flight (600
cycles for the 512 that the tensor cores need), wider ones one (885 for 768 at 192). Two tiles that share A or
B fetch a quarter to a third less from L2 but wait for each other, which pays only for sums of a middling
length in many waves: what such a step costs more where nothing is shared is the device's (`alone`; an H200's
faster memory makes it nothing).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

SHARED_BYTES = 227 << 10  # what one block may have on sm_90
MOST_STAGES = 8

Shared = Literal["", "a", "b", "ab"]

# Columns of a tile -> cycles of one step (128 of k) with 128 rows.
STEP_CYCLES = {64: 400, 96: 487, 112: 570, 128: 600, 160: 781, 176: 855, 192: 885}
COLUMN_CYCLES = 5.5  # a column, of writing a tile and beginning the next

LONG, VERY_LONG = 32, 100  # steps
MANY_WAVES = 6
LEAN = 0.97  # the same with a wide tile, which fetches less for each product
TOGETHER = 1.04  # a step of two blocks that wait for each other
WIDE = 1.06  # a step of a very long sum with one product in flight
STREAMED = 1.05  # a step of a narrow tile where experts have so few rows that their weights bound it

BAND = 16  # rows of tiles walked together
BAND_VERY_LONG = 8  # more of A does not stay in L2 beside B: 819 against 744 us at 4096 x 7168 x 16384
BAND_GROUPED = 2  # the weights of one expert do stay: 806 against 744 us with 4 x 8192 rows, 7168 x 2048

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


def _alone(steps: int) -> list[Tile]:
    group = BAND_VERY_LONG if steps >= VERY_LONG else BAND
    return [
        Tile(n, pipeline=1 if n <= 128 else 0, turns=2 if n == 176 else 0, group=group) for n in STEP_CYCLES
    ]


def _together(steps: int) -> list[Tile]:
    """Of equal cost, narrow tiles do better with a shared A and wide ones with a shared B."""
    sharing: dict[bool, tuple[Shared, Shared]] = {True: ("a", "b"), False: ("b", "a")}
    return [
        replace(tile, shared=shared)
        for tile in _alone(steps)
        if tile.n > 64
        for shared in sharing[tile.n <= 128]
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


def _fetching(tile: Tile, steps: int, waves: int, alone: float) -> float:
    """What fetching adds to a step, as a factor."""
    if steps >= VERY_LONG:
        return (TOGETHER if tile.shared else 1.0) * (WIDE if tile.n > 128 else 1.0)
    if steps >= LONG and waves > MANY_WAVES:
        return (1.0 if tile.shared else alone) * (LEAN if tile.n > 128 else 1.0)
    return TOGETHER if tile.shared else 1.0


def _many_rows_cycles(tile: Tile, rows: int, n: int, steps: int, multiprocessors: int, alone: float) -> float:
    high, wide = tile.clusters(rows, n)
    waves = -(-high * wide // (multiprocessors // tile.cluster))
    return waves * (
        steps * STEP_CYCLES[tile.n] * _fetching(tile, steps, waves, alone) + COLUMN_CYCLES * tile.n
    )


def _few_rows_cycles(tile: Tile, rows: int, n: int, steps: int, multiprocessors: int) -> float:
    high, wide = tile.clusters(rows, n)
    waves = -(-high * wide // (multiprocessors // tile.cluster))
    step = FEW_ROWS_STEP_CYCLES[tile.n]
    if tile.split == 1:
        return waves * (steps * step + COLUMN_CYCLES * tile.n) + BLOCK_CYCLES
    return waves * (-(-steps // tile.split) * step + BLOCK_CYCLES + EXCHANGE_CYCLES)


@cache
def dense_tile(rows: int, n: int, steps: int, multiprocessors: int, alone: float) -> Tile:
    """The tile of a product (rows, 128 * steps) @ (n, 128 * steps).T."""
    if rows <= 128:
        few = [tile for tile in _few_rows(rows) if tile.split <= steps]
        return min(few, key=lambda tile: _few_rows_cycles(tile, rows, n, steps, multiprocessors))
    return min(
        [*_alone(steps), *_together(steps)],
        key=lambda tile: _many_rows_cycles(tile, rows, n, steps, multiprocessors, alone),
    )


@cache
def grouped_tile(rows: int, experts: int, n: int, steps: int, multiprocessors: int) -> Tile:
    """The tile of `rows` rows in all, spread over `experts`."""
    each = max(1, rows // experts // 128)  # rows of tiles

    def cycles(tile: Tile) -> float:
        streamed = STREAMED if each <= 2 and tile.n <= 128 else 1.0
        waves = -(-(-(-rows // 128) * -(-n // tile.n)) // multiprocessors)
        return waves * (steps * STEP_CYCLES[tile.n] * streamed + COLUMN_CYCLES * tile.n)

    return replace(min(_alone(steps), key=cycles), group=min(BAND_GROUPED, each))
