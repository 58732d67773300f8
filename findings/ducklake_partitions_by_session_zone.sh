#!/usr/bin/env bash
# DuckLake of DuckDB 1.5.5: a table partitioned by day(time) puts a TIMESTAMPTZ into the day of the writer's session zone.
#
# Expected: the partition of an instant is one, that of UTC: it is a property of the table, which all writers share.
# Observed: of two writers with other zones one puts 01:00 UTC of 1 December into the folder day=1, the other into
# day=30 of November. DuckLake's own queries find both by time. But whoever works by folders or partitions (deletes a
# day's, reads day=1 with another engine, counts files of a day) gets a part of a day, and of its neighbor.
# For Corral: a lake is not partitioned by time, and each instance that writes to it sets its zone to UTC
# (processors/storage/lake/lake.py).
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

folder = pathlib.Path(sys.argv[1])
extension = next(pathlib.Path(package.__file__).parent.rglob("ducklake.duckdb_extension"))
print("duckdb", duckdb.__version__)


def attached(zone: str) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute(f"LOAD '{extension}'")
    connection.execute(f"SET TimeZone = '{zone}'")
    options = f"DATA_PATH '{folder}/files', DATA_INLINING_ROW_LIMIT 0"
    connection.execute(f"ATTACH 'ducklake:{folder}/catalog.ducklake' AS lake ({options})")
    return connection


with attached("UTC") as connection:
    connection.execute("CREATE TABLE lake.samples (time TIMESTAMPTZ, x INTEGER)")
    connection.execute("ALTER TABLE lake.samples SET PARTITIONED BY (month(time), day(time))")
for place, zone in enumerate(("UTC", "America/New_York")):
    with attached(zone) as connection:
        connection.execute("INSERT INTO lake.samples VALUES (to_timestamp(1764550800), ?)", [place])
folders = sorted(str(file.parent.relative_to(folder / "files")) for file in folder.glob("files/**/*.parquet"))
print(folders)
with attached("UTC") as connection:
    found = connection.execute("SELECT x FROM lake.samples WHERE day(time) = 1 ORDER BY x").fetchall()
print("of day 1, by DuckLake in UTC:", found)
ends = [name.partition("samples/")[2] for name in folders]
raise SystemExit(not (ends == ["month=11/day=30", "month=12/day=1"] and found == [(0,), (1,)]))
PYTHON
timeout 120 "$folder/venv/bin/python" "$folder/look.py" "$folder"
