"""SQL is served only if the guard sees known statements as expected, whatever DuckDB calls the parts of its trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pytest
from corral.processors.query.guard import guard, mirror, self_check, statement
from corral.processors.query.guard.errors import QueryError, UnexpectedResult
from corral.processors.query.guard.sandbox_client import Sandbox
from corral.processors.query.guard.statement import Parse, Statement, Tree


@pytest.fixture(scope="module")
def schema() -> Iterator[duckdb.DuckDBPyConnection]:
    connection, _ = mirror.build(self_check.SCHEMA)
    with connection:
        yield connection


def checker(connection: duckdb.DuckDBPyConnection, parse: Parse) -> Callable[[str], Statement]:
    """A guard in this process, without limits."""

    def check(sql: str) -> Statement:
        checked = statement.check(connection, self_check.SCHEMA.names, sql, self_check.LIMIT, parse)
        statement.bind(connection, mirror.Counter(), checked)
        return checked

    return check


def renamed(part: Any, old: str, new: str) -> Any:
    """A tree with another key."""
    if isinstance(part, dict):
        return {new if key == old else key: renamed(value, old, new) for key, value in part.items()}
    return [renamed(value, old, new) for value in part] if isinstance(part, list) else part


def test_known_statements_are_seen_as_expected(schema: duckdb.DuckDBPyConnection) -> None:
    self_check.verify(checker(schema, statement.parse_select))


@pytest.mark.parametrize(
    "key",
    ["class", "type", "function", "function_name", "children", "value", "catalog_name", "schema_name", "table_name",
     "cte_map", "key", "at_clause", "modifiers", "limit", "statements", "node"],
)  # fmt: skip
def test_a_tree_with_another_key_is_noticed(schema: duckdb.DuckDBPyConnection, key: str) -> None:
    def parse(cursor: duckdb.DuckDBPyConnection, sql: str) -> Tree:
        return renamed(statement.parse_select(cursor, sql), key, f"{key}_2")

    with pytest.raises((UnexpectedResult, KeyError, TypeError)) as noticed:
        self_check.verify(checker(schema, parse))
    if noticed.type is UnexpectedResult:
        assert duckdb.__version__ in str(noticed.value)


@pytest.mark.parametrize("kind", ["CONSTANT", "FUNCTION", "TABLE_FUNCTION", "BASE_TABLE", "SHOW_REF", "PARAMETER"])
def test_a_tree_with_another_kind_of_node_is_noticed(schema: duckdb.DuckDBPyConnection, kind: str) -> None:
    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: replaced(value) for key, value in part.items()}
        if isinstance(part, list):
            return [replaced(value) for value in part]
        return f"{kind.lower()} node" if part == kind else part

    def parse(cursor: duckdb.DuckDBPyConnection, sql: str) -> Tree:
        return replaced(statement.parse_select(cursor, sql))

    with pytest.raises(UnexpectedResult, match=duckdb.__version__):
        self_check.verify(checker(schema, parse))


def test_no_sql_is_served_where_a_known_statement_is_not_seen_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "REFUSED", (("SELECT getvariable('x')", "getenv()"),))
    sandbox = Sandbox()
    monkeypatch.setattr(guard, "SANDBOX", sandbox)
    with duckdb.connect() as connection:
        guarded = guard.SqlGuard(connection.cursor)
        guarded.start()
        for _ in range(2):
            with pytest.raises(QueryError, match=rf"no SQL is served.*{duckdb.__version__}.*getvariable") as refusal:
                guarded.check("SELECT 1", 10)
            assert refusal.value.code == "unavailable"
    sandbox.close()
