#!/usr/bin/env bash
# DuckDB 1.5.5: an integer of any size with a FLOAT becomes a FLOAT, of 24 bits, in sums, comparisons, joins and CASE.
#
# Expected: BIGINT and FLOAT meet in DOUBLE, as in PostgreSQL and NumPy, or at least a value that is only passed on, by
# `coalesce` or CASE, stays what it is. An INTEGER key never joins another number.
# Observed: the common type is FLOAT. A time in seconds since 1970 plus half a second of type FLOAT is off by up to
# 64 s. CASE, coalesce, greatest and UNION ALL change an integer above 2**24 if another branch is a FLOAT, and 16777217
# equals, and joins, a FLOAT of 16777216. A literal such as 0.5 is a DECIMAL and does none of that.
# For Corral: percentages and watts are FLOAT, bytes and counters BIGINT. Who combines the two in a query casts the
# metric to DOUBLE first (docs/querying.md).
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
SUM = "1796041061::BIGINT + 0.5::FLOAT"
CASES = {
    f"typeof({SUM})": "FLOAT",
    f"({SUM})::BIGINT - 1796041061": None,
    "1796041061::BIGINT + 0.5": 1796041061.5,
    "CASE WHEN true THEN 123456789 ELSE 0.5::FLOAT END": 123456792.0,
    "coalesce(123456789, 0.5::FLOAT)": 123456792.0,
    "greatest(123456789, 0.5::FLOAT)": 123456792.0,
    "16777217 = 16777216::FLOAT": True,
    "(SELECT count(*) FROM (SELECT 16777217 AS a) JOIN (SELECT 16777216::FLOAT AS b) ON a = b)": 1,
    "(SELECT max(a) FROM (SELECT 123456789 AS a UNION ALL SELECT 0.5::FLOAT))": 123456792.0,
    "typeof(9007199254740993::BIGINT + 0.5::DOUBLE)": "DOUBLE",
}
changed = False
for expression, wanted in CASES.items():
    [value] = duckdb.execute(f"SELECT {expression}").fetchone()
    print(f"{expression}: {value}")
    changed = changed or (abs(value) < 10 if wanted is None else value != wanted)
raise SystemExit(changed)
PYTHON
