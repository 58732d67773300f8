"""Analysts ask as much as they can while telemetry comes in: ingest goes on, and each is told where they stand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from corral.processors.embedded import EmbeddedHistory
from corral.processors.service import process
from corral.schemas import codec, subjects
from corral.schemas.query import END_HEADER
from nats.aio.client import Client
from support.empty_history import empty_history
from support.history import Asking, sample_batch

HEAVY = (
    "SELECT count(*) FROM range(3000000) a, range(3000000) b WHERE hash(a.range, b.range) % 7 = 0",
    "SELECT a.range % 1000000 AS k, count(*) FROM range(100000000) a GROUP BY 1 ORDER BY 2 DESC",
    "FROM range(100000) a, range(100000) b ORDER BY hash(a.range, b.range)",
)


@pytest.fixture
async def processor(nc: Client, server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[asyncio.Task[None]]:
    ready = asyncio.Event()
    shutil.copy(empty_history(), tmp_path / "history.duckdb")
    task = asyncio.create_task(
        process(
            EmbeddedHistory(tmp_path / "history.duckdb", memory_bytes=512 * 2**20), nats_url=server.url, ready=ready
        )
    )
    await asyncio.wait_for(ready.wait(), 30)
    yield task
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.long
async def test_a_flood_of_heavy_queries_stops_neither_ingest_nor_small_ones(
    nc: Client, server: EmbeddedServer, processor: asyncio.Task[None]
) -> None:
    analyst = await connect(server.url, name="analyst")
    codes: list[str] = []

    async def heavy(number: int) -> None:
        request = {"sql": HEAVY[number % len(HEAVY)], "timeout_seconds": 4, "format": "arrow"}
        reply = await analyst.request(subjects.QUERY, json.dumps(request).encode(), timeout=15)
        assert reply.headers is not None
        codes.append(json.loads(reply.headers.get(END_HEADER, "{}")).get("code", ""))

    flood = [asyncio.create_task(heavy(number)) for number in range(60)]
    await asyncio.sleep(0.5)
    js = nc.jetstream()
    asking = Asking(nc)
    stored: list[int] = []
    for sequence in range(1, 11):
        batch = sample_batch("h1", sequence, devices=8, ticks=5)
        await js.publish(subjects.samples_subject("h1"), codec.encode(batch))
        # Each is there, and can be asked for, while the flood goes on.
        await asking.until(f"SELECT count(*) >= {sequence * 40} FROM samples", True)
        stored.append(sum(not task.done() for task in flood))
    assert stored[0] > 0
    await asyncio.gather(*flood)
    assert set(codes) <= {"", "timeout", "busy", "too_large"}
    assert codes.count("busy") >= 60 - 2 - 32
    assert not processor.done()
    # The views are there, over what was stored meanwhile.
    await asking.until("SELECT count(*) FROM devices_now WHERE power_watts > 0", 8)
    await analyst.close()
