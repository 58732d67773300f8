"""From any earlier version of the tables to this one, in one transaction."""

from __future__ import annotations

from collections.abc import Iterable

from duckdb import DuckDBPyConnection

from ...schemas.metrics import METRICS
from . import rollups, schema


def migrate(cursor: DuckDBPyConnection) -> None:
    """Make what is missing, and add the columns of metrics that are new. The caller holds the transaction."""
    cursor.execute("CREATE SCHEMA IF NOT EXISTS store")
    for name, columns in schema.TABLES.items():
        cursor.execute(f"CREATE TABLE IF NOT EXISTS {name} ({columns})")
    cursor.execute(schema.create_day(schema.NO_SERIES))
    add_metrics(cursor, schema.NO_SERIES, METRICS)
    rollups.create(cursor)
    cursor.execute(
        "CREATE OR REPLACE VIEW dead_letters AS SELECT stream, code, sum(messages)::BIGINT AS messages, "
        "min(time) AS first, max(time) AS last FROM store.refused GROUP BY ALL"
    )
    cursor.execute("INSERT OR REPLACE INTO corral_meta VALUES ('version', ?)", [str(schema.VERSION)])


def stored_days(cursor: DuckDBPyConnection) -> list[str]:
    """The days that have a table."""
    rows = cursor.execute(
        "SELECT table_name[9:] FROM duckdb_tables() WHERE schema_name = 'store' "
        "AND regexp_full_match(table_name, 'samples_[0-9]{8}') ORDER BY 1"
    ).fetchall()
    return [str(day) for (day,) in rows]


def add_metrics(cursor: DuckDBPyConnection, table: str, metrics: Iterable[str]) -> None:
    """Add the columns of metrics that a table of samples does not have yet."""
    have = {row[0] for row in cursor.execute(f"DESCRIBE {table}").fetchall()}
    for name in metrics:
        if name not in have:
            cursor.execute(f"ALTER TABLE {table} ADD COLUMN {name} {METRICS[name].row.unit.sql}")
