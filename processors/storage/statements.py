"""What several statements share: a transaction, and Arrow tables that they can name."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence

import duckdb
from duckdb import DuckDBPyConnection

from .protocol import ArrowTable


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


def put(cursor: DuckDBPyConnection, table: str, rows: str, keys: Sequence[str]) -> None:
    """Put rows in the place of those that have their keys, or beside the others where none has. In a transaction.

    They are deleted and inserted: behind an `UPDATE`, and an upsert is one, DuckDB does not fold its log into the file
    for as long as a reader is under way that began before it; so that readers that overlap would let it grow for ever.

    Args:
        cursor: in a transaction.
        table: without a primary key, since DuckDB never takes the deleted rows out of one that has a key.
        rows: the statement that selects them, by the names of the table's columns; it may read the table itself.
        keys: columns that tell a row from others.
    """
    same = " AND ".join(f"{table}.{key} = p.{key}" for key in keys)
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE placed AS {rows}")
    cursor.execute(f"DELETE FROM {table} USING placed p WHERE {same}")
    cursor.execute(f"INSERT INTO {table} BY NAME FROM placed")


def put_meta(cursor: DuckDBPyConnection, key: str, value: str) -> None:
    """Say a fact about the database in `corral_meta`. In a transaction."""
    cursor.execute("DELETE FROM corral_meta WHERE key = ?", [key])
    cursor.execute("INSERT INTO corral_meta VALUES (?, ?)", [key, value])


@contextlib.contextmanager
def registered(cursor: DuckDBPyConnection, name: str, table: ArrowTable) -> Generator[None]:
    """Let a statement see an Arrow table under a name."""
    cursor.register(name, table)
    try:
        yield
    finally:
        with contextlib.suppress(duckdb.Error):
            cursor.unregister(name)
