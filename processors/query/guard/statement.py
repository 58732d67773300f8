"""One statement of a reader, checked against an allow-list and bound. Runs in a process of its own (`sandbox.py`).

DuckDB's parser turns the statement into a tree. Each node of it must be of a known kind, each function on the list
(`allowlist.py`), each relation one of the history's. What passes is planned over an empty copy of the schema: names are
expanded there as they will be in the history, so what takes too much time or memory to plan does so here first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

from .allowlist import FORMATS, FUNCTIONS, LENGTHS, LIST_ITEMS, OPERATORS, TABLE_FUNCTIONS
from .errors import QueryError, as_query_error
from .mirror import MAX_VIEW_WORDS, Counter, Names

CATALOGUE_VIEWS: Final = frozenset(("tables", "columns", "schemata"))
"""Views of `information_schema` with names and types only. All other catalogs show paths, settings or SQL."""

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


class Statement(Struct, frozen=True):
    """A statement that a reader may run.

    Attributes:
        sql: its text, without what follows it.
        limited: the same with a limit on its rows, or `sql` if that could not be proven equal.
        explain: the EXPLAIN that both begin with, if any.
    """

    sql: str
    limited: str
    explain: str = ""


Tree = dict[str, Any]
"""A statement as DuckDB's `json_serialize_sql` writes it."""
Parse = Callable[[DuckDBPyConnection, str], Tree]


def check(cursor: DuckDBPyConnection, names: Names, sql: str, limit: int, parse: Parse | None = None) -> Statement:
    """Parse a statement and check every node of it.

    Args:
        cursor: on any database; only its parser is used.
        names: in the history.
        sql: as the reader sent it.
        limit: rows that will be read at most.
        parse: turns a SELECT into a tree; `parse_select` by default.

    Raises:
        QueryError: `invalid` or `refused`, with what to do.
        MemoryError: it needs too much memory.
    """
    parse = parse or parse_select
    text, explain = _one_statement(cursor, sql)
    tree = parse(cursor, text)
    _check_tree(tree, names)
    if explain:
        return Statement(explain + text, explain + text, explain)
    return Statement(text, _limited(cursor, text, tree, limit, parse))


def bind(cursor: DuckDBPyConnection, counter: Counter, statement: Statement) -> None:
    """Plan a statement without running it, on a cursor of an empty copy of the history.

    Raises:
        QueryError: it does not bind.
        MemoryError: it needs too much memory, or mentions views too often.
    """
    counter.words = 0
    try:
        cursor.execute(f"PREPARE planned AS {statement.sql.removeprefix(statement.explain)}")
        cursor.execute("DEALLOCATE planned")
    except duckdb.OutOfMemoryException as error:
        raise MemoryError from error
    except duckdb.Error as error:
        if counter.words > MAX_VIEW_WORDS:
            raise MemoryError from error
        raise as_query_error(error) from None


def _check_tree(tree: Tree, names: Names) -> None:
    nodes = list(_objects(tree))
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


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of a tree. Constants are leaves: what they hold is data, never a node."""
    stack = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, list):
            stack.extend(cast("list[Any]", part))
        elif isinstance(part, dict):
            node = cast("dict[str, Any]", part)
            yield node
            if node.get("class") != "CONSTANT":
                stack.extend(node.values())


def _one_statement(cursor: DuckDBPyConnection, sql: str) -> tuple[str, str]:
    """Text of the only statement, and the EXPLAIN in front of it, if any."""
    if "\0" in sql:
        raise QueryError("invalid", "the SQL contains a NUL character")
    try:
        statements = cursor.extract_statements(sql)
    except duckdb.OutOfMemoryException as error:
        raise MemoryError from error
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


def parse_select(cursor: DuckDBPyConnection, sql: str) -> Tree:
    """Parse a SELECT into DuckDB's tree."""
    # Written out, since for a parameter DuckDB imports NumPy and pandas, with their threads.
    literal = "'" + sql.replace("'", "''") + "'"
    try:
        ((text,),) = cursor.execute(f"SELECT json_serialize_sql({literal})").fetchall()
    except duckdb.OutOfMemoryException as error:
        raise MemoryError from error
    try:
        tree = cast("Tree", json.loads(text))
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
    elif isinstance(kind, str) and not kind.endswith("_TYPE_INFO") and kind not in _NODES:
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


def _limited(cursor: DuckDBPyConnection, sql: str, tree: Tree, limit: int, parse: Parse) -> str:
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
        changed = parse(cursor, candidate)
    except (QueryError, duckdb.Error):
        return sql
    modifiers = changed["statements"][0]["node"]["modifiers"]
    if not modifiers or modifiers[-1]["type"] != "LIMIT_MODIFIER" or modifiers[-1]["offset"] is not None:
        return sql
    added = modifiers.pop()["limit"]
    same = added.get("class") == "CONSTANT" and int(added["value"]["value"]) == limit + 1 and changed == tree
    return candidate if same else sql
