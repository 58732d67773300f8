"""Samples of a partition that are stored, and in no written rollup yet: pure state, and the choice of closed minutes.

The unit is the minute of a device, named by one number (`minute_keys`). Its samples are in memory; or only the key is
*noted*, and its samples are read from the lake. A minute is closed once its device has a sample in a later one, or once
no sample has come into it for `QUIET_SECONDS`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import pyarrow as pa
from msgspec import Struct
from numpy.typing import NDArray

from ..bucketing import among, data_of
from ..protocol import ArrowTable

Numbers = NDArray[np.int64]

QUIET_SECONDS: Final = 120.0
MINUTE_US: Final = 60_000_000
_BITS: Final = 32
_MASK: Final = (1 << _BITS) - 1
_NEVER: Final = np.iinfo(np.int64).max
NO_KEYS: Final[Numbers] = np.zeros(0, dtype=np.int64)


def minute_keys(series: NDArray[Any], minute: Numbers) -> Numbers:
    """One number for each device and minute (or hour) since the epoch, in their order."""
    return (series.astype(np.int64) << _BITS) | minute


def series_of(keys: Numbers) -> Numbers:
    """Devices of keys."""
    return keys >> _BITS


def minutes_of(keys: Numbers) -> Numbers:
    """Minutes (or hours) of keys."""
    return keys & _MASK


class _Chunk(Struct):
    """Samples that came together.

    Attributes:
        table: `us`, `series`, and the metrics that have a value.
        keys: of each row.
        distinct: the keys, each once, in order.
        snapshot: they were committed after it.
        came: when, on the monotonic clock.
        number: counts what came, in order.
    """

    table: ArrowTable
    keys: Numbers
    distinct: Numbers
    snapshot: int
    came: float
    number: int = 0


class _Noted(Struct):
    """Keys whose samples are read from the lake; see `_Chunk`."""

    distinct: Numbers
    snapshot: int
    came: float
    number: int = 0


class Closed(Struct, frozen=True):
    """Minutes that are to be written.

    Attributes:
        keys: in order.
        noted: those of which not all samples are in memory.
        upto: number of what had come by then: what has come since is not meant.
    """

    keys: Numbers
    noted: Numbers
    upto: int


class Unwritten:
    """Samples and keys that are to be rolled up. `add` may be called from any thread, all else from one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: list[_Chunk] = []
        self._noted: list[_Noted] = []
        self._count = 0

    @property
    def bytes(self) -> int:
        """Approximate memory of the samples."""
        with self._lock:
            return sum(chunk.table.nbytes + chunk.keys.nbytes for chunk in self._chunks)

    def snapshot_without(self, keys: Numbers, upto: int) -> int | None:
        """Greatest snapshot before all that is left once some minutes are `written`; None if nothing is."""
        with self._lock:
            return min(
                (
                    each.snapshot
                    for each in (*self._chunks, *self._noted)
                    if each.number > upto or not among(each.distinct, keys).all()
                ),
                default=None,
            )

    def add(self, samples: ArrowTable, snapshot: int, now: float) -> None:
        """Add samples that have been committed.

        Args:
            samples: as in `Batch.samples`.
            snapshot: that the transaction began with.
            now: on the monotonic clock.
        """
        rows = samples.num_rows
        columns = {"us": samples["time"].cast(pa.int64()), "series": samples["series"]}
        for name in samples.column_names:
            if name not in ("time", "series", "batch") and samples[name].null_count < rows:
                columns[name] = samples[name]
        table = pa.table(columns)
        keys = minute_keys(data_of(table["series"]), data_of(table["us"]) // MINUTE_US)
        chunk = _Chunk(table, keys, np.unique(keys), snapshot, now)
        with self._lock:
            self._count += 1
            chunk.number = self._count
            self._chunks.append(chunk)

    def note(self, keys: Numbers, snapshot: int, now: float) -> None:
        """Add minutes whose samples are in the lake, but not all of them here."""
        if len(keys):
            with self._lock:
                self._count += 1
                self._noted.append(_Noted(np.unique(keys), snapshot, now, self._count))

    def forget_samples(self) -> None:
        """Keep only the keys of what is in memory."""
        with self._lock:
            chunks, self._chunks = self._chunks, []
            self._noted += [_Noted(chunk.distinct, chunk.snapshot, chunk.came, chunk.number) for chunk in chunks]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._chunks, self._noted = [], []

    def closed(self, now: float, everything: bool = False) -> Closed:
        """Minutes that are closed, or all."""
        with self._lock:
            parts: list[_Chunk | _Noted] = [*self._chunks, *self._noted]
            noted = _joined(each.distinct for each in self._noted)
            upto = self._count
        keys, index = np.unique(np.concatenate([NO_KEYS, *(part.distinct for part in parts)]), return_inverse=True)
        if not len(keys):
            return Closed(keys, noted, upto)
        if not everything:
            came = np.full(len(keys), -np.inf)
            times = np.repeat([part.came for part in parts], [len(part.distinct) for part in parts])
            np.maximum.at(came, index, times)
            # In order, so the last key of each device is its newest minute.
            is_newest = np.append(series_of(keys[1:]) != series_of(keys[:-1]), True)
            keys = keys[~is_newest | (came + QUIET_SECONDS <= now)]
        return Closed(keys, noted[among(noted, keys)], upto)

    def samples(self, keys: Numbers, upto: int) -> ArrowTable | None:
        """Samples in memory of some minutes; None if there are none."""
        with self._lock:
            chunks = [chunk for chunk in self._chunks if chunk.number <= upto]
        found: list[ArrowTable] = []
        for chunk in chunks:
            chosen = among(chunk.distinct, keys)
            if chosen.all():
                found.append(chunk.table)
            elif chosen.any():
                found.append(chunk.table.filter(pa.array(among(chunk.keys, keys))))
        return pa.concat_tables(found, promote_options="default").combine_chunks() if found else None

    def written(self, keys: Numbers, upto: int) -> None:
        """Drop minutes that have been written, but not what has come into them since."""
        with self._lock:
            chunks: list[_Chunk] = []
            for chunk in self._chunks:
                chosen = among(chunk.distinct, keys)
                if chunk.number > upto or not chosen.any():
                    chunks.append(chunk)
                elif not chosen.all():
                    left = ~among(chunk.keys, keys)
                    table = chunk.table.filter(pa.array(left))
                    kept = chunk.distinct[~chosen]
                    chunks.append(_Chunk(table, chunk.keys[left], kept, chunk.snapshot, chunk.came, chunk.number))
            self._chunks = chunks
            noted: list[_Noted] = []
            for each in self._noted:
                kept = each.distinct if each.number > upto else each.distinct[~among(each.distinct, keys)]
                if len(kept):
                    noted.append(_Noted(kept, each.snapshot, each.came, each.number))
            self._noted = noted


class Stored:
    """Knowledge of which minutes have a stored rollup.

    Of each device it is known from one minute on: its *floor*. Minutes before must be looked up.
    """

    def __init__(self) -> None:
        self._floor = NO_KEYS
        self._last = NO_KEYS
        self._keys = NO_KEYS

    def forget(self) -> None:
        """Forget everything, after a write of which it is not known if it took place."""
        self._floor = self._last = self._keys = NO_KEYS

    def unknown(self, keys: Numbers) -> Numbers:
        """Those of some keys that must be looked up."""
        self._make_room(keys)
        return keys[minutes_of(keys) < self._floor[series_of(keys)]]

    def learn(self, asked: Numbers, first: int, found: Numbers) -> None:
        """Record that of some devices, from a minute on, exactly the minutes found are stored."""
        devices = np.unique(series_of(asked))
        self._floor[devices] = np.minimum(self._floor[devices], first)
        self._keys = np.union1d(self._keys, found)

    def among(self, keys: Numbers) -> NDArray[np.bool_]:
        """True for each key that is stored; none may be unknown."""
        return among(keys, self._keys)

    def newest(self, count: int) -> Numbers:
        """Newest stored minute of each device that is known; -1 for none."""
        found = np.full(count, -1, dtype=np.int64)
        series = series_of(self._keys)
        known = series < count
        # In order: the last that is assigned is the newest.
        found[series[known]] = minutes_of(self._keys[known])
        return found

    def add(self, keys: Numbers) -> None:
        """Record minutes that have been written now, and raise the floor of their devices.

        It is raised to the newest minute that was written before, or now if that is earlier. So a single sample far
        ahead does not raise it above the usual minutes.
        """
        if not len(keys):
            return
        self._make_room(keys)
        series, minutes = series_of(keys), minutes_of(keys)
        is_last = np.append(series[1:] != series[:-1], True)
        devices, newest = series[is_last], minutes[is_last]
        before = self._last[devices]
        raised = np.where(before >= 0, np.minimum(before, newest), -1)
        known = self._floor[devices] != _NEVER
        self._floor[devices[known]] = np.maximum(self._floor[devices], raised)[known]
        self._last[devices] = newest
        self._keys = np.union1d(self._keys, keys)
        self._keys = self._keys[minutes_of(self._keys) >= self._floor[series_of(self._keys)]]

    def _make_room(self, keys: Numbers) -> None:
        count = int(series_of(keys).max()) + 1 if len(keys) else 0
        more = count - len(self._floor)
        if more > 0:
            more = max(more, len(self._floor))
            self._floor = np.append(self._floor, np.full(more, _NEVER, dtype=np.int64))
            self._last = np.append(self._last, np.full(more, -1, dtype=np.int64))


def _joined(parts: Iterable[Numbers]) -> Numbers:
    return np.unique(np.concatenate([NO_KEYS, *parts]))
