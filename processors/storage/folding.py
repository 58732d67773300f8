"""Aggregates of samples in buckets, computed in numpy: those of `rollup_columns.from_raw`, in a fraction of its time.

Samples are sorted by device and time. Then each bucket is a run of rows, and each aggregate a reduction over runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...schemas.metrics import Metric
from .protocol import ArrowTable
from .rollup_columns import BIN_RATIO, FELL, ZERO_BIN, Level, binned, columns, is_linear
from .rollup_derived import CLOCKS, KNOWN, MASK, REASONS

Array: TypeAlias = NDArray[Any]
ArrowArray: TypeAlias = Any

_TIME: Final = pa.timestamp("us", "UTC")
_ARROW: Final = {
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "UINTEGER": pa.uint32(),
}
_SCALE: Final = 1 / math.log(BIN_RATIO)
_SERIES_BITS: Final = 21
_TIME_BITS: Final = 42
"""Bits of a sort key: 2 million devices, and 50 days in microseconds."""


class Folded(NamedTuple):
    """Rows of a level, and the counts in bins where the level keeps them.

    Attributes:
        rows: time, series, and the columns of the level, in the order of series and time.
        bins: time, series, metric (its number), bin and n.
        rows_of_bins: index of the row that each of these belongs to.
    """

    rows: ArrowTable
    bins: ArrowTable | None
    rows_of_bins: NDArray[np.int64]


class _Runs(NamedTuple):
    """Runs of rows, of which each is a bucket of a device.

    Attributes:
        starts: index of the first row of each.
        lengths: number of rows of each, at least 1.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def lasts(self) -> NDArray[np.int64]:
        """Index of the last row of each."""
        return self.starts + self.lengths - 1


class _Values(NamedTuple):
    """Values of a metric that are not null, in the order of the rows.

    Attributes:
        values: in runs.
        runs: those that have any value.
        there: which of all buckets these are; None for all of them.
        buckets: number of all buckets.
    """

    values: Array
    runs: _Runs
    there: NDArray[np.bool_] | None
    buckets: int

    def column(self, found: Array, kind: str) -> ArrowArray:
        """Column of all buckets from an aggregate of those that have a value; the others are null."""
        target = _ARROW[kind]
        if self.there is None:
            return pa.array(found, type=target)
        full = np.zeros(self.buckets, dtype=found.dtype)
        full[self.there] = found
        return pa.array(full, type=target, mask=~self.there)

    def counts(self) -> ArrowArray:
        """Number of values of each bucket, 0 where there is none."""
        if self.there is None:
            return pa.array(self.runs.lengths, type=pa.uint32())
        full = np.zeros(self.buckets, dtype=np.int64)
        full[self.there] = self.runs.lengths
        return pa.array(full, type=pa.uint32())


def fold(samples: ArrowTable, metrics: Sequence[Metric], level: Level, numbers: Mapping[str, int]) -> Folded:
    """Aggregate samples into buckets.

    Args:
        samples: `us` (time in microseconds since the epoch), `series`, and a column for each metric; in any order.
        metrics: to aggregate, in the order of the columns.
        level: whose buckets they are.
        numbers: of the metrics in bins.
    """
    times, series = _integers(samples["us"]), _integers(samples["series"])
    order = _order(times, series)
    if order is not None:
        times, series = times[order], series[order]
    buckets = times // (level.seconds * 1_000_000)
    runs = _runs((series[1:] != series[:-1]) | (buckets[1:] != buckets[:-1]), len(times))
    at = pa.array(buckets[runs.starts] * (level.seconds * 1_000_000), type=pa.int64()).cast(_TIME)
    devices = pa.array(series[runs.starts], type=pa.int32())
    found: dict[str, ArrowArray] = {"time": at, "series": devices, "samples": pa.array(runs.lengths, type=pa.uint32())}
    bins: list[tuple[Array, Array, Array, int]] = []
    counted = {metric.name for metric in binned(metrics)} if level.bins else set[str]()
    for metric in metrics:
        values = _values(samples[metric.name], order, runs)
        if metric.name in counted:
            p95, which, bin_of, n = _sorted_bins(metric, values)
            bins.append((which, bin_of, n, numbers[metric.name]))
        else:
            p95 = None
        found |= _aggregates(metric, values, p95)
        if metric.name == MASK:
            found |= _throttled(samples, order, runs)
    if level.bins:
        found[KNOWN] = _known(times, runs)
    names = columns(metrics, level)
    rows = pa.table(
        [found["time"], found["series"], *(found[name] for name, _ in names)],
        names=["time", "series", *(name for name, _ in names)],
    )
    which = np.concatenate([part[0] for part in bins]) if bins else np.zeros(0, dtype=np.int64)
    return Folded(rows, _bins_table(bins, which, at, devices) if level.bins else None, which)


