#!/usr/bin/env bash
# DuckLake of DuckDB 1.5.5: once a column was widened from FLOAT to DOUBLE, WHERE compares older rows as FLOAT.
#
# Expected: after `ALTER COLUMN a TYPE DOUBLE` an old 0.1 is 0.10000000149011612, as the query shows it, and filters
# judge the value that it shows: it is not equal to 0.1, and greater than 0.1.
# Observed: in files from before, WHERE a = 0.1 finds the row, and WHERE a > 0.1 does not, though the value that it
# shows is greater. The same comparison in the SELECT list, in FILTER, or on an expression such as a + 0, follows the
# value. So a query and the sum of its parts disagree. Integers that are widened are compared correctly.
# For Corral: columns of a lake are added and never change their type (processors/storage/statements.py), and metrics
# stay FLOAT.
#
# Exits 0 while DuckLake behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5 duckdb-extension-ducklake==1.5.5
cat > "$folder/look.py" <<'PYTHON'
import pathlib
import sys

import duckdb
import duckdb_extension_ducklake as package

folder = sys.argv[1]
extension = next(pathlib.Path(package.__file__).parent.rglob("ducklake.duckdb_extension"))
connection = duckdb.connect()
connection.execute(f"LOAD '{extension}'")


def attach(name: str, inlined: int) -> None:
    options = f"DATA_PATH '{folder}/{name}', DATA_INLINING_ROW_LIMIT {inlined}"
    connection.execute(f"ATTACH 'ducklake:{folder}/{name}.ducklake' AS {name} ({options})")


def value(sql: str) -> object:
    found = connection.execute(sql).fetchone()
    print(f"{sql}: {found[0]}")
    return found[0]


attach("files", 0)
connection.execute("USE files; CREATE TABLE t (a FLOAT); INSERT INTO t VALUES (0.1)")
connection.execute("ALTER TABLE t ALTER a TYPE DOUBLE; INSERT INTO t VALUES (0.1)")
CASES = {
    "SELECT list(a ORDER BY a)::VARCHAR FROM t": "[0.1, 0.10000000149011612]",
    "SELECT count(*) FROM t WHERE a = 0.1": 2,
    "SELECT count(*) FROM t WHERE a + 0 = 0.1": 1,
    "SELECT count(*) FILTER (a = 0.1) FROM t": 1,
    "SELECT count(*) FROM t WHERE a > 0.1": 0,
    "SELECT count(*) FILTER (a > 0.1) FROM t": 1,
}
outcomes = [value(sql) == wanted for sql, wanted in CASES.items()]
connection.execute("CREATE TABLE i (a INTEGER); INSERT INTO i VALUES (1); ALTER TABLE i ALTER a TYPE BIGINT")
outcomes.append(value("SELECT count(*) FROM i WHERE a = 4294967297") == 0)
raise SystemExit(not all(outcomes))
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
