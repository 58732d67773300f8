#!/usr/bin/env bash
# DuckDB 1.5.5: a folder named like day=1 replaces the column of that name in every Parquet file below it, unasked.
#
# Expected: a file's own columns are what reading the file gives, and a column from the path is added only where the
# file has none of its name, or with hive_partitioning = true.
# Observed: reading one file by its path, without an option, gives the value of the folder in each row; those that the
# file holds are not to be seen, and nothing warns. A file that was moved into another day's folder belongs to that day.
# With hive_partitioning = false the file's values are there.
# For Corral: the archive's folders are named day=…, its files have no such column, and the view `samples` and the rollups
# read them with hive_partitioning = false.
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5
cd "$folder"
mkdir -p day=1
"$folder/venv/bin/python" - <<'PYTHON'
import duckdb

print("duckdb", duckdb.__version__)
duckdb.execute("COPY (SELECT unnest([5, 6]) AS day, unnest([1, 2]) AS x) TO 'day=1/part.parquet'")
found = {
    "as it is": duckdb.execute("SELECT day, x FROM 'day=1/part.parquet' ORDER BY x").fetchall(),
    "not hive": duckdb.execute(
        "SELECT day, x FROM read_parquet('day=1/part.parquet', hive_partitioning = false) ORDER BY x"
    ).fetchall(),
}
print(found)
raise SystemExit(found != {"as it is": [(1, 1), (1, 2)], "not hive": [(5, 1), (6, 2)]})
PYTHON
