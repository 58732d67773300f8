"""Rollups of 10 s, 1 min and 1 h, kept equal to what a recomputation from raw samples would give.

Rows that have come since the last refresh are found by the batch numbers of the raw rows. Each (device, bucket) among
them is recomputed from all its raw samples, those of archived days included. So samples may be late, and a crash leaves
nothing to repair. The newest bucket of each device is in a small separate table (`…_open`), since it is written again
and again; an older one is written once, and again if a late sample falls into it.

Quantiles merge: for 1 min and 1 h the values of each gauge are kept as counts in bins (`…_bins`), and the p95 of an
hour is that of its minutes' counts added up. The p95 of 10 s and of 1 min is exact (nearest rank, as `quantile_disc`).
A bin is 1 wide for percent and degrees Celsius, so that the p95 of an hour is off by 0.5 at most; otherwise it spans a
ratio of 1.02, so that it is off by 1% at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import pyarrow as pa
from duckdb import DuckDBPyConnection

from ....schemas.metrics import METRICS, Metric
from .. import growth
from ..folding import Folded, fold
from ..growth import Tables
from ..protocol import ROW_GROUP_ROWS, ArrowTable
from ..rollup_columns import (
    BIN_RATIO,
    HOUR,
    LEVELS,
    MINUTE,
    TEMPLATE,
    TEN_SECONDS,
    ZERO_BIN,
    Level,
    add_columns,
    binned,
    columns,
    counters,
    create,
    from_minutes,
    is_linear,
)
from ..schema import NO_SERIES, day_of, day_table, sql_text
from ..statements import column_names, put, registered, transaction

__all__ = [
    "HOUR",
    "LEVELS",
    "MINUTE",
    "TEN_SECONDS",
    "Level",
    "create",
    "refresh",
    "refresh_archived",
    "runs",
]

_HOURS: Final = f"(FROM {TEMPLATE} UNION ALL BY NAME FROM {HOUR.table} UNION ALL BY NAME FROM {HOUR.table}_open)"
ROWS_AT_ONCE: Final = 500_000
"""Approximate number of raw rows for one step of a refresh: ingest waits for the commit of a step, and quantiles hold
their values in memory. Smaller steps cost a tenth more CPU time when there is much to catch up on."""


def refresh(
    cursor: DuckDBPyConnection,
    level: Level,
    days: Sequence[str],
    archived: Mapping[str, Sequence[Path]] | None = None,
    minutes_from: datetime | None = None,
) -> int:
    """Bring a rollup up to date with what has been committed. Each step is a transaction that may be repeated.

    Args:
        cursor: that is not used elsewhere meanwhile.
        level: to refresh.
        days: that have a raw table.
        archived: files of archived days, which a late sample may still belong to.
        minutes_from: rollups of 1 min before it are deleted, so stored hours before it are not recomputed.

    Returns:
        Number of buckets written.
    """
    through = _through(cursor, level)
    done = _done(cursor, level)
    if through <= done:
        return 0
    metrics = _metrics(cursor, level, days)
    for table in (level.table, f"{level.table}_open"):
        add_columns(cursor, table, metrics, level)
    source = _source(level, days, {})
    width = level.seconds * 1_000_000
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE touched_all AS SELECT series, epoch_us(time) // {width} AS bucket, "
        f"count(*) AS rows FROM {source} WHERE batch > {done} AND batch <= {through} GROUP BY ALL"
    )
    # The bucket that was the newest of its device until now is computed again with it, so that it can be told which
    # one is the newest now.
    cursor.execute(
        f"INSERT INTO touched_all SELECT series, epoch_us(time) // {width}, samples FROM {level.table}_open "
        "SEMI JOIN touched_all t USING (series) "
        f"ANTI JOIN touched_all u ON u.series = {level.table}_open.series "
        f"AND u.bucket = epoch_us({level.table}_open.time) // {width}"
    )
    if level is HOUR and minutes_from is not None:
        _leave_whole_hours(cursor, minutes_from)
    per_bucket = cursor.execute("SELECT bucket, sum(rows) FROM touched_all GROUP BY bucket ORDER BY bucket").fetchall()
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE newest AS SELECT series, max(bucket) AS bucket FROM touched_all GROUP BY series"
    )
    written = 0
    for first, last in runs([(int(bucket), int(rows)) for bucket, rows in per_bucket]):
        with transaction(cursor):
            written += _step(cursor, level, metrics, days, archived or {}, first, last, through)
    with transaction(cursor):
        put(cursor, "store.rolled", f"SELECT {sql_text(level.name)} AS level, {through}::BIGINT AS batch", ["level"])
    return written


def _leave_whole_hours(cursor: DuckDBPyConnection, minutes_from: datetime) -> None:
    """Exclude stored hours whose minutes were deleted from a refresh, since they would only cover what is left.

    Such an hour is touched if a device returns after months, or if a sample is as late. It is moved to the table of
    closed hours.
    """
    width = HOUR.seconds * 1_000_000
    limit = -(-int(minutes_from.timestamp() * 1e6) // width)
    stored = " UNION ALL ".join(
        f"SELECT series, epoch_us(time) // {width} AS bucket FROM {table} "
        f"WHERE time < make_timestamptz({limit * width})"
        for table in (HOUR.table, f"{HOUR.table}_open")
    )
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE whole AS SELECT DISTINCT series, bucket, make_timestamptz(bucket * "
        f"{width}) AS time FROM touched_all SEMI JOIN ({stored}) USING (series, bucket) WHERE bucket < {limit}"
    )
    if cursor.execute("SELECT 1 FROM whole LIMIT 1").fetchone() is None:
        return
    with transaction(cursor):
        # What was the newest hour of its device until now is that no more.
        for suffix in ("", "_bins") if HOUR.bins else ("",):
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


def refresh_archived(cursor: DuckDBPyConnection, day: str, files: Sequence[Path]) -> None:
    """Recompute all rollups of an archived day from its files, after they were lost.

    Args:
        cursor: that is not used elsewhere meanwhile.
        day: such as `20261124`.
        files: all of the day.
    """
    raw = _source(MINUTE, (), {day: files})
    counts = cursor.execute("SELECT " + ", ".join(f"count({name})" for name in METRICS) + f" FROM {raw}").fetchone()
    metrics = [metric for metric, count in zip(METRICS.values(), counts or (), strict=False) if count]
    start = f"TIMESTAMPTZ '{day[:4]}-{day[4:6]}-{day[6:]} 00:00:00+00'"
    for level in LEVELS:
        width = level.seconds * 1_000_000
        source = _source(level, (), {day: files})
        for table in (level.table, f"{level.table}_open"):
            add_columns(cursor, table, metrics, level)
        cursor.execute(
            f"CREATE OR REPLACE TEMP TABLE touched_all AS SELECT series, epoch_us(time) // {width} AS bucket, "
            f"count(*) AS rows FROM {source} WHERE time >= {start} AND time < {start} + INTERVAL 1 DAY GROUP BY ALL"
        )
        # None of them is the newest of its device: that one is computed from raw samples.
        cursor.execute("CREATE OR REPLACE TEMP TABLE newest AS SELECT DISTINCT series, -1 AS bucket FROM touched_all")
        found = cursor.execute("SELECT bucket, sum(rows) FROM touched_all GROUP BY bucket ORDER BY bucket").fetchall()
        for first, last in runs([(int(bucket), int(rows)) for bucket, rows in found]):
            with transaction(cursor):
                _step(cursor, level, metrics, (), {day: files}, first, last, 0)


def runs(buckets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut buckets (each with its number of rows, ascending) into runs without wide gaps, small enough for one step."""
    found: list[tuple[int, int]] = []
    rows = 0
    for bucket, size in buckets:
        if found and bucket <= found[-1][1] + 6 and rows + size <= ROWS_AT_ONCE:
            found[-1] = (found[-1][0], bucket)
            rows += size
        else:
            found.append((bucket, bucket))
            rows = size
    return found


