"""When to read: a grid of times that never drifts, and what to do when one is missed."""

from __future__ import annotations


class Pace:
    """Tick k is due at `start + k * interval`, so that errors never add up.

    A tick that is not begun by the time the next one is due is late: it is skipped and counted, never made up for.

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
        """When the next tick is due."""
        return self._start + self._number * self._interval

    def next(self, now: float) -> float:
        """A tick has ended; returns how long to wait for the next."""
        self._number += 1
        # The grid point at or before now may still be begun; those before it can't.
        latest = int((now - self._start) / self._interval)
        if latest > self._number:
            self.late += latest - self._number
            self._number = latest
        return max(self.due - now, 0.0)

    def missed(self, now: float) -> int:
        """Ticks that one which is still being read has cost so far."""
        return max(int((now - self.due) / self._interval), 0)
