"""Guard for readers' SQL: one SELECT over the history's tables and views, with functions that only compute.

Four barriers, each sufficient against most attempts:

1. DuckDB's parser turns the statement into a tree; each node of it must be of a known kind, each function on the
   allow-list (`allowlist.py`), each relation one of the history's (`SqlGuard.check`);
2. the instance has no access to files outside of the storage's folders, loads no extension, and its settings are locked
   (`storage/hardening.py`);
3. the statement runs in a read-only transaction (`begin`), on a separate cursor;
4. time, rows, memory and spill are bounded (`service.py`, `storage/hardening.py`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

from . import bind_growth
from .allowlist import FORMATS, FUNCTIONS, LENGTHS, LIST_ITEMS, OPERATORS, TABLE_FUNCTIONS
from .catalogue import Catalogue, read_catalogue
from .parse_growth import TooLarge, check_text
from .tree import objects

CATALOGUE_VIEWS: Final = frozenset(("tables", "columns", "schemata"))
"""Views of `information_schema` with names and types only. All other catalogs show paths, settings or SQL."""

ARROWS: Final = 8
"""Largest nesting of `->` and of lambdas."""

NAMES_SECONDS: Final = 1.0
"""The list of tables and views is read again after a refusal, but not more often than this."""

SHOW_NAMES: Final = frozenset(("", "tables", "__show_tables_expanded"))
"""`DESCRIBE`, `SUMMARIZE`, `SHOW TABLES`, `SHOW ALL TABLES`."""

# Kinds of nodes of DuckDB's serialized tree, by the key that they stand under. What is not named is refused.
_NODE_KINDS = """
SELECT_NODE SET_OPERATION_NODE RECURSIVE_CTE_NODE CTE_NODE ORDER_MODIFIER LIMIT_MODIFIER
LIMIT_PERCENT_MODIFIER DISTINCT_MODIFIER EMPTY EMPTY_FROM BASE_TABLE SUBQUERY JOIN TABLE_FUNCTION
EXPRESSION_LIST SHOW_REF PIVOT ORDER_DEFAULT ASCENDING DESCENDING
"""
_NODES: Final = frozenset(_NODE_KINDS.split())
_EXPRESSION_KINDS = """
BETWEEN CASE CAST COLLATE COLUMN_REF COMPARISON CONJUNCTION CONSTANT DEFAULT FUNCTION LAMBDA LAMBDA_REF
OPERATOR PARAMETER POSITIONAL_REFERENCE STAR SUBQUERY TYPE WINDOW
"""
_EXPRESSIONS: Final = frozenset(_EXPRESSION_KINDS.split())
_NAME: Final = re.compile(r"\w+")


class QueryError(Exception):
    """Failure of a query, with the error code for its client.

    Attributes:
        code: `invalid` (the SQL is wrong), `refused` (the SQL is not for readers), `timeout`, `cancelled`,
            `too_large` (memory, spill or answer), `busy` (the queue is full), `unavailable` (the processor stops, or
            can't keep the answer), `internal` (the processor's log says why).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Statement(Struct, frozen=True):
    """A statement that a reader may run.

    Attributes:
        sql: its text, without what follows it.
        limited: the same with a limit on its rows, or `sql` if that could not be proven equal.
    """

    sql: str
    limited: str


class Names(Struct, frozen=True):
    """Names in a database that the fence needs, in lower case.

    Attributes:
        relations: tables and views of the history.
        hidden: all others, which a CTE must not shadow.
        macros: of the history.
        database: of the history.
        catalogue: sizes of relations and macros.
    """

    relations: frozenset[str]
    hidden: frozenset[str]
    macros: frozenset[str]
    database: str
    catalogue: Catalogue


