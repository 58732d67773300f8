"""Schedule of ticks: a grid of times that never drifts, where late ticks are skipped."""

from __future__ import annotations


class Pace:
    """Schedule of ticks: tick k is due at `start + k * interval`, so that errors never add up.

    A tick that has not begun when the next one is due is late: it is skipped and counted, never made up for.

    Args:
        start: when the first tick is due, by a monotonic clock, in seconds.
        interval: between ticks, above 0.

    Attributes:
        due: when the next tick is due.
        late: ticks skipped so far.
    """

    def __init__(self, start: float, interval: float) -> None:
        self._start = start
        self._interval = interval
        self._number = 0
        self.late = 0

    @property
    def due(self) -> float:
        """Time at which the next tick is due."""
        return self._start + self._number * self._interval

    def next(self, now: float) -> float:
        """Advance to the next tick after one has ended; returns the seconds to wait for it."""
        self._number += 1
        # The grid point at or before now may still be begun; those before it can't.
        latest = int((now - self._start) / self._interval)
        if latest > self._number:
            self.late += latest - self._number
            self._number = latest
        return max(self.due - now, 0.0)

    def missed(self, now: float) -> int:
        """Number of ticks that the one in progress has cost so far."""
        return max(int((now - self.due) / self._interval), 0)
