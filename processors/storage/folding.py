"""Aggregates of samples in buckets, computed in numpy: those of `rollup_columns.from_raw`, in a fraction of its time.

See `bucketing.py` for how the values of a bucket are found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...schemas.metrics import Metric
from .bucketing import ARROW_TYPES, Array, ArrowArray, Buckets, Indexes, Runs, Samples, Values
from .growth import NOTHING
from .protocol import ArrowTable
from .rollup_columns import BIN_RATIO, FELL, ZERO_BIN, Level, binned, columns, is_linear
from .rollup_derived import CLOCKS, KNOWN, MASK, REASONS

_TIME: Final = pa.timestamp("us", "UTC")
_SCALE: Final = 1 / math.log(BIN_RATIO)


class Grown(NamedTuple):
    """Readings of a counter within buckets.

    Attributes:
        first: of each bucket; undefined where there is none.
        last: the same.
        inner: growth between them; `FELL` if it did not only rise.
        there: buckets that have a reading; None for all.
    """

    first: Array
    last: Array
    inner: Array
    there: NDArray[np.bool_] | None

    def take(self, which: Indexes) -> Grown:
        """Readings of some buckets, in the order of indexes."""
        there = None if self.there is None else self.there[which]
        return Grown(self.first[which], self.last[which], self.inner[which], there)


class Folded(NamedTuple):
    """Rows of a level, and the counts in bins where the level keeps them.

    Attributes:
        rows: time, series, and the columns of the level, in the order of the buckets; the increase of counters is null.
        bins: time, series, metric (its number), bin and n; those of closed buckets first. None if the level has none.
        closed_bins: number of those of closed buckets.
        counters: readings of each counter, by the metric's name.
    """

    rows: ArrowTable
    bins: ArrowTable | None
    closed_bins: int
    counters: dict[str, Grown]


def fold(
    samples: Samples, metrics: Sequence[Metric], level: Level, numbers: Mapping[str, int], found: Buckets, closed: int
) -> Folded:
    """Aggregate samples into buckets.

    Args:
        samples: all rows of the buckets.
        metrics: to aggregate, in the order of the columns.
        level: whose buckets they are.
        numbers: of the metrics in bins.
        found: the buckets, in any order.
        closed: number of the first of these that are closed.
    """
    width = level.seconds * 1_000_000
    at = pa.array(found.number * width, type=pa.int64()).cast(_TIME)
    devices = pa.array(found.series, type=pa.int32())
    made: dict[str, ArrowArray] = {"time": at, "series": devices, "samples": pa.array(found.lengths, type=pa.uint32())}
    runs = Runs(samples, found)
    bins: list[_Bins] = []
    readings: dict[str, Grown] = {}
    counted = {metric.name for metric in binned(metrics)} if level.bins else set[str]()
    for metric in metrics:
        values = Values(runs, *samples.column(metric.name))
        if metric.name in counted:
            p95, of_it = _sorted_bins(metric, values, numbers[metric.name])
            bins += of_it
        else:
            p95 = None
        made |= _aggregates(metric, values, p95, readings)
        if metric.name == MASK:
            made |= _throttled(samples, runs)
    if level.bins:
        made[KNOWN] = _known(samples.times, found)
    names = columns(metrics, level)
    rows = pa.table(
        [made["time"], made["series"], *(made[name] for name, _ in names)],
        names=["time", "series", *(name for name, _ in names)],
    )
    if not level.bins:
        return Folded(rows, None, 0, readings)
    return Folded(rows, *_bins_table(bins, found.number * width, found.series, closed), readings)


def with_increases(
    folded: Folded, increases: Mapping[str, Array], grown: Mapping[str, Grown], order: Indexes | None = None
) -> Folded:
    """Set the growth of counters.

    Args:
        folded: rows of a level.
        increases: of each counter, for each bucket.
        grown: readings of each counter in the same buckets.
        order: index of each folded row among these buckets; None if they are in the same order.
    """
    rows = folded.rows
    for name, increase in increases.items():
        there = grown[name].there
        nulls = increase == NOTHING
        if there is not None:
            nulls |= ~there
        if order is not None:
            increase, nulls = increase[order], nulls[order]
        column = f"{name}_increase"
        array = pa.array(increase, type=rows.schema.field(column).type, mask=nulls)
        rows = rows.set_column(rows.column_names.index(column), column, array)
    return folded._replace(rows=rows)


def _aggregates(metric: Metric, values: Values, p95: Array | None, readings: dict[str, Grown]) -> dict[str, ArrowArray]:
    """Columns of one metric, as `rollup_columns.columns` names them."""
    name, sql = metric.name, metric.row.unit.sql
    found: dict[str, ArrowArray] = {}
    for aggregate in metric.row.rollup:
        match aggregate:
            case "min":
                result = values.reduce(np.minimum)
            case "max":
                result = values.reduce(np.maximum)
            case "mean":
                found[f"{name}_count"] = values.counts()
                found[f"{name}_sum"] = values.column(values.reduce(np.add, np.float64), "DOUBLE")
                continue
            case "p95":
                result = _nearest_rank(values) if p95 is None else p95
            case "last":
                result = values.last()
            case "any":
                result = values.reduce(np.bitwise_or)
            case "increase":
                readings[name] = grown = _grown(values)
                nulls = None if grown.there is None else ~grown.there
                found[f"{name}_first"] = pa.array(grown.first, type=ARROW_TYPES[sql], mask=nulls)
                found[f"{name}_inner"] = pa.array(grown.inner, type=ARROW_TYPES[sql], mask=nulls)
                found[f"{name}_increase"] = pa.nulls(values.buckets, ARROW_TYPES[sql])
                continue
            case _:
                raise ValueError(f"{name}: a rollup has no aggregate {aggregate!r}")
        found[f"{name}_{aggregate}"] = values.column(result, sql)
    return found


def _grown(values: Values) -> Grown:
    """First and last value of a counter, and its growth within the bucket: `FELL` if it did not only rise."""
    first, last = values.first(), values.last()
    inner = last - first
    inner[values.fell()] = FELL
    return Grown(values.spread(first), values.spread(last), values.spread(inner), values.there)


def _rank(length: int) -> int:
    """Index of the p95 among sorted values, by the nearest rank, as `quantile_disc(…, 0.95)`."""
    return -(-95 * length // 100) - 1


def _nearest_rank(values: Values) -> Array:
    """p95 of each bucket. Of less than 20 values it is the greatest."""
    found = values.reduce(np.maximum)
    for which, rows in values.by_length(values.lengths >= 20):
        rank = _rank(rows.shape[1])
        found[which] = np.partition(rows, rank, axis=1)[:, rank]
    return found


class _Bins(NamedTuple):
    """Counts in bins: the index of the bucket, the bin, the count, and the number of the metric."""

    which: Indexes
    bins: Array
    counts: Indexes
    metric: int


def _sorted_bins(metric: Metric, values: Values, number: int) -> tuple[Array, list[_Bins]]:
    """The p95 of each bucket that has a value, and the counts in bins.

    Values that stand still, as many metrics do for hours, are not sorted.
    """
    index = np.arange(values.buckets) if values.there is None else np.flatnonzero(values.there)
    p95 = values.reduce(np.maximum)
    still = values.reduce(np.minimum) == p95
    parts = [_Bins(index[still], _bin(metric, p95[still]), values.lengths[still], number)]
    for which, rows in values.by_length(~still):
        rows.sort(axis=1)
        length = rows.shape[1]
        p95[which] = rows[:, _rank(length)]
        # The bins of distinct values, since most repeat; then of these the ones with the same bin are one.
        begins = np.ones(rows.shape, dtype=np.bool_)
        np.not_equal(rows[:, 1:], rows[:, :-1], out=begins[:, 1:])
        at = np.flatnonzero(begins)
        bins, row = _bin(metric, rows.reshape(-1)[at]), at // length
        apart = np.ones(len(at), dtype=np.bool_)
        apart[1:] = (bins[1:] != bins[:-1]) | (row[1:] != row[:-1])
        at, bins, row = at[apart], bins[apart], row[apart]
        parts.append(_Bins(index[which][row], bins, np.diff(at, append=rows.size), number))
    return p95, parts


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


def _bins_table(parts: Sequence[_Bins], times: Indexes, series: Array, closed: int) -> tuple[ArrowTable, int]:
    """Bins with their keys, those of the first buckets before the others; and how many these are."""
    parts = parts or [_Bins(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int16), np.zeros(0, dtype=np.int64), 0)]
    which = np.concatenate([part.which for part in parts])
    metric = np.repeat(np.array([part.metric for part in parts], dtype=np.int16), [len(part.which) for part in parts])
    bins, counts = np.concatenate([part.bins for part in parts]), np.concatenate([part.counts for part in parts])
    early = which < closed
    first = int(np.count_nonzero(early))
    if 0 < first < len(which):
        order = np.concatenate((np.flatnonzero(early), np.flatnonzero(~early)))
        which, metric, bins, counts = which[order], metric[order], bins[order], counts[order]
    columns = {
        "time": pa.array(times[which], type=pa.int64()).cast(_TIME),
        "series": pa.array(series[which], type=pa.int32()),
        "metric": pa.array(metric),
        "bin": pa.array(bins),
        "n": pa.array(counts, type=pa.uint32()),
    }
    return pa.table(columns), first


def _known(times: Indexes, found: Buckets) -> ArrowArray:
    """Seconds that the samples of each bucket stand for: see `rollup_derived.known`."""
    seconds = np.zeros(len(found.starts))
    for length in np.unique(found.lengths[found.lengths > 2]).tolist():
        which = np.flatnonzero(found.lengths == length)
        rows = times[found.starts[which][:, None] + np.arange(length)]
        steps, rank = np.diff(rows, axis=1), -(-(length - 1) // 2) - 1
        seconds[which] = length * np.partition(steps, rank, axis=1)[:, rank] / 1e6
    return pa.array(seconds, type=pa.float64(), mask=found.lengths <= 2)


def _throttled(samples: Samples, runs: Runs) -> dict[str, ArrowArray]:
    """Columns of throttled samples: see `rollup_derived.throttling`."""

    def number(name: str, null: int) -> Array:
        data, valid = samples.column(name)
        return data if valid is None else np.where(valid, data, null)

    def per_bucket(data: Array) -> Array:
        return Values(runs, data, None).reduce(np.add, np.float64 if data.dtype.kind == "f" else np.int64)

    reasons = number(MASK, 0)
    count = len(runs.lengths)
    found: dict[str, ArrowArray] = {}
    for name, bits in REASONS.items():
        held = (reasons & bits) != 0
        counts = per_bucket(held) if held.any() else np.zeros(count, dtype=np.int64)
        found[name] = pa.array(counts, type=pa.uint32())
    if not all(name in samples.names for name in CLOCKS):
        return found
    held = (reasons & next(iter(REASONS.values()))) != 0
    clock, most = (number(name, -1) for name in CLOCKS)
    held &= (clock >= 0) & (most > 0)
    sums, counts = np.zeros(count), np.zeros(count, dtype=np.int64)
    if held.any():
        sums = per_bucket(np.where(held, 100.0 * clock / np.where(held, most, 1), 0.0))
        counts = per_bucket(held)
    found["throttled_sm_clock_percent_sum"] = pa.array(sums, mask=counts == 0)
    found["throttled_sm_clock_percent_count"] = pa.array(counts, type=pa.uint32())
    return found