def read_names(cursor: DuckDBPyConnection, private: Sequence[str] = ()) -> Names:
    """Read the names from the database's catalog; `private` lists tables that readers should not see."""
    rows = cursor.execute(
        "SELECT lower(name), own FROM ("
        " SELECT table_name AS name, database_name = current_database() AND schema_name = 'main' AS own"
        " FROM duckdb_tables() UNION ALL"
        " SELECT view_name, NOT internal AND database_name = current_database() AND schema_name = 'main'"
        " FROM duckdb_views())"
    ).fetchall()
    own = {name for name, is_own in rows if is_own} - {name.lower() for name in private}
    macros = cursor.execute(
        "SELECT DISTINCT lower(function_name) FROM duckdb_functions()"
        " WHERE NOT internal AND database_name = current_database() AND function_type IN ('macro', 'table_macro')"
    ).fetchall()
    return Names(
        relations=frozenset(own),
        hidden=frozenset(name for name, _ in rows) - own,
        macros=frozenset(name for (name,) in macros),
        database=str(cursor.execute("SELECT current_database()").fetchall()[0][0]).lower(),
        catalogue=read_catalogue(cursor),
    )


class SqlGuard:
    """Checks statements against one database.

    Args:
        connect: gives a new cursor on the database.
        private: tables that readers should not see.
    """

    def __init__(self, connect: Callable[[], DuckDBPyConnection], private: Sequence[str] = ()) -> None:
        self._connect = connect
        self._private = tuple(private)
        self._names: Names | None = None
        self._read_at = 0.0

    def check(self, sql: str, limit: int) -> Statement:
        """Parse a statement and check every node of it.

        Args:
            sql: as the reader sent it.
            limit: rows that will be read at most.

        Raises:
            QueryError: `invalid` or `refused`, with what to do.
        """
        cursor = self._connect()
        try:
            text, explain = _one_statement(cursor, sql)
            tree = _parse(cursor, text)
            try:
                self._check_tree(cursor, text, tree)
            except QueryError:
                # A table may be newer than the list of names; but a flood of refusals must not read the list each time.
                if time.monotonic() - self._read_at < NAMES_SECONDS:
                    raise
                self._names = None
                self._check_tree(cursor, text, tree)
            if explain:
                return Statement(explain + text, explain + text)
            return Statement(text, _limited(cursor, text, tree, limit))
        finally:
            cursor.close()

    def _check_tree(self, cursor: DuckDBPyConnection, text: str, tree: dict[str, Any]) -> None:
        names = self._names
        if names is None:
            self._read_at = time.monotonic()
            names = self._names = read_names(cursor, self._private)
        _check_arrows(tree)
        nodes = list(objects(tree))
        ctes = {str(entry["key"]).lower() for node in nodes for entry in _cte_entries(node)}
        for name in ctes:
            if name in names.hidden or not _NAME.fullmatch(name):
                raise QueryError("refused", f"a CTE can't be called {name!r} here: choose another name")
        # Table functions in FROM produce rows one vector at a time, so their size needs no check.
        in_from = {id(node["function"]) for node in nodes if node.get("type") == "TABLE_FUNCTION"}
        for node in nodes:
            _check_node(node, names, ctes)
            if "function_name" in node and id(node) not in in_from:
                _check_size(str(node["function_name"]).lower(), node.get("children") or [])
        _check_expansion(text, tree, names)


def _one_statement(cursor: DuckDBPyConnection, sql: str) -> tuple[str, str]:
    """Text of the only statement, and the EXPLAIN in front of it, if any."""
    if "\0" in sql:
        raise QueryError("invalid", "the SQL contains a NUL character")
    try:
        check_text(sql)
        statements = cursor.extract_statements(sql)
    except TooLarge as error:
        raise QueryError("refused", str(error)) from None
    except duckdb.Error as error:
        raise QueryError("invalid", str(error)) from None
    if not statements:
        raise QueryError("invalid", "there is no statement in this SQL")
    kinds = [statement.type.name for statement in statements]
    if kinds == ["CREATE", "SELECT"] and not statements[0].query.strip():
        raise QueryError("refused", "a PIVOT needs its values written out: PIVOT … ON column IN (value, …)")
    if len(statements) > 1:
        raise QueryError("refused", f"one statement at a time: this SQL has {len(statements)}")
    text = statements[0].query.strip().rstrip(";").strip()
    if kinds[0] == "SELECT":
        return text, ""
    if kinds[0] == "EXPLAIN":
        return _strip_explain(text)
    raise QueryError(
        "refused", f"{kinds[0]} is not for readers: the history is read-only, and answers SELECT, DESCRIBE and the like"
    )


