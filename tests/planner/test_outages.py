"""Leases over outages: of the planner, of the bus, of both, of a collector, of a clock. Who renews keeps the lease; one
that nobody renews ends, after a whole time to live in which that could have been done."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from corral.bus.tasks import heed_cancellation
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client
from support.planner_rig import FakeHosts, PlannerProcess, ask, persist, running, until_ready

TTL = 2.0
AWAY = 3.0
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


async def take(nc: Client, owner: str, ttl: float) -> str:
    # A device whose lease has expired is free once a sample shows it idle.
    body = {"owner": owner, "gpus": 1, "ttl_seconds": ttl, "wait_seconds": 30}
    return (await persist(nc, "request", body))["lease"]["lease_id"]


async def state(nc: Client, lease_id: str) -> str:
    wanted = {"lease_id": lease_id, "states": ["active", "released", "expired", "lost", "evicted"]}
    return (await persist(nc, "leases", wanted))["leases"][0]["state"]


async def until_state(nc: Client, lease_id: str, wanted: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (now := await state(nc, lease_id)) != wanted:
        assert time.monotonic() < end, f"{lease_id} is {now}, and not {wanted}"
        await asyncio.sleep(0.1)


class Holder:
    """Renews three times in a time to live, and as soon as it can."""

    def __init__(self, nc: Client, owner: str, lease_id: str, ttl: float) -> None:
        self.ended: dict[str, Any] | None = None
        self._task = asyncio.create_task(self._renew(nc, {"owner": owner, "lease_id": lease_id}, ttl))

    async def _renew(self, nc: Client, body: dict[str, Any], ttl: float) -> None:
        while self.ended is None:
            heed_cancellation()
            answer: dict[str, Any] = {}
            try:
                answer = await ask(nc, "renew", body, timeout=0.5)
            except Exception:  # nobody is there
                await asyncio.sleep(0.1)
            if answer.get("code") in ("ended", "not_found"):
                self.ended = answer
            elif answer.get("type") == "lease":
                await asyncio.sleep(ttl / 3)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def stop_process(pid: int, on: bool) -> None:
    os.kill(pid, signal.SIGSTOP if on else signal.SIGCONT)


async def outage(kind: str, server: EmbeddedServer, planner: PlannerProcess) -> None:
    assert server.process is not None
    pid = server.process.pid
    if kind == "planner killed twice":  # the second time before anything that seems overdue could be ended
        for _ in range(2):
            planner.kill()
            await asyncio.sleep(AWAY / 2)
            planner.start()
            await asyncio.sleep(0.5)
    elif kind == "bus killed":
        server.kill()
        await asyncio.sleep(AWAY)
        server.start()
    elif kind == "both paused":
        planner.pause(True)
        stop_process(pid, True)
        await asyncio.sleep(AWAY)
        stop_process(pid, False)
        planner.pause(False)
    else:
        server.kill()
        planner.kill()
        await asyncio.sleep(AWAY)
        server.start()
        planner.start()


@pytest.mark.parametrize(
    "kinds",
    [
        ["both paused", "bus killed"],
        pytest.param(["planner killed twice", "both killed"], marks=pytest.mark.long),
    ],
)
async def test_an_outage_ends_no_lease_that_is_renewed_and_every_other_after_a_whole_life(
    server: EmbeddedServer, nc: Client, tmp_path: Path, kinds: list[str]
) -> None:
    planner = PlannerProcess(server.url, tmp_path / "log")
    hosts = FakeHosts(nc, hosts=1, devices=2)
    await hosts.start()
    planner.start()
    try:
        await until_ready(nc, 2, timeout=60)
        held = await take(nc, "ann", TTL)
        holder = Holder(nc, "ann", held, TTL)
        for kind in kinds:
            left = await take(nc, "bob", TTL)
            await outage(kind, server, planner)
            # Its time is over, and it is renewed for the first time a moment after that could be done again.
            assert await state(nc, left) == "active", kind
            await asyncio.sleep(TTL / 4)
            answer = await persist(nc, "renew", {"owner": "bob", "lease_id": left})
            assert answer["type"] == "lease", f"{kind}: {answer}"
            await until_state(nc, left, "expired", 30)
            assert await state(nc, held) == "active", f"{kind}: {holder.ended}"
        await holder.stop()
    finally:
        planner.kill()
        await hosts.stop()


async def test_a_host_whose_collector_is_away_keeps_the_leases_that_are_renewed(
    server: EmbeddedServer, nc: Client
) -> None:
    hosts = FakeHosts(nc, hosts=1, devices=3)
    await hosts.start()
    async with running(server.url, lost_after_seconds=2.0, stale_after_seconds=1.5):
        await until_ready(nc, 3)
        ids = [await take(nc, owner, ttl) for owner, ttl in (("ann", 6.0), ("bob", 600.0), ("eve", 600.0))]
        holder = Holder(nc, "ann", ids[0], 6.0)
        asked = await nc.subscribe(f"corral.v1.leases.expiring.{ids[2]}")
        hosts.silent.add("node0")
        # A holder with a long time to live hears that it is asked for.
        await asked.next_msg(timeout=10)
        attentive = Holder(nc, "eve", ids[2], 3.0)
        await until_state(nc, ids[1], "lost", 15)
        assert [await state(nc, lease_id) for lease_id in (ids[0], ids[2])] == ["active", "active"]
        refused = await ask(nc, "request", {"owner": "new", "gpus": 1})
        assert refused["type"] == "rejection", "no new work goes to a host that is not heard"
        hosts.silent.clear()
        await until_ready(nc, 1)
        assert (await state(nc, ids[0]), holder.ended) == ("active", None)
        # Once they are renewed no more they end as ever.
        await holder.stop()
        await attentive.stop()
        await until_state(nc, ids[0], "expired", 20)
    await hosts.stop()


@pytest.mark.skipif(not FAKETIME.exists(), reason=f"{FAKETIME} is not there (Debian's faketime)")
async def test_a_planners_clock_that_is_set_ends_no_lease_and_keeps_none(
    server: EmbeddedServer, nc: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0\n")
    hosts = FakeHosts(nc, hosts=1, devices=4)
    await hosts.start()
    planner = PlannerProcess(server.url, tmp_path / "log")
    with monkeypatch.context() as environment:
        environment.setenv("LD_PRELOAD", str(FAKETIME))
        environment.setenv("FAKETIME_TIMESTAMP_FILE", str(offset))
        environment.setenv("FAKETIME_NO_CACHE", "1")
        for name in ("FAKETIME_DONT_FAKE_MONOTONIC", "DONT_FAKE_MONOTONIC"):
            environment.setenv(name, "1")
        planner.start()
    try:
        await until_ready(nc, 4, timeout=60)
        ids = {"long": await take(nc, "ann", 3000.0), "held": await take(nc, "ann", 3.0)}
        holder = Holder(nc, "ann", ids["held"], 3.0)
        left = {"+3600": await take(nc, "bob", 3.0), "-3600": await take(nc, "bob", 9.0)}
        for jump, lease_id in left.items():
            offset.write_text(f"{jump}\n")
            await until_state(nc, lease_id, "expired", 30)
            assert [await state(nc, held) for held in ids.values()] == ["active", "active"], jump
        assert holder.ended is None
        await holder.stop()
    finally:
        planner.kill()
        await hosts.stop()
