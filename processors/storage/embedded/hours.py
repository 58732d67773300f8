"""Rollups of 1 h, made from those of 1 min: wide columns in SQL, counts in bins and their p95 in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
from duckdb import DuckDBPyConnection
from numpy.typing import NDArray

from ....schemas.metrics import METRICS, Metric
from ..bucketing import data_of
from ..protocol import ROW_GROUP_ROWS, ArrowTable
from ..rollup_columns import (
    BIN_RATIO,
    HOUR,
    MINUTE,
    ZERO_BIN,
    Level,
    add_room,
    binned,
    columns,
    from_minutes,
    is_linear,
    stored_rows,
)
from ..schema import sql_text
from ..statements import column_names, put, registered, transaction
from . import totals

Numbers = NDArray[np.int64]

_WIDTH: Final = HOUR.seconds * 1_000_000
_MINUTES: Final = f"(SELECT * FROM {MINUTE.table} UNION ALL BY NAME SELECT * FROM {MINUTE.table}_open)"
_BINS: Final = f"(SELECT * FROM {MINUTE.table}_bins UNION ALL BY NAME SELECT * FROM {MINUTE.table}_open_bins)"
ROWS_AT_ONCE: Final = 500_000
"""Approximate number of minutes for one step of a refresh: ingest waits for the commit of a step."""
_CELLS_AT_ONCE: Final = 20_000_000
"""Number of counts that are added up in one array."""


def runs(buckets: Sequence[tuple[int, int]], rows_at_once: int = ROWS_AT_ONCE) -> list[tuple[int, int]]:
    """Cut buckets (each with its number of rows, ascending) into runs without wide gaps, small enough for one step."""
    found: list[tuple[int, int]] = []
    rows = 0
    for bucket, size in buckets:
        if found and bucket <= found[-1][1] + 6 and rows + size <= rows_at_once:
            found[-1] = (found[-1][0], bucket)
            rows += size
        else:
            found.append((bucket, bucket))
            rows = size
    return found


def done(cursor: DuckDBPyConnection, level: Level) -> int:
    """Batch through which a level is refreshed."""
    row = cursor.execute("SELECT batch FROM store.rolled WHERE level = ?", [level.name]).fetchone()
    return int(row[0]) if row else 0


def set_done(cursor: DuckDBPyConnection, level: Level, through: int) -> None:
    """Record through which batch a level is refreshed. Call it in a transaction."""
    put(cursor, "store.rolled", f"SELECT {sql_text(level.name)} AS level, {through}::BIGINT AS batch", ["level"])


def metrics_with_data(cursor: DuckDBPyConnection, level: Level, samples: Sequence[str] = ()) -> list[Metric]:
    """Metrics that a level has columns for, or the minutes that hours are made of, or any of some tables of samples."""
    levels = (HOUR, MINUTE) if level is HOUR else (level,)
    had: set[str] = set()
    for one in levels:
        had |= column_names(cursor, one.table) | column_names(cursor, f"{one.table}_open")
    for table in samples:
        had |= {f"{name}_last" for name in column_names(cursor, table)}
    return [metric for metric in METRICS.values() if f"{metric.name}_last" in had]


def refresh(cursor: DuckDBPyConnection, minutes_from: datetime | None) -> int:
    """Bring the hours up to date with the minutes; return how many were written.

    Args:
        cursor: that is not used elsewhere meanwhile.
        minutes_from: minutes before it are deleted, so stored hours before it are not recomputed.
    """
    through, stored = done(cursor, MINUTE), done(cursor, HOUR)
    if through <= stored:
        return 0
    metrics = metrics_with_data(cursor, HOUR)
    _touch(cursor, f"batch > {stored} AND batch <= {through}")
    # The hour that was the newest of its device until now is computed again with it, so that it can be told which one
    # is the newest now.
    cursor.execute(
        f"INSERT INTO touched_all SELECT series, epoch_us(time) // {_WIDTH}, samples FROM {HOUR.table}_open "
        "SEMI JOIN touched_all t USING (series) "
        f"ANTI JOIN touched_all u ON u.series = {HOUR.table}_open.series "
        f"AND u.bucket = epoch_us({HOUR.table}_open.time) // {_WIDTH}"
    )
    if minutes_from is not None:
        _leave_whole_hours(cursor, minutes_from)
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE newest AS SELECT series, max(bucket) AS bucket FROM touched_all GROUP BY series"
    )
    written = _write(cursor, metrics, through)
    with transaction(cursor):
        set_done(cursor, HOUR, through)
    return written


def refresh_day(cursor: DuckDBPyConnection, day: str, metrics: Sequence[Metric]) -> None:
    """Recompute the hours of a day, such as `20261124`, from its minutes. None becomes the newest of its device."""
    start = f"TIMESTAMPTZ '{day[:4]}-{day[4:6]}-{day[6:]} 00:00:00+00'"
    _touch(cursor, f"time >= {start} AND time < {start} + INTERVAL 1 DAY")
    cursor.execute("CREATE OR REPLACE TEMP TABLE newest AS SELECT DISTINCT series, -1 AS bucket FROM touched_all")
    _write(cursor, metrics, 0)


def _touch(cursor: DuckDBPyConnection, where: str) -> None:
    """Create the table `touched_all` of the hours of those minutes that a condition selects."""
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE touched_all AS SELECT series, epoch_us(time) // {_WIDTH} AS bucket, "
        f"count(*) AS rows FROM {_MINUTES} WHERE {where} GROUP BY ALL"
    )


def _leave_whole_hours(cursor: DuckDBPyConnection, minutes_from: datetime) -> None:
    """Exclude stored hours whose minutes were deleted from a refresh, since they would only cover what is left.

    Such an hour is touched if a device returns after months, or if a sample is as late. It is moved to the table of
    closed hours.
    """
    limit = -(-int(minutes_from.timestamp() * 1e6) // _WIDTH)
    stored = " UNION ALL ".join(
        f"SELECT series, epoch_us(time) // {_WIDTH} AS bucket FROM {table} "
        f"WHERE time < make_timestamptz({limit * _WIDTH})"
        for table in (HOUR.table, f"{HOUR.table}_open")
    )
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE whole AS SELECT DISTINCT series, bucket, make_timestamptz(bucket * "
        f"{_WIDTH}) AS time FROM touched_all SEMI JOIN ({stored}) USING (series, bucket) WHERE bucket < {limit}"
    )
    if cursor.execute("SELECT 1 FROM whole LIMIT 1").fetchone() is None:
        return
    with transaction(cursor):
        # What was the newest hour of its device until now is that no more.
        for suffix in ("", "_bins"):
            table = f"{HOUR.table}_open{suffix}"
            cursor.execute(
                f"INSERT INTO {HOUR.table}{suffix} BY NAME FROM {table} SEMI JOIN whole USING (series, time)"
            )
            cursor.execute(
                f"DELETE FROM {table} USING whole w WHERE {table}.series = w.series AND {table}.time = w.time"
            )
    cursor.execute(
        "DELETE FROM touched_all USING whole w WHERE touched_all.series = w.series AND touched_all.bucket = w.bucket"
    )


def _write(cursor: DuckDBPyConnection, metrics: Sequence[Metric], through: int) -> int:
    """Recompute the hours in `touched_all`, the newest of each device as in `newest`."""
    for table in (HOUR.table, f"{HOUR.table}_open"):
        add_room(cursor, table, columns(metrics, HOUR))
    numbers = dict(cursor.execute("SELECT name, metric FROM store.metrics").fetchall())
    found = cursor.execute("SELECT bucket, sum(rows) FROM touched_all GROUP BY bucket ORDER BY bucket").fetchall()
    written = 0
    for first, last in runs([(int(bucket), int(rows)) for bucket, rows in found]):
        with transaction(cursor):
            written += _step(cursor, metrics, numbers, first, last, through)
    return written


def _step(
    cursor: DuckDBPyConnection,
    metrics: Sequence[Metric],
    numbers: Mapping[str, int],
    first: int,
    last: int,
    through: int,
) -> int:
    start, end = f"make_timestamptz({first * _WIDTH})", f"make_timestamptz({(last + 1) * _WIDTH})"
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE touched AS SELECT t.series, t.bucket, "
        f"make_timestamptz(t.bucket * {_WIDTH}) AS time, t.bucket = n.bucket AS open "
        f"FROM touched_all t JOIN newest n USING (series) WHERE t.bucket BETWEEN {first} AND {last}"
    )
    totals.delete_touched(cursor, first, last)
    for table in (HOUR.table, f"{HOUR.table}_open"):
        for suffix in ("", "_bins"):
            cursor.execute(
                f"DELETE FROM {table}{suffix} AS r USING touched t WHERE r.series = t.series AND r.time = t.time "
                f"AND r.time >= {start} AND r.time < {end}"
            )
    merged, quantiles = _merge_bins(cursor, binned(metrics), numbers, start, end)
    with registered(cursor, "quantiles", quantiles):
        _insert(cursor, metrics, merged, start, end, through)
    row = cursor.execute("SELECT count(*) FROM touched").fetchone()
    return int(row[0]) if row else 0


def _insert(
    cursor: DuckDBPyConnection, metrics: Sequence[Metric], merged: ArrowTable, start: str, end: str, through: int
) -> None:
    """Insert the touched hours and their counts in bins, each into the table where it belongs."""
    wide = ", ".join(("time", "series", "batch", *(name for name, _ in columns(metrics, HOUR))))
    minutes = " UNION ALL ".join(
        stored_rows(cursor, table, metrics, MINUTE) for table in (MINUTE.table, f"{MINUTE.table}_open")
    )
    values = ", ".join(["h.time", "h.series", "h.batch", *values_of(metrics)])
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE staged AS SELECT make_timestamptz(bucket * {_WIDTH}) AS time, series, bucket, "
        f"{through}::BIGINT AS batch, {from_minutes(metrics)} FROM (SELECT *, epoch_us(time) // {_WIDTH} AS bucket "
        f"FROM ({minutes}) WHERE time >= {start} AND time < {end}) SEMI JOIN touched USING (series, bucket) "
        "GROUP BY series, bucket"
    )
    for (is_open,) in cursor.execute("SELECT DISTINCT open FROM touched").fetchall():
        table = f"{HOUR.table}_open" if is_open else HOUR.table
        cursor.execute(
            f"INSERT INTO {table} ({wide}) SELECT {values} FROM staged h JOIN touched t USING (series, bucket) "
            f"LEFT JOIN quantiles q USING (series, bucket) WHERE t.open = {is_open} ORDER BY h.series, h.bucket"
        )
        with registered(cursor, "merged", merged.to_reader(max_chunksize=ROW_GROUP_ROWS)):
            cursor.execute(
                f"INSERT INTO {table}_bins (time, series, metric, bin, n) SELECT t.time, m.series, m.metric, m.bin, "
                f"m.n FROM merged m JOIN touched t USING (series, bucket) WHERE t.open = {is_open}"
            )


def values_of(metrics: Sequence[Metric]) -> list[str]:
    """SQL of each column of an hour: of rows that `from_minutes` made (`h`), and of the values of p95 (`q`)."""
    p95 = {f"{metric.name}_p95": metric for metric in binned(metrics)}

    def value(name: str) -> str:
        # The middle of a bin may lie outside of what was measured; the least and the greatest are exact.
        metric = p95.get(name)
        if metric is None:
            return f"h.{name}"
        middle, low, high = f"q.{metric.name}::{metric.row.unit.sql}", f"h.{metric.name}_min", f"h.{metric.name}_max"
        return f"CASE WHEN {middle} IS NOT NULL THEN least(greatest({middle}, {low}), {high}) END"

    return [value(name) for name, _ in columns(metrics, HOUR)]


def _merge_bins(
    cursor: DuckDBPyConnection, metrics: Sequence[Metric], numbers: Mapping[str, int], start: str, end: str
) -> tuple[ArrowTable, ArrowTable]:
    """Read the minutes' counts of the touched hours; see `merge_bins`."""
    found = cursor.execute(
        f"SELECT series, epoch_us(time) // {_WIDTH} AS bucket, metric, bin, n FROM {_BINS} "
        f"WHERE time >= {start} AND time < {end}"
    ).to_arrow_table()
    touched = cursor.execute("SELECT series, bucket FROM touched ORDER BY series, bucket").to_arrow_table()
    return merge_bins(found, touched, metrics, numbers)


