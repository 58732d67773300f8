#!/usr/bin/env bash
# DuckDB 1.5.5: NaN is the greatest number, except in filters that are pushed into Arrow tables and others' Parquet files.
#
# Expected: as DuckDB documents, and PostgreSQL does, NaN equals itself and is greater than all other numbers, in
# whatever the rows are stored. `WHERE x > 5` and `count(*) FILTER (x > 5)` agree.
# Observed: of a table with NaN, 1, 9 and NULL, `WHERE x > 5` finds two rows, and of the same Arrow table one, since
# Arrow compares by IEEE 754; `WHERE x + 0 > 5` and FILTER find two there, too. Of a Parquet file that pyarrow 26
# wrote, `x > 5` finds both, but `x = 'nan'` and `x IN (1, 'nan')` miss the NaN, because the file's statistics leave
# NaN out, as the format says, and DuckDB skips the row group by them. `isnan(x)` finds it everywhere. Files of DuckDB
# itself behave as tables.
# For Corral: a metric that has no value is NULL in the history and in its archive, never NaN
# (processors/ingest/columnar.py), and the archive is written by DuckDB.
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5 pyarrow==26.0.1
cat > "$folder/look.py" <<'PYTHON'
import sys

import duckdb
import pyarrow
import pyarrow.parquet

folder = sys.argv[1]
print("duckdb", duckdb.__version__, "pyarrow", pyarrow.__version__)
table = pyarrow.table({"x": [float("nan"), 1.0, 9.0, None]})
connection = duckdb.connect()
connection.register("arrow", table)
connection.execute("CREATE TABLE stored AS FROM arrow")
pyarrow.parquet.write_table(table, f"{folder}/pyarrow.parquet")
connection.execute(f"COPY stored TO '{folder}/duckdb.parquet'")
SOURCES = ("stored", "arrow", f"'{folder}/pyarrow.parquet'", f"'{folder}/duckdb.parquet'")
CASES = {
    "x > 5": (2, 1, 2, 2),
    "NOT (x <= 5)": (2, 1, 2, 2),
    "x BETWEEN 5 AND 'nan'": (2, 1, 2, 2),
    "x + 0 > 5": (2, 2, 2, 2),
    "x = 'nan'": (1, 1, 0, 1),
    "x IN (1, 'nan')": (2, 2, 1, 2),
    "isnan(x)": (1, 1, 1, 1),
}
changed = False
for condition, wanted in CASES.items():
    counts = tuple(
        connection.execute(f"SELECT count(*) FROM {source} WHERE {condition}").fetchone()[0] for source in SOURCES
    )
    print(f"WHERE {condition}: table, Arrow, Parquet of pyarrow, Parquet of DuckDB: {counts}")
    changed = changed or counts != wanted
[filtered] = connection.execute("SELECT count(*) FILTER (x > 5) FROM arrow").fetchone()
print("FILTER (x > 5) of the Arrow table:", filtered)
raise SystemExit(changed or filtered != 2)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
