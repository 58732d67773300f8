#!/usr/bin/env bash
# DuckLake of DuckDB 1.5.5 rounds a HUGEINT to 53 bits once its row is in a file: a flush changes what a table contains.
#
# Expected: a table gives back the values that were inserted, or refuses a column type that it can't store, as it
# refuses ENUM. In particular `ducklake_flush_inlined_data` moves rows and changes none.
# Observed: HUGEINT and UHUGEINT are written to Parquet as DOUBLE. 9007199254740993 is exact while its row is inlined
# in the catalog, and 9007199254740992 after the flush; without inlining it is rounded at once. The column's type is
# HUGEINT all the time, and nothing warns. `CREATE TABLE t AS SELECT sum(...)` of a BIGINT makes such a column.
# DECIMAL(38, 0) and UBIGINT keep all digits.
# For Corral: no table of a lake has a column of these types; counters and sums are BIGINT, UBIGINT or DOUBLE
# (tests/processors/test_lake_storage.py).
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


NUMBER = 2**53 + 1
attach("files", 0)
attach("inlined", 10)
same = True
for name in ("files", "inlined"):
    columns = f"sum({NUMBER}::BIGINT) AS total, {NUMBER}::DECIMAL(38, 0) AS exact"
    connection.execute(f"CREATE TABLE {name}.t AS SELECT {columns}")
    same &= value(f"SELECT typeof(total) FROM {name}.t") == "HUGEINT"
    same &= value(f"SELECT exact::VARCHAR FROM {name}.t") == str(NUMBER)
same &= value("SELECT total::VARCHAR FROM files.t") == str(NUMBER - 1)
connection.execute(f"CREATE TABLE inlined.u (total HUGEINT); INSERT INTO inlined.u VALUES ({NUMBER})")
same &= value("SELECT total::VARCHAR FROM inlined.u") == str(NUMBER)
connection.execute("CALL ducklake_flush_inlined_data('inlined')")
same &= value("SELECT total::VARCHAR FROM inlined.u") == str(NUMBER - 1)
raise SystemExit(not same)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder"
