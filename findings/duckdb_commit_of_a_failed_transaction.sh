#!/usr/bin/env bash
# DuckDB 1.5.5: after an error in a transaction, COMMIT either stores everything or silently nothing.
#
# Expected: an error between BEGIN and COMMIT always aborts the transaction, as in PostgreSQL, or never, as in SQLite.
# And a COMMIT that can't commit raises.
# Observed: it depends on the kind of the error. After a statement that does not parse, or names an unknown table,
# column or setting, the transaction continues and commits. After a failed cast, constraint, missing parameter or
# missing file it is aborted: further statements are refused. COMMIT is not: it returns as usual, and rolls everything
# back.
# So code that catches an error, goes on to COMMIT and sees no exception has not necessarily stored anything.
# For Corral: no harm. Each transaction is a `with transaction(cursor)` (`processors/storage/statements.py`), which
# rolls back on any error, and no such block catches one itself.
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5
"$folder/venv/bin/python" - <<'PYTHON'
import duckdb

print("duckdb", duckdb.__version__)
CONTINUES = {
    "syntax": "SELEC 1",
    "unknown column": "SELECT nothing FROM t",
    "unknown table": "SELECT * FROM nothing",
    "unknown setting": "SET nothing = 1",
    "table exists": "CREATE TABLE t (a INTEGER)",
}
ABORTED = {
    "cast": "SELECT 'a'::INTEGER",
    "duplicate key": "INSERT INTO t VALUES (1)",
    "null": "INSERT INTO t VALUES (NULL)",
    "missing parameter": "SELECT ?",
    "missing file": "SELECT * FROM read_parquet('/nothing.parquet')",
}


def after(statement: str) -> tuple[str, bool, list[int]]:
    connection = duckdb.connect()
    connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY)")
    connection.execute("INSERT INTO t VALUES (1)")
    connection.execute("BEGIN")
    connection.execute("INSERT INTO t VALUES (2)")
    try:
        connection.execute(statement).fetchall()
        raise SystemExit(f"no error: {statement}")
    except duckdb.Error as error:
        kind = type(error).__name__
    try:
        connection.execute("INSERT INTO t VALUES (3)")
        continues = True
    except duckdb.TransactionException:
        continues = False
    connection.execute("COMMIT")  # raises in neither case
    return kind, continues, [row[0] for row in connection.execute("SELECT a FROM t ORDER BY a").fetchall()]


changed = False
for statements, wanted in ((CONTINUES, (True, [1, 2, 3])), (ABORTED, (False, [1]))):
    for name, statement in statements.items():
        kind, continues, rows = after(statement)
        print(f"{name}, {kind}: {'continues' if continues else 'aborted'}, rows after COMMIT: {rows}")
        changed = changed or (continues, rows) != wanted
raise SystemExit(changed)
PYTHON
