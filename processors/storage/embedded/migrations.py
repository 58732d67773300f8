"""Migrate the tables from any earlier version to this one, in one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from duckdb import DuckDBPyConnection

from ....schemas.metrics import METRICS, Metric
from .. import peaks, schema
from ..rollup_columns import HOUR, MINUTE, TEN_SECONDS, Level, add_columns, stored_rows
from ..rollup_derived import (
    ALL_MINUTES,
    HEAT,
    HELD_BACK,
    IDLE_PERCENT,
    KNOWN,
    POWER,
    SLOWDOWN,
    Derived,
    idleness,
    known,
    throttling,
)
from ..statements import add_missing, column_names, columns_of
from . import rollups


def migrate(cursor: DuckDBPyConnection) -> None:
    """Create what is missing, and add the columns of new metrics. The caller holds the transaction."""
    cursor.execute("CREATE SCHEMA IF NOT EXISTS store")
    found = cursor.execute("SELECT schema_name || '.' || table_name FROM duckdb_tables()").fetchall()
    there = {str(name).removeprefix("main.") for (name,) in found}
    rows = cursor.execute(
        "SELECT schema_name || '.' || table_name FROM duckdb_constraints() WHERE constraint_type = 'PRIMARY KEY'"
    ).fetchall()
    keyed = {str(name).removeprefix("main.") for (name,) in rows}
    for name, columns in schema.TABLES.items():
        if name in there:
            add_missing(cursor, name, columns_of(cursor, columns))
            if name in keyed and "PRIMARY KEY" not in columns:
                _drop_key(cursor, name, columns)
        else:
            cursor.execute(f"CREATE TABLE {name} ({columns})")
    cursor.execute(schema.create_day(schema.NO_SERIES, METRICS))
    add_metrics(cursor, schema.NO_SERIES, METRICS)
    rollups.create(cursor)
    untold = _lacks_known(cursor)
    row = cursor.execute("SELECT value FROM corral_meta WHERE key = 'version'").fetchone()
    if row is not None and row[0] == "1":
        _fill_derived(cursor)
    if untold:
        _fill_known(cursor)
    if peaks.TABLE not in there and "processes" in there:
        peaks.fill(cursor)
    cursor.execute(
        "CREATE OR REPLACE VIEW dead_letters AS SELECT stream, code, sum(messages)::BIGINT AS messages, "
        "min(time) AS first, max(time) AS last FROM store.refused GROUP BY ALL"
    )
    cursor.execute("INSERT OR REPLACE INTO corral_meta VALUES ('version', ?)", [str(schema.VERSION)])


def _drop_key(cursor: DuckDBPyConnection, table: str, columns: str) -> None:
    """Recreate a table of version 3 or older without its primary key, since DuckDB can't drop one."""
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE kept AS FROM {table}")
    cursor.execute(f"DROP TABLE {table}")
    cursor.execute(f"CREATE TABLE {table} ({columns})")
    cursor.execute(f"INSERT INTO {table} BY NAME FROM kept")
    cursor.execute("DROP TABLE temp.main.kept")


def stored_days(cursor: DuckDBPyConnection) -> list[str]:
    """Days that have a table, and parts of days, such as `20261124_sorted`."""
    rows = cursor.execute(
        "SELECT table_name[9:] FROM duckdb_tables() WHERE schema_name = 'store' "
        f"AND regexp_full_match(table_name, 'samples_[0-9]{{8}}({schema.CLOSED}|{schema.SORTED})?') ORDER BY 1"
    ).fetchall()
    return [str(day) for (day,) in rows]


def add_metrics(cursor: DuckDBPyConnection, table: str, metrics: Iterable[str]) -> None:
    """Add the columns of metrics that a table of samples does not have yet."""
    add_missing(cursor, table, [(name, METRICS[name].row.unit.sql) for name in metrics])


_HOURS: Final = (HOUR.table, f"{HOUR.table}_open")

RECENT: Final = "3 days"
"""Rollups of 1 min of this time are filled in, too: a late sample may cause their hour to be recomputed."""


