"""Times after which refused clients are told to ask again: one after the other, as fast as they can be taken."""

from __future__ import annotations

import random
from typing import Final

LEAST_SECONDS: Final = 1.0
MOST_SECONDS: Final = 300.0
"""Limit on a time: the estimate may be wrong."""
EXPECTED_RATE: Final = 200.0
LEAST_RATE: Final = 50.0
"""Refused clients that are let come back each second at least: a refusal takes about 0.1 ms of processor time."""
_WINDOW_SECONDS: Final = 0.5
_APART_SECONDS: Final = 2.0
"""Refusals that are further apart are of different times of overload."""
_EARLIEST: Final = 0.7
"""Clients come back at random between this part of their time and all of it, since some do not: a fifth too many."""


class RetryTimes:
    """Gives each refused client a time of its own, so that not all ask again at once, nor too late for what is free.

    Args:
        rate: clients that are expected to be taken each second, until that is measured.
    """

    def __init__(self, rate: float = EXPECTED_RATE) -> None:
        self._rate = rate
        self._taken = 0
        self._window_began = 0.0
        self._refused_at = 0.0
        self._last = 0.0
        """Time that the last refused client was given."""

    def note_taken(self) -> None:
        """Note that a client was not refused: so many are taken."""
        self._taken += 1

    def next_seconds(self, now: float) -> float:
        """Time after which the client of one more refused request is to ask again, with jitter.

        Args:
            now: seconds, by a monotonic clock.
        """
        if now - self._refused_at > _APART_SECONDS:
            self._window_began, self._taken = now, 0
        elif now - self._window_began >= _WINDOW_SECONDS:
            measured = self._taken / (now - self._window_began)
            self._rate = max(LEAST_RATE, (self._rate + measured) / 2)
            self._window_began, self._taken = now, 0
        self._refused_at = now
        self._last = min(max(self._last + 1 / self._rate, now + LEAST_SECONDS / _EARLIEST), now + MOST_SECONDS)
        return round((self._last - now) * random.uniform(_EARLIEST, 1.0), 3)
