#!/usr/bin/env bash
# DuckDB 1.5.5: an Arrow RecordBatchReader that a statement mentions twice is empty the second time; results are wrong.
#
# Expected: a reader can be read once, so that a statement which needs it twice, or a second statement, fails.
# Observed: it is empty from then on, and nothing is raised. `FROM r JOIN r` and `WHERE k IN (FROM r)` find no rows,
# UNION ALL has half of them, and `(SELECT count(*) FROM r), (SELECT sum(k) FROM r)` is a count and NULL. A later
# statement counts 0, also after one that read a row only (LIMIT 1). A CTE of it may be mentioned twice, and EXPLAIN
# and DESCRIBE read nothing.
# For Corral: readers are registered for one INSERT that mentions them once (processors/storage/embedded/database.py,
# hours.py, rollups.py); tests compare what is stored with what was read.
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
table = pyarrow.table({"k": [1, 2, 3]})
connection = duckdb.connect()
CASES = {
    "SELECT count(*) FROM r": [(3,)],
    "SELECT count(*) FROM r AS a JOIN r AS b USING (k)": [(0,)],
    "SELECT count(*) FROM r WHERE k IN (SELECT k FROM r)": [(0,)],
    "SELECT count(*) FROM (FROM r UNION ALL FROM r)": [(3,)],
    "SELECT (SELECT count(*) FROM r), (SELECT sum(k) FROM r)": [(3, None)],
    "WITH c AS (FROM r) SELECT count(*) FROM c AS a JOIN c AS b USING (k)": [(3,)],
}
changed = False
for sql, wanted in CASES.items():
    connection.register("r", table.to_reader())
    found = connection.execute(sql).fetchall()
    [after] = connection.execute("SELECT count(*) FROM r").fetchone()
    print(f"{sql}: {found}; then count(*): {after}")
    changed = changed or found != wanted or after != 0
connection.register("r", table.to_reader())
connection.execute("DESCRIBE r").fetchall()
[described] = connection.execute("SELECT count(*) FROM r").fetchone()
connection.register("r", table.to_reader())
connection.execute("FROM r LIMIT 1").fetchall()
[limited] = connection.execute("SELECT count(*) FROM r").fetchone()
print(f"count(*) after DESCRIBE: {described}, after LIMIT 1: {limited}")
raise SystemExit(changed or (described, limited) != (3, 0))
PYTHON
