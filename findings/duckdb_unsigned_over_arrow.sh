#!/usr/bin/env bash
# DuckDB 1.5.5 exports large UHUGEINT to Arrow as negative numbers, and HUGEINT as decimals that Arrow calls invalid.
#
# Expected: a 128-bit integer comes out of `to_arrow_table()` as the number that `fetchall()` returns, or the export is
# refused: Arrow has no such integer, and its decimals of 128 bits have at most 38 digits.
# Observed: both types become decimal128(38, 0) without an error, and the bits are copied. From 2**127 on a UHUGEINT is
# negative: 2**128 - 1 is -1, and so is half of all `md5_number`. A HUGEINT of 39 digits keeps its value, but the table
# fails its validation. DuckDB reads the negative numbers back, too, as does a cast to float.
# For Corral: results of queries are made from Arrow. UHUGEINT is exact in JSON, by its bits, and refused in other
# formats (`processors/query/results.py`, tests/processors/test_query_properties.py).
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5 pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import duckdb
import pyarrow

print("duckdb", duckdb.__version__, "pyarrow", pyarrow.__version__)
connection = duckdb.connect()
changed = False
for expression, sign in (
    ("170141183460469231731687303715884105727::UHUGEINT", 1),
    ("170141183460469231731687303715884105729::UHUGEINT", -1),
    ("340282366920938463463374607431768211455::UHUGEINT", -1),
    ("md5_number('b')", -1),
):
    sql = f"SELECT {expression} AS a, typeof(a) AS type"
    value, kind = connection.execute(sql).fetchone()
    table = connection.execute(sql).to_arrow_table()
    [arrow] = table["a"].to_pylist()
    [back] = duckdb.from_arrow(table).select("a").fetchone()
    print(f"{kind} {value}: {table.schema.field('a').type} {arrow}")
    wanted = value if sign > 0 else value - 2**128
    changed = changed or int(arrow) != wanted or int(back) != wanted or kind != "UHUGEINT"
table = connection.execute("SELECT 170141183460469231731687303715884105727::HUGEINT AS a").to_arrow_table()
try:
    table.validate(full=True)
    changed = True
except pyarrow.ArrowInvalid as error:
    print(f"HUGEINT {table['a'][0]}:", error)
raise SystemExit(changed)
PYTHON
