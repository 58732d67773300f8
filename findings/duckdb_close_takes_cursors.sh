#!/usr/bin/env bash
# DuckDB 1.5.5 in Python: closing a connection closes the cursors made from it; dropping the last reference does not.
#
# Expected: a cursor is a connection of its own to the same instance, as documented ("duplicate the current
# connection"). So closing its parent does not affect it, as with any other connection, and the instance exists until
# the last connection is closed.
# Observed: after close() of the parent a cursor raises ConnectionException. If the last reference to the parent is
# dropped instead, its cursors continue and see the same data; so does a cursor that was made from a cursor.
# For Corral: when the readers' instance was replaced, their cursors would have failed in the middle of a result. The
# old instance is dropped, not closed (`Readers` in processors/storage/lake/readers.py,
# tests/processors/test_lake_storage.py).
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5
"$folder/venv/bin/python" - <<'PYTHON'
import gc

import duckdb


def outcome(cursor: duckdb.DuckDBPyConnection) -> str:
    try:
        return f"answers {cursor.execute('SELECT sum(a) FROM t').fetchone()}"
    except duckdb.Error as error:
        return type(error).__name__


def parent() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("CREATE TABLE t AS SELECT range AS a FROM range(10)")
    return connection


print("duckdb", duckdb.__version__)
closed = parent()
cursor, inner = closed.cursor(), closed.cursor().cursor()
closed.close()
dropped = parent()
kept = dropped.cursor()
del dropped
gc.collect()
found = {"parent closed": outcome(cursor), "its cursor's cursor": outcome(inner), "parent dropped": outcome(kept)}
for name, text in found.items():
    print(f"{name}: {text}")
raise SystemExit(not (found["parent closed"] == "ConnectionException" and found["parent dropped"] == "answers (45,)"))
PYTHON