def _through(cursor: DuckDBPyConnection, level: Level) -> int:
    if level is HOUR:
        row = cursor.execute("SELECT batch FROM store.rolled WHERE level = ?", [MINUTE.name]).fetchone()
    else:
        row = cursor.execute("SELECT coalesce(max(batch), 0) FROM store.watermarks").fetchone()
    return int(row[0]) if row else 0


def _done(cursor: DuckDBPyConnection, level: Level) -> int:
    row = cursor.execute("SELECT batch FROM store.rolled WHERE level = ?", [level.name]).fetchone()
    return int(row[0]) if row else 0


def _metrics(cursor: DuckDBPyConnection, level: Level, days: Sequence[str]) -> list[Metric]:
    """Metrics with data: those in the tables that the level reads, and those that it has columns for."""
    had = column_names(cursor, level.table)
    if level is HOUR:
        had |= column_names(cursor, MINUTE.table)
    else:
        had |= {f"{name}_last" for day in days for name in column_names(cursor, day_table(day))}
    return [metric for metric in METRICS.values() if f"{metric.name}_last" in had]


def _archived_within(archived: Mapping[str, Sequence[Path]], first: int, end: int) -> dict[str, Sequence[Path]]:
    """Archived days that a range of seconds overlaps."""
    low, high = day_of(first * 1_000_000), day_of((end - 1) * 1_000_000)
    return {day: files for day, files in archived.items() if low <= day <= high}


