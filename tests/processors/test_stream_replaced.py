"""The bus loses its disk, or is set back to a copy of it, under a processor that goes on reading."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from corral.cli.server import EmbeddedServer
from corral.processors.storage import Database
from corral.processors.storage.interface import Batch
from corral.schemas import bus, codec
from history import Asking, sample_batch
from nats.aio.client import Client
from nats.errors import Error as NatsError

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
                await js.publish(bus.samples_subject("h1"), payload)
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


def test_a_watermark_beyond_the_end_of_its_stream_is_not_believed(tmp_path: Path) -> None:
    storage = Database(tmp_path / "history.duckdb")
    storage.resume("S", "made")
    storage.commit(Batch(stream="S", sequence=20))
    assert storage.resume("S", "made", 20) == 20
    assert storage.resume("S", "made", 12) == 0
    storage.commit(Batch(stream="S", sequence=12))
    storage.close()
    again = Database(tmp_path / "history.duckdb")
    assert again.resume("S", "made", 12) == 12
    again.close()
