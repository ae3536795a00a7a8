"""Values counted by size, as a Prometheus histogram wants them. Pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Distribution:
    """`counts[i]` values are above bounds[i - 1] and at most bounds[i]; the last is of those above all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...] = ()
    sum: float = 0.0

    def with_value(self, value: float) -> Distribution:
        counts = list(self.counts or (0,) * (len(self.bounds) + 1))
        counts[bisect_left(self.bounds, value)] += 1
        return replace(self, counts=tuple(counts), sum=self.sum + value)

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), the last bound being infinite."""
        buckets, total = [], 0
        for index, bound in enumerate((*self.bounds, float("inf"))):
            total += self.counts[index] if self.counts else 0
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), float(total)))
        return buckets