def _source(level: Level, days: Sequence[str], archived: Mapping[str, Sequence[Path]]) -> str:
    if level is HOUR:
        return f"(SELECT * FROM {MINUTE.table} UNION ALL BY NAME SELECT * FROM {MINUTE.table}_open)"
    parts = [f"FROM {table}" for table in (NO_SERIES, *(day_table(day) for day in sorted(days)))]
    files = ", ".join(sql_text(str(file)) for found in archived.values() for file in found)
    if files:
        parts.append(
            "SELECT p.* EXCLUDE (host, device), s.series, 0::BIGINT AS batch "
            f"FROM read_parquet([{files}], union_by_name = true, hive_partitioning = false) p "
            "JOIN store.series s USING (host, device)"
        )
    return "(" + " UNION ALL BY NAME ".join(parts) + ")"


def _step(
    cursor: DuckDBPyConnection,
    level: Level,
    metrics: Sequence[Metric],
    days: Sequence[str],
    archived: Mapping[str, Sequence[Path]],
    first: int,
    last: int,
    through: int,
) -> int:
    """Recompute the touched buckets of a run and replace the old ones; return the number of buckets."""
    width = level.seconds * 1_000_000

    def samples(first: int, end: int) -> str:
        """Rows between two times in microseconds, those of archived days included."""
        source = _source(level, days, _archived_within(archived, first // 1_000_000, -(-end // 1_000_000)))
        return f"SELECT * FROM {source} WHERE time >= make_timestamptz({first}) AND time < make_timestamptz({end})"

    start, end = f"make_timestamptz({first * width})", f"make_timestamptz({(last + 1) * width})"
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE touched AS SELECT t.series, t.bucket, "
        f"make_timestamptz(t.bucket * {width}) AS time, t.bucket = n.bucket AS open "
        f"FROM touched_all t JOIN newest n USING (series) WHERE t.bucket BETWEEN {first} AND {last}"
    )
    if level is HOUR:
        _stage_hours(cursor, metrics, samples(first * width, (last + 1) * width), start, end, through)
        _delete_touched(cursor, level, start, end)
        return _insert_hours(cursor, metrics)
    folded = _fold(cursor, level, metrics, samples(first * width, (last + 1) * width))
    counted = counters(metrics)
    _stage_counters(cursor, folded.rows, counted)
    stored = (level.table, f"{level.table}_open")
    tables = Tables(level, ("series",), stored, _HOURS, samples, f"batch = {through}", falls_marked=True)
    growth.join(cursor, tables, counted, first, last)
    _delete_touched(cursor, level, start, end)
    _insert_folded(cursor, level, metrics, folded, through)
    return folded.rows.num_rows


def _delete_touched(cursor: DuckDBPyConnection, level: Level, start: str, end: str) -> None:
    """Delete the stored rows of the touched buckets, all of them between two times."""
    for suffix in ("", "_bins") if level.bins else ("",):
        for table in (f"{level.table}{suffix}", f"{level.table}_open{suffix}"):
            cursor.execute(
                f"DELETE FROM {table} USING touched t WHERE {table}.series = t.series AND {table}.time = t.time "
                f"AND {table}.time >= {start} AND {table}.time < {end}"
            )


def _fold(cursor: DuckDBPyConnection, level: Level, metrics: Sequence[Metric], samples: str) -> Folded:
    """Aggregate the samples of the touched buckets."""
    picked = ", ".join(("series", *(metric.name for metric in metrics)))
    rows = cursor.execute(
        f"SELECT epoch_us(time) AS us, {picked} FROM "
        f"(SELECT *, epoch_us(time) // {level.seconds * 1_000_000} AS bucket FROM ({samples})) "
        "SEMI JOIN touched USING (series, bucket)"
    ).to_arrow_table()
    numbers = dict(cursor.execute("SELECT name, metric FROM store.metrics").fetchall()) if level.bins else {}
    return fold(rows, metrics, level, numbers)


def _stage_counters(cursor: DuckDBPyConnection, rows: ArrowTable, counted: Sequence[Metric]) -> None:
    """Create the table `staged` with what the growth of counters is computed from."""
    parts = [f"{metric.name}_{part}" for metric in counted for part in ("first", "last", "inner", "increase")]
    with registered(cursor, "folded", rows.select(["time", "series", *parts])):
        cursor.execute("CREATE OR REPLACE TEMP TABLE staged AS FROM folded")


def _insert_folded(
    cursor: DuckDBPyConnection, level: Level, metrics: Sequence[Metric], folded: Folded, through: int
) -> None:
    """Insert buckets with the growth of their counters from `staged`, each where `touched` says."""
    increases = [f"{metric.name}_increase" for metric in counters(metrics)]
    # In the order of the folded rows.
    known = cursor.execute(
        f"SELECT {', '.join(['t.open', *increases])} FROM staged s JOIN touched t USING (series, time) "
        "ORDER BY series, time"
    ).to_arrow_table()
    rows = folded.rows
    for name in increases:
        rows = rows.set_column(rows.column_names.index(name), name, known[name])
    is_open = known["open"].to_numpy()
    names = ", ".join(rows.column_names)
    for table, chosen in ((level.table, ~is_open), (f"{level.table}_open", is_open)):
        # Most refreshes close no bucket, and to plan an insert of hundreds of columns takes as long without rows.
        if not chosen.any():
            continue
        part = rows if chosen.all() else rows.filter(pa.array(chosen))
        with registered(cursor, "folded", part.to_reader(max_chunksize=ROW_GROUP_ROWS)):
            cursor.execute(f"INSERT INTO {table} ({names}, batch) SELECT {names}, {through}::BIGINT FROM folded")
        if folded.bins is not None:
            bins = folded.bins.filter(pa.array(chosen[folded.rows_of_bins]))
            with registered(cursor, "folded", bins.to_reader(max_chunksize=ROW_GROUP_ROWS)):
                cursor.execute(f"INSERT INTO {table}_bins (time, series, metric, bin, n) FROM folded")


def _insert_hours(cursor: DuckDBPyConnection, metrics: Sequence[Metric]) -> int:
    """Insert the staged hours and their counts in bins, each where `touched` says; return the number of hours."""
    wide = ", ".join(("time", "series", "batch", *(name for name, _ in columns(metrics, HOUR))))
    for (is_open,) in cursor.execute("SELECT DISTINCT open FROM touched").fetchall():
        table = f"{HOUR.table}_open" if is_open else HOUR.table
        for suffix, names in (("", wide), ("_bins", "time, series, metric, bin, n")):
            cursor.execute(
                f"INSERT INTO {table}{suffix} ({names}) SELECT {names} FROM staged{suffix} "
                f"JOIN touched t USING (series, time) WHERE t.open = {is_open}"
            )
    row = cursor.execute("SELECT count(*) FROM staged").fetchone()
    return int(row[0]) if row else 0


def _stage_hours(
    cursor: DuckDBPyConnection, metrics: Sequence[Metric], minutes: str, start: str, end: str, through: int
) -> None:
    """Create the tables `staged` and `staged_bins` of the touched hours from minutes."""
    width = HOUR.seconds * 1_000_000
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE staged AS SELECT make_timestamptz(bucket * {width}) AS time, series, "
        f"{through}::BIGINT AS batch, {from_minutes(metrics)} FROM (SELECT *, epoch_us(time) // {width} AS bucket "
        f"FROM ({minutes})) SEMI JOIN touched USING (series, bucket) GROUP BY series, bucket"
    )
    _stage_merged_bins(cursor, metrics, start, end)


