"""Known statements that the guard must see as expected before it is trusted with those of readers.

The guard reads trees that DuckDB serializes, and their keys are no stable interface: with another version it may find
no function in a tree, and let everything pass. So each check is tried, in each place where a function can stand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .errors import QueryError, UnexpectedResult
from .mirror import Mirror, Names
from .statement import Statement

SCHEMA: Final = Mirror(
    database="history",
    statements=("CREATE TABLE samples (device VARCHAR, n INTEGER)", "CREATE TABLE private (n INTEGER)"),
    macros=(),
    views=(),
    names=Names(frozenset(("samples",)), frozenset(("private", "duckdb_settings")), frozenset(), "history"),
)
"""Schema that the known statements are about."""

LIMIT: Final = 10
"""Rows that are asked for."""

ALLOWED: Final = (
    "SELECT 1",
    "FROM samples",
    "SELECT device, sum(n) AS n FROM history.main.samples GROUP BY ALL HAVING sum(n) > 1 ORDER BY n",
    "SELECT * FROM range(3), generate_series(1, 3) t(i)",
    "WITH a AS (FROM samples) SELECT upper(device), len(range(10)), repeat('-', 10) FROM a",
    "SELECT list_transform([1], lambda x: x + 1), sum(n) OVER (PARTITION BY device) FROM samples",
)
"""Statements that must pass, with a limit added."""

UNLIMITED: Final = (
    "DESCRIBE samples",
    "SUMMARIZE samples",
    "SHOW TABLES",
    "FROM samples LIMIT 3",
    "EXPLAIN FROM samples",
)
"""Statements that must pass as they are."""

_PLACES: Final = (
    "SELECT {}",
    "SELECT 1 + length({})",
    "SELECT (SELECT {})",
    "SELECT [{} FOR x IN [1]]",
    "SELECT list_transform([1], lambda x: {})",
    "SELECT CASE WHEN true THEN {} END",
    "SELECT {}::VARCHAR",
    "SELECT {} BETWEEN 'a' AND 'b'",
    "SELECT n FROM samples WHERE device = {}",
    "SELECT n FROM samples ORDER BY {}",
    "SELECT n FROM samples LIMIT length({})",
    "SELECT count(*) FROM samples GROUP BY {}",
    "SELECT DISTINCT ON ({}) n FROM samples",
    "SELECT n FROM samples QUALIFY row_number() OVER (ORDER BY {}) = 1",
    "SELECT sum(n) FILTER ({} = 'x') FROM samples",
    "SELECT * REPLACE ({} AS device) FROM samples",
    "SELECT s.n FROM samples s JOIN samples t ON s.device = {}",
    "FROM (SELECT {})",
    "FROM (VALUES ({}))",
    "FROM repeat({}, 2)",
    "WITH a AS (SELECT {}) FROM a",
    "WITH RECURSIVE a AS (SELECT '' AS x UNION ALL SELECT {} FROM a) FROM a",
    "SELECT '' UNION ALL SELECT {}",
    "PIVOT (SELECT {} AS x) ON x IN ('a') USING count(*)",
    "DESCRIBE SELECT {}",
    "EXPLAIN SELECT {}",
)
"""Places where a function can stand."""

REFUSED: Final = (
    *((place.format("getenv('HOME')"), "getenv()") for place in _PLACES),
    ("FROM read_text('x')", "read_text()"),
    ("SELECT (SELECT max(content) FROM read_text('x'))", "read_text()"),
    ("FROM private", "'private'"),
    ("FROM samples, LATERAL (FROM private)", "'private'"),
    ("FROM duckdb_settings", "'duckdb_settings'"),
    ("FROM pg_catalog.samples", "'pg_catalog.samples'"),
    ("FROM other.main.samples", "'other'"),
    ("FROM samples AT (VERSION => 1)", "AT (…)"),
    ("WITH duckdb_settings AS (SELECT 1) FROM duckdb_settings", "CTE"),
    ("SHOW memory_limit", "'memory_limit'"),
    ("SHOW DATABASES", "there is SHOW TABLES, and DESCRIBE"),
    ("SELECT $1", "has a parameter"),
    ("SELECT repeat('x', 1000000)", "the length in repeat()"),
    ("SELECT repeat('x', n) FROM samples", "the length in repeat()"),
    ("SELECT printf('%99999d', 1)", "the format in printf()"),
    ("SELECT range(100000000)", "range()"),
    ("SELECT generate_series(0, -100000000, -1)", "generate_series()"),
    ("SELECT 1; SELECT 2", "one statement"),
    ("DELETE FROM samples", "read-only"),
    ("EXPLAIN ANALYZE SELECT 1", "EXPLAIN ANALYZE"),
)
"""Statements that must be refused, each with a part of the reason."""

_DOUBLED: Final = "SELECT n AS a0{} FROM samples"


def _doubling(levels: int) -> str:
    """A statement whose size doubles with each level, when DuckDB replaces aliases by what they stand for."""
    return _DOUBLED.format("".join(f", a{level} + a{level} AS a{level + 1}" for level in range(levels)))


SMALL: Final = _doubling(5)
"""A statement that grows, within bounds."""
LARGE: Final = _doubling(30)
"""A statement that grows beyond all bounds."""


def verify(check: Callable[[str], Statement]) -> None:
    """Check the statements that are judged by their tree.

    Args:
        check: the guard, over `SCHEMA`, with the limit `LIMIT`.

    Raises:
        UnexpectedResult: one was not seen as expected.
        QueryError: it could not be checked.
    """
    limited = [(sql, f"{sql}\nLIMIT {LIMIT + 1}") for sql in (*ALLOWED, SMALL)]
    for sql, expected in (*limited, *zip(UNLIMITED, UNLIMITED, strict=True)):
        try:
            checked = check(sql)
        except QueryError as error:
            _raise_unless_judged(error)
            raise UnexpectedResult(sql, "it is allowed", f"{error.code}: {error}") from error
        if checked.limited != expected:
            raise UnexpectedResult(sql, f"it becomes {expected!r}", f"{checked.limited!r}")
    for sql, reason in REFUSED:
        _expect_refusal(check, sql, reason)


def verify_growth(check: Callable[[str], Statement]) -> None:
    """Check that a statement without bounds is stopped.

    Args:
        check: the guard, over `SCHEMA`, with limits of time and memory.

    Raises:
        UnexpectedResult: it was not.
    """
    _expect_refusal(check, LARGE, "too large to plan")


def _expect_refusal(check: Callable[[str], Statement], sql: str, reason: str) -> None:
    expected = f"a refusal for {reason}"
    try:
        check(sql)
    except QueryError as error:
        _raise_unless_judged(error)
        if reason not in str(error):
            raise UnexpectedResult(sql, expected, f"{error.code}: {error}") from error
    else:
        raise UnexpectedResult(sql, expected, "it is allowed")


def _raise_unless_judged(error: QueryError) -> None:
    """Raise an error that says nothing about the statement, such as that the machine had no time for it."""
    if error.code not in ("invalid", "refused"):
        raise error
