#!/usr/bin/env bash
# DuckLake of DuckDB 1.5.5 keeps what it has read of every snapshot in memory for as long as a lake is attached.
#
# Expected: an attachment holds the newest snapshot's schema and statistics. Memory stays constant however many commits
# go through it, especially with a memory_limit.
# Observed: 1,500 commits of one row through one attachment leave 58 MB cached, and 4 MB through attachments that are
# renewed every 100. duckdb_memory() reports it as OBJECT_CACHE, and it is freed with the attachment.
# For Corral: a processor of a lake commits every two seconds, and grew by 30 to 200 KB with each commit. Its parts and
# readers attach again every 200 commits (`RENEW_COMMITS` in processors/storage/lake/lake.py,
# tests/processors/test_lake_storage.py).
#
# Exits 0 while DuckLake behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5 duckdb-extension-ducklake==1.5.5
cat > "$folder/commits.py" <<'PYTHON'
import pathlib
import sys

import duckdb
import duckdb_extension_ducklake as package

folder, every = sys.argv[1], int(sys.argv[2])
extension = next(pathlib.Path(package.__file__).parent.rglob("ducklake.duckdb_extension"))


def attach() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute(f"SET threads = 1; LOAD '{extension}'")
    connection.execute(f"ATTACH 'ducklake:{folder}/catalog.ducklake' AS lake (DATA_PATH '{folder}/data')")
    connection.execute("USE lake")
    return connection


def cached(connection: duckdb.DuckDBPyConnection) -> int:
    sql = "SELECT sum(memory_usage_bytes)::BIGINT FROM duckdb_memory() WHERE tag = 'OBJECT_CACHE'"
    return connection.execute(sql).fetchone()[0]


connection = attach()
columns = ", ".join(f"c{number} DOUBLE" for number in range(150))
connection.execute(f"CREATE TABLE t (a BIGINT, {columns})")
for number in range(1, 1501):
    connection.execute(f"INSERT INTO t (a, c0) VALUES ({number}, 1)")
    if number % every == 0 and number < 1500:
        connection.close()
        connection = attach()
rows = connection.execute("SELECT count(*) FROM t").fetchone()[0]
print(rows, cached(connection))
PYTHON
"$folder/venv/bin/python" -c 'import duckdb; print("duckdb", duckdb.__version__)'
mkdir "$folder/one" "$folder/many"
read -r rows one < <("$folder/venv/bin/python" "$folder/commits.py" "$folder/one" 10000)
read -r same many < <("$folder/venv/bin/python" "$folder/commits.py" "$folder/many" 100)
echo "one attachment: $rows rows, $one bytes cached"
echo "made anew every 100 commits: $same rows, $many bytes cached"
[ "$rows" = 1500 ] && [ "$same" = 1500 ] && [ "$one" -gt $((4 * many)) ] && [ "$one" -gt 10000000 ]