def merge_bins(
    found: ArrowTable, touched: ArrowTable, metrics: Sequence[Metric], numbers: Mapping[str, int]
) -> tuple[ArrowTable, ArrowTable]:
    """Add up the minutes' counts of hours, and find the p95 of each.

    Args:
        found: counts of minutes: `series`, `bucket` (the hour), `metric`, `bin`, `n`.
        touched: the hours: `series`, `bucket`, in this order.
        metrics: that have bins.
        numbers: of the metrics.

    Returns:
        The counts (`series`, `bucket`, `metric`, `bin`, `n`); and for each hour the value of the bin of each metric's
        p95, by the metric's name.
    """
    series, bucket = data_of(touched["series"]), data_of(touched["bucket"])
    hours = len(series)
    first = int(bucket.min()) if hours else 0
    places = np.full((int(series.max()) + 1 if hours else 0, int(bucket.max()) - first + 1 if hours else 0), -1)
    places[series, bucket - first] = np.arange(hours)
    of_series = data_of(found["series"])
    known = of_series < len(places)
    at = np.full(len(of_series), -1)
    at[known] = places[of_series[known], data_of(found["bucket"])[known] - first]
    metric, bins, counts = data_of(found["metric"]), data_of(found["bin"]), data_of(found["n"])
    if not (at >= 0).all():
        chosen = at >= 0
        at, metric, bins, counts = at[chosen], metric[chosen], bins[chosen], counts[chosen]
    parts: list[tuple[Numbers, int, NDArray[np.int16], Numbers]] = []
    quantiles: dict[str, Any] = {"series": touched["series"], "bucket": touched["bucket"]}
    for one in metrics:
        chosen = np.flatnonzero(metric == numbers[one.name])
        which, bin_of, n, p95, there = _merged(at[chosen], bins[chosen], counts[chosen], hours)
        parts.append((which, numbers[one.name], bin_of, n))
        value = p95.astype(np.float64)
        if not is_linear(one):
            value = np.where(p95 == ZERO_BIN, 0.0, np.power(BIN_RATIO, np.where(p95 == ZERO_BIN, 0.0, value)))
        quantiles[one.name] = pa.array(value, mask=~there)
    which = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, dtype=np.int64)
    merged = pa.table(
        {
            "series": pa.array(series[which], type=pa.int32()),
            "bucket": pa.array(bucket[which], type=pa.int64()),
            "metric": pa.array(
                np.repeat(np.array([part[1] for part in parts], np.int16), [len(part[0]) for part in parts])
            ),
            "bin": pa.array(np.concatenate([part[2] for part in parts]) if parts else [], type=pa.int16()),
            "n": pa.array(np.concatenate([part[3] for part in parts]) if parts else [], type=pa.uint32()),
        }
    )
    return merged, pa.table(quantiles)


