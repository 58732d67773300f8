"""Processors that share the work do so with a processor's credentials; nobody else gets in between."""

from __future__ import annotations

import asyncio
from pathlib import Path

from corral.bus.access.roles import Role
from corral.bus.layout import ensure_layout
from corral.processors.ingest import partitions
from corral.processors.ingest.reader import Reader
from support.secured_bus import SecuredBus


async def test_the_parts_of_a_history_are_shared_with_a_processors_credentials(tmp_path: Path) -> None:
    secured = SecuredBus(tmp_path)
    secured.add(Role.PROCESSOR, "processor")
    secured.add(Role.COLLECTOR, "node-7")
    secured.server.start()
    try:
        nc = await secured.connect("processor")
        js = nc.jetstream()
        await ensure_layout(js)
        await partitions.ensure_stream(js, 2)
        host = await secured.connect("node-7")
        await host.request("corral.v1.samples.node-7", b"x", timeout=5)
        consumers = partitions.consumers(2)
        came = asyncio.Event()

        async def work(part: str) -> None:
            consumer = consumers[part]
            reader = Reader(nc, consumer.stream, part.replace("/", "-"), filter_subjects=consumer.subjects)
            await reader.identify()
            await reader.start(0)
            while True:
                for message in await reader.take(1, 0.1):
                    await reader.acknowledge(message.reply)
                    came.set()

        claims = partitions.Claims(nc, "history", "one", [*consumers], work)
        running = asyncio.create_task(claims.run())
        async with asyncio.timeout(20):
            await came.wait()
        assert set(claims.owned) == set(consumers)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await host.close()
        await nc.close()
        assert secured.violations() == []
    finally:
        secured.server.kill()
