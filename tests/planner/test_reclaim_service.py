"""Borrowers give back what a group is guaranteed: through a real planner, over kills, and only where it helps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.broker.quotas.reclaimer import IDLE_SECONDS
from corral.schemas import subjects
from nats.aio.client import Client
from support.planner_rig import FakeHosts, PlannerProcess, ask, queued, until_ready

VISION = {"name": "vision", "guarantee": {"gpus": {"*": 3}}, "members": ["ann"]}
NLP = {"name": "nlp", "guarantee": {"gpus": {"*": 1}}, "members": ["bob"]}


@pytest.fixture
def planner(server: EmbeddedServer, tmp_path: Path) -> Iterator[PlannerProcess]:
    """A planner, not started yet, that does not outlive the test."""
    process = PlannerProcess(server.url, tmp_path / "planner.log")
    yield process
    process.kill()


async def active(nc: Client, owner: str) -> dict[str, dict[str, Any]]:
    return {lease["lease_id"]: lease for lease in (await ask(nc, "leases", {"owner": owner}))["leases"]}


async def noticed(nc: Client, owner: str, count: int) -> list[dict[str, Any]]:
    """The leases of an owner that have a notice, once there are so many."""
    async with asyncio.timeout(60):
        while True:
            found = [lease for lease in (await active(nc, owner)).values() if lease["preemption"]]
            if len(found) == count:
                return found
            await asyncio.sleep(0.05)


async def leave(nc: Client, *leases: dict[str, Any]) -> None:
    """End leases that have a notice, as their holder may once the work is saved."""
    for lease in leases:
        answer = {"owner": lease["owner"], "lease_id": lease["lease_id"], "saved": True}
        await ask(nc, "checkpoint", answer)


async def test_borrowers_give_back_and_nobody_else(nc: Client, planner: PlannerProcess) -> None:
    hosts = FakeHosts(nc, hosts=1)
    await hosts.start()
    planner.start()
    await until_ready(nc, 4)
    assert (await ask(nc, "set_groups", {"set": [VISION, NLP]}))["revision"] == 1
    borrowed = {"owner": "bob", "preemptible": True, "grace_seconds": 60}
    for _ in range(4):
        assert (await ask(nc, "request", borrowed))["type"] == "assignment"
    # Work that can't be given back does not borrow.
    refused = await ask(nc, "request", {"owner": "bob"})
    assert "guaranteed to other groups" in refused["message"] or "0/4" in refused["message"]

    want = {"owner": "ann", "gpus": 2, "wait_seconds": 600, "request_id": "two", "ttl_seconds": 600}
    asked = asyncio.create_task(ask(nc, "request", want, timeout=60))
    victims = await noticed(nc, "bob", 2)
    for lease in victims:
        notice = lease["preemption"]
        assert (notice["claimant"], notice["claimant_owner"], notice["claimant_group"]) == ("two", "ann", "vision")
        assert lease["group"] == "nlp"
    (waiting,) = (await ask(nc, "queue"))["entries"]
    assert waiting["group"] == "vision"
    # The claim outlives the planner: no third lease gets a notice, and the same two keep theirs.
    planner.kill()
    planner.start()
    await until_ready(nc, 4)
    assert (await ask(nc, "withdraw", {"owner": "ann", "request_id": "two"}))["code"] == "withdrawn"
    await noticed(nc, "bob", 0)
    assert len(await active(nc, "bob")) == 4
    asked.cancel()

    # Asked for again, and saved: the devices are ann's, and bob keeps what he is guaranteed and one more.
    asked = asyncio.create_task(ask(nc, "request", {**want, "request_id": "again"}, timeout=60))
    for lease in await noticed(nc, "bob", 2):
        saved = {"owner": "bob", "lease_id": lease["lease_id"], "saved": True}
        assert (await ask(nc, "checkpoint", saved))["state"] == "evicted"
    assert (await asked)["type"] == "assignment"
    # One device is borrowed still: the third that vision is guaranteed. A fourth would be nlp's own.
    more = [
        asyncio.create_task(ask(nc, "request", {**want, "gpus": 1, "request_id": f"more{at}"}, timeout=60))
        for at in range(2)
    ]
    (last,) = await noticed(nc, "bob", 1)
    await ask(nc, "release", {"owner": "bob", "lease_id": last["lease_id"]})
    assert (await more[0])["type"] == "assignment"
    entry = (await ask(nc, "queue"))["entries"][0]
    assert entry["request_id"] == "more1"
    assert [lease["preemption"] for lease in (await active(nc, "bob")).values()] == [None]
    more[1].cancel()
    await hosts.stop()


async def test_two_groups_that_ask_at_once_wait_for_different_leases(nc: Client, planner: PlannerProcess) -> None:
    hosts = FakeHosts(nc, hosts=1)
    await hosts.start()
    planner.start()
    await until_ready(nc, 4)
    owners = {"ann": "vision", "eve": "ops"}
    groups = [{"name": name, "guarantee": {"gpus": {"*": 2}}, "members": [owner]} for owner, name in owners.items()]
    await ask(nc, "set_groups", {"set": groups})
    for _ in range(4):
        await ask(nc, "request", {"owner": "bob", "preemptible": True, "grace_seconds": 60})
    asked: list[asyncio.Task[dict[str, Any]]] = []
    victims: list[dict[str, Any]] = []
    for owner in [*owners, *owners]:
        want = {"owner": owner, "wait_seconds": 600}
        asked.append(asyncio.create_task(ask(nc, "request", want, timeout=60)))
        victims = await noticed(nc, "bob", len(asked))
    assert sorted(lease["preemption"]["claimant_group"] for lease in victims) == ["ops", "ops", "vision", "vision"]
    for lease in victims:
        await ask(nc, "release", {"owner": "bob", "lease_id": lease["lease_id"]})
    assert [(await each)["type"] for each in asked] == ["assignment"] * 4
    await hosts.stop()


async def test_borrowers_give_back_under_the_limit_of_the_group_around(nc: Client, planner: PlannerProcess) -> None:
    hosts = FakeHosts(nc, hosts=2)
    await hosts.start()
    planner.start()
    await until_ready(nc, 8)
    lab = {"name": "lab", "limit": {"gpus": {"*": 4}}}
    inside = [{**group, "name": f"lab/{group['name']}"} for group in (VISION, NLP)]
    assert (await ask(nc, "set_groups", {"set": [lab, *inside]}))["revision"] == 1
    for _ in range(4):
        await ask(nc, "request", {"owner": "bob", "preemptible": True, "grace_seconds": 60})
    assert (await ask(nc, "request", {"owner": "eve", "preemptible": True}))["type"] == "assignment"
    # Three devices are free, but lab must not use more: those in lab give back, and eve does not.
    want = {"owner": "ann", "gpus": 2, "wait_seconds": 600, "request_id": "two", "ttl_seconds": 600}
    asked = asyncio.create_task(ask(nc, "request", want, timeout=60))
    for lease in await noticed(nc, "bob", 2):
        await ask(nc, "release", {"owner": "bob", "lease_id": lease["lease_id"]})
    assert (await asked)["type"] == "assignment"
    assert [lease["preemption"] for owner in ("bob", "eve") for lease in (await active(nc, owner)).values()] == [
        None
    ] * 3
    await hosts.stop()


async def test_a_device_that_is_lost_before_it_is_seen_idle_is_not_waited_for(
    nc: Client, planner: PlannerProcess
) -> None:
    hosts = FakeHosts(nc, hosts=2, devices=2)
    await hosts.start()
    planner.options = ('{"stale_after_seconds": 120}',)
    planner.start()
    await until_ready(nc, 4)
    await ask(nc, "set_groups", {"set": [VISION, NLP]})
    borrowed = {"owner": "bob", "preemptible": True, "grace_seconds": 0.2}
    for _ in range(4):
        assert (await ask(nc, "request", borrowed))["type"] == "assignment"
    hosts.silent |= {*hosts.names}  # nothing is seen idle
    want = {"owner": "ann", "gpus": 1, "wait_seconds": 600, "request_id": "one", "ttl_seconds": 600}
    asked = asyncio.create_task(ask(nc, "request", want, timeout=60))
    (first,) = await evicted(nc, "bob", 1)
    lost = first["grants"][0]["host"]
    await ask(nc, "drain", {"hosts": [lost], "drain": True, "reason": "broken"})
    (_, second) = await evicted(nc, "bob", 2)
    waited = datetime.fromisoformat(second["preemption"]["notified_at"]) - datetime.fromisoformat(first["ended_at"])
    assert waited.total_seconds() < IDLE_SECONDS
    assert second["grants"][0]["host"] != lost
    hosts.silent.clear()
    granted = (await asked)["lease"]["grants"][0]
    assert granted["device"] == second["grants"][0]["device"]
    await hosts.stop()


async def test_a_free_device_that_another_takes_meanwhile_is_not_waited_for(
    nc: Client, planner: PlannerProcess
) -> None:
    """A request counts on a free device beside the one that a borrower gives back; a request ahead of it takes that."""
    hosts = FakeHosts(nc, hosts=2, devices=2)
    await hosts.start()
    planner.start()
    await until_ready(nc, 4)
    ops = {"name": "ops", "guarantee": {"gpus": {"*": 1}}, "members": ["eve"]}
    await ask(nc, "set_groups", {"set": [{**VISION, "guarantee": {"gpus": {"*": 2}}}, ops]})
    borrowed = {"owner": "bob", "preemptible": True, "grace_seconds": 60, "ttl_seconds": 600}
    for host in ("node1", "node1", "node0"):  # the last one loses least
        assert (await ask(nc, "request", {**borrowed, "hosts": [host]}))["type"] == "assignment"
    want = {"owner": "ann", "gpus": 2, "wait_seconds": 600, "request_id": "two", "ttl_seconds": 600}
    asked = asyncio.create_task(ask(nc, "request", want, timeout=60))
    victims = await noticed(nc, "bob", 1)
    # Of groups that have used equally little the first by name is next.
    taken = await ask(nc, "request", {"owner": "eve", "wait_seconds": 600, "ttl_seconds": 600})
    assert taken["lease"]["grants"][0]["host"] == "node0"
    await leave(nc, *victims)
    await leave(nc, *await noticed(nc, "bob", 2))
    first, *others = await evicted(nc, "bob", 3)
    assert first["grants"][0]["host"] == "node0"
    for lease in others:
        waited = datetime.fromisoformat(lease["preemption"]["notified_at"]) - datetime.fromisoformat(first["ended_at"])
        assert waited.total_seconds() < IDLE_SECONDS
    assert {grant["host"] for grant in (await asked)["lease"]["grants"]} == {"node1"}
    await hosts.stop()


async def test_a_notice_that_frees_nothing_alone_is_withdrawn_by_the_next_leader(
    nc: Client, planner: PlannerProcess
) -> None:
    """A planner that is killed while it gives notice to two leases has given it to one."""
    hosts = FakeHosts(nc, hosts=1, devices=1)
    await hosts.start()
    planner.start()
    await until_ready(nc, 1)
    vision = {**VISION, "guarantee": {"gpus": {"*": 1}}}
    assert (await ask(nc, "set_groups", {"set": [vision]}))["revision"] == 1
    half = {"owner": "bob", "gpu_share": 0.5, "preemptible": True, "grace_seconds": 1, "ttl_seconds": 600}
    first = (await ask(nc, "request", half))["lease"]["lease_id"]
    assert (await ask(nc, "request", {**half, "min_run_seconds": 600}))["type"] == "assignment"
    want = {"owner": "ann", "wait_seconds": 600, "request_id": "one", "ttl_seconds": 600}
    asked = asyncio.create_task(ask(nc, "request", want, timeout=60))
    await queued(nc, 1)
    planner.kill()
    key = f"$KV.{subjects.PLANNER_BUCKET}.lease.{first}"
    kept = await nc.jetstream().get_last_msg(f"KV_{subjects.PLANNER_BUCKET}", key)
    record = json.loads(kept.data or b"")
    record["lease"]["preemption"] = {
        "notified_at": record["lease"]["granted_at"],
        "ends_at": record["lease"]["granted_at"],
        "reason": "group vision is guaranteed what it asks for",
        "claimant": "one",
        "claimant_owner": "ann",
        "claimant_group": "vision",
    }
    await nc.jetstream().publish(key, json.dumps(record).encode())
    planner.start()
    await until_ready(nc)
    await noticed(nc, "bob", 0)
    assert len(await active(nc, "bob")) == 2
    asked.cancel()
    await hosts.stop()


async def evicted(nc: Client, owner: str, count: int) -> list[dict[str, Any]]:
    """The leases of an owner that were preempted, in the order of their ends, once there are so many."""
    async with asyncio.timeout(60):
        while True:
            found = (await ask(nc, "leases", {"owner": owner, "states": ["evicted"]}))["leases"]
            if len(found) >= count:
                return sorted(found, key=lambda lease: lease["ended_at"])
            await asyncio.sleep(0.05)
