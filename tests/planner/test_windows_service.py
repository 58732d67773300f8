"""Booked windows on a real bus: they survive a planner that is killed, and begin and end without any client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import Rejected, connect
from corral.schemas import subjects
from corral.schemas.requests import LeaseState
from corral.schemas.windows import Window
from nats.aio.client import Client as Bus
from support.planner_rig import FakeHosts, PlannerProcess, ask, persist, running, until_ready


@pytest.fixture
async def hosts(nc: Bus) -> AsyncIterator[FakeHosts]:
    made = FakeHosts(nc, hosts=1, devices=2)
    await made.start()
    yield made
    await made.stop()


def times_of(starts: float, lasts: float) -> dict[str, Any]:
    begin = datetime.now(UTC) + timedelta(seconds=starts)
    return {"starts_at": begin, "ends_at": begin + timedelta(seconds=lasts)}


def times(starts: float, lasts: float) -> dict[str, Any]:
    return {name: time.isoformat() for name, time in times_of(starts, lasts).items()}


async def test_a_window_outlives_its_planner_and_begins_and_ends_by_itself(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts, tmp_path: Path
) -> None:
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    try:
        await until_ready(nc, 2)
        wanted = {"gpus": 2, "owners": ["ann"], "lead_seconds": 1, "reason": "course", "window_id": "w1"}
        booked = await ask(nc, "book", {"book": {**wanted, **times(5, 1.5)}, "operator": "olga"})
        assert booked["type"] == "windows", booked
        window = booked["windows"][0]["window"]
        assert sorted(window["devices"]) == sorted(hosts.devices["node0"])
        assert (await ask(nc, "request", {"owner": "ben"}))["reasons"][0]["code"] == "booked"
        planner.kill()
        planner.start()
        await until_ready(nc, 2)
        listed = await ask(nc, "windows")
        assert listed["windows"][0]["window"] == window
        assert listed["windows"][0]["state"] == "booked"
        assert (await persist(nc, "request", {"owner": "ben"}))["reasons"][0]["code"] == "booked"
        asking = [
            asyncio.create_task(
                ask(nc, "request", {"owner": owner, "gpus": 2, "wait_seconds": 60, "request_id": owner}, timeout=60)
            )
            for owner in ("ben", "ann")
        ]
        granted = (await asking[1])["lease"]
        # The next window of the same owner takes the devices over, though her lease ends only as it begins.
        behind = datetime.fromisoformat(window["ends_at"]) + timedelta(seconds=1)
        more = {**wanted, "window_id": "w2", "starts_at": window["ends_at"], "ends_at": behind.isoformat()}
        assert (await ask(nc, "book", {"book": more}))["windows"][0]["leases"] == []
        after = (await asking[0])["lease"]
        starts, ends = (datetime.fromisoformat(window[name]) for name in ("starts_at", "ends_at"))
        assert granted["window"] == "w1"
        assert datetime.fromisoformat(granted["granted_at"]) >= starts
        assert datetime.fromisoformat(granted["ends_at"]) == ends
        assert datetime.fromisoformat(after["granted_at"]) >= behind
        assert after["ends_at"] is None
        bucket = await nc.jetstream().key_value(subjects.PLANNER_BUCKET)
        for _ in range(200):  # a window that is over is forgotten
            if (await bucket.get("windows")).value == b"[]":
                break
            await asyncio.sleep(0.05)
        assert (await ask(nc, "windows"))["windows"] == []
        ended = (await ask(nc, "leases", {"lease_id": granted["lease_id"], "states": ["expired"]}))["leases"]
        assert "window w1 is over" in ended[0]["reason"]
    finally:
        planner.kill()


async def test_booking_and_cancelling(server: EmbeddedServer, nc: Bus, hosts: FakeHosts) -> None:
    async with running(server.url), connect(server.url, owner="olga") as client:
        await until_ready(nc, 2)
        held = await client.request(gpus=1, owner="ben")
        begin = datetime.now(UTC) + timedelta(hours=1)
        window = Window(
            starts_at=begin, ends_at=begin + timedelta(hours=1), gpus=2, owners=["ann"], reason="course", window_id="a"
        )
        with pytest.raises(Rejected, match=r"1 of 2 devices that match .* 1 have leases without max_seconds"):
            await client.book(window)
        # Maintenance is booked, and names whom it finds.
        maintenance = Window(
            starts_at=begin, ends_at=begin + timedelta(hours=1), maintenance=True, hosts=["node0"], reason="fans"
        )
        found = await client.book(maintenance)
        assert [(lease.lease_id, lease.owner) for lease in found.leases] == [(held.lease.lease_id, "ben")]
        assert found.window.operator == "olga"
        with pytest.raises(Rejected, match=r"maintenance \(fans\)"):
            await client.request(owner="ben", gpus=1)
        assert (await client.devices())[0].booked.startswith("booked for maintenance (fans) from ")
        await client.cancel_window(found.window.window_id or "")
        await client.release(held.lease.lease_id, owner="ben")
        assert not (await client.book(window, dry_run=True)).leases
        assert await client.windows() == []
        # Sent again, after an answer was lost, it is booked once.
        first = await client.book(window)
        assert await client.book(window) == first
        assert [status.window.window_id for status in await client.windows(owner="ann")] == ["a"]
        assert await client.windows(owner="ben") == []
        await client.cancel_window("a")
        # Preemptible leases may be on booked devices, and are preempted in time.
        await client.request(gpus=1, owner="ben", preemptible=True, grace_seconds=0)
        # The window is for a group, and so for the members of the groups within.
        await ask(nc, "set_groups", {"set": [{"name": "lab/vision", "members": ["ann"]}]})
        found = await client.book(Window(**times_of(2.5, 1), gpus=2, group="lab", lead_seconds=1, reason="course"))
        assert [(lease.owner, lease.preempted) for lease in found.leases] == [("ben", True)]
        await client.request(gpus=1, owner="ben", preemptible=True, grace_seconds=0)
        granted = (await client.request(gpus=2, owner="ann", wait="30s")).lease
        assert granted.window == found.window.window_id
        ended = await client.leases(owner="ben", states=(LeaseState.EVICTED,))
        assert [lease.reason for lease in ended] == ["preempted: its devices are booked for lab (course)"] * 2
        assert all(lease.ended_at is not None and lease.ended_at < found.window.starts_at for lease in ended)
        await client.cancel_window(found.window.window_id or "")
        for body, field in (
            ({**times(-100, 200), "gpus": 1, "owners": ["ann"], "reason": "r"}, "$.book.starts_at"),
            ({**times(100, 200), "gpus": 1, "owners": ["ann"]}, "$.book.reason"),
            ({**times(100, 200), "gpus": 1, "reason": "r"}, "$.book.owners"),
            ({**times(100, 200), "maintenance": True, "hosts": ["nodeX"], "reason": "r"}, "$.book.hosts[0]"),
        ):
            assert (await ask(nc, "book", {"book": body}))["field"] == field
        assert (await ask(nc, "book", {}))["code"] == "invalid"
        assert (await ask(nc, "book", {"cancel": "nope"}))["code"] == "not_found"