_SPACE: Final = r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)"
_EXPLAIN: Final = re.compile(
    rf"{_SPACE}*explain(?=\W){_SPACE}*(?:(analyze)(?=\W){_SPACE}*)?(?:\(([\w\s,]*)\){_SPACE}*(?=[a-z(]))?",
    re.IGNORECASE | re.DOTALL,
)
_FORMATS: Final = frozenset(("text", "json", "html", "graphviz", "yaml", "mermaid", "default"))


def _strip_explain(text: str) -> tuple[str, str]:
    """Split an EXPLAIN into the statement that it explains, which is checked, and a rewritten EXPLAIN."""
    match = _EXPLAIN.match(text)
    options = [option.split() for option in match[2].lower().split(",")] if match and match[2] else []
    analyze = bool(match and match[1])
    form = ""
    for option in options:
        if option == ["analyze"]:
            analyze = True
        elif len(option) == 2 and option[0] == "format" and option[1] in _FORMATS:
            form = option[1]
        else:
            match = None
    if match is None:
        raise QueryError("refused", "write it as EXPLAIN SELECT … or EXPLAIN (FORMAT json) SELECT …")
    if analyze:
        raise QueryError("refused", "EXPLAIN ANALYZE is not for readers, for it names files: there is plain EXPLAIN")
    return text[match.end() :], f"EXPLAIN (FORMAT {form}) " if form else "EXPLAIN "


def _parse(cursor: DuckDBPyConnection, sql: str) -> dict[str, Any]:
    """Parse a SELECT into DuckDB's tree."""
    ((text,),) = cursor.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
    try:
        tree = cast("dict[str, Any]", json.loads(text))
    except RecursionError:
        raise QueryError("invalid", "the SQL is nested too deep: split it up with WITH") from None
    if tree.get("error"):
        message = str(tree.get("error_message", ""))
        if "Only SELECT" in message:
            raise QueryError("refused", "the history is read-only, and answers SELECT, DESCRIBE and the like")
        raise QueryError("invalid", message)
    if len(tree["statements"]) != 1:
        raise QueryError("refused", "one statement at a time")
    return tree


def _check_arrows(tree: Any) -> None:
    """Refuse long chains of `->`: each doubles the time that DuckDB takes to bind them, without interrupts."""
    stack: list[tuple[Any, int]] = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        if isinstance(node, dict):
            found = cast("dict[str, Any]", node)
            depth += found.get("class") == "LAMBDA"
            if depth > ARROWS:
                raise QueryError("refused", f"more than {ARROWS} -> in a row: write json_extract(…, '$.a.b.c') instead")
            stack.extend((value, depth) for value in found.values())
        elif isinstance(node, list):
            stack.extend((value, depth) for value in cast("list[Any]", node))


def _check_expansion(text: str, tree: dict[str, Any], names: Names) -> None:
    """Refuse a statement that grows too large when DuckDB expands its names, which can't be interrupted."""
    try:
        # The text itself is bounded by the size of a message.
        bind_growth.check_tree(tree, names.catalogue, len(text))
    except TooLarge as error:
        raise QueryError("refused", str(error)) from None
    except RecursionError:
        raise QueryError("invalid", "the SQL is nested too deep: split it up with WITH") from None


def _cte_entries(node: dict[str, Any]) -> list[dict[str, Any]]:
    ctes = node.get("cte_map")
    return cast("list[dict[str, Any]]", ctes["map"]) if isinstance(ctes, dict) else []


def _check_node(node: dict[str, Any], names: Names, ctes: set[str]) -> None:
    kind = node.get("type")
    if "class" in node:
        if node["class"] not in _EXPRESSIONS:
            raise QueryError("refused", f"{node['class']} expressions are not for readers")
        if node["class"] == "PARAMETER":
            raise QueryError("invalid", "the SQL has a parameter ($1 or ?): write the value out")
        if "function_name" in node:
            _check_function(str(node["function_name"]).lower(), names)
    elif isinstance(kind, str) and kind.isupper() and "_TYPE_INFO" not in kind and kind not in _NODES:
        raise QueryError("refused", f"{kind} is not for readers")
    elif kind == "TABLE_FUNCTION":
        name = str(node["function"].get("function_name", "")).lower()
        if name not in TABLE_FUNCTIONS and name not in names.macros:
            raise QueryError("refused", f"the table function {name}() is not for readers")
    elif kind == "BASE_TABLE":
        _check_table(node, names, ctes)
    elif kind == "SHOW_REF" and str(node["table_name"]).strip('"').lower() not in SHOW_NAMES:
        raise QueryError("refused", f"SHOW {node['table_name']} is not for readers: there is SHOW TABLES, and DESCRIBE")


