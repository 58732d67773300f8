"""Rollups of 10 s, 1 min and 1 h, kept equal to what a recomputation from raw samples would give.

Rows that have come since the last refresh are found by the batch numbers of the raw rows. Each (device, bucket) among
them is recomputed from all its raw samples, those of archived days included. So samples may be late, and a crash leaves
nothing to repair. The samples are read once for both levels that are made from them, and aggregated in numpy. The
newest bucket of each device is in a small separate table (`…_open`), since it is written again and again; an older one
is written once, and again if a late sample falls into it.

Quantiles merge: for 1 min and 1 h the values of each gauge are kept as counts in bins (`…_bins`), and the p95 of an
hour is that of its minutes' counts added up. The p95 of 10 s and of 1 min is exact (nearest rank, as `quantile_disc`).
A bin is 1 wide for percent and degrees Celsius, so that the p95 of an hour is off by 0.5 at most; otherwise it spans a
ratio of 1.02, so that it is off by 1% at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from duckdb import DuckDBPyConnection
from msgspec import structs
from numpy.typing import NDArray

from ....schemas.metrics import METRICS, Metric
from .. import growth
from ..bucketing import Buckets, Samples, among, buckets, data_of
from ..folding import Folded, fold, with_increases
from ..growth import LacksColumns, Tables
from ..protocol import ROW_GROUP_ROWS
from ..readings import Readings
from ..rollup_columns import (
    HOUR,
    LEVELS,
    MINUTE,
    TEMPLATE,
    TEN_SECONDS,
    Level,
    counters,
    create,
)
from ..schema import NO_SERIES, day_of, day_table, sql_text
from ..statements import add_missing, registered, transaction
from . import hours, replacement
from .hours import done, metrics_with_data, runs, set_done

__all__ = ["HOUR", "LEVELS", "MINUTE", "TEN_SECONDS", "Level", "Rollups", "create", "runs"]

Numbers = NDArray[np.int64]

_HOURS: Final = f"(FROM {TEMPLATE} UNION ALL BY NAME FROM {HOUR.table} UNION ALL BY NAME FROM {HOUR.table}_open)"
ROWS_AT_ONCE: Final = 1_300_000
"""Approximate number of raw rows for one step of a refresh, and ten times that of its 10 s: as many of these as make a
row group, which DuckDB writes directly rather than through its log. A step of samples with 20 metrics takes some 300 MB
of memory meanwhile."""


class _Touched(NamedTuple):
    """Buckets of a level that are recomputed, in the order of device and time.

    Attributes:
        series: device of each.
        bucket: its number.
        rows: number of new samples in it.
    """

    series: Numbers
    bucket: Numbers
    rows: Numbers

    def with_buckets(self, others: _Touched) -> _Touched:
        """Same with others added; a bucket that is in both counts once, with the rows of both."""
        parts = (np.concatenate(pair) for pair in zip(self, others, strict=True))
        return _merged(*parts)

    def wider(self, factor: int) -> _Touched:
        """Buckets of a level with wider ones that these are in."""
        return _merged(self.series, self.bucket // factor, self.rows)


class _Due(NamedTuple):
    """A level that is refreshed.

    Attributes:
        level: which.
        touched: its buckets that are recomputed.
        open_before: newest bucket of each device that is stored, by the device's number; -1 if there is none.
        newest: newest bucket of each device then; -1 for devices that have none, or whose open bucket is not touched.
    """

    level: Level
    touched: _Touched
    open_before: Numbers
    newest: Numbers


class _Step(NamedTuple):
    """Buckets of a level that are written at once.

    Attributes:
        due: the level.
        metrics: that are aggregated.
        chosen: the buckets, in the order of device and time.
        is_open: true for each that is the newest of its device.
        order: index among them of each that is folded: those that are closed, then those that are open.
        closed: number of the closed ones.
        folded: their aggregates, in that order; the growth of counters is still to be computed.
        left_out: columns that are not stored for the closed and for the open ones, as `replacement.make_room` says.
    """

    due: _Due
    metrics: Sequence[Metric]
    chosen: Buckets
    is_open: NDArray[np.bool_]
    order: Numbers
    closed: int
    folded: Folded
    left_out: Sequence[set[str]]


class Rollups:
    """Refreshes the rollups of one database, in one thread. Keeps the last readings of counters in memory."""

    def __init__(self) -> None:
        self._readings = {
            level.name: Readings(level.seconds * 1_000_000, _tables(level, partial(_within, (), {}), 0).reach)
            for level in (TEN_SECONDS, MINUTE)
        }

    def refresh(
        self,
        cursor: DuckDBPyConnection,
        levels: Sequence[Level],
        days: Sequence[str],
        archived: Mapping[str, Sequence[Path]] | None = None,
        minutes_from: datetime | None = None,
    ) -> int:
        """Bring rollups up to date with what has been committed. Each step is a transaction that may be repeated.

        Args:
            cursor: that is not used elsewhere meanwhile.
            levels: to refresh; hours are made of the minutes that are stored by then.
            days: that have a raw table.
            archived: files of archived days, which a late sample may still belong to.
            minutes_from: rollups of 1 min before it are deleted, so stored hours before it are not recomputed.

        Returns:
            Number of buckets written.
        """
        written = 0
        if from_samples := [level for level in levels if level is not HOUR]:
            try:
                written += self._refresh_from_samples(cursor, from_samples, days, archived or {})
            except BaseException:
                self.forget()
                raise
        if HOUR in levels:
            written += hours.refresh(cursor, minutes_from)
        return written

    def forget(self) -> None:
        """Forget all readings, since the stored rows have changed otherwise."""
        for readings in self._readings.values():
            readings.forget()

    def refresh_archived(self, cursor: DuckDBPyConnection, day: str, files: Sequence[Path]) -> None:
        """Recompute all rollups of an archived day from its files, after they were lost.

        Args:
            cursor: that is not used elsewhere meanwhile.
            day: such as `20261124`.
            files: all of the day.
        """
        self.forget()
        raw = _source((), {day: files})
        counts = cursor.execute("SELECT " + ", ".join(f"count({name})" for name in METRICS) + f" FROM {raw}").fetchone()
        metrics = [metric for metric, count in zip(METRICS.values(), counts or (), strict=False) if count]
        start = f"TIMESTAMPTZ '{day[:4]}-{day[4:6]}-{day[6:]} 00:00:00+00'"
        within = f"time >= {start} AND time < {start} + INTERVAL 1 DAY"
        touched = _count_touched(cursor, raw, TEN_SECONDS, within)
        # None of them is the newest of its device: that one is computed from raw samples.
        none = np.full(_size(touched.series), -1, dtype=np.int64)
        found = [
            _Due(level, touched.wider(level.seconds // TEN_SECONDS.seconds), none, none)
            for level in (TEN_SECONDS, MINUTE)
        ]
        self._write(cursor, found, metrics, (), {day: files}, 0)
        hours.refresh_day(cursor, day, metrics)
        self.forget()

    def _refresh_from_samples(
        self,
        cursor: DuckDBPyConnection,
        levels: Sequence[Level],
        days: Sequence[str],
        archived: Mapping[str, Sequence[Path]],
    ) -> int:
        row = cursor.execute("SELECT coalesce(max(batch), 0) FROM store.watermarks").fetchone()
        through = int(row[0]) if row else 0
        behind = {level: stored for level in levels if (stored := done(cursor, level)) < through}
        if not behind:
            return 0
        source = _source(days, {})
        found: list[_Due] = []
        fresh: dict[int, _Touched] = {}
        finest = min(behind, key=lambda level: level.seconds)
        for level, stored in behind.items():
            if stored not in fresh:
                fresh[stored] = _count_touched(cursor, source, finest, f"batch > {stored} AND batch <= {through}")
            touched = fresh[stored].wider(level.seconds // finest.seconds)
            found.append(_due(cursor, level, touched))
        metrics = metrics_with_data(cursor, levels[-1], [day_table(day) for day in days])
        written = self._write(cursor, found, metrics, days, archived, through)
        with transaction(cursor):
            for level in behind:
                set_done(cursor, level, through)
        return written

    def _write(
        self,
        cursor: DuckDBPyConnection,
        found: Sequence[_Due],
        metrics: Sequence[Metric],
        days: Sequence[str],
        archived: Mapping[str, Sequence[Path]],
        through: int,
    ) -> int:
        """Recompute the touched buckets of all levels, and replace the old ones."""
        numbers = dict(cursor.execute("SELECT name, metric FROM store.metrics").fetchall())
        widest = max((due.level for due in found), key=lambda level: level.seconds)
        read = _Touched(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
        for due in found:
            read = read.with_buckets(due.touched.wider(widest.seconds // due.level.seconds))
        weights = read.rows + ROWS_AT_ONCE // ROW_GROUP_ROWS * _tens_in(found, widest, read)
        per_bucket = _sums(read.bucket, weights)
        written = 0
        for first, last in runs(per_bucket, ROWS_AT_ONCE):
            chosen = (read.bucket >= first) & (read.bucket <= last)
            factor = widest.seconds
            within = _between(days, archived, first * factor, (last + 1) * factor)
            samples = _read(cursor, metrics, widest, within, read.series[chosen], read.bucket[chosen])
            for due in found:
                written += self._write_level(cursor, due, metrics, numbers, samples, days, archived, through)
        return written

    def _write_level(
        self,
        cursor: DuckDBPyConnection,
        due: _Due,
        metrics: Sequence[Metric],
        numbers: Mapping[str, int],
        samples: Samples,
        days: Sequence[str],
        archived: Mapping[str, Sequence[Path]],
        through: int,
    ) -> int:
        """Write the touched buckets among the samples that were read."""
        level = due.level
        chosen = buckets(samples, level)
        of_due = _keys(due.touched.series, due.touched.bucket)
        chosen = chosen.take(np.flatnonzero(among(_keys(chosen.series, chosen.number), of_due)))
        if not len(chosen.number):
            return 0
        is_open = chosen.number == due.newest[chosen.series]
        order = np.concatenate((np.flatnonzero(~is_open), np.flatnonzero(is_open)))
        closed = len(order) - int(np.count_nonzero(is_open))
        folded = fold(samples, metrics, level, numbers, chosen.take(order), closed)
        tables = _tables(level, partial(_within, days, archived), through)
        # DuckDB does not commit rows of a table that gets a column in the same transaction.
        left_out = replacement.make_room(cursor, level, metrics, folded.rows, closed)
        step = _Step(due, metrics, chosen, is_open, order, closed, folded, left_out)
        while True:
            try:
                with transaction(cursor):
                    self._store(cursor, step, tables, through)
                return len(order)
            except LacksColumns as lacking:
                self._readings[level.name].forget()
                add_missing(cursor, lacking.table, lacking.columns)

    def _store(self, cursor: DuckDBPyConnection, step: _Step, tables: Tables, through: int) -> None:
        """Compute the growth of counters in the buckets of a step, and replace their rows."""
        due, metrics, chosen, is_open, order, closed, folded, left_out = step
        level, counted = due.level, counters(metrics)
        if counted:
            places = np.empty(len(order), dtype=np.int64)
            places[order] = np.arange(len(order))
            grown = {name: readings.take(places) for name, readings in folded.counters.items()}
            kept = self._readings[level.name]
            found = kept.growth(counted, chosen, grown)
            if not found.settled.all():
                tables = structs.replace(tables, rows=replacement.stored(cursor, level, counted))
                _join(cursor, tables, counted, folded, order, ~found.settled, is_open, found.increases, kept, due)
            folded = with_increases(folded, found.increases, grown, order)
        before = due.open_before[chosen.series]
        replacement.delete(cursor, level, chosen, f"{level.table}_open", chosen.number == before)
        replacement.delete(cursor, level, chosen, level.table, (before < 0) | (chosen.number < before))
        replacement.insert(cursor, level, metrics, folded, closed, left_out, through)


def refresh(
    cursor: DuckDBPyConnection,
    level: Level,
    days: Sequence[str],
    archived: Mapping[str, Sequence[Path]] | None = None,
    minutes_from: datetime | None = None,
) -> int:
    """Refresh one level, without readings from before; see `Rollups.refresh`."""
    return Rollups().refresh(cursor, [level], days, archived, minutes_from)


def _tables(level: Level, readings: Callable[[int, int], str], through: int) -> Tables:
    stored = (level.table, f"{level.table}_open")
    return Tables(level, ("series",), stored, _HOURS, readings, f"batch = {through}", falls_marked=True)


def _size(series: Numbers) -> int:
    return int(series.max()) + 1 if len(series) else 0


def _keys(series: NDArray[Any], bucket: Numbers) -> Numbers:
    """One number for each device and bucket, in their order."""
    return (series.astype(np.int64) << 40) | (bucket & ((1 << 40) - 1))


def _merged(series: Numbers, bucket: Numbers, rows: Numbers) -> _Touched:
    keys, index = np.unique(_keys(series, bucket), return_inverse=True)
    rows = np.bincount(index, weights=rows, minlength=len(keys)).astype(np.int64)
    return _Touched(keys >> 40, keys & ((1 << 40) - 1), rows)


def _count_touched(cursor: DuckDBPyConnection, source: str, level: Level, where: str) -> _Touched:
    """Buckets of the samples that a condition selects."""
    found = cursor.execute(
        f"SELECT series::BIGINT AS series, epoch_us(time) // {level.seconds * 1_000_000} AS bucket, count(*) AS rows "
        f"FROM {source} WHERE {where} GROUP BY ALL"
    ).to_arrow_table()
    return _merged(*(data_of(found[name]) for name in ("series", "bucket", "rows")))


def _due(cursor: DuckDBPyConnection, level: Level, touched: _Touched) -> _Due:
    """Add the open buckets of the touched devices, so that it can be told which bucket is the newest now."""
    stored = cursor.execute(
        f"SELECT series::BIGINT AS series, epoch_us(time) // {level.seconds * 1_000_000} AS bucket, "
        f"samples::BIGINT AS rows FROM {level.table}_open"
    ).to_arrow_table()
    was_open = _Touched(*(data_of(stored[name]) for name in ("series", "bucket", "rows")))
    size = max(_size(touched.series), _size(was_open.series))
    newest, before = (np.full(size, -1, dtype=np.int64) for _ in range(2))
    before[was_open.series] = was_open.bucket
    is_touched = np.zeros(size, dtype=np.bool_)
    is_touched[touched.series] = True
    again = is_touched[was_open.series]
    touched = touched.with_buckets(_Touched(*(part[again] for part in was_open)))
    # They are in the order of time: the last one assigned is the newest.
    newest[touched.series] = touched.bucket
    return _Due(level, touched, before, newest)


def _tens_in(found: Sequence[_Due], widest: Level, read: _Touched) -> Numbers:
    """Number of touched buckets of the finest level in each of the widest."""
    finest = min(found, key=lambda due: due.level.seconds)
    keys = _keys(finest.touched.series, finest.touched.bucket // (widest.seconds // finest.level.seconds))
    index = np.searchsorted(_keys(read.series, read.bucket), keys)
    return np.bincount(index, minlength=len(read.series)).astype(np.int64)


def _sums(bucket: Numbers, rows: Numbers) -> list[tuple[int, int]]:
    found, index = np.unique(bucket, return_inverse=True)
    sums = np.bincount(index, weights=rows, minlength=len(found)).astype(np.int64)
    return list(zip(found.tolist(), sums.tolist(), strict=True))


def _source(days: Sequence[str], archived: Mapping[str, Sequence[Path]]) -> str:
    parts = [f"FROM {table}" for table in (NO_SERIES, *(day_table(day) for day in sorted(days)))]
    files = ", ".join(sql_text(str(file)) for found in archived.values() for file in found)
    if files:
        parts.append(
            "SELECT p.* EXCLUDE (host, device), s.series, 0::BIGINT AS batch "
            f"FROM read_parquet([{files}], union_by_name = true, hive_partitioning = false) p "
            "JOIN store.series s USING (host, device)"
        )
    return "(" + " UNION ALL BY NAME ".join(parts) + ")"


def _between(days: Sequence[str], archived: Mapping[str, Sequence[Path]], first: int, end: int) -> str:
    """SELECT of the samples in a range of seconds, those of archived days included."""
    return _within(days, archived, first * 1_000_000, end * 1_000_000)


def _within(days: Sequence[str], archived: Mapping[str, Sequence[Path]], first: int, end: int) -> str:
    """SELECT of the samples between two times in microseconds, those of archived days included."""
    low, high = day_of(first), day_of(end - 1)
    source = _source(
        [day for day in days if low <= day[:8] <= high],
        {day: files for day, files in archived.items() if low <= day <= high},
    )
    return f"SELECT * FROM {source} WHERE time >= make_timestamptz({first}) AND time < make_timestamptz({end})"


def _read(
    cursor: DuckDBPyConnection,
    metrics: Sequence[Metric],
    level: Level,
    samples: str,
    series: Numbers,
    bucket: Numbers,
) -> Samples:
    """Read the samples of some buckets."""
    picked = ", ".join(("series", *(metric.name for metric in metrics)))
    wanted = pa.table({"series": pa.array(series, type=pa.int32()), "bucket": bucket})
    with registered(cursor, "wanted", wanted):
        rows = cursor.execute(
            f"SELECT epoch_us(time) AS us, {picked} FROM "
            f"(SELECT *, epoch_us(time) // {level.seconds * 1_000_000} AS bucket FROM ({samples})) "
            "SEMI JOIN wanted USING (series, bucket)"
        ).to_arrow_table()
    return Samples(rows)


def _join(
    cursor: DuckDBPyConnection,
    tables: Tables,
    counted: Sequence[Metric],
    folded: Folded,
    order: Numbers,
    chosen: NDArray[np.bool_],
    is_open: NDArray[np.bool_],
    increases: dict[str, NDArray[Any]],
    kept: Readings,
    due: _Due,
) -> None:
    """Compute the growth of some devices' counters in SQL, and set it in `increases`.

    Args:
        cursor: in the transaction of the step.
        tables: of the level.
        counted: the counters.
        folded: all buckets of the step.
        order: index of each folded row among the buckets in the order of device and time.
        chosen: which of these buckets.
        is_open: true for the newest bucket of each device, in the same order.
        increases: of each counter, in the same order.
        kept: learns the last readings.
        due: the level.
    """
    parts = [f"{metric.name}_{part}" for metric in counted for part in ("first", "last", "inner", "increase")]
    which = pa.array(chosen[order])
    rows = folded.rows.select(["time", "series", *parts]).filter(which)
    opened = pa.array(is_open[order][chosen[order]])
    width = tables.width
    with registered(cursor, "folded", rows.append_column("open", opened)):
        cursor.execute(
            f"CREATE OR REPLACE TEMP TABLE touched AS SELECT series, epoch_us(time) // {width} AS bucket, time, open "
            "FROM folded"
        )
        cursor.execute("CREATE OR REPLACE TEMP TABLE staged AS SELECT * EXCLUDE (open) FROM folded")
    numbers = data_of(rows["time"].cast(pa.int64())) // width
    growth.join(cursor, tables, counted, int(numbers.min()), int(numbers.max()))
    names = ", ".join(f"{metric.name}_increase" for metric in counted)
    # In the order of the buckets.
    found = cursor.execute(f"SELECT {names} FROM staged ORDER BY series, time").fetchnumpy()
    for metric in counted:
        increases[metric.name][chosen] = np.ma.filled(found[f"{metric.name}_increase"], growth.NOTHING)
    rows_now = growth.last_readings(cursor, tables, counted)
    # A late step comes before that of the device's open bucket, whose readings it may change.
    current = rows_now["bucket"] >= due.open_before[rows_now["series"]]
    kept.learn(counted, {name: column[current] for name, column in rows_now.items()})
