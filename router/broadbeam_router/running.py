"""Running a coroutine without the event loop between its steps.

A request waits two or three times, each time for bytes that one callback brings. With asyncio's tasks and
futures every such wait costs one more turn of the loop (a poll of the kernel included): measured, a third of
what the gateway spends on a request. Here the callback that brings the bytes runs the next step itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator

import msgspec


class Signal(msgspec.Struct, eq=False):
    """Something waited for once: by a coroutine, or by `resume`, which runs within `set` or `fail`."""

    is_set: bool = False
    error: Exception | None = None
    resume: Callable[[], None] | None = None

    def set(self) -> None:
        if not self.is_set:
            self.is_set = True
            resume, self.resume = self.resume, None  # who waited often holds the signal: no ring is left
            if resume is not None:
                resume()

    def fail(self, error: Exception) -> None:
        if not self.is_set:
            self.error = error
            self.set()

    def __await__(self) -> Generator[object, None, None]:
        if not self.is_set:
            yield self
        if self.error is not None:
            raise self.error


Ended = Callable[[BaseException | None], None]


class Run:
    """A coroutine on its way. `ended` is called exactly once, with what it raised: None if it returned,
    CancelledError if it was cancelled.

    It may await Signals, and asyncio's futures and tasks; it is not itself a task, so what needs one
    (asyncio.timeout) has to run in one."""

    __slots__ = ("_coroutine", "_ended", "_waiting")

    def __init__(self, coroutine: Coroutine[object, None, None], ended: Ended) -> None:
        self._coroutine = coroutine
        self._ended = ended
        self._waiting: object = None

    def start(self) -> None:
        self.step()

    def step(self, error: BaseException | None = None) -> None:
        """Run to the next wait; with `error`, by raising it where the coroutine waits."""
        self._waiting = None
        try:
            waiting = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
        except StopIteration:
            self._ended(None)
        except (Exception, asyncio.CancelledError) as failure:  # the outermost frame of a request
            self._ended(failure)
        else:
            self._waiting = waiting
            if type(waiting) is Signal:
                waiting.resume = self.step
            else:
                assert isinstance(waiting, asyncio.Future), "only signals and futures can be awaited"
                waiting._asyncio_future_blocking = False  # as a task does when it takes a future over
                waiting.add_done_callback(self._woken)

    def _woken(self, future: asyncio.Future[object]) -> None:
        if self._waiting is future:
            self.step()

    def cancel(self) -> None:
        """Raise CancelledError where the coroutine waits, at once; nothing if it has ended.

        A future it waits for is not cancelled with it: whoever awaits one sees to that."""
        waiting = self._waiting
        if waiting is None:
            return
        if isinstance(waiting, Signal):
            waiting.resume = None
        self.step(asyncio.CancelledError())
