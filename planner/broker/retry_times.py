"""Times after which refused clients are told to ask again, so that their retries cost the planner little."""

from __future__ import annotations

import random
from typing import Final

LEAST_SECONDS: Final = 1.0
MOST_SECONDS: Final = 30.0
"""Limit on the base of a time; with its jitter it may be half as much again."""
_MANY: Final = 500
"""Refusals a second that are too many: a refusal takes about 0.1 ms of processor time."""
_WINDOW_SECONDS: Final = 1.0


class RetryTimes:
    """Doubles the time after a second with many refusals, and halves it after one with few."""

    def __init__(self) -> None:
        self._base = LEAST_SECONDS
        self._window_began = 0.0
        self._refused = 0

    def next_seconds(self, now: float) -> float:
        """Time after which the client of one more refused request is to ask again, with jitter.

        Args:
            now: seconds, by a monotonic clock.
        """
        windows = int((now - self._window_began) / _WINDOW_SECONDS)
        if windows:
            if self._refused > _MANY * _WINDOW_SECONDS:
                self._base *= 2
                windows -= 1
            elif self._refused > _MANY / 4 * _WINDOW_SECONDS:
                windows -= 1
            self._base = min(MOST_SECONDS, max(LEAST_SECONDS, self._base / 2 ** min(windows, 10)))
            self._window_began, self._refused = now, 0
        self._refused += 1
        return round(self._base * random.uniform(1.0, 1.5), 3)
