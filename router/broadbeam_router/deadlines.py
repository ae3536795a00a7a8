"""One timer for all connections: each carries a deadline that moves without touching the event loop."""

from __future__ import annotations

import asyncio
from typing import Protocol

NEVER = float("inf")
TICK_S = 0.1


class Timed(Protocol):
    """`deadline` is on the loop's clock; moving it is one attribute store, where a timer costs 1-2 us."""

    deadline: float

    def expire(self) -> None: ...


class Deadlines:
    """Calls `expire` on what is late, once and at most TICK_S after its deadline."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timed: set[Timed] = set()
        self._handle = loop.call_later(TICK_S, self._tick)
        self.add = self._timed.add
        self.discard = self._timed.discard

    def _tick(self) -> None:
        self._handle = self._loop.call_later(TICK_S, self._tick)  # first: an error below must not end it
        now = self._loop.time()
        late = [timed for timed in self._timed if timed.deadline < now]
        for timed in late:
            timed.deadline = NEVER
            timed.expire()

    def stop(self) -> None:
        self._handle.cancel()
