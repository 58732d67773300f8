#!/usr/bin/env bash
# DuckDB 1.5.5 refuses a checkpoint after an UPDATE while an older reader is active, but not after DELETE and INSERT.
#
# Expected: both are the same to a checkpoint, as to other transactions: old rows for the reader, new ones for the rest.
# So both succeed, or neither.
# Observed: while a reader is active that began earlier, CHECKPOINT fails after an UPDATE (an upsert is one) and
# succeeds after the same change made with DELETE and INSERT. If readers overlap, the log of an updated table is never
# checkpointed.
# For Corral: one upserted watermark in each commit let the log grow for as long as there were readers. Rows that are
# replaced repeatedly are now deleted and inserted (`statements.put`, tests/processors/test_log_folding.py).
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import duckdb

print("duckdb", duckdb.__version__)
CHANGES = {
    "update": ["UPDATE t SET b = b + 1 WHERE a = 1"],
    "delete and insert": ["CREATE TEMP TABLE n AS SELECT a, b + 1 AS b FROM t WHERE a = 1",
                          "DELETE FROM t WHERE a = 1", "INSERT INTO t FROM n"],
}
found = {}
for name, statements in CHANGES.items():
    connection = duckdb.connect(f"{sys.argv[1]}/{name.split()[0]}.duckdb")
    connection.execute("CREATE TABLE t AS SELECT range AS a, 0::BIGINT AS b FROM range(1000)")
    connection.execute("CHECKPOINT")
    reader = connection.cursor()
    reader.execute("BEGIN")
    reader.execute("SELECT sum(b) FROM t").fetchall()
    connection.execute("BEGIN")
    for statement in statements:
        connection.execute(statement)
    connection.execute("COMMIT")
    try:
        connection.cursor().execute("CHECKPOINT")
        found[name] = "works"
    except duckdb.Error as error:
        found[name] = "refused: " + str(error).splitlines()[0]
    reader.execute("ROLLBACK")
    connection.close()
for name, outcome in found.items():
    print(f"CHECKPOINT behind {name}: {outcome}")
raise SystemExit(not (found["update"].startswith("refused") and found["delete and insert"] == "works"))
PYTHON
