"""What several statements share: a transaction, and Arrow tables that they can name."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable

import duckdb
from duckdb import DuckDBPyConnection

from .interface import ArrowTable


@contextlib.contextmanager
def transaction(cursor: DuckDBPyConnection) -> Generator[None]:
    """All of the block's statements, or none."""
    cursor.execute("BEGIN TRANSACTION")
    try:
        yield
        cursor.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(duckdb.Error):
            cursor.execute("ROLLBACK")
        raise


def column_names(cursor: DuckDBPyConnection, table: str) -> set[str]:
    """The columns that a table has."""
    return {row[0] for row in cursor.execute(f"DESCRIBE {table}").fetchall()}


def columns_of(cursor: DuckDBPyConnection, definition: str) -> list[tuple[str, str]]:
    """Name and type of the columns that `CREATE TABLE` would make of a definition."""
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE wanted ({definition})")
    found = [(row[0], row[1]) for row in cursor.execute("DESCRIBE temp.main.wanted").fetchall()]
    cursor.execute("DROP TABLE temp.main.wanted")
    return found


def add_missing(cursor: DuckDBPyConnection, table: str, columns: Iterable[tuple[str, str]]) -> None:
    """Add the columns, by name and type, that a table does not have yet; the rows that are there are null in them."""
    have = column_names(cursor, table)
    for name, kind in columns:
        if name not in have:
            cursor.execute(f'ALTER TABLE {table} ADD COLUMN "{name}" {kind}')


@contextlib.contextmanager
def registered(cursor: DuckDBPyConnection, name: str, table: ArrowTable) -> Generator[None]:
    """Let a statement see an Arrow table under a name."""
    cursor.register(name, table)
    try:
        yield
    finally:
        with contextlib.suppress(duckdb.Error):
            cursor.unregister(name)
