"""An empty copy of a database's schema, in which a statement binds as in the database itself."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

MEMORY_BYTES: Final = 128 * 2**20
"""DuckDB's memory limit in the copy. It holds no rows, so only constants that are computed while planning count."""

MAX_VIEW_WORDS: Final = 80_000
"""Words of all views that a statement may be bound with: DuckDB takes about a second for so many."""

COUNTER: Final = "corral_count_view"
"""Function that counts a view; it is not on the allow-list."""

_WORD: Final = re.compile(r"\w+")
_TEXT: Final = re.compile(r"'[^']*'")

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


class Mirror(Struct, frozen=True):
    """Schema of a database.

    Attributes:
        database: its name.
        statements: that create schemas and tables.
        macros: statements that create macros.
        views: statements that create relations with the columns of the views, which count how often they are bound.
        names: for the allow-list.
    """

    database: str
    statements: tuple[str, ...]
    macros: tuple[str, ...]
    views: tuple[str, ...]
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
        "SELECT schema_name, view_name, sql FROM duckdb_views() WHERE database_name = ? AND NOT internal",
        [database],
    ).fetchall()
    sizes = view_sizes({name.lower(): sql or "" for _, name, sql in views})
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
            _view((schema, name), columns[schema, name], sizes[name.lower()])
            for schema, name, _ in sorted(views)
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


def _view(name: tuple[str, str], columns: Sequence[tuple[str, str]], size: int) -> str:
    values = ", ".join(f"NULL::{kind} AS {_quoted(column)}" for column, kind in columns)
    # DuckDB computes the arguments of a table function when it binds the call.
    return f"CREATE VIEW {_quoted(*name)} AS SELECT {values} FROM range({COUNTER}({size})) WHERE false"


def view_sizes(texts: Mapping[str, str]) -> dict[str, int]:
    """Words in each view's text, with those of the views that it mentions; texts by name in lower case.

    To bind a view takes some 10 µs for each word.
    """
    words = {name: _WORD.findall(_TEXT.sub("", text).lower()) for name, text in texts.items()}
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            sizes[name] = 1  # its own text has its name, too
            sizes[name] = len(words[name]) + sum(size(word) for word in words[name] if word in words)
        return sizes[name]

    for name in words:
        size(name)
    return sizes


def _macros(rows: Iterable[tuple[str, str, str, list[str], str]]) -> list[str]:
    """Statements that create macros; a macro may have several forms."""
    forms: dict[tuple[str, str], list[str]] = {}
    for schema, name, kind, parameters, definition in rows:
        body = f"TABLE {definition}" if kind == "table_macro" else definition
        forms.setdefault((schema, name), []).append(f"({', '.join(map(_quoted, parameters))}) AS {body}")
    return [f"CREATE MACRO {_quoted(*name)}{', '.join(found)}" for name, found in sorted(forms.items())]


class Counter:
    """Words of the views that a statement has been bound with."""

    def __init__(self) -> None:
        self.words = 0

    def add(self, words: int) -> int:
        """Count a view; called by DuckDB.

        Raises:
            MemoryError: these are too many.
        """
        self.words += words
        if self.words > MAX_VIEW_WORDS:
            raise MemoryError
        return 0


def build(mirror: Mirror) -> tuple[DuckDBPyConnection, Counter]:
    """Create an empty database with a schema, with the settings of the original, on this thread alone."""
    connection = duckdb.connect(config={"threads": "1", "memory_limit": f"{MEMORY_BYTES}B"})
    if mirror.database != "memory":
        connection.execute(f"ATTACH ':memory:' AS {_quoted(mirror.database)}")
        connection.execute(f"USE {_quoted(mirror.database)}")
    counter = Counter()
    untyped: Any = connection  # DuckDB's stubs want its own types where it takes their names
    untyped.create_function(COUNTER, counter.add, ["INTEGER"], "INTEGER", side_effects=True)
    for setting in _SETTINGS:
        connection.execute(f"SET {setting}")
    connection.execute("BEGIN")
    for statement in (*mirror.statements, *mirror.views):
        counter.words = 0
        connection.execute(statement)
    connection.execute("COMMIT")
    for macro in mirror.macros:
        with contextlib.suppress(duckdb.Error):  # a statement that calls it does not bind, and is refused
            connection.execute(macro)
    return connection, counter
