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
from corral.schemas.work.windows import Window
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
        wanted = {"gpus": 2, "owners": ["ann"], "lead_seconds": 1, "reason": "course"}
        booked = await ask(nc, "book", {"book": {**wanted, "window_id": "w0", **times(3600, 60)}, "operator": "olga"})
        assert booked["type"] == "windows", booked
        window = booked["windows"][0]["window"]
        assert sorted(window["devices"]) == sorted(hosts.devices["node0"])
        planner.kill()
        planner.start()
        await until_ready(nc, 2)
        listed = await ask(nc, "windows")
        assert listed["windows"][0]["window"] == window
        assert listed["windows"][0]["state"] == "booked"
        assert (await persist(nc, "request", {"owner": "ben"}))["reasons"][0]["code"] == "booked"
        assert (await ask(nc, "book", {"cancel": "w0"}))["type"] == "windows"
        wanted["window_id"] = "w1"
        booked = await ask(nc, "book", {"book": {**wanted, **times(4, 3)}})
        window = booked["windows"][0]["window"]
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


async def test_what_is_granted_before_a_maintenance_has_ended_when_it_begins_and_what_ran_before_goes_on(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    async with running(server.url):
        await until_ready(nc, 2)
        preemptible = {"owner": "ann", "preemptible": True, "grace_seconds": 0.2, "ttl_seconds": 60}
        before = (await ask(nc, "request", preemptible))["lease"]
        fans = {"maintenance": True, "hosts": ["node0"], "lead_seconds": 1, "reason": "fans", **times(3, 60)}
        begin = datetime.fromisoformat((await ask(nc, "book", {"book": fans}))["windows"][0]["starts_at"])
        for body in ({}, {"gpus": 0, "cpus": 1}):
            await ask(nc, "request", {**preemptible, **body})
        listed = (await ask(nc, "windows"))["windows"][0]["leases"]
        assert sorted(lease["preempted"] for lease in listed) == [False, True, True]
        for _ in range(200):
            active = (await ask(nc, "leases"))["leases"]
            if len(active) == 1:
                break
            await asyncio.sleep(0.05)
        assert [lease["lease_id"] for lease in active] == [before["lease_id"]]
        assert datetime.now(UTC) < begin
        ended = (await ask(nc, "leases", {"states": ["evicted"]}))["leases"]
        assert {lease["reason"] for lease in ended} == {"preempted: maintenance (fans) begins"}


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


async def test_devices_that_are_drained_or_lost_are_replaced_or_the_window_says_that_it_is_short(
    server: EmbeddedServer, nc: Bus, tmp_path: Path
) -> None:
    hosts = FakeHosts(nc, hosts=3, devices=2)
    await hosts.start()
    planner = PlannerProcess(server.url, tmp_path / "planner.log", '{"lost_after_seconds": 2}')
    planner.start()
    try:
        await until_ready(nc, 6)
        wanted = {"gpus": 2, "owners": ["ann"], "hosts": ["node[01]"], "lead_seconds": 1, "reason": "r"}
        booked = (await ask(nc, "book", {"book": {**wanted, "window_id": "w", **times(3600, 60)}}))["windows"][0]
        first = booked["window"]["devices"]
        assert booked["missing"] == booked["replaced"] == []
        # A lease of somebody else, which may last any time, keeps one of the others from the window.
        other = "node1" if booked["hosts"] == ["node0"] else "node0"
        held = (await ask(nc, "request", {"owner": "ben", "hosts": [other]}))["lease"]
        await ask(nc, "drain", {"devices": first, "drain": True, "reason": "new fans"})
        status = await window_with(nc, "w", replaced=1, missing=1)
        free = ({*hosts.devices[other]} - {held["grants"][0]["device"]}).pop()
        assert status["window"]["devices"] == [first[1], free]
        assert status["missing"] == [{"device": first[1], "host": booked["hosts"][0], "reason": "drained: new fans"}]
        # It is booked instead, and what was booked is not any more; that outlives the planner.
        fleet = {device["uuid"]: device["booked"] for device in (await ask(nc, "devices"))["devices"]}
        assert fleet[free].startswith("booked for ann")
        assert fleet[first[0]] == ""
        planner.kill()
        planner.start()
        assert (await window_with(nc, "w", replaced=1, missing=1))["replaced"] == status["replaced"]
        # As soon as the lease ends, the window is whole.
        await persist(nc, "release", {"lease_id": held["lease_id"], "owner": "ben"})
        status = await window_with(nc, "w", replaced=2, missing=0)
        assert {*status["window"]["devices"]} == {*hosts.devices[other]}

        # A window that is now, on a host that is lost, takes over a preemptible lease, and its owner starts there.
        await ask(nc, "book", {"cancel": "w"})
        held = (await ask(nc, "request", {"owner": "ben", "hosts": ["node2"], "gpus": 2, **PREEMPTIBLE}))["lease"]
        now = {**wanted, "window_id": "v", "hosts": ["node[12]"], **times(0.5, 120)}
        hosts_of_v = (await ask(nc, "book", {"book": now}))["windows"][0]["hosts"]
        assert hosts_of_v == ["node1"]
        hosts.silent.add("node1")
        status = await window_with(nc, "v", replaced=2, missing=0)
        assert [(one["host"], one["by_host"], one["reason"]) for one in status["replaced"]] == [
            ("node1", "node2", "its host is lost")
        ] * 2
        asked = {"owner": "ann", "gpus": 2, "hosts": ["node2"], "wait_seconds": 30}
        granted = (await ask(nc, "request", asked, timeout=30))["lease"]
        assert granted["window"] == "v"
        ended = (await ask(nc, "leases", {"lease_id": held["lease_id"], "states": ["evicted"]}))["leases"]
        assert ended[0]["reason"] == "preempted: its devices are booked for ann (r)"
    finally:
        planner.kill()
        await hosts.stop()


PREEMPTIBLE = {"preemptible": True, "grace_seconds": 0}


async def window_with(nc: Bus, window_id: str, *, replaced: int, missing: int) -> dict[str, Any]:
    """A window, once so many devices of it were replaced and so many are missing."""
    async with asyncio.timeout(30):
        while True:
            listed = await persist(nc, "windows", {"window_id": window_id})
            status = listed["windows"][0]
            if (len(status["replaced"]), len(status["missing"])) == (replaced, missing):
                return status
            await asyncio.sleep(0.05)