def _order(times: NDArray[np.int64], series: NDArray[np.int64]) -> NDArray[np.int64] | None:
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


def _runs(begins: NDArray[np.bool_], rows: int) -> _Runs:
    """Runs of rows, where the second and further rows are flagged that begin one."""
    if not rows:
        return _Runs(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.flatnonzero(begins) + 1))
    return _Runs(starts, np.diff(starts, append=rows))


def _integers(column: Any) -> Array:
    return _data(column.combine_chunks())


def _data(array: Any) -> Array:
    """Data of an Arrow array of numbers, without a copy; undefined where it is null."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    dtype = array.type.to_pandas_dtype()
    if not len(array):
        return np.zeros(0, dtype=dtype)
    return np.frombuffer(array.buffers()[1], dtype=dtype, count=len(array), offset=array.offset * dtype().itemsize)


def _values(column: Any, order: NDArray[np.int64] | None, runs: _Runs) -> _Values:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    count = len(runs.starts)
    data = _data(array)
    if not array.null_count:
        return _Values(data if order is None else data[order], runs, None, count)
    valid: NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    if order is not None:
        data, valid = data[order], valid[order]
    lengths = np.add.reduceat(valid, runs.starts, dtype=np.int64) if count else runs.lengths
    there = lengths > 0
    lengths = lengths[there]
    return _Values(data[valid], _Runs(np.cumsum(lengths) - lengths, lengths), there, count)


def _aggregates(metric: Metric, found: _Values, p95: Array | None) -> dict[str, ArrowArray]:
    """Columns of one metric, as `rollup_columns.columns` names them."""
    name, sql = metric.name, metric.row.unit.sql
    values, runs = found.values, found.runs
    columns: dict[str, ArrowArray] = {}
    some = len(values) > 0
    for aggregate in metric.row.rollup:
        match aggregate:
            case "min" | "max":
                reduce = np.minimum if aggregate == "min" else np.maximum
                result = reduce.reduceat(values, runs.starts) if some else values
            case "mean":
                columns[f"{name}_count"] = found.counts()
                sums = np.add.reduceat(values, runs.starts, dtype=np.float64) if some else values.astype(np.float64)
                columns[f"{name}_sum"] = found.column(sums, "DOUBLE")
                continue
            case "p95":
                result = _nearest_rank(values, runs) if p95 is None else p95
            case "last":
                result = values[runs.lasts]
            case "any":
                result = np.bitwise_or.reduceat(values, runs.starts) if some else values
            case "increase":
                columns |= _grown(name, sql, found)
                continue
            case _:
                raise ValueError(f"{name}: a rollup has no aggregate {aggregate!r}")
        columns[f"{name}_{aggregate}"] = found.column(result, sql)
    return columns


def _grown(name: str, sql: str, found: _Values) -> dict[str, ArrowArray]:
    """First value of a counter, and its growth within the bucket: `FELL` if it did not only rise."""
    values, runs = found.values, found.runs
    first, last = values[runs.starts], values[runs.lasts]
    inner = last - first
    if len(values):
        fell = np.empty(len(values), dtype=np.bool_)
        np.less(values[1:], values[:-1], out=fell[1:])
        fell[runs.starts] = False
        inner[np.logical_or.reduceat(fell, runs.starts)] = FELL
    return {
        f"{name}_first": found.column(first, sql),
        f"{name}_inner": found.column(inner, sql),
        f"{name}_increase": pa.nulls(found.buckets, _ARROW[sql]),
    }


def _ranks(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the p95 among sorted values, by the nearest rank, as `quantile_disc(…, 0.95)`."""
    return -(-95 * lengths // 100) - 1


def _nearest_rank(values: Array, runs: _Runs) -> Array:
    """p95 of each run. Of less than 20 values it is the greatest."""
    if not len(values):
        return values
    found = np.maximum.reduceat(values, runs.starts)
    for length, which, rows in _by_length(values, runs, np.flatnonzero(runs.lengths >= 20)):
        rank = int(_ranks(np.array([length]))[0])
        found[which] = np.partition(rows, rank, axis=1)[:, rank]
    return found


def _by_length(values: Array, runs: _Runs, which: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64], Array]]:
    """Runs as matrices, a row each; one matrix for each length."""
    lengths = runs.lengths[which]
    found: list[tuple[int, NDArray[np.int64], Array]] = []
    for length in np.unique(lengths).tolist():
        same = which[lengths == length]
        found.append((length, same, values[runs.starts[same][:, None] + np.arange(length)]))
    return found


