"""Consistent copy of the history in a separate DuckDB file, made while ingest goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path

import duckdb

from ....schemas.metrics import METRICS
from ... import views
from .. import schema
from . import migrations
from .database import Database, identify

_OURS = "store.archive_files", "store.watermarks", "store.marks", "store.arrivals"
"""Tables that are not copied: a copy has no archive next to it, and no position in a stream."""


def write_snapshot(database: Database, target: Path, archive: bool = True) -> int:
    """Write a copy of all tables at one moment, which needs no other file.

    Args:
        database: to copy.
        target: file to write; it must not exist.
        archive: include the samples of archived days.

    Returns:
        Number of samples in it.

    Raises:
        duckdb.Error: it could not be written; nothing is left of it then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    writing = target.with_name(target.name + ".tmp")
    try:
        samples = _write(database, writing, archive)
        writing.rename(target)
        return samples
    finally:
        for path in (writing, writing.with_name(writing.name + ".wal")):
            path.unlink(missing_ok=True)


def _write(database: Database, path: Path, archive: bool) -> int:
    # An empty history first, made by the same code as any other: tables, rollups, views.
    with duckdb.connect(str(path)) as empty:
        empty.execute("SET TimeZone = 'UTC'")
        identify(empty, path)
        migrations.migrate(empty)
        views.install(empty)
        empty.execute("INSERT INTO corral_meta VALUES ('copied', now()::VARCHAR)")
    cursor = database.cursor()
    copy = f"copy_{path.stem.partition('.')[0]}"
    try:
        cursor.execute(f"ATTACH {schema.sql_text(str(path))} AS {copy}")
        try:
            # One transaction reads one moment, and may write to one other database.
            cursor.execute("BEGIN TRANSACTION")
            samples = _copy(cursor, copy, archive)
            cursor.execute("COMMIT")
            cursor.execute(f"CHECKPOINT {copy}")
        finally:
            with contextlib.suppress(duckdb.Error):
                cursor.execute("ROLLBACK")
            cursor.execute(f"DETACH {copy}")
    finally:
        cursor.close()
    # The view over the days that are there now; a copy is a separate database.
    with duckdb.connect(str(path)) as filled:
        filled.execute("SET TimeZone = 'UTC'")
        filled.execute(schema.samples_view(migrations.stored_days(filled)))
    return samples


def _copy(cursor: duckdb.DuckDBPyConnection, copy: str, archive: bool) -> int:
    here = cursor.execute("SELECT current_database()").fetchone()
    name = here[0] if here else ""
    tables = cursor.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() "
        "WHERE database_name = ? AND NOT internal AND NOT temporary",
        [name],
    ).fetchall()
    for folder, table in tables:
        full = f"{folder}.{table}"
        if full in _OURS or table == "corral_meta" or table.startswith("samples_"):
            continue
        if table.startswith("rollup_"):
            # They have columns as metrics have come.
            cursor.execute(f"CREATE OR REPLACE TABLE {copy}.{full} AS FROM {full}")
            continue
        cursor.execute(f"DELETE FROM {copy}.{full}")
        cursor.execute(f"INSERT INTO {copy}.{full} BY NAME SELECT * FROM {full}")
    samples = 0
    for folder, table in tables:
        if table.startswith("samples_") and table != "samples_none":
            cursor.execute(f"CREATE TABLE {copy}.{folder}.{table} AS FROM {folder}.{table}")
            row = cursor.execute(f"SELECT count(*) FROM {folder}.{table}").fetchone()
            samples += int(row[0]) if row else 0
    return samples + (_copy_archive(cursor, copy) if archive else 0)


def _copy_archive(cursor: duckdb.DuckDBPyConnection, copy: str) -> int:
    """Copy archived days as tables, read through the view `samples`; return the number of samples that this adds."""
    days = cursor.execute(
        "SELECT DISTINCT strftime(day, '%Y%m%d') AS day FROM store.archive_files ORDER BY day"
    ).fetchall()
    stored = migrations.stored_days(cursor)
    names = ", ".join(METRICS)
    copied = 0
    for (day,) in days:
        table = f"{copy}.{schema.day_table(day)}"
        for part in schema.parts_of(day, stored):
            # Late samples have recreated the day's table: the view has both, so all of the day is taken from it.
            late = f"{copy}.{schema.day_table(part)}"
            row = cursor.execute(f"SELECT count(*) FROM {late}").fetchone()
            copied -= int(row[0]) if row else 0
            cursor.execute(f"DROP TABLE {late}")
        cursor.execute(
            f"CREATE TABLE {table} AS SELECT v.time, s.series, 0::BIGINT AS batch, {names} FROM samples v "
            "JOIN store.series s USING (host, device) "
            "WHERE v.time >= ?::DATE::TIMESTAMPTZ AND v.time < (?::DATE + 1)::TIMESTAMPTZ ORDER BY s.series, v.time",
            [f"{day[:4]}-{day[4:6]}-{day[6:]}"] * 2,
        )
        row = cursor.execute(f"SELECT count(*) FROM {table}").fetchone()
        copied += int(row[0]) if row else 0
    return copied
