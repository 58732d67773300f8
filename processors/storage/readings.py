"""Last readings of counters, kept between refreshes, so that most growth is a difference of two numbers.

A counter that only rises grows in a bucket by the difference of the last reading in it and the last one before it. All
else is left to `growth.py`: counters that fall or jump, buckets near such ones, samples that are late, and devices
whose readings are not known here yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ...schemas.metrics import Metric
from .bucketing import Buckets
from .folding import Grown
from .growth import max_per_minute
from .rollup_columns import FELL

Array: TypeAlias = NDArray[Any]

_MINUTE: Final = 60_000_000
_NONE: Final = -1
"""Minute of a reading: there has been none."""
_UNSEEN: Final = -2
"""Minute of a reading that has not been looked up: the device had none in its newest bucket."""
_UNKNOWN: Final = np.iinfo(np.int64).min


class _Reading(Struct):
    """Readings of one counter, by the number of the device; minutes may be `_NONE` or `_UNSEEN`.

    Attributes:
        before: the last one before the device's newest bucket.
        before_minute: its minute.
        last: the last one.
        last_minute: its minute.
    """

    before: Array
    before_minute: Array
    last: Array
    last_minute: Array

    def arrays(self) -> list[Array]:
        """All of them."""
        return [self.before, self.before_minute, self.last, self.last_minute]


class Growth(Struct):
    """Growth of counters in buckets.

    Attributes:
        increases: of each counter by the metric's name, for each bucket; undefined where it has no reading, and where
            `settled` is false.
        settled: buckets of devices whose growth is known.
    """

    increases: dict[str, Array]
    settled: NDArray[np.bool_]


class Readings:
    """Last readings of one level's counters.

    Args:
        width: of a bucket, in microseconds.
        reach: distance in which an odd bucket affects others, in microseconds; see `growth.Tables`.
    """

    def __init__(self, width: int, reach: int) -> None:
        self._width = width
        self._reach = reach
        self._newest = np.zeros(0, dtype=np.int64)
        """Newest bucket of each device by number; `_UNKNOWN` if what is kept of it is not valid."""
        self._counters: dict[str, _Reading] = {}

    def forget(self) -> None:
        """Forget all readings, since the stored rows have changed otherwise."""
        self._newest[:] = _UNKNOWN

    def growth(self, counters: Sequence[Metric], buckets: Buckets, grown: Mapping[str, Grown]) -> Growth:
        """Compute the growth of counters, and remember the last readings of devices that are settled.

        What is remembered is only valid once the buckets are stored: call `forget` if that fails.

        Args:
            counters: that the level has.
            buckets: of a refresh, in the order of device and time, those of a device complete from the first that
                changes.
            grown: readings of each counter in these buckets.
        """
        count = len(buckets.series)
        if not count:
            return Growth({}, np.zeros(0, dtype=np.bool_))
        series = buckets.series.astype(np.int64)
        self._make_room(counters, int(series.max()) + 1)
        begins = np.ones(count, dtype=np.bool_)
        begins[1:] = series[1:] != series[:-1]
        firsts = np.flatnonzero(begins)
        lasts = np.append(firsts[1:], count) - 1
        device = np.cumsum(begins) - 1
        devices = series[firsts]
        newest = self._newest[devices]
        settled = (newest != _UNKNOWN) & (buckets.number[firsts] >= newest)
        minutes = buckets.number * self._width // _MINUTE
        increases: dict[str, Array] = {}
        changed: list[tuple[_Reading, list[Array]]] = []
        for metric in counters:
            kept, found = self._counters[metric.name], grown[metric.name]
            # With the bucket that was the newest, what came before that one counts.
            again = buckets.number[firsts] == newest
            base = np.where(again, kept.before[devices], kept.last[devices])
            base_minute = np.where(again, kept.before_minute[devices], kept.last_minute[devices])
            before, before_minute, last, last_minute = _linked(found, minutes, device, firsts, base, base_minute)
            step = np.where(before_minute < 0, 0, found.first - before)
            odd = (before_minute == _UNSEEN) | (found.inner == FELL) | (step < 0) | (found.first < 0)
            if (most := max_per_minute(metric)) is not None:
                odd |= (found.inner > most) | (step > most * (1 + minutes - np.maximum(before_minute, 0)))
            if found.there is not None:
                odd &= found.there
            if odd.any():
                settled &= ~np.logical_or.reduceat(odd, firsts)
            increases[metric.name] = found.inner + step
            changed.append((kept, [before[lasts], before_minute[lasts], last[lasts], last_minute[lasts]]))
        known = devices[settled]
        self._newest[devices[~settled]] = _UNKNOWN
        self._newest[known] = buckets.number[lasts[settled]]
        for kept, values in changed:
            for array, new in zip(kept.arrays(), values, strict=True):
                array[known] = new[settled]
        return Growth(increases, settled[device])

    def learn(self, counters: Sequence[Metric], rows: Mapping[str, Array]) -> None:
        """Remember the last readings of devices from their stored rows.

        Args:
            counters: that the level has.
            rows: one for each device: `series`, its newest `bucket`, the time until which it is `odd` in microseconds,
                and `…_before`, `…_minute`, `…_last` of each counter, masked where there is none. What is before a
                bucket without readings is only known if it was nearby.
        """
        calm = rows["odd"] + self._reach <= rows["bucket"] * self._width
        series = rows["series"][calm].astype(np.int64)
        if not len(series):
            return
        self._make_room(counters, int(series.max()) + 1)
        bucket = rows["bucket"][calm]
        self._newest[series] = bucket
        for metric in counters:
            kept = self._counters[metric.name]
            before, minute, last = (rows[f"{metric.name}_{part}"][calm] for part in ("before", "minute", "last"))
            there = ~np.ma.getmaskarray(last)
            minute = np.where(np.ma.getmaskarray(minute), np.where(there, _NONE, _UNSEEN), np.ma.filled(minute, 0))
            kept.before[series], kept.before_minute[series] = np.ma.filled(before, 0), minute
            kept.last[series] = np.where(there, np.ma.filled(last, 0), np.ma.filled(before, 0))
            kept.last_minute[series] = np.where(there, bucket * self._width // _MINUTE, minute)

    def _make_room(self, counters: Sequence[Metric], count: int) -> None:
        """Have arrays for as many devices, and for all counters."""
        have = len(self._newest)
        if count > have:
            more = max(count, 2 * have) - have
            self._newest = np.append(self._newest, np.full(more, _UNKNOWN))
            for kept in self._counters.values():
                kept.before, kept.last = (
                    np.append(part, np.zeros(more, np.int64)) for part in (kept.before, kept.last)
                )
                kept.before_minute, kept.last_minute = (
                    np.append(part, np.full(more, _UNSEEN)) for part in (kept.before_minute, kept.last_minute)
                )
        for metric in counters:
            if metric.name not in self._counters:
                size = len(self._newest)
                zeros, unseen = np.zeros(size, np.int64), np.full(size, _UNSEEN)
                self._counters[metric.name] = _Reading(zeros, unseen, zeros.copy(), unseen.copy())


def _linked(
    found: Grown, minutes: Array, device: Array, firsts: Array, base: Array, base_minute: Array
) -> tuple[Array, Array, Array, Array]:
    """Last reading before each bucket and up to its end, each with its minute: of the bucket before, or the base."""
    count = len(minutes)
    rows = np.arange(count)
    upto = rows if found.there is None else np.maximum.accumulate(np.where(found.there, rows, -1))
    earlier = np.empty(count, dtype=np.int64)
    earlier[0], earlier[1:] = -1, upto[:-1]
    start = firsts[device]

    def of(place: Array) -> tuple[Array, Array]:
        inside = place >= start
        value = np.where(inside, found.last[place], base[device])
        return value, np.where(inside, minutes[place], base_minute[device])

    return (*of(earlier), *of(upto))