def _check_function(name: str, names: Names) -> None:
    known = name in FUNCTIONS or name in OPERATORS or name in TABLE_FUNCTIONS or name in names.macros
    if not known:
        raise QueryError("refused", f"the function {name}() does not exist, or is not for readers")


def _check_size(name: str, arguments: list[Any]) -> None:
    """Refuse calls whose single value could be larger than all memory of a query (see `allowlist.LENGTHS`)."""
    if name in LENGTHS:
        place, most = LENGTHS[name]
        length = _constant(arguments[place]) if len(arguments) > place else None
        if not isinstance(length, int) or length > most:
            raise QueryError("refused", f"the length in {name}() has to be written out, and {most:,} at most")
    elif name in FORMATS:
        form = _constant(arguments[0]) if arguments else None
        if not isinstance(form, str) or re.search(r"[0-9]{5}|\*", form):
            raise QueryError("refused", f"the format in {name}() has to be written out, with widths up to 9999")
    elif name in ("range", "generate_series"):
        bounds = [value for value in map(_constant, arguments) if isinstance(value, int)]
        if bounds and len(bounds) == len(arguments) and max(bounds) - min(*bounds, 0) > LIST_ITEMS:
            raise QueryError(
                "refused", f"{name}() of so many numbers is for FROM: as one value, {LIST_ITEMS:,} at most"
            )


def _constant(argument: Any) -> Any:
    """Value of a literal argument; None for any other."""
    if isinstance(argument, dict) and cast("dict[str, Any]", argument).get("class") == "CONSTANT":
        return cast("dict[str, Any]", argument)["value"].get("value")
    return None


def _check_table(node: dict[str, Any], names: Names, ctes: set[str]) -> None:
    catalog, schema, table = (str(node[key]).lower() for key in ("catalog_name", "schema_name", "table_name"))
    if node.get("at_clause") is not None:
        raise QueryError("refused", "AT (…) is not for readers")
    # `database.table` parses as schema and table.
    if not catalog and schema == names.database != "main":
        schema = "main"
    if catalog not in ("", names.database):
        raise QueryError("refused", f"the database {catalog!r} is not for readers")
    if schema == "information_schema" and table in CATALOGUE_VIEWS:
        return
    if schema in ("", "main") and (table in names.relations or (not schema and table in ctes)):
        return
    shown = f"{schema}.{table}" if schema else table
    raise QueryError("refused", f"there is no table {shown!r} for readers: SHOW TABLES lists what there is")


def _limited(cursor: DuckDBPyConnection, sql: str, tree: dict[str, Any], limit: int) -> str:
    """Add `LIMIT limit + 1` to a statement without a limit, so that DuckDB sorts no more than is asked for.

    The result is used only if its tree is the original one with that limit, which it is not if, for example, the limit
    ends up in a comment.
    """
    node = tree["statements"][0]["node"]
    plain = node["type"] in ("SELECT_NODE", "SET_OPERATION_NODE")
    shows = plain and node.get("from_table", {}).get("type") == "SHOW_REF"
    if not plain or shows or any(m["type"].startswith("LIMIT") for m in node["modifiers"]):
        return sql
    candidate = f"{sql}\nLIMIT {limit + 1}"
    try:
        changed = _parse(cursor, candidate)
    except (QueryError, duckdb.Error):
        return sql
    modifiers = changed["statements"][0]["node"]["modifiers"]
    if not modifiers or modifiers[-1]["type"] != "LIMIT_MODIFIER" or modifiers[-1]["offset"] is not None:
        return sql
    added = modifiers.pop()["limit"]
    same = added.get("class") == "CONSTANT" and int(added["value"]["value"]) == limit + 1 and changed == tree
    return candidate if same else sql


def begin(cursor: DuckDBPyConnection) -> None:
    """Start the read-only transaction that a reader's statement runs in: any write fails in it."""
    cursor.execute("BEGIN TRANSACTION READ ONLY")
