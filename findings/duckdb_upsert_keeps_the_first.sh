#!/usr/bin/env bash
# DuckDB 1.5.5: of several rows for one key in an upsert only the first counts; the others disappear without an error.
#
# Expected: INSERT … ON CONFLICT DO UPDATE with two rows for a key applies one after the other, as SQLite does, or
# fails, as PostgreSQL does ("cannot affect row a second time") and as a MERGE that inserts both does. INSERT OR REPLACE
# leaves the last row.
# Observed: the first row for a key is inserted, or updates what is there, and each later one in the same statement is
# dropped. So a batch of states that are sorted by time leaves the oldest, and counters that are added by `v = v +
# excluded.v` count a key once a statement, however many rows come. OR REPLACE does the same. Nothing is raised, and
# RETURNING shows the first only.
# For Corral: no table of the history is written by upserts of rows that may repeat a key. A batch is folded first,
# and rows are replaced by DELETE and INSERT (processors/storage/statements.py).
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5
"$folder/venv/bin/python" - <<'PYTHON'
import sqlite3

import duckdb

print("duckdb", duckdb.__version__, "sqlite", sqlite3.sqlite_version)
LAST = "INSERT INTO t VALUES (1, 1), (1, 2), (1, 3) ON CONFLICT (k) DO UPDATE SET v = excluded.v"
ADDED = "INSERT INTO t VALUES (1, 1), (1, 10), (1, 100) ON CONFLICT (k) DO UPDATE SET v = t.v + excluded.v"
REPLACED = "INSERT OR REPLACE INTO t VALUES (1, 1), (1, 2), (1, 3)"
MERGED = (
    "MERGE INTO t USING (VALUES (1, 1), (1, 2)) AS s(k, v) ON t.k = s.k "
    "WHEN MATCHED THEN UPDATE SET v = s.v WHEN NOT MATCHED THEN INSERT VALUES (s.k, s.v)"
)


def left(connection, statement: str, before: int | None) -> int:
    connection.execute("DROP TABLE IF EXISTS t")
    connection.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v INTEGER)")
    if before is not None:
        connection.execute(f"INSERT INTO t VALUES (1, {before})")
    connection.execute(statement)
    return connection.execute("SELECT v FROM t").fetchone()[0]


duck, lite = duckdb.connect(), sqlite3.connect(":memory:")
CASES = [(LAST, None, 1, 3), (LAST, 0, 1, 3), (ADDED, None, 1, 111), (ADDED, 1000, 1001, 1111), (REPLACED, 0, 1, 3)]
changed = False
for statement, before, of_duck, of_lite in CASES:
    found = left(duck, statement, before), left(lite, statement, before)
    print(f"before {before}: {statement}: DuckDB {found[0]}, SQLite {found[1]}")
    changed = changed or found != (of_duck, of_lite)
try:
    left(duck, MERGED, None)
    changed = True
except duckdb.ConstraintException as error:
    print("MERGE:", error)
many = "INSERT INTO t SELECT 1, 1 FROM range(5000) ON CONFLICT (k) DO UPDATE SET v = t.v + excluded.v"
print("5,000 times 1:", counted := left(duck, many, None))
raise SystemExit(changed or counted != 1)
PYTHON
