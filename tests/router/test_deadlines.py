from __future__ import annotations

import asyncio

from broadbeam_router.deadlines import NEVER, TICK_S, Deadlines


class Timed:
    """Notes that it expired, and fails if it is told to."""

    def __init__(self, deadline: float, fails: bool = False) -> None:
        self.deadline = deadline
        self.fails = fails
        self.expired = 0

    def expire(self) -> None:
        self.expired += 1
        assert not self.fails


async def test_what_is_late_expires_once_and_what_was_moved_does_not() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    late, moved, idle = Timed(loop.time()), Timed(loop.time()), Timed(NEVER)
    for timed in (late, moved, idle):
        deadlines.add(timed)
    moved.deadline = loop.time() + 60
    await asyncio.sleep(4 * TICK_S)
    deadlines.stop()
    assert (late.expired, moved.expired, idle.expired) == (1, 0, 0)


async def test_one_that_fails_does_not_keep_the_others_for_ever() -> None:
    loop = asyncio.get_running_loop()
    complaints: list[object] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    deadlines = Deadlines(loop)
    several = [Timed(loop.time(), fails=n % 2 == 0) for n in range(4)]
    for timed in several:
        deadlines.add(timed)
    await asyncio.sleep(8 * TICK_S)
    deadlines.stop()
    assert [timed.expired for timed in several] == [1, 1, 1, 1]
    assert len(complaints) == 2
