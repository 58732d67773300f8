#!/usr/bin/env bash
# DuckDB 1.5.5: MERGE takes several source rows for one target row without an error, and inserts an unmatched key twice.
#
# Expected: an error that a row of the target matches more than one row of the source, as the SQL standard says, and
# PostgreSQL, SQL Server, Snowflake and Delta Lake do.
# Observed: both rows are applied. RETURNING has two rows for the one that changed, the count is 2, and the row has the
# value of one of them. Two source rows of a key that is not there yet are inserted as two rows.
# For Corral: rows are folded to one for each key before they are stored, and replaced by DELETE and INSERT; MERGE is
# used nowhere.
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
connection = duckdb.connect()
connection.execute("CREATE TABLE devices (device INTEGER, load INTEGER)")
connection.execute("INSERT INTO devices VALUES (1, 10), (2, 20)")
MERGE = """MERGE INTO devices t USING (VALUES (1, 50), (1, 60), (9, 70), (9, 80)) s (device, load) ON t.device = s.device
WHEN MATCHED THEN UPDATE SET load = s.load WHEN NOT MATCHED THEN INSERT VALUES (s.device, s.load)
RETURNING merge_action, device"""
returned = sorted(connection.execute(MERGE).fetchall())
print("returned", returned)
one = connection.execute("SELECT load FROM devices WHERE device = 1").fetchall()
new = connection.execute("SELECT load FROM devices WHERE device = 9 ORDER BY ALL").fetchall()
print("device 1:", one, "· device 9:", new)
same = returned == [("INSERT", 9), ("INSERT", 9), ("UPDATE", 1), ("UPDATE", 1)] and new == [(70,), (80,)]
raise SystemExit(not (same and one in ([(50,)], [(60,)])))
PYTHON
