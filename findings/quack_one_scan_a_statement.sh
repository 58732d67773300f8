#!/usr/bin/env bash
# Quack of DuckDB 1.5.5: a statement may scan attached servers once; two of their tables can not be joined, nor one twice.
#
# Expected: tables of an attached Quack server behave like those of an attached DuckDB file or PostgreSQL database:
# `FROM h.a JOIN h.b` works, though both may be read in full. If not, materialized CTEs help, which are read one after
# the other.
# Observed: any statement with two scans fails with "Multiple streaming scans … are not currently supported": a join
# or UNION of two tables, of `h.query('…')` twice, IN and EXISTS, scalar subqueries, and materialized CTEs, too. One
# scan works in every place, also in CREATE TABLE AS and INSERT, which the message names. A single `h.query('…')` may
# join as much as it likes, since that happens on the server. Of several statements in one `h.query` all run, and the
# first one's rows are the answer.
# For Corral: docs/querying.md says to join within `history.query('…')`, or to copy one side first; several statements
# in one are refused (tests/processors/test_quack_endpoint.py).
#
# Exits 0 while DuckDB behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==1.5.5 duckdb-extension-quack==1.5.5 \
    duckdb-extension-httpfs==1.5.5
cat > "$folder/look.py" <<'PYTHON'
import importlib
import multiprocessing
import pathlib
import socket

import duckdb

TOKEN = "a-token-for-this-test-alone"


def connect() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    for name in ("httpfs", "quack"):
        package = importlib.import_module(f"duckdb_extension_{name}")
        extension = next(pathlib.Path(package.__file__).parent.rglob(f"{name}.duckdb_extension"))
        connection.execute(f"LOAD '{extension}'")
    return connection


def serve(port: int, ready, ended) -> None:
    connection = connect()
    connection.execute("CREATE TABLE a AS SELECT range AS k FROM range(10); CREATE TABLE b AS FROM a")
    connection.execute("CALL quack_serve(?, token = ?)", [f"quack:127.0.0.1:{port}", TOKEN]).fetchall()
    ready.set()
    ended.wait(60)


CASES = {
    "SELECT count(*) FROM h.a": 10,
    "SELECT count(*) FROM h.a JOIN mine USING (k)": 3,
    "SELECT count(*) FROM h.a JOIN h.b USING (k)": None,
    "SELECT count(*) FROM h.a AS x JOIN h.a AS y USING (k)": None,
    "SELECT count(*) FROM (FROM h.a UNION ALL FROM h.b)": None,
    "SELECT count(*) FROM h.a WHERE k IN (FROM h.b)": None,
    "SELECT (SELECT max(k) FROM h.a) + (SELECT max(k) FROM h.b)": None,
    "WITH x AS MATERIALIZED (FROM h.a), y AS MATERIALIZED (FROM h.b) SELECT count(*) FROM x JOIN y USING (k)": None,
    "SELECT count(*) FROM h.query('FROM a') JOIN h.query('FROM b') USING (k)": None,
    "SELECT count(*) FROM h.query('FROM a JOIN b USING (k)')": 10,
    "CREATE TABLE copied AS FROM h.a": 10,
    "INSERT INTO copied FROM h.b": 10,
    "SELECT count(*) FROM h.query('SELECT 1 AS n; INSERT INTO b VALUES (99)')": 1,
    "SELECT max(k) FROM h.b": 99,
}


def main() -> bool:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ready, ended = context.Event(), context.Event()
    server = context.Process(target=serve, args=(port, ready, ended))
    server.start()
    same = ready.wait(60)
    client = connect()
    client.execute(f"ATTACH 'quack:127.0.0.1:{port}' AS h (TOKEN '{TOKEN}')")
    client.execute("CREATE TABLE mine AS SELECT range AS k FROM range(3)")
    for sql, wanted in CASES.items():
        try:
            [found] = client.execute(sql).fetchone()
            same = same and found == wanted
        except duckdb.NotImplementedException as error:
            found = str(error)[:60]
            same = same and wanted is None
        print(f"{sql}: {found}")
    ended.set()
    server.join(30)
    return same


if __name__ == "__main__":
    raise SystemExit(not main())
PYTHON
timeout 120 "$folder/venv/bin/python" "$folder/look.py"