def _stage_merged_bins(cursor: DuckDBPyConnection, metrics: Sequence[Metric], start: str, end: str) -> None:
    """Add up the minutes' counts in bins, and compute the p95 of each hour from them."""
    width = HOUR.seconds * 1_000_000
    both = f"(SELECT * FROM {MINUTE.table}_bins UNION ALL BY NAME SELECT * FROM {MINUTE.table}_open_bins)"
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE staged_bins AS SELECT make_timestamptz(bucket * {width}) AS time, "
        f"series, metric, bin, sum(n)::UINTEGER AS n FROM (SELECT *, epoch_us(time) // {width} AS bucket FROM {both} "
        f"WHERE time >= {start} AND time < {end}) SEMI JOIN touched USING (series, bucket) "
        "GROUP BY bucket, series, metric, bin"
    )
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE quantiles AS SELECT time, series, metric, min(bin) AS bin FROM ("
        "SELECT *, sum(n) OVER (PARTITION BY time, series, metric ORDER BY bin) AS upto, "
        "sum(n) OVER (PARTITION BY time, series, metric) AS total FROM staged_bins) "
        "WHERE upto >= ceil(0.95 * total) GROUP BY ALL"
    )
    numbers = dict(cursor.execute("SELECT name, metric FROM store.metrics").fetchall())
    # One pass: a column for each metric, from the rows of the long table.
    picks, sets = list[str](), list[str]()
    for metric in binned(metrics):
        name, sql = metric.name, metric.row.unit.sql
        value = "bin" if is_linear(metric) else f"CASE WHEN bin = {ZERO_BIN} THEN 0 ELSE pow({BIN_RATIO}, bin) END"
        picks.append(f"(any_value({value}) FILTER (metric = {numbers[name]}))::{sql} AS {name}")
        # The middle of a bin may lie outside of what was measured; the least and the greatest are exact.
        sets.append(f"{name}_p95 = least(greatest(q.{name}, staged.{name}_min), staged.{name}_max)")
    if not sets:
        return
    cursor.execute(
        f"UPDATE staged SET {', '.join(sets)} FROM (SELECT time, series, {', '.join(picks)} FROM quantiles "
        "GROUP BY time, series) q WHERE q.time = staged.time AND q.series = staged.series"
    )
