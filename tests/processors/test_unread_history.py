"""What waits for a larger transaction is stored for a reader, and when the processor stops."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from corral.processors.ingest.deadletters import DeadLetters
from corral.processors.ingest.ingest import CONSUMERS, Ingest
from corral.schemas import codec, subjects
from nats.aio.client import Client
from support.empty_history import new_database
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

    ingest = Ingest(nc, database, CONSUMERS[0], DeadLetters(js), unread_seconds=WAITS_SECONDS)
    task = asyncio.create_task(ingest.run())
    await publish(1, 20)
    assert rows() == 0
    assert await ingest.flush(20)
    assert (rows(), ingest.counts.batches) == (40, 1)
    assert await ingest.flush(20), "nothing is left to wait for"

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
