"""The client during an outage of the bus: calls wait, samples continue afterwards, leases are kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import LeaseLost, Unavailable, connect
from corral.collectors.service import collect
from corral.collectors.simulated.source import SimulatedSource
from corral.planner.service import Settings, plan
from corral.schemas.requests import LeaseState


async def test_everything_goes_on_after_the_server_was_killed(server: EmbeddedServer, tmp_path: Path) -> None:
    stop = asyncio.Event()
    source = SimulatedSource(1, 2, background=0, faults_per_device_day=0)
    agent = asyncio.create_task(
        collect(source, name="sim", nats_url=server.url, interval_seconds=0.1, batch_seconds=0.1, state=tmp_path)
    )
    planner = asyncio.create_task(plan(server.url, Settings(), stop=stop))
    async with connect(server.url, owner="ann", timeout=15, patience=15) as client:
        async with asyncio.timeout(20):
            while (await client.fleet()).usable_devices < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        samples = client.watch()
        before = await anext(samples)
        lost: list[LeaseLost] = []
        async with client.lease(gpus=1, ttl=6, on_lost=lost.append) as held:
            server.kill()
            waiting = asyncio.create_task(client.devices())
            await asyncio.sleep(1.5)
            assert not waiting.done(), "a call waits for the bus"
            server.start()
            devices = await waiting
            assert [device.leases for device in devices if device.uuid in held.devices] == [[held.lease_id]]
            async with asyncio.timeout(15):
                async for sample in samples:
                    if sample.time_ns > before.time_ns + 3 * 10**9:
                        break
            # Longer than its time to live: it was renewed over the new connection.
            async with asyncio.timeout(20):
                while held.lease.expires_at.timestamp() * 1e9 < before.time_ns + 9e9:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert lost == []
        assert [one.state for one in await client.leases(lease_id=held.lease_id, states=tuple(LeaseState))] == [
            LeaseState.RELEASED
        ]
        await samples.aclose()  # type: ignore[attr-defined]

        # Without a server the call says so, once its time is over; and a lease is given up when its own is, where that
        # was asked for.
        client.timeout = 0.5
        gone = asyncio.Event()
        held = await client.lease(gpus=1, ttl=1.5, on_lost=lambda _: gone.set(), on_outage="stop").__aenter__()
        server.kill()
        with pytest.raises(Unavailable, match="lost"):
            await client.fleet()
        async with asyncio.timeout(10):
            await gone.wait()
        with pytest.raises(LeaseLost, match="could not be renewed"):
            held.check()
        await held.release()
        server.start()
    agent.cancel()
    stop.set()
    await asyncio.gather(agent, planner, return_exceptions=True)


async def test_whoever_waits_or_asks_goes_on_when_the_planner_is_replaced(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    source = SimulatedSource(1, 2, background=0, faults_per_device_day=0)
    agent = asyncio.create_task(collect(source, name="sim", nats_url=server.url, interval_seconds=0.1, state=tmp_path))

    def start() -> tuple[asyncio.Event, asyncio.Task[None]]:
        stop = asyncio.Event()
        return stop, asyncio.create_task(plan(server.url, Settings(), stop=stop))

    stop, planner = start()
    async with connect(server.url, owner="ann", patience=15) as client:
        async with asyncio.timeout(20):
            while (await client.fleet()).usable_devices < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        blocker = (await client.request(gpus=2, ttl="1h")).lease.lease_id
        in_line = asyncio.Event()
        waiting = asyncio.create_task(client.request(gpus=1, wait="60s", on_wait=lambda _: in_line.set()))
        await in_line.wait()
        # It says good-bye to those who wait: they ask the next one, under the same id.
        stop.set()
        await planner
        asking = asyncio.create_task(client.devices())
        stop, planner = start()
        assert len(await asking) == 2
        in_line.clear()
        async with asyncio.timeout(20):
            await in_line.wait()
        assert not waiting.done()
        await client.release(blocker)
        assert len((await waiting).lease.grants) == 1
    agent.cancel()
    stop.set()
    await asyncio.gather(agent, planner, return_exceptions=True)
