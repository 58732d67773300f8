"""Start times of counters, by the rules for cumulative sums in OpenTelemetry's data model.

A counter that is seen for the first time has counted since an unknown time: its start is the time of that first point.
A value that falls was reset: it has counted since the point before. Misread values are filtered out before
(`exporter/counters.py`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

_FORGET_ROUNDS: Final = 100
"""Rounds without a value after which a counter is forgotten; it starts anew after that."""


class _Seen:
    __slots__ = ("round", "start_ns", "time_ns", "value")

    def __init__(self, value: float, time_ns: int, round: int) -> None:
        self.start_ns = self.time_ns = time_ns
        self.value = value
        self.round = round


class Starts:
    """Start times of all counters that are sent."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, _Seen] = {}
        self._round = 0

    def __len__(self) -> int:
        return len(self._seen)

    def start_ns(self, key: Hashable, value: float, time_ns: int) -> int:
        """Start time of a counter's point, in nanoseconds since the epoch.

        Args:
            key: the counter: host, name and attributes.
            value: its value; for a histogram the number of observations.
            time_ns: when it was read.
        """
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = _Seen(value, time_ns, self._round)
            return seen.start_ns
        if value < seen.value:
            seen.start_ns = min(seen.time_ns, time_ns)
        elif time_ns < seen.start_ns:  # the clock was set back
            seen.start_ns = time_ns
        seen.value, seen.time_ns, seen.round = value, time_ns, self._round
        return seen.start_ns

    def end_round(self) -> None:
        """Note that all values of one time are through, and forget counters that no longer come."""
        self._round += 1
        if self._round % _FORGET_ROUNDS == 0:
            self._seen = {key: seen for key, seen in self._seen.items() if seen.round >= self._round - _FORGET_ROUNDS}
