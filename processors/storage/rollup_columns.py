"""Columns of rollups: levels, tables, views, and the SQL of each aggregate of a metric."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Final

from duckdb import DuckDBPyConnection
from msgspec import Struct

from ...schemas.metrics import METRICS, Metric
from ...schemas.rows import CELSIUS, PERCENT
from .rollup_derived import Derived, idleness, known, throttling
from .rollup_restoring import restored
from .statements import add_missing, column_names

BIN_RATIO: Final = 1.02
ZERO_BIN: Final = -32768
"""Bin of 0, which has no logarithm."""
FELL: Final = -1
"""In the column `…_inner`: the counter did not only rise within the bucket."""


class Level(Struct, frozen=True):
    """A level of rollups.

    Attributes:
        name: `10s`, `1m` or `1h`.
        seconds: width of a bucket.
        bins: true if it keeps counts in bins.
    """

    name: str
    seconds: int
    bins: bool

    @property
    def table(self) -> str:
        """Table of the closed buckets."""
        return f"store.rollup_{self.name}"


TEN_SECONDS: Final = Level("10s", 10, False)
MINUTE: Final = Level("1m", 60, True)
HOUR: Final = Level("1h", 3600, True)
LEVELS: Final = (TEN_SECONDS, MINUTE, HOUR)

TEMPLATE: Final = "store.rollup_none"
"""An empty table with every column: the tables of the levels have those of the metrics that have come."""

_KEY: Final = "time TIMESTAMPTZ NOT NULL, series INTEGER NOT NULL"
_EMPTY: Final = f"{_KEY}, batch BIGINT NOT NULL, samples UINTEGER"
"""Columns of a new table."""

WEIGHTED_QUANTILE: Final = """weighted_quantile(values_and_counts, q) AS list_reduce(
    list_transform(
        list_sort(list_filter(values_and_counts, lambda e: e.n > 0)),
        lambda e: {value: e.value::DOUBLE, n: e.n::DECIMAL(38, 9)}
    ),
    lambda a, e: CASE WHEN a.n > 0 OR a.value IS NULL
        THEN {value: e.value, n: (a.n - e.n)::DECIMAL(38, 9)} ELSE a END,
    {value: NULL::DOUBLE, n: (q * list_sum(list_transform(values_and_counts, lambda e: e.n)))::DECIMAL(38, 9)}
).value"""
"""The smallest value that at least q of all counts do not exceed: counts are taken off q of their sum, smallest value
first. One pass: a subquery over the unnested list would carry the whole list along with each of its entries."""


def binned(metrics: Iterable[Metric]) -> list[Metric]:
    """Metrics whose values are kept as counts in bins."""
    return [metric for metric in metrics if "p95" in metric.row.rollup]


def counters(metrics: Iterable[Metric]) -> list[Metric]:
    """Metrics that are counters."""
    return [metric for metric in metrics if "increase" in metric.row.rollup]


def is_linear(metric: Metric) -> bool:
    """True if the bins of a metric are 1 wide; otherwise each spans a ratio of `BIN_RATIO`."""
    return metric.row.unit in (PERCENT, CELSIUS)


def derived(metrics: Iterable[Metric], level: Level) -> list[Derived]:
    """Columns of a level that belong to no single metric."""
    names = {metric.name for metric in metrics}
    return (known() if level.bins else []) + throttling(names) + (idleness(names) if level == HOUR else [])


def columns(metrics: Sequence[Metric], level: Level) -> list[tuple[str, str]]:
    """Name and type of each stored column apart from the key: those that views show, and those that a merge needs."""
    found: list[tuple[str, str]] = [("samples", "UINTEGER")]
    for metric in metrics:
        name, sql = metric.name, metric.row.unit.sql
        for aggregate in metric.row.rollup:
            if aggregate == "mean":
                found += [(f"{name}_count", "UINTEGER"), (f"{name}_sum", "DOUBLE")]
            elif aggregate == "increase":
                found += [(f"{name}_first", sql), (f"{name}_inner", sql), (f"{name}_increase", sql)]
            else:
                found.append((f"{name}_{aggregate}", sql))
    return found + [(column.name, column.sql) for column in derived(metrics, level)]


def shown(level: Level) -> list[str]:
    """Columns of a level's view, apart from time and device."""
    # Of hours every column is stored.
    values = restored(list(METRICS.values())) if level is not HOUR else {}

    def value(column: str) -> str:
        return f"{values[column]} AS {column}" if column in values else column

    found = ["samples"]
    for name, metric in METRICS.items():
        for aggregate in metric.row.rollup:
            if aggregate == "mean":
                mean = f"{name}_sum / {name}_count"
                if values:
                    mean = f"coalesce({mean}, {name}_last)"
                found += [f"{mean} AS {name}_mean", value(f"{name}_count")]
            else:
                found.append(value(f"{name}_{aggregate}"))
    return found + [value(column.name) for column in derived(METRICS.values(), level)]


