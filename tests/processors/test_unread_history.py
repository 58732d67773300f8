"""What waits for a larger transaction is stored for a reader, and when the processor stops."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.processors import embedded
from corral.processors.ingest import reader
from corral.processors.ingest.deadletters import DeadLetters
from corral.processors.ingest.ingest import CONSUMERS, Ingest
from corral.processors.metrics import ProcessorMetrics
from corral.processors.storage import Maintenance
from corral.processors.storage.embedded import maintenance
from corral.schemas import codec, subjects
from nats.aio.client import Client
from support.empty_history import new_database
from support.feed import Feed
from support.history import sample_batch

WAITS_SECONDS = 3600.0


async def test_messages_wait_for_a_reader_or_the_end(nc: Client, tmp_path: Path) -> None:
    js = nc.jetstream()
    database = new_database(tmp_path)
    subject = subjects.samples_subject("h1")

    def rows() -> int:
        found = database.cursor().execute("SELECT count(*) FROM samples").fetchone()
        return found[0] if found else 0

    async def publish(first: int, last: int) -> None:
        for sequence in range(first, last + 1):
            await js.publish(subject, codec.encode(sample_batch("h1", sequence, devices=2, ticks=1)))
        async with asyncio.timeout(20):
            while ingest.received < last:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    stored: list[int] = []
    ingest = Ingest(
        nc, database, CONSUMERS[0], DeadLetters(js), unread_seconds=WAITS_SECONDS, stored=lambda: stored.append(rows())
    )
    task = asyncio.create_task(ingest.run())
    await publish(1, 20)
    assert rows() == 0
    assert await ingest.flush(20)
    assert (rows(), ingest.counts.batches) == (40, 1)
    assert await ingest.flush(20), "nothing is left to wait for"
    async with asyncio.timeout(20):
        while stored != [40]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await publish(21, 30)
    assert rows() == 40
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert rows() == 60

    # The next one begins after that.
    ingest = Ingest(nc, database, CONSUMERS[0], DeadLetters(js), unread_seconds=WAITS_SECONDS)
    task = asyncio.create_task(ingest.run())
    await publish(31, 31)
    assert await ingest.flush(20)
    assert (rows(), ingest.counts.duplicates, ingest.counts.messages) == (62, 0, 1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    database.close()


@pytest.mark.long
async def test_messages_that_wait_are_stored_once_when_the_bus_is_gone(
    nc: Client,
    server: EmbeddedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(reader, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(reader, "API_SECONDS", 0.1)
    js = nc.jetstream()
    database = new_database(tmp_path)
    ingest = Ingest(nc, database, CONSUMERS[0], DeadLetters(js), unread_seconds=WAITS_SECONDS)
    task = asyncio.create_task(ingest.run())
    for sequence in range(1, 6):
        payload = codec.encode(sample_batch("h1", sequence, devices=2, ticks=1))
        await js.publish(subjects.samples_subject("h1"), payload)
    async with asyncio.timeout(20):
        while ingest.received < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        server.kill()
        while caplog.text.count("CORRAL_TELEMETRY: TimeoutError") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert database.cursor().execute("SELECT count(*) FROM samples").fetchone() == (10,)
    assert (ingest.counts.messages, ingest.counts.duplicates) == (5, 0)
    database.close()
    server.start()
    async with asyncio.timeout(20):
        while not nc.is_connected:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_maintenance_that_falls_behind_shows_in_health(
    nc: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, feed, goes_on = new_database(tmp_path), Feed(), threading.Event()
    feed.publish(1, ticks=3, devices=2)
    feed.store(database)
    care = Maintenance(database)
    metrics = ProcessorMetrics(DeadLetters(nc.jetstream()), behind=lambda: care.behind)

    def late() -> list[str]:
        return [reason for reason in metrics.health_status().reasons if "not done since" in reason]

    monkeypatch.setattr(maintenance, "BEHIND_SECONDS", 0.2)
    roll_up = care.roll_up
    monkeypatch.setattr(care, "roll_up", lambda *levels: (goes_on.wait(20), roll_up(*levels)))
    assert not late()
    care.start()
    async with asyncio.timeout(20):
        while not late():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert late()[0].startswith("rollups of 10s and 1m: due for 0 min")
        goes_on.set()
        while late():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.to_thread(care.stop)
    database.close()


def test_messages_wait_for_less_time_than_the_server_waits_for_their_acknowledgement() -> None:
    assert 3 * embedded.UNREAD_SECONDS < reader.ACK_WAIT_SECONDS


@pytest.mark.parametrize(
    ("span_seconds", "cpu_seconds", "pause_seconds"),
    [
        (900.0, 0.3, 900.0),  # a few GPUs
        (900.0, 1.4, 450.0),  # a thousand: half as much at once takes 0.7 s
        (450.0, 0.6, 900.0),
        (900.0, 70.0, 60.0),  # many thousands
        (60.0, 5.0, 60.0),
        (math.inf, 5.0, 60.0),  # what has come since the last run, at the start
    ],
)
def test_a_refresh_that_takes_long_while_nobody_reads_is_done_more_often(
    span_seconds: float, cpu_seconds: float, pause_seconds: float
) -> None:
    job = maintenance._Job("rollups", lambda: None, 6.0, 900.0, 60.0)  # pyright: ignore[reportPrivateUsage]
    found = maintenance._unread_seconds(job, span_seconds, cpu_seconds)  # pyright: ignore[reportPrivateUsage]
    assert found == pytest.approx(pause_seconds)


def test_a_reader_gets_new_rollups_just_after_old_ones(tmp_path: Path) -> None:
    database, feed = new_database(tmp_path), Feed()
    care = Maintenance(database, unread_seconds=WAITS_SECONDS)

    def samples_in(view: str) -> int:
        found = database.cursor().execute(f"SELECT coalesce(sum(samples), 0)::BIGINT FROM {view}").fetchone()
        return found[0] if found else 0

    def store() -> None:
        feed.publish(1, ticks=3, devices=2)
        feed.store(database)

    store()
    care.start()
    deadline = time.monotonic() + 20
    while samples_in("rollup_1h") < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store()
    care.read(20)
    care.stop()
    assert [samples_in(f"rollup_{name}") for name in ("10s", "1m", "1h")] == [12, 12, 12]
    database.close()
