"""An empty copy of a database's schema, in which a statement binds as in the database itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Final

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

MEMORY_BYTES: Final = 128 * 2**20
"""DuckDB's memory limit in the copy. It holds no rows, so only constants that are computed while planning count."""

_SETTINGS: Final = (
    "GLOBAL TimeZone = 'UTC'",
    "python_enable_replacements = false",
    "autoinstall_known_extensions = false",
    "autoload_known_extensions = false",
    "enable_external_access = false",
    "lock_configuration = true",
)


class Names(Struct, frozen=True):
    """Names in a database, in lower case.

    Attributes:
        relations: tables and views that readers may use.
        hidden: all others, which a CTE must not shadow.
        macros: of the history.
        database: of the history.
    """

    relations: frozenset[str]
    hidden: frozenset[str]
    macros: frozenset[str]
    database: str


class View(Struct, frozen=True):
    """A view, by its SQL, and by an empty relation with the same columns where that SQL reads files."""

    sql: str
    empty: str


class Mirror(Struct, frozen=True):
    """Schema of a database.

    Attributes:
        database: its name.
        statements: that create schemas and tables.
        macros: statements that create macros.
        views: in the order in which they were created.
        names: for the allow-list.
    """

    database: str
    statements: tuple[str, ...]
    macros: tuple[str, ...]
    views: tuple[View, ...]
    names: Names


def read(cursor: DuckDBPyConnection, private: Sequence[str] = ()) -> Mirror:
    """Read the schema of a cursor's database; `private` lists tables that readers should not see."""
    database = str(cursor.execute("SELECT current_database()").fetchall()[0][0])
    schemas = cursor.execute(
        "SELECT schema_name FROM duckdb_schemas() WHERE database_name = ? AND NOT internal AND schema_name <> 'main'",
        [database],
    ).fetchall()
    columns: dict[tuple[str, str], list[tuple[str, str]]] = {}
    rows = cursor.execute(
        "SELECT schema_name, table_name, column_name, data_type FROM duckdb_columns() "
        "WHERE database_name = ? AND NOT internal ORDER BY table_oid, column_index",
        [database],
    ).fetchall()
    for schema, table, column, kind in rows:
        columns.setdefault((schema, table), []).append((column, kind))
    views = cursor.execute(
        "SELECT schema_name, view_name, sql FROM duckdb_views() WHERE database_name = ? AND NOT internal "
        "ORDER BY view_oid",
        [database],
    ).fetchall()
    tables = columns.keys() - {(schema, name) for schema, name, _ in views}
    macros = cursor.execute(
        "SELECT schema_name, function_name, function_type, parameters, macro_definition FROM duckdb_functions() "
        "WHERE database_name = ? AND NOT internal AND function_type IN ('macro', 'table_macro')",
        [database],
    ).fetchall()
    return Mirror(
        database,
        (
            *(f"CREATE SCHEMA {_quoted(schema)}" for (schema,) in sorted(schemas)),
            *(_table(name, columns[name]) for name in sorted(tables)),
        ),
        tuple(_macros(macros)),
        tuple(
            View(sql, _empty((schema, name), columns[schema, name]))
            for schema, name, sql in views
            if (schema, name) in columns
        ),
        _names(cursor, database, {row[1] for row in macros}, private),
    )


def _names(cursor: DuckDBPyConnection, database: str, macros: Iterable[str], private: Sequence[str]) -> Names:
    rows = cursor.execute(
        "SELECT lower(name), own FROM ("
        " SELECT table_name AS name, database_name = $1 AND schema_name = 'main' AS own"
        " FROM duckdb_tables() UNION ALL"
        " SELECT view_name, NOT internal AND database_name = $1 AND schema_name = 'main'"
        " FROM duckdb_views())",
        [database],
    ).fetchall()
    own = {name for name, is_own in rows if is_own} - {name.lower() for name in private}
    return Names(
        relations=frozenset(own),
        hidden=frozenset(name for name, _ in rows) - own,
        macros=frozenset(name.lower() for name in macros),
        database=database.lower(),
    )


def _quoted(*names: str) -> str:
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def _table(name: tuple[str, str], columns: Sequence[tuple[str, str]]) -> str:
    return f"CREATE TABLE {_quoted(*name)} ({', '.join(f'{_quoted(column)} {kind}' for column, kind in columns)})"


def _empty(name: tuple[str, str], columns: Sequence[tuple[str, str]]) -> str:
    values = ", ".join(f"NULL::{kind} AS {_quoted(column)}" for column, kind in columns)
    return f"CREATE VIEW {_quoted(*name)} AS SELECT {values} WHERE false"


def _macros(rows: Iterable[tuple[str, str, str, list[str], str]]) -> list[str]:
    """Statements that create macros; a macro may have several forms."""
    forms: dict[tuple[str, str], list[str]] = {}
    for schema, name, kind, parameters, definition in rows:
        body = f"TABLE {definition}" if kind == "table_macro" else definition
        forms.setdefault((schema, name), []).append(f"({', '.join(map(_quoted, parameters))}) AS {body}")
    return [f"CREATE MACRO {_quoted(*name)}{', '.join(found)}" for name, found in sorted(forms.items())]


def build(mirror: Mirror) -> DuckDBPyConnection:
    """Create an empty database with a schema, with the settings of the original, on this thread alone."""
    connection = duckdb.connect(config={"threads": "1", "memory_limit": f"{MEMORY_BYTES}B"})
    if mirror.database != "memory":
        connection.execute(f"ATTACH ':memory:' AS {_quoted(mirror.database)}")
        connection.execute(f"USE {_quoted(mirror.database)}")
    for setting in _SETTINGS:
        connection.execute(f"SET {setting}")
    connection.execute("BEGIN")
    for statement in mirror.statements:
        connection.execute(statement)
    connection.execute("COMMIT")
    for macro in mirror.macros:
        with contextlib.suppress(duckdb.Error):  # a statement that calls it does not bind, and is refused
            connection.execute(macro)
    _create_views(connection, mirror.views)
    return connection


def _create_views(connection: DuckDBPyConnection, views: Sequence[View]) -> None:
    """Create views: those that read files as empty relations, and each after those that it mentions."""
    waiting = list(views)
    while waiting:
        left = [view for view in waiting if not _create_view(connection, view)]
        if len(left) == len(waiting):
            # A view whose SQL no longer binds, as one whose table is gone.
            connection.execute(left.pop(0).empty)
        waiting = left


def _create_view(connection: DuckDBPyConnection, view: View) -> bool:
    try:
        connection.execute(view.sql)
    except duckdb.PermissionException:
        connection.execute(view.empty)
    except duckdb.Error:
        return False
    return True
