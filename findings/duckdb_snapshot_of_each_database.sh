#!/usr/bin/env bash
# DuckDB 1.5.5: a transaction that reads two attached databases sees each at another time.
#
# Expected: a transaction is one snapshot of all attached databases, taken at BEGIN or at the first statement. So what
# was committed after the transaction's first answer is not in any of its later ones.
# Observed: each database gets a snapshot of its own, when the transaction first names it. After a read of one database
# the other shows a commit that came later, so that an order and its archive copy, moved in between, are seen twice or
# not at all. From then on both stay as they are. Within one database the snapshot is of the first read, not of BEGIN.
# For Corral: no harm: a query and a backup read one database, the history or the lake, and the part of the archive that
# belongs to it is named by its views. It is a reason not to move days into a second database file.
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
writer = duckdb.connect(f"{sys.argv[1]}/main.duckdb")
writer.execute(f"ATTACH '{sys.argv[1]}/other.duckdb' AS other")
for table in ("t", "other.t"):
    writer.execute(f"CREATE TABLE {table} AS SELECT 0 AS a")
reader = writer.cursor()


def seen(table: str) -> int:
    return reader.execute(f"SELECT max(a) FROM {table}").fetchone()[0]


def commit(value: int) -> None:
    for table in ("t", "other.t"):
        writer.execute(f"INSERT INTO {table} VALUES ({value})")


reader.execute("BEGIN TRANSACTION READ ONLY")
commit(1)
found = [("main, a commit after BEGIN", seen("t"))]
commit(2)
found += [("other, read for the first time", seen("other.t")), ("main again", seen("t"))]
commit(3)
found += [("other again", seen("other.t")), ("main again", seen("t"))]
for name, value in found:
    print(f"{name}: {value}")
raise SystemExit([value for _, value in found] != [1, 2, 1, 2, 1])
PYTHON
