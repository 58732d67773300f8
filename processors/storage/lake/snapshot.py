"""Copy of a lake in a separate DuckDB file: one snapshot of DuckLake, with the views, for any DuckDB to open."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import duckdb

from ..schema import sql_text
from . import rollups
from .lake import Lake, attach

PROGRAM: Final = "corral lake copy"
"""Program in the copy's `corral_meta`, so that no processor takes the copy for a history."""


def write_snapshot(lake: Lake, target: Path, archive: bool, recent: timedelta) -> int:
    """Write a copy.

    Args:
        lake: to copy.
        target: file to write; it must not exist.
        archive: include all samples; otherwise only those that are not older than `recent`.
        recent: see `archive`.

    Returns:
        Number of samples in it.

    Raises:
        duckdb.Error, StorageError, StoragePaused: it could not be written; nothing is left of it then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    writing = target.with_name(target.name + ".tmp")
    connection = attach(lake, read_only=True)
    try:
        connection.execute(f"ATTACH {sql_text(str(writing))} AS copy")
        connection.execute("CREATE SCHEMA copy.store")
        tables = connection.execute(
            "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'lake'"
        ).fetchall()
        # One transaction reads one snapshot, and may write to one other database.
        connection.execute("BEGIN TRANSACTION")
        for schema, table in tables:
            kept = ""
            if table == "samples" and not archive:
                kept = f" WHERE time >= {sql_text((datetime.now(UTC) - recent).isoformat())}::TIMESTAMPTZ"
            connection.execute(f"CREATE TABLE copy.{schema}.{table} AS FROM lake.{schema}.{table}{kept}")
        connection.execute("UPDATE copy.corral_meta SET value = ? WHERE key = 'program'", [PROGRAM])
        connection.execute("INSERT INTO copy.corral_meta VALUES ('copied', now()::VARCHAR)")
        connection.execute("COMMIT")
        row = connection.execute("SELECT count(*) FROM copy.samples").fetchone()
        connection.execute("DETACH copy")
        with duckdb.connect(str(writing)) as filled:
            filled.execute("SET TimeZone = 'UTC'")
            for statement in rollups.view_statements():
                filled.execute(statement)
        writing.rename(target)
        return int(row[0]) if row else 0
    finally:
        connection.close()
        for path in (writing, writing.with_name(writing.name + ".wal")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
