"""What the client's tests share: two simulated devices, and a planner that knows them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from corral.client import Client
from corral.collectors.service import collect
from corral.collectors.simulated.source import SimulatedSource
from corral.planner.limits import Limits
from corral.planner.service import Settings, plan


@contextlib.asynccontextmanager
async def devices(url: str, state: Path) -> AsyncIterator[None]:
    """A host's collector."""
    source = SimulatedSource(1, 2, background=0, faults_per_device_day=0)
    agent = asyncio.create_task(collect(source, name="sim", nats_url=url, interval_seconds=0.1, state=state))
    yield
    agent.cancel()
    await asyncio.gather(agent, return_exceptions=True)


@contextlib.asynccontextmanager
async def planner(url: str, limits: Limits | None = None, silence_seconds: float = 30.0) -> AsyncIterator[None]:
    """A planner in this process, for as long as the block lasts."""
    stop = asyncio.Event()
    settings = Settings(limits=limits or Limits(), silence_seconds=silence_seconds)
    planning = asyncio.create_task(plan(url, settings, stop=stop))
    yield
    stop.set()
    await planning


async def until_ready(client: Client) -> None:
    """Wait until the devices can be had."""
    async with asyncio.timeout(20):
        while (await client.fleet()).usable_devices < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