def _merged(
    at: Numbers, bins: NDArray[np.int16], counts: NDArray[np.uint32], hours: int
) -> tuple[Numbers, NDArray[np.int16], Numbers, NDArray[np.int16], NDArray[np.bool_]]:
    """Add up one metric's counts in an array of hours by bins.

    Returns:
        Hour, bin and count of each that is not 0; bin of the p95 of each hour; and which hours have any.
    """
    p95, there = np.zeros(hours, dtype=np.int16), np.zeros(hours, dtype=np.bool_)
    if not len(at):
        return np.zeros(0, dtype=np.int64), bins, np.zeros(0, dtype=np.int64), p95, there
    zero = bins == ZERO_BIN
    low = int(bins.min(where=~zero, initial=np.iinfo(np.int16).max))
    high = int(bins.max())
    # The bin of 0 is far below all others: here it is the one before the least.
    low, high = (low - 1, high) if not zero.all() else (0, 0)
    column = np.where(zero, low, bins).astype(np.int64) - low
    width = high - low + 1
    found: list[tuple[Numbers, NDArray[np.int16], Numbers]] = []
    step = max(1, _CELLS_AT_ONCE // width)
    for begin in range(0, hours, step):
        end = min(begin + step, hours)
        chosen = slice(None) if step >= hours else (at >= begin) & (at < end)
        cells = (at[chosen] - begin) * width + column[chosen]
        sums = np.bincount(cells, weights=counts[chosen], minlength=(end - begin) * width).astype(np.int64)
        table = sums.reshape(-1, width)
        upto = table.cumsum(axis=1)
        total = upto[:, -1]
        there[begin:end] = total > 0
        place = (upto >= -(-95 * total // 100)[:, None]).argmax(axis=1)
        p95[begin:end] = np.where((place == 0) & zero.any(), ZERO_BIN, place + low)
        full = np.flatnonzero(sums)
        bin_of = full % width
        bin_of = np.where((bin_of == 0) & zero.any(), ZERO_BIN, bin_of + low).astype(np.int16)
        found.append((full // width + begin, bin_of, sums[full]))
    which, bin_of, n = (np.concatenate(part) for part in zip(*found, strict=True))
    return which, bin_of, n, p95, there
