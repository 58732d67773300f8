"""Nothing starts on what was granted once: a client that slept is told so, and one lease has one holder."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import Conflict, Ended, LeaseLost, SyncClient, connect
from corral.schemas.requests import LeaseState
from nats.aio.client import Client as Bus
from support.planner_rig import FakeHosts, PlannerProcess, until_ready

HOLD = """
import sys, time
from corral.client import SyncClient
with SyncClient(sys.argv[1], owner="ann") as client, client.lease(request_id="service", ttl=6) as lease:
    print(lease.lease_id, flush=True)
    time.sleep(60)
"""


@pytest.fixture
async def fleet(server: EmbeddedServer, nc: Bus, tmp_path: Path) -> AsyncIterator[str]:
    """A planner in a process of its own, which goes on while this one sleeps, and two devices; the bus's URL."""
    planner = PlannerProcess(server.url, tmp_path / "log", '{"stale_after_seconds": 60}')
    hosts = FakeHosts(nc, hosts=1, devices=2)
    await hosts.start()
    planner.start()
    await until_ready(nc, 2, timeout=60)
    yield server.url
    planner.kill()
    await hosts.stop()


async def test_a_client_that_slept_through_its_grant_takes_nothing_that_is_anothers(fleet: str) -> None:
    told, awake = threading.Semaphore(0), threading.Event()
    with SyncClient(fleet, owner="ann", timeout=30) as ann:
        async with connect(fleet, owner="bob", timeout=30) as bob:
            blocker = (await bob.request(gpus=2, ttl="2m")).lease.lease_id
            wish = functools.partial(ann.request, gpus=2, ttl=1, wait="2m", on_wait=lambda _: told.release())
            asking = asyncio.create_task(asyncio.to_thread(wish))
            await asyncio.to_thread(told.acquire)
            # Her client sleeps from here: it is granted, its lease ends, and bob has all again.
            ann._loop.loop.call_soon_threadsafe(awake.wait)  # pyright: ignore[reportPrivateUsage]
            await bob.release(blocker)
            second = (await bob.request(gpus=2, ttl="2m", wait="60s")).lease.lease_id
            passed = {one.lease_id for one in await bob.leases(owner="ann", states=[LeaseState.EXPIRED])}
            awake.set()
            assert passed, "it was granted while it slept"
            # Awake, it finds the old answer, and is told so.
            with pytest.raises(LeaseLost, match="suspended") as lost:
                await asking
            assert lost.value.lease_id in passed
            assert [one.lease_id for one in await bob.leases()] == [second]


async def test_one_lease_has_one_holder_and_a_new_one_after_a_crash(fleet: str) -> None:
    environment = {**os.environ, "CORRAL_CONFIG": os.devnull}
    first = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", HOLD, fleet], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    async with connect(fleet, owner="ann", timeout=30) as ann:
        try:
            lease_id = (await asyncio.to_thread(first.stdout.readline)).strip()
            with pytest.raises(Conflict, match="of this machine"):
                await ann.lease(request_id="service", ttl=6).__aenter__()
        finally:
            first.kill()
            first.wait()
        # Who is started again after a crash goes on with it, alone.
        async with ann.lease(request_id="service", ttl=6) as held:
            assert held.lease_id == lease_id
            with pytest.raises(Conflict, match="this process"):
                await ann.lease(request_id="service", ttl=6).__aenter__()
        with pytest.raises(Ended, match="released"):
            await ann.request(request_id="service", ttl=6)


async def test_work_that_starts_late_is_confirmed_first(fleet: str) -> None:
    async with connect(fleet, owner="ann", timeout=30) as ann, ann.lease(gpus=1, ttl=60) as held:
        before = held.lease
        assert await held.ready() > time.clock_gettime(time.CLOCK_BOOTTIME)
        held._confirmed_at -= 3600.0  # pyright: ignore[reportPrivateUsage]  # as a machine that was suspended
        assert held.overdue
        assert await held.ready() > time.clock_gettime(time.CLOCK_BOOTTIME)
        assert held.lease.expires_at > before.expires_at
        assert not held.overdue
