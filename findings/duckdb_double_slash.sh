#!/usr/bin/env bash
# DuckDB 1.5.5: the operator of integer division, //, does not round if an operand is a DOUBLE, a FLOAT or a DECIMAL.
#
# Expected: 7.5 // 2 is 3, or 3.0 as in Python: the operator is there to drop what is after the point.
# Observed: it is 3.75, and -7.5 // 2 is -3.75: a plain division. Of integers it rounds towards zero (-7 // 2 is -3,
# where Python has -4).
# For Corral: buckets are made of epoch_us(), which is a BIGINT, never of epoch(), which is a DOUBLE; docs/querying.md
# has both.
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
changed = False
for sql, guessed in (
    ("7 // 2", 3), ("-7 // 2", -3), ("7.5::DOUBLE // 2", 3.75), ("-7.5::DOUBLE // 2", -3.75), ("7.5::FLOAT // 2", 3.75),
    ("7.5::DECIMAL(4, 1) // 2", 3.75), ("epoch(to_timestamp(1764550805)) // 60", 1764550805 / 60),
    ("epoch_us(to_timestamp(1764550805)) // 60000000", 1764550805 // 60),
):
    [value] = duckdb.execute(f"SELECT {sql}").fetchone()
    print(sql, "=", value)
    changed = changed or value != guessed
raise SystemExit(changed)
PYTHON
