#!/usr/bin/env bash
# DuckDB 1.5.5: a table with a primary key never gives up the space of deleted rows.
#
# Expected: a checkpoint drops row groups of which all rows are deleted, and the file reuses their blocks, with a key or
# without: a table whose old rows are deleted as new ones come has a constant size.
# Observed: that is so without a key. With PRIMARY KEY or UNIQUE every row that was ever inserted stays in the file and
# in `estimated_size`, although count(*) is right; neither a checkpoint, nor VACUUM, nor a restart changes it.
# For Corral: watermarks and rollups, which are replaced with every commit, made the file grow forever. Tables whose
# rows are replaced have no key (schema version 4, `processors/storage/schema.py`); `statements.put` keeps them unique.
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

ROUNDS, ROWS = 6, 100_000
print("duckdb", duckdb.__version__)


def kept(key: str) -> tuple[int, int, int]:
    """Rows counted, rows in the file, and used blocks of 256 KiB after a restart."""
    path = f"{sys.argv[1]}/{key.partition(' ')[0] or 'none'}.duckdb"
    with duckdb.connect(path) as connection:
        connection.execute(f"CREATE TABLE t (a BIGINT {key}, b DOUBLE)")
        for number in range(ROUNDS):
            first = number * ROWS
            connection.execute(f"INSERT INTO t SELECT range, random() FROM range({first}, {first + ROWS})")
            connection.execute(f"DELETE FROM t WHERE a < {first}")
            connection.execute("CHECKPOINT")
        connection.execute("VACUUM")
    with duckdb.connect(path) as connection:
        connection.execute("CHECKPOINT")
        [rows] = connection.execute("SELECT count(*) FROM t").fetchone()
        [stored] = connection.execute("SELECT estimated_size FROM duckdb_tables()").fetchone()
        [blocks] = connection.execute("SELECT used_blocks FROM pragma_database_size()").fetchone()
    return rows, stored, blocks


found = {key: kept(key) for key in ("", "PRIMARY KEY", "UNIQUE")}
for key, (rows, stored, blocks) in found.items():
    print(f"{key or 'no key'}: {rows} rows, {stored} in the file, {blocks} blocks")
*plain, least = found.pop("")
grown = all(found[key][:2] == (ROWS, ROUNDS * ROWS) and found[key][2] > 3 * least for key in found)
raise SystemExit(not (plain == [ROWS, ROWS] and grown))
PYTHON
