"""Samples in buckets, for numpy: their order by device and time, and the values of a column in each bucket.

Each bucket is a run of rows. Runs of one length are gathered into a matrix, a column each, so that an aggregate is a
reduction over whole rows of it. The few runs of other lengths, and values among nulls, are reduced run by run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .protocol import ArrowTable

if TYPE_CHECKING:
    from .rollup_columns import Level

Array: TypeAlias = NDArray[Any]
Indexes: TypeAlias = NDArray[np.int64]
ArrowArray: TypeAlias = Any
Which: TypeAlias = Indexes | slice

ARROW_TYPES: Final = {
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "UINTEGER": pa.uint32(),
}
_SERIES_BITS: Final = 21
_TIME_BITS: Final = 42
"""Bits of a sort key: 2 million devices, and 50 days in microseconds."""
_FEW_RUNS: Final = 64
"""Runs of one length, below which they get no matrix of their own."""


class Samples:
    """Samples in any order, with their order by device and time.

    Args:
        table: `us` (time in microseconds since the epoch), `series`, and a column for each metric.

    Attributes:
        times: in microseconds, in the order of device and time.
        series: numbers of devices, in that order.
    """

    def __init__(self, table: ArrowTable) -> None:
        self._table = table
        times, series = data_of(table["us"]), data_of(table["series"])
        self._order = _order(times, series)
        if self._order is not None:
            times, series = times[self._order], series[self._order]
        self.times: Indexes = times
        self.series: Array = series
        self._columns: dict[str, tuple[Array, NDArray[np.bool_] | None]] = {}

    @property
    def names(self) -> list[str]:
        """Columns of the table."""
        return self._table.column_names

    def column(self, name: str) -> tuple[Array, NDArray[np.bool_] | None]:
        """Values in the order of the table, and which are not null; None if all are."""
        found = self._columns.get(name)
        if found is None:
            array = _one_chunk(self._table[name])
            valid = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None
            found = self._columns[name] = (data_of(array), valid)
        return found

    def places(self, rows: Indexes) -> Indexes:
        """Places in the table of rows in the order of device and time."""
        return rows if self._order is None else self._order[rows]


class Buckets(NamedTuple):
    """Buckets of a level, each a run of rows.

    Attributes:
        number: time of each by number: microseconds since the epoch, divided by the level's width.
        series: device of each.
        starts: first row of each in the order of device and time.
        lengths: number of rows of each, at least 1.
    """

    number: Indexes
    series: Array
    starts: Indexes
    lengths: Indexes

    def take(self, which: Array) -> Buckets:
        """Some of them, in another order if indexes say so."""
        return Buckets(self.number[which], self.series[which], self.starts[which], self.lengths[which])


def data_of(column: ArrowArray) -> Array:
    """Data of an Arrow array of numbers, without a copy if it is one chunk; undefined where it is null."""
    array = _one_chunk(column)
    dtype = array.type.to_pandas_dtype()
    if not len(array):
        return np.zeros(0, dtype=dtype)
    return np.frombuffer(array.buffers()[1], dtype=dtype, count=len(array), offset=array.offset * dtype().itemsize)


def _one_chunk(column: ArrowArray) -> ArrowArray:
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)


def among(keys: Indexes, wanted: Indexes) -> NDArray[np.bool_]:
    """True for each key that is among others, both in order."""
    if len(keys) == len(wanted) and bool((keys == wanted).all()):
        return np.ones(len(keys), dtype=np.bool_)
    if not len(wanted):
        return np.zeros(len(keys), dtype=np.bool_)
    at = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
    return wanted[at] == keys


def buckets(samples: Samples, level: Level) -> Buckets:
    """Buckets of a level, in the order of device and time."""
    rows = len(samples.times)
    if not rows:
        none = np.zeros(0, dtype=np.int64)
        return Buckets(none, samples.series, none, none)
    numbers = samples.times // (level.seconds * 1_000_000)
    begins = np.empty(rows, dtype=np.bool_)
    begins[0] = True
    np.not_equal(numbers[1:], numbers[:-1], out=begins[1:])
    begins[1:] |= samples.series[1:] != samples.series[:-1]
    starts = np.flatnonzero(begins)
    return Buckets(numbers[starts], samples.series[starts], starts, np.diff(starts, append=rows))


def _order(times: Indexes, series: Array) -> Indexes | None:
    """Order of rows by device and time; None if they are in it."""
    if not len(times):
        return None
    first, greatest = int(times.min()), int(series.max())
    if int(times.max()) - first >= 1 << _TIME_BITS or greatest >= 1 << _SERIES_BITS or int(series.min()) < 0:
        return np.lexsort((times, series))
    keys = (series.astype(np.int64) << _TIME_BITS) | (times - first)
    if bool((keys[1:] >= keys[:-1]).all()):
        return None
    return np.argsort(keys)


class Runs:
    """Places of the rows of buckets: matrices for the usual lengths, and a list of the others.

    Attributes:
        lengths: number of rows of each bucket.
        matrices: for each usual length, which buckets have it, and the places of their rows, a column for each bucket.
        rest: the other buckets.
        rest_places: places of their rows, one bucket after the other.
        rest_starts: where each begins in these.
    """

    def __init__(self, samples: Samples, found: Buckets) -> None:
        self._samples = samples
        self._found = found
        self.lengths = found.lengths
        self.matrices: list[tuple[Which, Indexes]] = []
        lengths, counts = np.unique(found.lengths, return_counts=True)
        rest = np.ones(len(found.lengths), dtype=np.bool_)
        for length in lengths[(counts >= _FEW_RUNS) | (len(lengths) == 1)].tolist():
            same = found.lengths == length
            rest &= ~same
            which = slice(None) if len(lengths) == 1 else np.flatnonzero(same)
            rows = found.starts[which][None, :] + np.arange(length)[:, None]
            self.matrices.append((which, samples.places(rows)))
        self.rest = np.flatnonzero(rest)
        self.rest_places = samples.places(_ranges(found.starts[self.rest], found.lengths[self.rest]))
        self.rest_starts = _starts(found.lengths[self.rest])
        self._places: Indexes | None = None

    @property
    def places(self) -> Indexes:
        """Places of all rows, one bucket after the other."""
        if self._places is None:
            self._places = self._samples.places(_ranges(self._found.starts, self._found.lengths))
        return self._places


class Values:
    """Values of a metric in buckets.

    Args:
        runs: places of the rows of the buckets.
        data: values by place.
        valid: which are not null; None if all are.

    Attributes:
        buckets: number of buckets.
        there: buckets that have any value; None if all have.
        lengths: number of values of each of these.
    """

    def __init__(self, runs: Runs, data: Array, valid: NDArray[np.bool_] | None) -> None:
        self.buckets = len(runs.lengths)
        self.there: NDArray[np.bool_] | None = None
        self.lengths = runs.lengths
        self._matrices: list[tuple[Which, Array]] = []
        if valid is None:
            self._matrices = [(which, data[places]) for which, places in runs.matrices]
            self._rest: Which = runs.rest if self._matrices else slice(None)
            self._values, self._starts = data[runs.rest_places], runs.rest_starts
            return
        valid = valid[runs.places]
        lengths = np.add.reduceat(valid, _starts(runs.lengths), dtype=np.int64) if self.buckets else runs.lengths
        self.there = lengths > 0
        self.lengths = lengths[self.there]
        self._rest = slice(None)
        self._values, self._starts = data[runs.places][valid], _starts(self.lengths)

    def __len__(self) -> int:
        """Number of buckets with a value."""
        return len(self.lengths)

    def reduce(self, function: np.ufunc, dtype: Any = None) -> Array:
        """Aggregate of each bucket that has a value."""
        return self._joined(
            [(which, function.reduce(matrix, axis=0, dtype=dtype)) for which, matrix in self._matrices],
            function.reduceat(self._values, self._starts, dtype=dtype) if len(self._starts) else self._values[:0],
        )

    def first(self) -> Array:
        """First value of each bucket that has one."""
        return self._joined([(which, matrix[0]) for which, matrix in self._matrices], self._values[self._starts])

    def last(self) -> Array:
        """Last value of each bucket that has one."""
        lasts = np.append(self._starts[1:], len(self._values))[: len(self._starts)] - 1
        return self._joined([(which, matrix[-1]) for which, matrix in self._matrices], self._values[lasts])

    def fell(self) -> NDArray[np.bool_]:
        """True for each bucket with a value that has one below the one before it."""
        values = self._values
        fell = np.zeros(len(values), dtype=np.bool_)
        np.less(values[1:], values[:-1], out=fell[1:])
        fell[self._starts] = False
        return self._joined(
            [(which, (matrix[1:] < matrix[:-1]).any(axis=0)) for which, matrix in self._matrices],
            np.logical_or.reduceat(fell, self._starts) if len(self._starts) else fell,
        )

    def by_length(self, chosen: NDArray[np.bool_]) -> list[tuple[Indexes, Array]]:
        """Chosen ones of the buckets with a value, as matrices of a row each; one matrix for each length."""
        found: list[tuple[Indexes, Array]] = []
        for which, matrix in self._matrices:
            among = chosen[which]
            if among.any():
                index = np.flatnonzero(among) if isinstance(which, slice) else which[among]
                found.append((index, np.ascontiguousarray(matrix[:, among].T)))
        lengths, index = self.lengths[self._rest], np.arange(len(self.lengths))[self._rest]
        if not len(self._starts):
            return found
        for length in np.unique(lengths[chosen[index]]).tolist():
            same = np.flatnonzero((lengths == length) & chosen[index])
            found.append((index[same], self._values[self._starts[same][:, None] + np.arange(length)]))
        return found

    def column(self, found: Array, kind: str) -> ArrowArray:
        """Column of all buckets from an aggregate of those that have a value; the others are null."""
        target = ARROW_TYPES[kind]
        if self.there is None:
            return pa.array(found, type=target)
        return pa.array(self.spread(found), type=target, mask=~self.there)

    def counts(self) -> ArrowArray:
        """Number of values of each bucket, 0 where there is none."""
        return pa.array(self.spread(self.lengths), type=pa.uint32())

    def spread(self, found: Array) -> Array:
        """Aggregate of all buckets, 0 where there is no value."""
        if self.there is None:
            return found
        full = np.zeros(self.buckets, dtype=found.dtype)
        full[self.there] = found
        return full

    def _joined(self, parts: Sequence[tuple[Which, Any]], rest: Array) -> Array:
        if not parts:
            return rest
        if len(parts) == 1 and isinstance(parts[0][0], slice):
            return parts[0][1]
        out = np.empty(len(self.lengths), dtype=parts[0][1].dtype)
        for which, part in parts:
            out[which] = part
        out[self._rest] = rest
        return out


def _starts(lengths: Indexes) -> Indexes:
    return np.cumsum(lengths) - lengths


def _ranges(starts: Indexes, lengths: Indexes) -> Indexes:
    """Numbers of all ranges, one after the other."""
    if not len(starts):
        return np.zeros(0, dtype=np.int64)
    return np.repeat(starts - _starts(lengths), lengths) + np.arange(int(lengths.sum()))