def stored_rows(cursor: DuckDBPyConnection, table: str, metrics: Sequence[Metric], level: Level) -> str:
    """SELECT of the rows of a level's table with all columns of some metrics, those included that it was spared."""
    have = column_names(cursor, table)
    values = restored(metrics, have)
    found = ["time", "series", "batch"]
    for name, sql in columns(metrics, level):
        value = values.get(name) or (name if name in have else f"NULL::{sql}")
        found.append(f"{value} AS {name}")
    return f"SELECT {', '.join(found)} FROM {table}"


def create(cursor: DuckDBPyConnection) -> None:
    """Create missing tables, add columns of new metrics, and create the views."""
    cursor.execute(
        "CREATE TABLE IF NOT EXISTS store.metrics (metric SMALLINT PRIMARY KEY, name VARCHAR, linear BOOLEAN)"
    )
    known = {row[0] for row in cursor.execute("SELECT name FROM store.metrics").fetchall()}
    for metric in binned(METRICS.values()):
        if metric.name not in known:
            cursor.execute(
                "INSERT INTO store.metrics SELECT coalesce(max(metric) + 1, 0), ?, ? FROM store.metrics",
                [metric.name, is_linear(metric)],
            )
    # A new table gets all columns at once: a statement for each of its hundreds of columns takes a quarter of a second.
    every = ", ".join(f'"{name}" {kind}' for name, kind in columns(list(METRICS.values()), HOUR))
    cursor.execute(f"CREATE TABLE IF NOT EXISTS {TEMPLATE} ({_KEY}, batch BIGINT NOT NULL, {every})")
    add_columns(cursor, TEMPLATE, list(METRICS.values()), HOUR)
    for level in LEVELS:
        for table in (level.table, f"{level.table}_open"):
            cursor.execute(f"CREATE TABLE IF NOT EXISTS {table} ({_EMPTY})")
            if level.bins:
                cursor.execute(
                    f"CREATE TABLE IF NOT EXISTS {table}_bins ({_KEY}, metric SMALLINT, bin SMALLINT, n UINTEGER)"
                )
    for level in LEVELS:
        if cursor.execute("FROM store.rolled WHERE level = ?", [level.name]).fetchone() is None:
            cursor.execute("INSERT INTO store.rolled VALUES (?, 0)", [level.name])
    _create_views(cursor)


def _create_views(cursor: DuckDBPyConnection) -> None:
    """Create the views and macros unless they are there already: to plan them takes 0.5 s, and leaves 27 MiB behind."""
    statements = [f"CREATE OR REPLACE MACRO {WEIGHTED_QUANTILE}"]
    for level in LEVELS:
        statements += _views(level) + (_bins_views(level) if level.bins else [])
    made = hashlib.sha256(repr((statements, columns(list(METRICS.values()), HOUR))).encode()).hexdigest()
    # In the comment of the one that is made last: an older Corral replaces it by one without.
    last = f"rollup_{LEVELS[-1].name}_bins"
    comment = "SELECT comment FROM duckdb_views() WHERE schema_name = 'main' AND view_name = ?"
    row = cursor.execute(comment, [last]).fetchone()
    if row is not None and row[0] == made:
        return
    for statement in statements:
        cursor.execute(statement)
    cursor.execute(f"COMMENT ON VIEW {last} IS '{made}'")


def add_columns(cursor: DuckDBPyConnection, table: str, metrics: Sequence[Metric], level: Level) -> None:
    """Add the columns that a table of a level does not have yet."""
    add_missing(cursor, table, columns(metrics, level))


def add_room(cursor: DuckDBPyConnection, table: str, wanted: Sequence[tuple[str, str]]) -> None:
    """Add the columns, by name and type, that a table of a level does not have yet; a new table gets them at once."""
    have = column_names(cursor, table)
    missing = [(name, kind) for name, kind in wanted if name not in have]
    is_new = bool(missing) and len(have) == _EMPTY.count(",") + 1
    if is_new and cursor.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is None:
        added = ", ".join(f'"{name}" {kind}' for name, kind in missing)
        cursor.execute(f"CREATE OR REPLACE TABLE {table} ({_EMPTY}, {added})")
        return
    for name, kind in missing:
        cursor.execute(f'ALTER TABLE {table} ADD COLUMN "{name}" {kind}')


def _views(level: Level) -> list[str]:
    """Statements for the view that people query, and for the one that other views join, with a device's number."""
    both = f"(FROM {TEMPLATE} UNION ALL BY NAME FROM {level.table} UNION ALL BY NAME FROM {level.table}_open)"
    columns = ", ".join(shown(level))
    return [
        f"CREATE OR REPLACE VIEW rollup_{level.name} AS SELECT r.time, s.host, s.device, {columns} "
        f"FROM {both} r JOIN store.series s USING (series)",
        f"CREATE OR REPLACE VIEW store.series_{level.name} AS SELECT time, series, {columns} FROM {both}",
    ]


