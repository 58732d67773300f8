"""Readers' SQL against DuckDB's own lists: every setting, every extension, and every function that might read a file.

The guard has to refuse each attempt (for functions, `test_confine_corpus.py` has seen to that). Then each is run on the
locked connection without the guard, which has to keep its settings and its secrets all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
from corral.processors.query.guard import guard
from corral.processors.query.guard.allowlist import FUNCTIONS, TABLE_FUNCTIONS
from corral.processors.query.guard.errors import QueryError
from corral.processors.query.guard.guard import SqlGuard
from corral.processors.storage import hardening

SECRET = "the-secret-of-the-host"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("door")
    (made / "secret.csv").write_text(f"a\n{SECRET}\n")
    return made


@pytest.fixture(scope="module")
def locked(place: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    connection = duckdb.connect(str(place / "history.duckdb"))
    connection.execute("CREATE TABLE samples AS SELECT 1 AS n")
    hardening.lock(connection, directories=[], memory_bytes=256 * 2**20, spill_bytes=2**20)
    yield connection
    connection.close()


def listed(sql: str) -> list[str]:
    return [name for (name,) in duckdb.connect().execute(sql).fetchall()]


def unguarded(locked: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Run a statement without the guard; what it shows."""
    cursor = locked.cursor()
    shown = ""
    with contextlib.suppress(duckdb.Error, RuntimeError, TypeError, ValueError):
        guard.begin(cursor)
        shown = str(cursor.execute(sql).fetchmany(10))
    with contextlib.suppress(duckdb.Error):
        cursor.rollback()
    cursor.close()
    return shown


def refused(guarded: SqlGuard, sql: str) -> bool:
    try:
        guarded.check(sql, 10)
    except QueryError:
        return True
    return False


def test_no_setting_can_be_changed(locked: duckdb.DuckDBPyConnection) -> None:
    guarded = SqlGuard(locked.cursor)
    state = "SELECT name, value FROM duckdb_settings() WHERE name NOT IN ('schema', 'search_path') ORDER BY ALL"
    before = locked.execute(state).fetchall()
    attempts = [
        form.format(name)
        for name in listed("SELECT DISTINCT name FROM duckdb_settings()")
        for form in ("SET {} = 'x'", "SET GLOBAL {} = 1", "RESET {}", "PRAGMA {} = true", "PRAGMA {}")
    ]
    assert len(attempts) > 500
    assert [sql for sql in attempts if not refused(guarded, sql)] == []
    for sql in attempts:
        # The schema is each connection's own, and an empty search path hides nothing.
        if not any(name in sql for name in ("schema", "search_path")):
            unguarded(locked, sql)
    assert locked.execute(state).fetchall() == before


def test_no_extension_can_be_brought_in(locked: duckdb.DuckDBPyConnection, place: Path) -> None:
    guarded = SqlGuard(locked.cursor)
    # An extension is known by its functions: to list extensions, one would have to look at files.
    loaded = "SELECT count(*) FROM duckdb_functions()"
    before = locked.execute(loaded).fetchall()
    attempts = [
        form.format(name, place)
        for name in listed("SELECT extension_name FROM duckdb_extensions()")
        for form in ("INSTALL {}", "LOAD {}", "FORCE INSTALL {} FROM community", "ATTACH '{1}/x' AS y (TYPE {0})")
    ]
    assert len(attempts) > 50
    assert [sql for sql in attempts if not refused(guarded, sql)] == []
    for sql in attempts:
        unguarded(locked, sql)
    assert locked.execute(loaded).fetchall() == before


def test_no_function_shows_a_file(locked: duckdb.DuckDBPyConnection, place: Path) -> None:
    """Every function that takes a text and is not allowed to readers, called with a file of the host."""
    guarded = SqlGuard(locked.cursor)
    names = listed(
        "SELECT DISTINCT function_name FROM duckdb_functions() WHERE list_contains(parameter_types, 'VARCHAR') "
        "OR list_contains(parameter_types, 'ANY') OR function_type IN ('table', 'pragma')"
    )
    files = (f"'{place}/secret.csv'", f"['{place}/*']")
    attempts = 0
    for name in names:
        if name in FUNCTIONS | TABLE_FUNCTIONS or not name.replace("_", "").isalnum() or "sleep" in name:
            continue
        for file in files:
            for sql in (f'FROM "{name}"({file})', f'SELECT "{name}"({file})'):
                attempts += 1
                if "arrow" not in name and "pandas" not in name:  # they take an address in memory
                    assert SECRET not in unguarded(locked, sql), sql
    assert attempts > 200
    for sql in (
        f"COPY samples TO '{place}/out.csv'",
        f"COPY samples FROM '{place}/secret.csv'",
        f"FROM '{place}/secret.csv'",
        f"EXPORT DATABASE '{place}/out'",
    ):
        assert refused(guarded, sql), sql
        assert SECRET not in unguarded(locked, sql)
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith("history")) == ["secret.csv"]