def _sorted_bins(metric: Metric, found: _Values) -> tuple[Array, NDArray[np.int64], Array, NDArray[np.int64]]:
    """The p95 of each run; and the counts in bins, each with its bucket.

    Values that stand still, as many metrics do for hours, are not sorted.
    """
    values, runs = found.values, found.runs
    number = np.arange(found.buckets) if found.there is None else np.flatnonzero(found.there)
    if not len(values):
        return values, number[:0], np.zeros(0, dtype=np.int16), number[:0]
    p95 = np.maximum.reduceat(values, runs.starts)
    still = np.minimum.reduceat(values, runs.starts) == p95
    parts = [(number[still], _bin(metric, p95[still]), runs.lengths[still])]
    for length, which, rows in _by_length(values, runs, np.flatnonzero(~still)):
        rows.sort(axis=1)
        p95[which] = rows[:, int(_ranks(np.array([length]))[0])]
        bins = _bin(metric, rows)
        begins = np.ones(bins.shape, dtype=np.bool_)
        np.not_equal(bins[:, 1:], bins[:, :-1], out=begins[:, 1:])
        at = np.flatnonzero(begins)
        parts.append((number[which][at // length], bins.reshape(-1)[at], np.diff(at, append=bins.size)))
    which, bins, counts = (np.concatenate(part) for part in zip(*parts, strict=True))
    return p95, which, bins, counts


def _bin(metric: Metric, values: Array) -> Array:
    """Bin of each value: see `rollup_columns.bin_of`."""
    if is_linear(metric):
        # As doubles: the sum of 0.5 and the float below it is 1 as a float.
        halves = np.add(np.abs(values), 0.5, dtype=np.float64)
        return np.copysign(np.floor(halves), values).astype(np.int16)
    positive = values > 0
    logarithms = np.log(values, where=positive, out=np.zeros(values.shape), dtype=np.float64) * _SCALE
    rounded = np.copysign(np.floor(np.abs(logarithms) + 0.5), logarithms).astype(np.int16)
    rounded[~positive] = ZERO_BIN
    return rounded


def _bins_table(
    parts: Sequence[tuple[NDArray[np.int64], Array, NDArray[np.int64], int]],
    which: NDArray[np.int64],
    at: Any,
    devices: Any,
) -> ArrowTable:
    names = ["time", "series", "metric", "bin", "n"]
    kinds = [_TIME, pa.int32(), pa.int16(), pa.int16(), pa.uint32()]
    if not parts:
        return pa.table([pa.array([], type=kind) for kind in kinds], names=names)
    metric = np.repeat(np.array([part[3] for part in parts], dtype=np.int16), [len(part[0]) for part in parts])
    bins, counts = np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
    found = [at.take(which), devices.take(which), pa.array(metric), pa.array(bins), pa.array(counts, type=pa.uint32())]
    return pa.table(found, names=names)


def _known(times: NDArray[np.int64], runs: _Runs) -> Any:
    """Seconds that the samples of each bucket stand for: see `rollup_derived.known`."""
    found = np.zeros(len(runs.starts))
    for length, which, rows in _by_length(times, runs, np.flatnonzero(runs.lengths > 2)):
        steps, rank = np.diff(rows, axis=1), -(-(length - 1) // 2) - 1
        found[which] = length * np.partition(steps, rank, axis=1)[:, rank] / 1e6
    return pa.array(found, type=pa.float64(), mask=runs.lengths <= 2)


def _throttled(samples: ArrowTable, order: NDArray[np.int64] | None, runs: _Runs) -> dict[str, Any]:
    """Columns of throttled samples: see `rollup_derived.throttling`."""
    reasons = _sql_null_as_zero(samples[MASK], order)
    count = len(runs.starts)
    found: dict[str, Any] = {}
    for name, bits in REASONS.items():
        held = (reasons & bits) != 0
        if not held.any():
            found[name] = pa.array(np.zeros(count, dtype=np.uint32))
            continue
        found[name] = pa.array(np.add.reduceat(held, runs.starts, dtype=np.int64), type=pa.uint32())
    if not all(name in samples.column_names for name in CLOCKS):
        return found
    held = (reasons & next(iter(REASONS.values()))) != 0
    clock, most = (_sql_null_as_zero(samples[name], order, -1) for name in CLOCKS)
    held &= (clock >= 0) & (most > 0)
    sums, counts = np.zeros(count), np.zeros(count, dtype=np.int64)
    if held.any():
        percent = np.where(held, 100.0 * clock / np.where(held, most, 1), 0.0)
        sums = np.add.reduceat(percent, runs.starts)
        counts = np.add.reduceat(held, runs.starts, dtype=np.int64)
    found["throttled_sm_clock_percent_sum"] = pa.array(sums, mask=counts == 0)
    found["throttled_sm_clock_percent_count"] = pa.array(counts, type=pa.uint32())
    return found


def _sql_null_as_zero(column: Any, order: NDArray[np.int64] | None, null: int = 0) -> Array:
    data = _data(column.fill_null(null).combine_chunks())
    return data if order is None else data[order]