def _bins_views(level: Level) -> list[str]:
    both = f"(SELECT * FROM {level.table}_bins UNION ALL BY NAME SELECT * FROM {level.table}_open_bins)"
    value = (
        f"CASE WHEN m.linear THEN b.bin WHEN b.bin = {ZERO_BIN} THEN 0 ELSE pow({BIN_RATIO}, b.bin) END AS value, b.n"
    )
    return [
        f"CREATE OR REPLACE VIEW rollup_{level.name}_bins AS SELECT b.time, s.host, s.device, m.name AS metric, "
        f"{value} FROM {both} b JOIN store.series s USING (series) JOIN store.metrics m ON m.metric = b.metric",
        f"CREATE OR REPLACE VIEW store.series_{level.name}_bins AS SELECT b.time, b.series, m.name AS metric, "
        f"b.bin, b.n FROM {both} b JOIN store.metrics m ON m.metric = b.metric",
    ]


def bin_of(metric: Metric) -> str:
    """SQL of the bin that a metric's value falls into."""
    if is_linear(metric):
        return f"round({metric.name})::SMALLINT"
    scale = 1 / math.log(BIN_RATIO)
    return f"CASE WHEN {metric.name} <= 0 THEN {ZERO_BIN} ELSE round(ln({metric.name}) * {scale!r}) END::SMALLINT"


def from_raw(metrics: Sequence[Metric], level: Level) -> str:
    """SQL of the aggregates of a bucket over raw samples, in the order of `columns`.

    The growth within the bucket is in `…_inner`; `…_increase` is null until `growth.join` computes it.
    """
    parts = ["count(*)::UINTEGER AS samples"]
    for metric in metrics:
        name = metric.name
        for aggregate in metric.row.rollup:
            match aggregate:
                case "min" | "max":
                    parts.append(f"{aggregate}({name}) AS {name}_{aggregate}")
                case "mean":
                    parts.append(f"count({name})::UINTEGER AS {name}_count, sum({name})::DOUBLE AS {name}_sum")
                case "p95":
                    parts.append(f"quantile_disc({name}, 0.95) AS {name}_p95")
                case "last":
                    parts.append(f"arg_max({name}, time) AS {name}_last")
                case "any":
                    parts.append(f"bit_or({name}) AS {name}_any")
                case "increase":
                    first, last = f"arg_min({name}, time)", f"arg_max({name}, time)"
                    # A counter that only grew has its least value first and its greatest last; -1 marks all others.
                    grew = f"min({name}) = {first} AND max({name}) = {last}"
                    inner = f"CASE WHEN {grew} THEN {last} - {first} WHEN count({name}) > 0 THEN -1 END"
                    later = f"NULL::{metric.row.unit.sql} AS {name}_increase"
                    parts.append(f"{first} AS {name}_first, {inner} AS {name}_inner, {later}")
                case _:
                    raise ValueError(f"{name}: a rollup has no aggregate {aggregate!r}")
    parts += [f"{column.raw or f'NULL::{column.sql}'} AS {column.name}" for column in derived(metrics, level)]
    return ", ".join(parts)


def bigint_or_null(expression: str) -> str:
    """SQL of a stored sum, null if it overflows: absurd values of one counter must not stop all other rollups."""
    return f"TRY_CAST({expression} AS BIGINT)"


def from_minutes(metrics: Sequence[Metric]) -> str:
    """SQL of the aggregates of an hour over its minutes, in the order of `columns`; p95 is computed from the bins."""
    parts = ["sum(samples)::UINTEGER AS samples"]
    for metric in metrics:
        name = metric.name
        for aggregate in metric.row.rollup:
            match aggregate:
                case "min" | "max":
                    parts.append(f"{aggregate}({name}_{aggregate}) AS {name}_{aggregate}")
                case "mean":
                    parts.append(f"sum({name}_count)::UINTEGER AS {name}_count, sum({name}_sum) AS {name}_sum")
                case "p95":
                    parts.append(f"NULL::{metric.row.unit.sql} AS {name}_p95")
                case "last":
                    parts.append(f"arg_max({name}_last, time) AS {name}_last")
                case "any":
                    parts.append(f"bit_or({name}_any) AS {name}_any")
                case "increase":
                    growth = bigint_or_null(f"sum({name}_increase)")
                    first = f"arg_min({name}_first, time)"
                    parts.append(f"{first} AS {name}_first, {growth} AS {name}_inner, {growth} AS {name}_increase")
                case _:
                    raise ValueError(f"{name}: a rollup has no aggregate {aggregate!r}")
    parts += [f"{column.merged} AS {column.name}" for column in derived(metrics, HOUR)]
    return ", ".join(parts)
