"""The Quack endpoint, with a real second DuckDB process as its client."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from corral.processors.query import quack
from corral.processors.storage import Database, hardening

pytest.importorskip("duckdb_extension_quack", reason="pip install 'corral[quack]'")
TOKEN = "a-token-of-enough-letters"

CLIENT = """
import json, sys
import duckdb
from corral.processors.query import quack
connection = duckdb.connect()
quack.load(connection)
answers = []
for sql in json.loads(sys.stdin.read()):
    try:
        answers.append([str(value) for row in connection.execute(sql).fetchall() for value in row])
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[quack.QuackEndpoint]:
    folder = tmp_path_factory.mktemp("quack")
    connection = duckdb.connect(str(folder / "history.duckdb"))
    connection.execute("CREATE TABLE samples AS SELECT range AS n, 'gpu' || range % 4 AS device FROM range(50000)")
    connection.execute("CREATE VIEW busy AS SELECT device, max(n) AS most FROM samples GROUP BY device")
    connection.execute("CREATE SCHEMA store; CREATE TABLE store.secret AS SELECT 'hidden' AS a")
    quack.load(connection)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = quack.QuackEndpoint(connection, connection.cursor, f"127.0.0.1:{port}", TOKEN)
    hardening.lock(connection, memory_bytes=512 * 2**20)
    yield endpoint
    endpoint.close()
    connection.close()


def client(*statements: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLIENT)],
        input=json.dumps(statements), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A slow machine gets DuckDB's progress bar before it.
    return json.loads(done.stdout.splitlines()[-1])


def test_a_client_reads_tables_and_views_and_writes_nothing(endpoint: quack.QuackEndpoint) -> None:
    attach = f"ATTACH '{endpoint.uri}' AS history (TOKEN '{TOKEN}')"
    answers = client(
        attach,
        "SELECT count(*), sum(n) FROM history.samples WHERE n >= 10",
        "SELECT most FROM history.busy ORDER BY device LIMIT 1",
        "SELECT s.device, count(*) FROM history.samples s JOIN (SELECT 'gpu1' AS device) USING (device) GROUP BY 1",
        "FROM history.query('SELECT max(n) FROM samples')",
        "INSERT INTO history.samples VALUES (1, 'x')",
        "CREATE TABLE history.mine (a INTEGER)",
        "DROP TABLE history.samples",
        "FROM history.query('FROM store.secret')",
        "FROM history.query('FROM duckdb_settings()')",
        "FROM history.query('FROM duckdb_views()')",
        "FROM history.query('FROM read_text(''/etc/hostname'')')",
        "FROM history.query('SELECT 1; DROP TABLE samples')",
        "FROM history.query('SET GLOBAL quack_authorization_function = ''quack_nop_authorization''')",
        "FROM history.query('CALL quack_stop(''x'')')",
        "FROM history.query('CALL quack_serve(''quack:127.0.0.1:1'', token = ''1234567890'')')",
        "FROM history.query('BEGIN TRANSACTION')",
        "FROM history.query('SELECT corral_authorise(''a'', ''b'')')",
        "SELECT count(*) FROM history.samples",
    )
    assert answers[:5] == [[], ["49990", "1249974955"], ["49996"], ["gpu1", "12500"], ["49999"]]
    assert all("Authorization failed" in answer for answer in answers[5:-1]), answers[5:-1]
    assert answers[-1] == ["50000"]


def test_without_the_token_nothing_is_answered(endpoint: quack.QuackEndpoint) -> None:
    for answer in client(
        f"ATTACH '{endpoint.uri}' AS history (TOKEN 'a-token-of-other-letters')",
        f"FROM quack_query('{endpoint.uri}', 'SELECT 1', token = 'a-token-of-other-letters')",
        f"FROM quack_query('{endpoint.uri}', 'SELECT 1')",
    ):
        assert "Authentication failed" in answer or "token" in answer


def test_a_large_result_comes_whole(endpoint: quack.QuackEndpoint) -> None:
    attach = f"ATTACH '{endpoint.uri}' AS history (TOKEN '{TOKEN}')"
    copy = "CREATE TABLE mine AS FROM history.query('SELECT n, repeat(device, 20) AS text FROM samples, range(10)')"
    assert client(attach, copy, "SELECT count(*), count(DISTINCT n) FROM mine")[-1] == ["500000", "50000"]


def test_tables_are_joined_by_the_server_or_after_one_was_copied(endpoint: quack.QuackEndpoint) -> None:
    """A client's statement reads the history once (findings/quack_one_scan_a_statement.sh)."""
    answers = client(
        f"ATTACH '{endpoint.uri}' AS history (TOKEN '{TOKEN}')",
        "SELECT count(*) FROM history.samples JOIN history.busy USING (device)",
        "FROM history.query('SELECT count(*) FROM samples JOIN busy USING (device)')",
        "CREATE TABLE mine AS FROM history.busy",
        "SELECT count(*) FROM history.samples JOIN mine USING (device)",
    )
    assert "Multiple streaming scans" in answers[1]
    assert [answers[2], answers[4]] == [["50000"], ["50000"]]


def test_the_token_comes_from_a_file_that_others_can_not_read(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(quack.QuackError, match="can't be read"):
        quack.read_token(file)
    file.write_text("short\n")
    file.chmod(0o600)
    with pytest.raises(quack.QuackError, match="at least 16"):
        quack.read_token(file)
    file.write_text(TOKEN + "\n")
    assert quack.read_token(file) == TOKEN
    file.chmod(0o640)
    with pytest.raises(quack.QuackError, match="chmod 600"):
        quack.read_token(file)


def test_the_endpoint_opens_again_with_a_database_that_was_reopened(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    def prepare(connection: duckdb.DuckDBPyConnection) -> Any:
        quack.load(connection)
        return quack.QuackEndpoint(connection, connection.cursor, address, TOKEN).close

    asked = (f"ATTACH 'quack:{address}' AS history (TOKEN '{TOKEN}')", "SELECT count(*) FROM history.fleet_by_hour")
    for _ in range(2):
        database = Database(tmp_path / "history.duckdb", prepare=prepare)
        assert client(*asked) == [[], ["0"]]
        database.close()
    assert "Could not connect" in client(asked[0])[0]


async def test_an_address_that_is_taken_or_wrong_is_reported() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connection = duckdb.connect()
    quack.load(connection)
    with pytest.raises(quack.QuackError, match="can't be listened on"):
        quack.QuackEndpoint(connection, connection.cursor, f"127.0.0.1:{port}", TOKEN)
    for address in ("host:port", "x:0", "a'b:1"):
        with pytest.raises(quack.QuackError, match="no address"):
            quack.parse_address(address)
    assert quack.parse_address("history") == ("history", 9494)
    server.close()
    connection.close()
