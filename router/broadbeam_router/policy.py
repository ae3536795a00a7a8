"""Which of the candidates gets a leg: pure functions from loads to an index.

`loads` are requests in flight per candidate (own counters), `turn` counts the picks so far and `chance` is
uniform in [0, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Policy = Callable[[Sequence[int], int, float], int]


def least_loaded(loads: Sequence[int], turn: int, chance: float) -> int:
    """Any of the least loaded, each as likely."""
    least = min(loads)
    index = loads.index(least)
    for _ in range(int(chance * loads.count(least))):
        index = loads.index(least, index + 1)
    return index


def round_robin(loads: Sequence[int], turn: int, chance: float) -> int:
    return turn % len(loads)


def random(loads: Sequence[int], turn: int, chance: float) -> int:
    return int(chance * len(loads))


POLICIES: dict[str, Policy] = {"least-loaded": least_loaded, "round-robin": round_robin, "random": random}