def _fill_derived(cursor: DuckDBPyConnection) -> None:
    """From version 1: fill in throttled samples and idle minutes, as far as old rollups have them.

    Ten seconds in which a throttle reason was seen count whole, as in the views of that version.
    """
    names = {name for name in METRICS if f"{name}_last" in column_names(cursor, HOUR.table)}
    metrics = [METRICS[name] for name in METRICS if name in names]
    for level in (TEN_SECONDS, MINUTE, HOUR):
        for table in (level.table, f"{level.table}_open"):
            add_columns(cursor, table, metrics, level)
    if "throttle_reasons_bitmask" in names:
        for level, recent in ((MINUTE, f" AND t.time > now() - INTERVAL '{RECENT}'"), (HOUR, "")):
            _set(cursor, level, throttling(names), _from_ten_seconds(cursor, names, level), recent)
    if "gpu_utilization_percent" in names:
        found = idleness(names)
        values = ", ".join(f"{column.merged} AS {column.name}" for column in found)
        hours = f"SELECT series, make_timestamptz(epoch_us(time) // 3600000000 * 3600000000) AS bucket, {values} FROM "
        hours += f"({_rows(cursor, metrics, MINUTE)}) GROUP BY ALL"
        _set(cursor, HOUR, found, hours, "")
        # If the minutes are not kept any more, only hours that were all idle or all busy can be filled in.
        load = "gpu_utilization_percent"
        cursor.execute(
            f"UPDATE {HOUR.table} SET known_minutes_bitmask = {ALL_MINUTES}, idle_minutes_bitmask = "
            f"CASE WHEN {load}_max < {IDLE_PERCENT} THEN {ALL_MINUTES} ELSE 0 END WHERE known_minutes_bitmask IS NULL "
            f"AND ({load}_max < {IDLE_PERCENT} OR {load}_min >= {IDLE_PERCENT})"
        )


def _lacks_known(cursor: DuckDBPyConnection) -> bool:
    """True if there are hours from before rollups kept the time that their samples stand for."""
    rows = " UNION ALL ".join(f"(SELECT 1 FROM {table} LIMIT 1)" for table in _HOURS)
    return cursor.execute(rows).fetchone() is not None and KNOWN not in column_names(cursor, HOUR.table)


def _fill_known(cursor: DuckDBPyConnection) -> None:
    """Fill in that time for such hours: 60 s for each of their minutes that has a rollup."""
    for table in _HOURS:
        add_missing(cursor, table, [(column.name, column.sql) for column in known()])
    minutes = (
        f"SELECT series, make_timestamptz(epoch_us(time) // 3600000000 * 3600000000) AS bucket, 60.0 * count(*) "
        f"AS {KNOWN} FROM (FROM {MINUTE.table} UNION ALL BY NAME FROM {MINUTE.table}_open) GROUP BY ALL"
    )
    _set(cursor, HOUR, known(), minutes, "")


def _rows(cursor: DuckDBPyConnection, metrics: Sequence[Metric], level: Level) -> str:
    tables = (level.table, f"{level.table}_open")
    return " UNION ALL ".join(stored_rows(cursor, table, metrics, level) for table in tables)


def _from_ten_seconds(cursor: DuckDBPyConnection, names: set[str], level: Level) -> str:
    held = f"(throttle_reasons_bitmask_any & {HELD_BACK}) <> 0"
    parts = [
        f"sum(CASE WHEN (throttle_reasons_bitmask_any & {bits}) <> 0 THEN samples ELSE 0 END)::UINTEGER AS {name}"
        for name, bits in (
            ("throttled_samples", HELD_BACK),
            ("throttled_thermal_samples", HEAT),
            ("throttled_power_samples", POWER),
            ("throttled_slowdown_samples", SLOWDOWN),
        )
    ]
    if {"sm_clock_megahertz", "sm_clock_max_megahertz"} <= names:
        percent = "100 * sm_clock_megahertz_sum / nullif(sm_clock_max_megahertz_last, 0)"
        parts.append(f"sum({percent}) FILTER ({held}) AS throttled_sm_clock_percent_sum")
        count = f"sum(sm_clock_megahertz_count) FILTER ({held} AND sm_clock_max_megahertz_last > 0)"
        parts.append(f"coalesce({count}, 0)::UINTEGER AS throttled_sm_clock_percent_count")
    width = level.seconds * 1_000_000
    return (
        f"SELECT series, make_timestamptz(epoch_us(time) // {width} * {width}) AS bucket, {', '.join(parts)} FROM "
        f"({_rows(cursor, [METRICS[name] for name in METRICS if name in names], TEN_SECONDS)}) GROUP BY ALL"
    )


def _set(cursor: DuckDBPyConnection, level: Level, columns: list[Derived], source: str, which: str) -> None:
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE derived AS {source}")
    sets = ", ".join(f"{column.name} = d.{column.name}" for column in columns)
    for table in (level.table, f"{level.table}_open"):
        cursor.execute(
            f"UPDATE {table} t SET {sets} FROM derived d WHERE d.series = t.series AND d.bucket = t.time{which}"
        )
    cursor.execute("DROP TABLE derived")
