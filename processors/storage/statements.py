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


@contextlib.contextmanager
def registered(cursor: DuckDBPyConnection, name: str, table: ArrowTable) -> Generator[None]:
    """Let a statement see an Arrow table under a name."""
    cursor.register(name, table)
    try:
        yield
    finally:
        with contextlib.suppress(duckdb.Error):
            cursor.unregister(name)
