"""What several statements share: a transaction, and Arrow tables that they can name."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

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


def add_missing(cursor: DuckDBPyConnection, table: str, columns: str) -> None:
    """Add the columns that a table of an earlier version does not have yet; their old rows are null there.

    Args:
        cursor: in a transaction.
        table: to be changed.
        columns: all that it should have, as `CREATE TABLE` takes them.
    """
    have = {row[0] for row in cursor.execute(f"DESCRIBE {table}").fetchall()}
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE wanted ({columns})")
    for name, kind, *_ in cursor.execute("DESCRIBE temp.main.wanted").fetchall():
        if name not in have:
            cursor.execute(f'ALTER TABLE {table} ADD COLUMN "{name}" {kind}')
    cursor.execute("DROP TABLE temp.main.wanted")


@contextlib.contextmanager
def registered(cursor: DuckDBPyConnection, name: str, table: ArrowTable) -> Generator[None]:
    """Let a statement see an Arrow table under a name."""
    cursor.register(name, table)
    try:
        yield
    finally:
        with contextlib.suppress(duckdb.Error):
            cursor.unregister(name)
