"""`corral query`: its output and its exit code."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from corral.cli.local.server import EmbeddedServer
from corral.processors.query.service import QueryService
from corral.schemas import subjects
from nats.aio.client import Client
from support.local_cluster import invoke

START_SECONDS = 90.0
"""A command takes a second of a core to start, and four start at once."""
FOREVER = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"


@pytest.fixture
async def history(nc: Client) -> AsyncIterator[QueryService]:
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE samples AS SELECT TIMESTAMPTZ '2026-11-24 10:00:00+00' + to_seconds(range) AS time,"
        " 'gpu' || range AS device, range / 4 AS share FROM range(5)"
    )
    service = QueryService(nc, connection.cursor)
    await service.start()
    yield service
    await service.stop()


class Ended:
    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out.decode(), err.decode()


async def start(url: str, *arguments: str, feed: bool = False) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "corral.cli.main", "--nats", url, "query", *arguments,
        stdin=asyncio.subprocess.PIPE if feed else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def corral_query(url: str, *arguments: str, stdin: str | None = None) -> Ended:
    process = await start(url, *arguments, feed=stdin is not None)
    out, err = await asyncio.wait_for(process.communicate(stdin.encode() if stdin is not None else None), START_SECONDS)
    assert process.returncode is not None
    return Ended(process.returncode, out, err)


async def test_the_same_rows_in_every_form(server: EmbeddedServer, history: QueryService, tmp_path: Path) -> None:
    sql = "FROM samples WHERE share > 0.5 ORDER BY time"
    (tmp_path / "ask.sql").write_text(f"-- from a file\n{sql};\n")
    arrow = tmp_path / "rows.arrow"
    table, document, csv, file = await asyncio.gather(
        corral_query(server.url, sql),
        corral_query(server.url, "--json", stdin=sql),
        corral_query(server.url, sql, "--csv", "--limit", "1"),
        corral_query(server.url, "-f", str(tmp_path / "ask.sql"), "--arrow", str(arrow)),
    )
    assert [line.split() for line in table.out.splitlines()] == [
        ["time", "(UTC)", "device", "share"],
        ["2026-11-24", "10:00:03", "gpu3", "0.75"],
        ["2026-11-24", "10:00:04", "gpu4", "1"],
    ]
    assert json.loads(document.out)["rows"] == [
        ["2026-11-24T10:00:03.000000Z", "gpu3", 0.75],
        ["2026-11-24T10:00:04.000000Z", "gpu4", 1.0],
    ]
    assert csv.out == 'time,device,share\r\n"2026-11-24T10:00:03.000000Z","gpu3",0.75\r\n'
    assert "Only the first 1 rows" in csv.err
    assert pa.ipc.open_stream(arrow.read_bytes()).read_all().column("device").to_pylist() == ["gpu3", "gpu4"]
    assert [table.code, document.code, csv.code, file.code] == [0, 0, 0, 0]


async def test_tables_have_the_times_of_the_reader_and_name_their_zone(
    server: EmbeddedServer, history: QueryService
) -> None:
    first = "SELECT min(time) AS time FROM samples"
    year = f"SELECT time AS winter, time - INTERVAL 150 DAY AS summer, TIMESTAMPTZ 'infinity' AS never FROM ({first})"
    both = "SELECT unnest([min(time), min(time) - INTERVAL 150 DAY]) AS time FROM samples"

    async def lines(sql: str, *options: str, **values: str) -> list[str]:
        done = await asyncio.to_thread(invoke, *options, "query", sql, url=server.url, **values)
        return [" ".join(line.split()) for line in done.stdout.splitlines()]

    assert await lines(year, TZ="Europe/Berlin") == [
        "winter (CET) summer (CEST) never", "2026-11-24 11:00:00 2026-06-27 12:00:00 infinity",
    ]  # fmt: skip
    assert await lines(both, TZ="Europe/Berlin") == ["time", "2026-11-24 11:00:00 CET", "2026-06-27 12:00:00 CEST"]
    assert await lines(both, "--utc", TZ="Europe/Berlin") == [
        "time (UTC)",
        "2026-11-24 10:00:00",
        "2026-06-27 10:00:00",
    ]


async def test_exit_codes_say_what_went_wrong(server: EmbeddedServer, history: QueryService, tmp_path: Path) -> None:
    cases = {
        ("SELEC 1",): (8, "syntax error"),
        ("DROP TABLE samples",): (8, "read-only"),
        (FOREVER, "--timeout", "1s"): (7, "1 s"),
        ("",): (2, "SHOW TABLES"),
        ("SELECT 1", "--timeout", "soon"): (2, "no duration"),
        ("SELECT 1", "--csv", "--json"): (2, "exclude"),
        ("-f", str(tmp_path / "none.sql")): (2, "none.sql"),
        ("SELECT 1", "--arrow", str(tmp_path / "no" / "file")): (1, "can't write"),
    }

    async def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(invoke, "query", *arguments, url=server.url)

    for arguments, (code, word) in cases.items():
        result = await asked(*arguments)
        assert result.returncode == code, (arguments, result.stderr)
        assert word in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr
    await history.stop()
    result = await asked("SELECT 1")
    assert result.returncode == 6
    assert "no processor" in result.stderr
    server.kill()
    assert (await asked("SELECT 1")).returncode == 3


async def test_ctrl_c_cancels_the_statement(server: EmbeddedServer, history: QueryService, nc: Client) -> None:
    process = await start(server.url, FOREVER, "--timeout", "180s")

    async def until_running(wanted: int) -> dict[str, int]:
        for _ in range(int(START_SECONDS / 0.05)):
            stats = json.loads((await nc.request(f"$SRV.STATS.{subjects.HISTORY_SERVICE}", b"")).data)
            counts = next(endpoint["data"] for endpoint in stats["endpoints"] if endpoint["name"] == "query")
            if counts["running"] == wanted:
                return counts
            await asyncio.sleep(0.05)
        raise AssertionError(f"never {wanted} running")

    await until_running(1)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), START_SECONDS) == 130
    assert (await until_running(0))["failed"] == 1
