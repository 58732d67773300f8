"""The connection to the bus flushes across a reconnection, where nats-py's own waits to its timeout."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from corral.bus.connect import connect
from corral.cli.local.server import EmbeddedServer
from support.stalling_proxy import StallingProxy


async def test_a_flush_ends_with_the_connection_that_follows_the_one_it_began_on(server: EmbeddedServer) -> None:
    proxy = StallingProxy(server.port)
    await proxy.start()
    connection = await connect(proxy.url)
    try:
        stalled = asyncio.create_task(proxy.stall(1.0, cut=False))
        await asyncio.sleep(0)
        flushing = asyncio.create_task(connection.flush(timeout=600))
        pings: Any = connection
        while not pings._pongs:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        proxy.cut()
        async with asyncio.timeout(60):
            await flushing
        assert connection.stats["reconnects"] == 1
        await stalled
    finally:
        with contextlib.suppress(Exception):
            await connection.close()
        await proxy.stop()
