"""Rollups in a lake: the same columns as the embedded storage's, equal to a recomputation from raw samples.

Rows that have come since the last refresh are in DuckLake's change feed between two snapshots. Each (device, bucket) in
it is recomputed from all its raw samples, and its old row replaced, in a transaction that also updates the row of
`store.rolled`. So of two processors that do it at once, one fails and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from duckdb import DuckDBPyConnection

from ....schemas.metrics import METRICS, Metric
from ... import views
from .. import growth
from .. import rollup_columns as shapes
from ..embedded.hours import runs
from ..growth import Tables
from ..rollup_columns import LEVELS, Level
from ..rollup_derived import idleness, known
from ..schema import sql_text
from ..statements import add_missing, transaction

REFRESH_SECONDS: Final = {"10s": 60.0, "1m": 60.0, "1h": 600.0}
"""An hour is recomputed from all its raw samples, so it is refreshed seldom."""

_METRICS: Final = list(METRICS.values())
_BINNED: Final = shapes.binned(_METRICS)
_FEED: Final = "ducklake_table_insertions('lake', 'main', 'samples', {first}::BIGINT, {last}::BIGINT)"


_SERIES: Final = "concat(host, '/', device) AS series"
"""Name of a device in the views that other views join: a lake has no numbers for devices."""


def create(connection: DuckDBPyConnection) -> None:
    """Create the tables of a new lake."""
    connection.execute("CREATE TABLE store.rolled (level VARCHAR, snapshot BIGINT, steps BIGINT)")
    key = "time TIMESTAMPTZ, host VARCHAR, device VARCHAR"
    for level in LEVELS:
        columns = ", ".join(f"{name} {sql}" for name, sql in shapes.columns(_METRICS, level))
        connection.execute(f"CREATE TABLE {level.table} ({key}, {columns})")
        connection.execute(f"INSERT INTO store.rolled VALUES ({sql_text(level.name)}, 0, 0)")
        if level.bins:
            connection.execute(f"CREATE TABLE {level.table}_bins ({key}, metric VARCHAR, bin SMALLINT, n UINTEGER)")


def shape(level: Level) -> list[tuple[str, str]]:
    """Name and type of each column of a level apart from its key."""
    return shapes.columns(_METRICS, level)


def add_columns(connection: DuckDBPyConnection) -> None:
    """Add the columns that the rollups of an older lake lack, and have all of them recomputed from the raw samples."""
    for level in LEVELS:
        add_missing(connection, level.table, shapes.columns(_METRICS, level))
    connection.execute("UPDATE store.rolled SET snapshot = 0")


def view_statements() -> list[str]:
    """Statements that create or replace the views and macros of a lake."""
    found: list[str] = []
    linear = ", ".join(sql_text(metric.name) for metric in _BINNED if shapes.is_linear(metric))
    for level in LEVELS:
        columns = ", ".join(shapes.shown(level))
        found.append(f"VIEW rollup_{level.name} AS SELECT time, host, device, {columns} FROM {level.table}")
        found.append(f"VIEW store.series_{level.name} AS SELECT time, {_SERIES}, {columns} FROM {level.table}")
        if level.bins:
            found.append(
                f"VIEW rollup_{level.name}_bins AS SELECT time, host, device, metric, "
                f"CASE WHEN metric IN ({linear}) THEN bin WHEN bin = {shapes.ZERO_BIN} THEN 0 "
                f"ELSE pow({shapes.BIN_RATIO}, bin) END AS value, n FROM {level.table}_bins"
            )
            found.append(
                f"VIEW store.series_{level.name}_bins AS SELECT time, {_SERIES}, metric, bin, n FROM {level.table}_bins"
            )
    hours = shapes.HOUR.table
    found.append(f"VIEW store.series AS SELECT DISTINCT {_SERIES}, host, device FROM {hours}")
    found.append(f"MACRO {shapes.WEIGHTED_QUANTILE}")
    found += [f"VIEW {name} AS {sql}" for name, sql in views.definitions()]
    rows = ", ".join(f"({sql_text(v.name)}, {sql_text(v.question)})" for v in views.VIEWS.values())
    found.append(f"VIEW questions AS FROM (VALUES {rows}) AS q(view, question)")
    return [f"CREATE OR REPLACE {statement}" for statement in found] + [
        f"COMMENT ON VIEW {view.name} IS {sql_text(view.question)}" for view in views.VIEWS.values()
    ]


def refresh(cursor: DuckDBPyConnection, level: Level) -> int:
    """Bring a rollup up to date with the lake, and return the number of buckets written."""
    # An hour reads its minutes too, and is never ahead of them.
    newest = "(SELECT id FROM lake.current_snapshot())"
    if level == shapes.HOUR:
        newest = f"(SELECT snapshot FROM store.rolled WHERE level = {sql_text(shapes.MINUTE.name)})"
    row = cursor.execute(f"SELECT snapshot, {newest} FROM store.rolled WHERE level = ?", [level.name]).fetchone()
    done, through = (int(row[0]), int(row[1])) if row else (0, 0)
    if through <= done:
        return 0
    width = level.seconds * 1_000_000
    # Before the first refresh everything is new, whatever of the feed has expired.
    source = _FEED.format(first=done + 1, last=through) if done else "samples"
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE touched_all AS SELECT host, device, epoch_us(time) // {width} AS bucket, "
        f"count(*) AS rows, min(epoch_us(time)) % {width} AS since FROM {source} GROUP BY ALL"
    )
    if level == shapes.HOUR:
        _add_neighbors(cursor)
    found = cursor.execute(
        "SELECT bucket, sum(rows) FROM temp.main.touched_all GROUP BY bucket ORDER BY bucket"
    ).fetchall()
    written = 0
    steps = runs([(int(bucket), int(rows)) for bucket, rows in found])
    for first, last in steps:
        with transaction(cursor):
            cursor.execute("UPDATE store.rolled SET steps = steps + 1 WHERE level = ?", [level.name])
            written += _step(cursor, level, first, last)
    with transaction(cursor):
        cursor.execute("UPDATE store.rolled SET snapshot = ? WHERE level = ?", [through, level.name])
    return written


def _time(bucket: int, width: int) -> str:
    return f"make_timestamptz({bucket * width})"


def _add_neighbors(cursor: DuckDBPyConnection) -> None:
    """Also touch the hours whose minutes a late sample changes.

    One is the hour of the counters' next reading. Another is the hour before, if the samples come so soon after its
    end that they show if a value in it was passing (see `growth.py`).
    """
    width = shapes.HOUR.seconds * 1_000_000
    cursor.execute(
        "INSERT INTO temp.main.touched_all SELECT n.host, n.device, n.bucket, n.rows, 0 FROM ("
        f"SELECT r.host, r.device, unnest([min(epoch_us(r.time) // {width}) FILTER (epoch_us(r.time) // {width} > "
        f"t.bucket), min(t.bucket - 1) FILTER (epoch_us(r.time) // {width} = t.bucket - 1 AND t.since < "
        f"{4_000_000 * growth.PASSING_SECONDS})]) AS bucket, any_value(r.samples) AS rows "
        f"FROM {shapes.HOUR.table} r JOIN temp.main.touched_all t ON r.host = t.host AND r.device = t.device "
        "GROUP BY r.host, r.device, t.bucket) n ANTI JOIN temp.main.touched_all u "
        "ON u.host = n.host AND u.device = n.device AND u.bucket = n.bucket WHERE n.bucket IS NOT NULL GROUP BY ALL"
    )


def _step(cursor: DuckDBPyConnection, level: Level, first: int, last: int) -> int:
    """Recompute the touched buckets of a run and replace their old rows; return the number of buckets."""
    width = level.seconds * 1_000_000
    start, end = _time(first, width), _time(last + 1, width)
    # It is not known here if there is a newer bucket, so the next reading is always looked up.
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE touched AS SELECT DISTINCT host, device, bucket, "
        f"make_timestamptz(bucket * {width}) AS time, false AS open FROM temp.main.touched_all "
        f"WHERE bucket BETWEEN {first} AND {last}"
    )

    def samples(first: int, end: int) -> str:
        """Rows between two times in microseconds."""
        within = f"time >= make_timestamptz({first}) AND time < make_timestamptz({end})"
        return f"SELECT * FROM lake.main.samples WHERE {within}"

    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE raw AS SELECT * FROM (SELECT *, epoch_us(time) // {width} AS bucket "
        f"FROM ({samples(first * width, (last + 1) * width)})) SEMI JOIN temp.main.touched USING (host, device, bucket)"
    )
    # Most devices have a third of the metrics: those that none has cost nothing.
    counts = cursor.execute(f"SELECT {', '.join(f'count({name})' for name in METRICS)} FROM temp.main.raw").fetchone()
    metrics = [metric for metric, count in zip(_METRICS, counts or (), strict=True) if count]
    names = ", ".join(name for name, _ in shapes.columns(metrics, level))
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE staged AS SELECT make_timestamptz(bucket * {width}) AS time, host, device, "
        f"{shapes.from_raw(metrics, level)} FROM temp.main.raw GROUP BY host, device, bucket"
    )
    if level == shapes.HOUR:
        _add_from_minutes(cursor, metrics, start, end)
    else:
        tables = Tables(level, ("host", "device"), (f"lake.{level.table}",), f"lake.{shapes.HOUR.table}", samples)
        growth.join(cursor, tables, shapes.counters(metrics), first, last)
    staged = "(host, device, time) IN (SELECT (host, device, time) FROM temp.main.staged)"
    key = f"{staged} AND time >= {start} AND time < {end}"
    cursor.execute(f"DELETE FROM lake.{level.table} WHERE {key}")
    cursor.execute(
        f"INSERT INTO lake.{level.table} (time, host, device, {names}) SELECT time, host, device, {names} "
        "FROM temp.main.staged ORDER BY host, device, time"
    )
    if level.bins:
        _replace_bins(cursor, level, shapes.binned(metrics), width, key)
    row = cursor.execute("SELECT count(*) FROM temp.main.staged").fetchone()
    return int(row[0]) if row else 0


def _add_from_minutes(cursor: DuckDBPyConnection, metrics: Sequence[Metric], start: str, end: str) -> None:
    """Set the columns of an hour that come from the rollup of its minutes.

    These are the idle minutes, the time that samples stand for, and the growth of counters.
    """
    derived = [*known(), *idleness({metric.name for metric in metrics})]
    found = [(column.name, column.merged) for column in derived]
    for metric in shapes.counters(metrics):
        name = metric.name
        found += [(f"{name}_{part}", shapes.bigint_or_null(f"sum({name}_increase)")) for part in ("inner", "increase")]
    values = ", ".join(f"{merged} AS {name}" for name, merged in found)
    cursor.execute(
        f"UPDATE temp.main.staged SET {', '.join(f'{name} = m.{name}' for name, _ in found)} FROM ("
        f"SELECT host, device, hour, {values} FROM ("
        "SELECT *, make_timestamptz(epoch_us(time) // 3600000000 * 3600000000) AS hour "
        f"FROM lake.{shapes.MINUTE.table} WHERE time >= {start} AND time < {end}) GROUP BY host, device, hour) m "
        "WHERE m.host = staged.host AND m.device = staged.device AND m.hour = staged.time"
    )


def _replace_bins(cursor: DuckDBPyConnection, level: Level, metrics: Sequence[Metric], width: int, key: str) -> None:
    parts: Sequence[str] = [
        f"SELECT make_timestamptz(bucket * {width}) AS time, host, device, {sql_text(m.name)} AS metric, "
        f"{shapes.bin_of(m)} AS bin, count(*)::UINTEGER AS n FROM temp.main.raw WHERE {m.name} IS NOT NULL GROUP BY ALL"
        for m in metrics
    ]
    cursor.execute(f"DELETE FROM lake.{level.table}_bins WHERE {key}")
    if parts:
        cursor.execute(f"INSERT INTO lake.{level.table}_bins {' UNION ALL '.join(parts)}")
