"""A processor that is told to stop stops, whatever comes at the same moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.processors.embedded import EmbeddedHistory
from corral.processors.ingest.reader import Reader
from corral.processors.service import process
from corral.schemas import subjects
from nats.aio.client import Client


class Interrupted(Reader):
    """Its task is cancelled just when a message has come, before the task itself has run again."""

    task: asyncio.Task[None]

    def _on_chunk(self, inbox: str, messages: list[tuple[bytes, bytes, bytes]]) -> None:
        super()._on_chunk(inbox, messages)
        if any(reply for _, reply, _ in messages):
            # One turn of the loop later the wait for messages is over, and who waited for it has not heard of it.
            asyncio.get_running_loop().call_soon(self.task.cancel)


async def test_a_message_that_comes_with_the_cancellation_does_not_undo_it(nc: Client) -> None:
    reader = Interrupted(nc, subjects.TELEMETRY_STREAM, "interrupted")

    async def read() -> None:
        while True:
            await reader.take(1, 0.0)

    await reader.start(0)
    reader.task = asyncio.create_task(read())
    await asyncio.sleep(0)
    await nc.jetstream().publish(subjects.samples_subject("h1"), b"anything")
    done, _ = await asyncio.wait({reader.task}, timeout=5)
    assert done
    assert reader.task.cancelled()
    await reader.stop()


@pytest.mark.parametrize("first", ["bus", "processor"])
async def test_a_processor_stops_though_its_server_dies_then(
    server: EmbeddedServer, tmp_path: Path, first: str
) -> None:
    ready = asyncio.Event()
    task = asyncio.create_task(process(EmbeddedHistory(tmp_path / "history.duckdb"), nats_url=server.url, ready=ready))
    await asyncio.wait_for(ready.wait(), 20)
    if first == "bus":
        server.kill()
    task.cancel()
    await asyncio.sleep(0)
    server.kill()
    # Its supervisor kills it after 10 s, and its database would be left as it was then.
    done, _ = await asyncio.wait({task}, timeout=9)
    assert done
    assert task.cancelled()
