"""A histogram that costs its writer one bisection: counts and sums by bucket, cumulative for the
life of a store."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

LATENCY_BOUNDS_S = (
    *(0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
GROUP_BOUNDS = tuple(2**power for power in range(13))


class Histogram:
    """One thread adds; any thread may read, and may miss the latest value or two."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        """The upper bounds of the buckets, ascending. One more bucket holds values above them."""
        self.counts = [0] * (len(bounds) + 1)
        self.sums = [0.0] * (len(bounds) + 1)

    def add(self, *values: float) -> None:
        """Count each of `values` in its bucket."""
        bounds, counts, sums = self.bounds, self.counts, self.sums
        for value in values:
            bucket = bisect_left(bounds, value)
            counts[bucket] += 1
            sums[bucket] += value
