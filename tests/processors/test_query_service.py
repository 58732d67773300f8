"""SQL over the bus, through a real server and a real database."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import duckdb
import msgspec
import pyarrow as pa
import pytest
from corral.bus.connect import connect
from corral.bus.process import resident_bytes
from corral.processors.query.service import Limits, QueryService
from corral.processors.storage import hardening
from corral.schemas import subjects
from corral.schemas.query import END_HEADER, PART_HEADER, ProcessorStatus
from nats.aio.client import Client

BILLION = "SELECT a.range * b.range AS n FROM range(100000) a, range(10000) b"
FOREVER = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"


@pytest.fixture
async def database() -> AsyncIterator[duckdb.DuckDBPyConnection]:
    connection = duckdb.connect()
    connection.execute("CREATE TABLE samples AS SELECT range AS n, 'gpu' || range % 8 AS device FROM range(50000)")
    hardening.lock(connection, memory_bytes=512 * 2**20, spill_bytes=64 * 2**20)
    yield connection
    connection.close()


@pytest.fixture
async def service(nc: Client, database: duckdb.DuckDBPyConnection) -> AsyncIterator[QueryService]:
    service = QueryService(nc, database.cursor, limits=Limits(slots=2, per_asker=1, waiting=4))
    await service.start()
    yield service
    await service.stop()


async def ask(nc: Client, sql: str, acknowledge: bool = True, **fields: Any) -> tuple[bytes, dict[str, Any], int]:
    """All parts of an answer, its end, and how many parts there were: by bare NATS, as any client would."""
    inbox = nc.new_inbox()
    parts = await nc.subscribe(inbox)
    await nc.publish(subjects.QUERY, json.dumps({"sql": sql, **fields}).encode(), reply=inbox)
    body = b""
    for number in range(100_000):
        message = await parts.next_msg(timeout=30)
        assert message.headers is not None
        assert message.headers[PART_HEADER] == str(number)
        body += message.data
        if END_HEADER in message.headers:
            await parts.unsubscribe()
            return body, json.loads(message.headers[END_HEADER]), number + 1
        if message.reply and acknowledge:
            await nc.publish(message.reply, b"")
    raise AssertionError("no end")


async def rows(nc: Client, sql: str, **fields: Any) -> list[list[Any]]:
    body, end, _ = await ask(nc, sql, **fields)
    assert not end.get("error"), end
    return json.loads(body)["rows"]


async def test_plain_request_gets_one_json_document(nc: Client, service: QueryService) -> None:
    reply = await nc.request(
        subjects.QUERY,
        b'{"sql": "SELECT device, count(*) AS n FROM samples GROUP BY 1 ORDER BY 1 LIMIT 2"}',
        timeout=20,
    )
    assert json.loads(reply.data) == {
        "type": "result",
        "columns": ["device", "n"],
        "types": ["VARCHAR", "BIGINT"],
        "rows": [["gpu0", 6250], ["gpu1", 6250]],
        "truncated": False,
    }
    assert reply.headers is not None
    assert json.loads(reply.headers[END_HEADER])["rows"] == 2


async def test_values_that_json_has_no_word_for(nc: Client, service: QueryService) -> None:
    sql = """SELECT 'NaN'::DOUBLE, '-inf'::FLOAT, 1.50::DECIMAL(9,2), 170141183460469231731687303715884105727::HUGEINT,
        '2026-11-24 12:00:00.123456+02'::TIMESTAMPTZ, '2026-11-24 12:00:00.123456789'::TIMESTAMP_NS,
        'infinity'::TIMESTAMP, DATE '2026-11-24', TIME '10:11:12.5', INTERVAL '1 month 2 days 3.5 seconds',
        '\\x00\\xFF'::BLOB, '101'::BIT, [1.5, NULL, 'NaN'::DOUBLE], {'a': [{'b': 1}]}, MAP {'k': 1}, MAP {1: 2},
        'b'::ENUM('a', 'b'), [TIMESTAMP_NS '2026-11-24 00:00:00.000000001'], NULL, true"""
    ((*values,),) = await rows(nc, sql)
    assert values == [
        "NaN", "-Infinity", 1.5, 170141183460469231731687303715884105727,
        "2026-11-24T10:00:00.123456Z", "2026-11-24T12:00:00.123456789Z",
        "infinity", "2026-11-24", "10:11:12.500000", "P1M2DT3.5S",
        "AP8=", "101", [1.5, None, "NaN"], {"a": [{"b": 1}]}, {"k": 1}, [[1, 2]],
        "b", ["2026-11-24T00:00:00.000000001Z"], None, True,
    ]  # fmt: skip
    body, end, _ = await ask(nc, "SELECT '1'::BIGNUM AS n")
    assert (end["code"], json.loads(body)["code"]) == ("invalid", "invalid")
    assert "cast it to VARCHAR" in end["error"]


async def test_the_hours_of_a_zone_are_told_apart_at_the_end_of_summer_time(nc: Client, service: QueryService) -> None:
    sql = """SELECT time_bucket(INTERVAL 1 hour, t, 'Europe/Berlin') AS hour, count(*),
        any_value(time_bucket(INTERVAL 1 day, t, 'Europe/Berlin')) FROM
        range(TIMESTAMPTZ '2026-10-25 00:00:00+00', TIMESTAMPTZ '2026-10-25 02:00:00+00', INTERVAL 10 minute) AS r(t)
        GROUP BY hour ORDER BY hour"""
    midnight = "2026-10-24T22:00:00.000000Z"
    counted = await rows(nc, sql)
    assert counted == [["2026-10-25T00:00:00.000000Z", 6, midnight], ["2026-10-25T01:00:00.000000Z", 6, midnight]]


async def test_a_question_in_messagepack_is_answered_alike(nc: Client, service: QueryService) -> None:
    sql = """SELECT device, count(*) AS n, sum(count(*)) OVER () AS huge, 1.50::DECIMAL(9,2) AS d,
        0.1::DECIMAL(38,37) AS tenth, TIMESTAMP '2026-01-01 00:00:00.000001' AS at,
        [1.5, NULL] AS list, {'a': 1::HUGEINT} AS struct, NULL AS nothing
        FROM samples GROUP BY device ORDER BY device"""
    wordy = {"sql": sql, "tomorrow": 1}
    plain = await nc.request(subjects.QUERY, msgspec.json.encode(wordy), timeout=20)
    headers = {"Content-Type": "application/msgpack"}
    packed = await nc.request(subjects.QUERY, msgspec.msgpack.encode(wordy), timeout=20, headers=headers)
    assert (packed.headers or {})["Content-Type"] == "application/msgpack"
    assert json.loads(plain.data)["type"] == "result", plain.data
    assert msgspec.msgpack.decode(packed.data) == json.loads(plain.data)
    assert json.loads(plain.data)["warnings"] == ["$.tomorrow is not known to this version and was ignored"]
    exact = "SELECT 12345678901234567890.12::DECIMAL(38,2)"  # no number of MessagePack says that
    packed = await nc.request(subjects.QUERY, msgspec.msgpack.encode({"sql": exact}), timeout=20, headers=headers)
    assert msgspec.msgpack.decode(packed.data)["rows"] == [["12345678901234567890.12"]]
    for subject, body, code in (
        (subjects.QUERY, {"sql": "SELEC"}, "400"),
        (subjects.QUERY, {"sql": "COPY samples TO 'x'"}, "403"),
        (f"{subjects.QUERY_CANCEL}.ann", {"query_id": "nope"}, "404"),
    ):
        answer = await nc.request(subject, msgspec.msgpack.encode(body), timeout=20, headers=headers)
        told = msgspec.msgpack.decode(answer.data)
        assert answer.headers is not None
        assert (told["type"], answer.headers["Nats-Service-Error-Code"]) == ("error", code)
        assert answer.headers["Content-Type"] == "application/msgpack"
    status = await nc.request(f"{subjects.HISTORY_STATUS}.ann", b"", headers=headers, timeout=20)
    assert msgspec.msgpack.decode(status.data)["type"] == "processor"


async def test_csv_is_what_a_csv_reader_expects(nc: Client, service: QueryService) -> None:
    sql = """SELECT * FROM (VALUES (1, 'a,"b"', NULL, [1, 2], 1.50::DECIMAL(9,2), 'NaN'::DOUBLE),
        (2, '', 'x', NULL, NULL, 0.1)) AS t("id", "the, text", n, l, d, f)"""
    body, end, _ = await ask(nc, sql, format="csv")
    assert end["rows"] == 2
    assert list(csv.reader(io.StringIO(body.decode(), newline=""))) == [
        ["id", "the, text", "n", "l", "d", "f"],
        ["1", 'a,"b"', "", "[1,2]", "1.50", "nan"],
        ["2", "", "x", "", "", "0.1"],
    ]


async def test_arrow_comes_in_parts(nc: Client, service: QueryService) -> None:
    body, end, parts = await ask(nc, "FROM range(500000)", format="arrow", limit=400_000)
    assert parts > 1
    table = pa.ipc.open_stream(body).read_all()
    assert table.num_rows == end["rows"] == 400_000
    assert end["truncated"]
    assert table.column(0).to_pylist() == list(range(400_000))


async def test_limit_says_whether_rows_are_missing(nc: Client, service: QueryService) -> None:
    for sql, limit, truncated in (
        ("FROM range(10)", 10, False),
        ("FROM range(11)", 10, True),
        ("FROM range(9)", 10, False),
    ):
        body, end, _ = await ask(nc, sql, limit=limit)
        assert end.get("truncated", False) == json.loads(body)["truncated"] == truncated
        assert len(json.loads(body)["rows"]) == min(limit, end["rows"])
    body, end, _ = await ask(nc, "SELECT n FROM samples ORDER BY n DESC -- last first", limit=2)
    assert json.loads(body)["rows"] == [[49999], [49998]]


async def test_errors_have_codes(nc: Client, service: QueryService) -> None:
    for sql, code, word in (
        ("SELEC 1", "invalid", "syntax"),
        ("SELECT missing FROM samples", "invalid", "missing"),
        ("SELECT 1 / 'x'", "invalid", "onver"),
        ("SELECT n + 'x'::INT FROM samples", "invalid", "onver"),
        ("DROP TABLE samples", "refused", "read-only"),
        ("SELECT 1; SELECT 2", "refused", "one statement"),
        ("", "invalid", "empty"),
        ("-- nothing", "invalid", "no statement"),
    ):
        body, end, _ = await ask(nc, sql)
        assert (end["code"], code in json.loads(body)["code"]) == (code, True), (sql, end)
        assert word in end["error"], (sql, end)
    reply = await nc.request(subjects.QUERY, b"{")
    assert json.loads(reply.data)["type"] == "error"
    reply = await nc.request(subjects.QUERY, b'{"sql": "SELECT 1", "formt": "csv"}')
    assert "did you mean `format`" in json.loads(reply.data)["message"]


async def test_timeout_ends_the_statement_and_frees_its_slot(nc: Client, service: QueryService) -> None:
    _, end, _ = await ask(nc, FOREVER, timeout_seconds=0.2)
    assert end["code"] == "timeout"
    assert await rows(nc, "SELECT 1") == [[1]]


async def test_cancel_a_running_and_a_waiting_query(nc: Client, service: QueryService) -> None:
    running = asyncio.create_task(ask(nc, FOREVER, query_id="running"))
    await asyncio.sleep(0.2)
    waiting = asyncio.create_task(ask(nc, FOREVER, query_id="waiting"))
    await asyncio.sleep(0.1)
    for name in ("waiting", "running"):
        reply = await nc.request(subjects.QUERY_CANCEL, json.dumps({"query_id": name}).encode())
        assert json.loads(reply.data) == {"type": "cancelled", "query_id": name, "warnings": []}
    assert (await running)[1]["code"] == (await waiting)[1]["code"] == "cancelled"
    reply = await nc.request(subjects.QUERY_CANCEL, b'{"query_id": "running"}', timeout=2)
    assert json.loads(reply.data)["code"] == "not_found"


async def test_nobody_takes_all_slots_and_the_line_is_bounded(nc: Client, server: Any, service: QueryService) -> None:
    flood = [asyncio.create_task(ask(nc, FOREVER, timeout_seconds=20, query_id=f"q{n}")) for n in range(8)]
    other = await connect(server.url)
    try:
        await asyncio.sleep(0.2)
        assert await rows(other, "SELECT 42") == [[42]]
        assert not flood[0].done()
        for number in range(8):
            await nc.publish(subjects.QUERY_CANCEL, json.dumps({"query_id": f"q{number}"}).encode())
        codes = [(await task)[1]["code"] for task in flood]
        assert set(codes) == {"cancelled", "busy"}
        assert codes[0] == "cancelled"
        assert codes.count("busy") >= 3
    finally:
        await other.close()


async def test_a_billion_rows_are_cut_or_streamed_in_bounded_memory(nc: Client, service: QueryService) -> None:
    _, end, _ = await ask(nc, BILLION, limit=1000)
    assert (end["rows"], end["truncated"]) == (1000, True)
    # Without acknowledgements the answer ends where a server would cut off a slow reader.
    _, end, _ = await ask(nc, BILLION, format="arrow", limit=100_000_000)
    assert end["code"] == "too_large"
    # With them it goes as far as its reader does.
    inbox = nc.new_inbox()
    parts = await nc.subscribe(inbox)
    request = {"sql": BILLION, "format": "arrow", "limit": 100_000_000, "window": 2, "query_id": "long"}
    await nc.publish(subjects.QUERY, json.dumps(request).encode(), reply=inbox)
    for _ in range(500):
        if parts.pending_msgs == 2:
            break
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)  # a third would come by then
    assert parts.pending_msgs == 2
    for _ in range(60):
        message = await parts.next_msg(timeout=5)
        await nc.publish(message.reply, b"")
    assert parts.pending_msgs <= 2
    await nc.request(subjects.QUERY_CANCEL, b'{"query_id": "long"}')
    while True:
        message = await parts.next_msg(timeout=5)
        if message.headers is not None and END_HEADER in message.headers:
            break
    assert json.loads(message.headers[END_HEADER])["code"] == "cancelled"


async def test_a_reader_that_went_away_frees_its_slot(nc: Client, database: duckdb.DuckDBPyConnection) -> None:
    service = QueryService(nc, database.cursor, limits=Limits(slots=1, per_asker=1, acknowledge_seconds=0.3))
    await service.start()
    request = {"sql": BILLION, "format": "arrow", "limit": 100_000_000, "window": 1}
    # One that does not listen any more, and one that listens but takes nothing.
    silent = nc.new_inbox()
    parts = await nc.subscribe(silent)
    for inbox in (nc.new_inbox(), silent):
        await nc.publish(subjects.QUERY, json.dumps(request).encode(), reply=inbox)
        assert await rows(nc, "SELECT 1") == [[1]]
    last = [await parts.next_msg(timeout=5) for _ in range(2)][1]
    assert last.headers is not None
    assert "acknowledged no part" in json.loads(last.headers[END_HEADER])["error"]
    await service.stop()


async def test_too_much_memory_is_refused_and_the_rest_goes_on(nc: Client, service: QueryService) -> None:
    _, end, _ = await ask(nc, "SELECT list(a.range::VARCHAR || repeat('x', 100)) FROM range(100000000) a")
    assert end["code"] == "too_large"
    assert await rows(nc, "SELECT count(*) FROM samples") == [[50000]]


async def test_memory_that_duckdb_does_not_count_is_watched(nc: Client, database: duckdb.DuckDBPyConnection) -> None:
    """The values in hand: two thousand lists that grow by the second, far above what the process may hold."""
    service = QueryService(nc, database.cursor, limits=Limits(resident_bytes=resident_bytes() + 200 * 2**20))
    await service.start()
    doubled = "SELECT x || x || x || x AS x FROM ("
    sql = f"SELECT max(length(x)) FROM ({doubled * 4} SELECT repeat(range::VARCHAR, 500) AS x FROM range(10000000))))))"
    _, end, _ = await ask(nc, sql)
    assert (end["code"], "than there is" in end["error"]) == ("too_large", True), end
    assert await rows(nc, "SELECT 1") == [[1]]
    await service.stop()


async def test_the_service_answers_for_itself(nc: Client, service: QueryService) -> None:
    reply = await nc.request(subjects.HISTORY_STATUS, b"")
    status = msgspec.json.decode(reply.data, type=ProcessorStatus)
    assert status == ProcessorStatus(processor="processor")
    await rows(nc, "SELECT 1")
    stats = json.loads((await nc.request(f"$SRV.STATS.{subjects.HISTORY_SERVICE}", b"")).data)
    counts = {endpoint["name"]: endpoint["data"] for endpoint in stats["endpoints"]}
    assert counts["query"]["answered"] == 1


async def test_stop_answers_who_waits(nc: Client, database: duckdb.DuckDBPyConnection) -> None:
    service = QueryService(nc, database.cursor, limits=Limits(slots=1, per_asker=1))
    await service.start()
    asked = [asyncio.create_task(ask(nc, FOREVER)) for _ in range(2)]
    await asyncio.sleep(0.2)
    await service.stop()
    assert {(await task)[1]["code"] for task in asked} == {"unavailable"}
