"""Helpers for SQL statements: transactions, columns, upserts, and Arrow tables that statements can name."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any, cast

import duckdb
import pyarrow as pa
from duckdb import DuckDBPyConnection

from .protocol import ArrowTable


@contextlib.contextmanager
def transaction(cursor: DuckDBPyConnection) -> Generator[None]:
    """Run the block in a transaction: all of its statements take effect, or none."""
    cursor.execute("BEGIN TRANSACTION")
    try:
        yield
        cursor.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(duckdb.Error):
            cursor.execute("ROLLBACK")
        raise


def column_names(cursor: DuckDBPyConnection, table: str) -> set[str]:
    """Names of a table's columns."""
    # Planned, not run: `DESCRIBE` takes milliseconds for a table of hundreds of columns.
    return {row[0] for row in cursor.execute(f"FROM {table} LIMIT 0").description or ()}


def columns_of(cursor: DuckDBPyConnection, definition: str) -> list[tuple[str, str]]:
    """Name and type of the columns that `CREATE TABLE` would create from a definition."""
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
    """Replace the rows that have the keys of new rows, and insert the others. Call it in a transaction.

    Old rows are deleted and new ones inserted. After an `UPDATE` (and an upsert is one) DuckDB does not checkpoint its
    log into the file while a reader is active that began earlier. Overlapping readers would let the log grow forever.

    Args:
        cursor: in a transaction.
        table: without a primary key, since DuckDB never takes the deleted rows out of one that has a key.
        rows: the statement that selects them, by the names of the table's columns; it may read the table itself.
        keys: columns that identify a row.
    """
    same = " AND ".join(f"{table}.{key} = p.{key}" for key in keys)
    cursor.execute(f"CREATE OR REPLACE TEMP TABLE placed AS {rows}")
    cursor.execute(f"DELETE FROM {table} USING placed p WHERE {same}")
    cursor.execute(f"INSERT INTO {table} BY NAME FROM placed")


def put_meta(cursor: DuckDBPyConnection, key: str, value: str) -> None:
    """Set a value in `corral_meta`. Call it in a transaction."""
    cursor.execute("DELETE FROM corral_meta WHERE key = ?", [key])
    cursor.execute("INSERT INTO corral_meta VALUES (?, ?)", [key, value])


@contextlib.contextmanager
def registered(cursor: DuckDBPyConnection, name: str, table: ArrowTable) -> Generator[None]:
    """Register an Arrow table under a name, for the statements of the block; its texts are `without_nul`."""
    cursor.register(name, without_nul(table))
    try:
        yield
    finally:
        with contextlib.suppress(duckdb.Error):
            cursor.unregister(name)


def without_nul(table: ArrowTable) -> ArrowTable:
    """Replace NUL characters in the texts of a table by U+FFFD, in nested values, too.

    PostgreSQL stores no NUL (its documentation, 8.3), and DuckLake 1.5.5 writes rows and statistics to such a catalog
    as text: one name in one message would stop a lake's history for good.
    """
    if not isinstance(table, pa.Table):
        return table
    for at, field in enumerate(table.schema):
        column: Any = table.column(at)
        if any(_has_nul(chunk) for chunk in column.chunks):
            values = pa.array(_replaced(column.to_pylist()), field.type)
            table = table.set_column(at, field, values)
    return table


def _has_nul(array: Any) -> bool:
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        data = array.buffers()[2]
        return data is not None and b"\0" in data.to_pybytes()
    if pa.types.is_dictionary(kind):
        return _has_nul(array.dictionary)
    if pa.types.is_map(kind):
        return _has_nul(array.keys) or _has_nul(array.items)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_nul(array.values)
    if pa.types.is_struct(kind):
        return any(_has_nul(array.field(at)) for at in range(kind.num_fields))
    return False


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
        return {_replaced(key): _replaced(each) for key, each in pairs}
    if isinstance(value, list | tuple):
        return type(value)(map(_replaced, cast("list[Any]", value)))
    return value
