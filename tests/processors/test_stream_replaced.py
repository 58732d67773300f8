"""The bus loses its disk, or is set back to a copy of it, under a processor that goes on reading."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import duckdb
import pytest
from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from corral.processors.ingest.deadletters import DeadLetters
from corral.processors.ingest.ingest import CONSUMERS, Ingest
from corral.processors.storage import Database
from corral.processors.storage.protocol import Batch
from corral.schemas import codec, subjects
from nats.aio.client import Client
from nats.errors import Error as NatsError
from support.empty_history import new_database
from support.history import Asking, sample_batch

BEGAN_NS = time.time_ns() - 3600 * 10**9


async def publish(nc: Client, numbers: Iterable[int]) -> None:
    """One sample a message, each with a time of its own; sent again until the stream is there."""
    js = nc.jetstream(timeout=1)
    deadline = time.monotonic() + 20
    for number in numbers:
        start_ns = BEGAN_NS + number * 10**9
        payload = codec.encode(sample_batch("h1", number, devices=1, ticks=1, start_ns=start_ns))
        while True:
            try:
                await js.publish(subjects.samples_subject("h1"), payload)
                break
            except (NatsError, TimeoutError, OSError):
                assert time.monotonic() < deadline, "the stream was not made anew"
                await asyncio.sleep(0.1)


def lose(server: EmbeddedServer, copy: Path | None = None) -> None:
    """Kill the server, and start it without its streams, or with a copy of them."""
    server.kill()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(server.data / "jetstream")
    if copy is not None:
        shutil.copytree(copy, server.data / "jetstream")
    server.start()


async def test_streams_that_are_gone_are_made_and_read_from_their_start(
    server: EmbeddedServer, nc: Client, processor: Asking
) -> None:
    await publish(nc, range(1, 21))
    await processor.until("SELECT count(*) FROM samples", 20)
    lose(server)
    # Some had come before, as from a collector that had no answer for them.
    await publish(nc, range(16, 26))
    await processor.until("SELECT count(*) FROM samples", 25)
    assert await processor.rows("SELECT count(DISTINCT time) FROM samples") == [[25]]


async def test_a_stream_that_was_set_back_to_a_copy_is_read_again(
    server: EmbeddedServer, nc: Client, processor: Asking, tmp_path: Path
) -> None:
    await publish(nc, range(1, 11))
    await processor.until("SELECT count(*) FROM samples", 10)
    server.stop()
    shutil.copytree(server.data / "jetstream", tmp_path / "copy")
    server.start()
    await publish(nc, range(11, 21))
    await processor.until("SELECT count(*) FROM samples", 20)
    lose(server, tmp_path / "copy")
    # They get the numbers in the stream that others had which are stored.
    await publish(nc, range(21, 26))
    await processor.until("SELECT count(*) FROM samples", 25)
    assert await processor.rows("SELECT count(DISTINCT time) FROM samples") == [[25]]


@pytest.mark.parametrize("running", [True, False])
async def test_a_stream_that_was_set_back_and_has_grown_beyond_is_read_again(
    server: EmbeddedServer, nc: Client, tmp_path: Path, running: bool
) -> None:
    """By number alone nothing is missing: another message stands where the watermark is."""
    database = new_database(tmp_path)

    @contextlib.asynccontextmanager
    async def reading() -> AsyncIterator[None]:
        client = await connect(server.url)
        ingest = asyncio.create_task(Ingest(client, database, CONSUMERS[0], DeadLetters(client.jetstream())).run())
        yield
        ingest.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ingest
        await client.close()

    async def stored(count: int) -> None:
        deadline = time.monotonic() + 20
        sql = "SELECT count(*), count(DISTINCT time) FROM samples"
        while (found := database.cursor().execute(sql).fetchone()) != (count, count):
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)

    async def set_back() -> None:
        """To 10 of 20 messages; it has 25 again before anybody looks."""
        server.kill()
        shutil.rmtree(server.data / "jetstream")
        shutil.copytree(tmp_path / "copy", server.data / "jetstream")
        # Where the processor does not look for it yet.
        apart = EmbeddedServer(server.data)
        apart.start()
        other = await connect(apart.url)
        await publish(other, range(21, 36))
        await other.close()
        apart.stop()
        server.start()

    async with reading():
        await publish(nc, range(1, 11))
        await stored(10)
        server.stop()
        shutil.copytree(server.data / "jetstream", tmp_path / "copy")
        server.start()
        await publish(nc, range(11, 21))
        await stored(20)
        if running:
            await set_back()
            await stored(35)
    if not running:
        await set_back()
        async with reading():
            await stored(35)
    database.close()


async def test_a_stream_that_is_deleted_is_made_and_read_from_its_start(nc: Client, processor: Asking) -> None:
    await publish(nc, range(1, 11))
    await processor.until("SELECT count(*) FROM samples", 10)
    await nc.jetstream().delete_stream(subjects.TELEMETRY_STREAM)
    await publish(nc, range(8, 21))
    await processor.until("SELECT count(*) FROM samples", 20)
    assert await processor.rows("SELECT count(DISTINCT time) FROM samples") == [[20]]


def test_a_watermark_beyond_the_end_of_its_stream_is_not_believed(tmp_path: Path) -> None:
    storage = new_database(tmp_path)
    storage.resume("S", "made")
    storage.commit(Batch(stream="S", sequence=20))
    assert storage.resume("S", "made", 20) == 20
    assert storage.resume("S", "made", 12) == 0
    storage.commit(Batch(stream="S", sequence=12))
    storage.close()
    again = Database(tmp_path / "history.duckdb")
    assert again.resume("S", "made", 12) == 12
    assert again.marked_ns("S") == 0
    again.commit(Batch(stream="S", sequence=13, stored_ns=77))
    again.close()
    # What an older Corral writes has no mark, and the one that is there is another watermark's.
    with duckdb.connect(str(tmp_path / "history.duckdb")) as older:
        assert older.execute("SELECT sequence, stored_ns FROM store.marks WHERE stream = 'S'").fetchall() == [(13, 77)]
        older.execute("UPDATE store.watermarks SET sequence = 14 WHERE stream = 'S'")
        older.execute("INSERT INTO store.watermarks SELECT 'T', created, 13, batch FROM store.watermarks")
        older.execute("INSERT INTO store.marks SELECT 'T', sequence, stored_ns FROM store.marks")
    newest = Database(tmp_path / "history.duckdb")
    assert (newest.marked_ns("S"), newest.marked_ns("T")) == (0, 77)
    newest.close()
