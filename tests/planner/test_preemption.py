"""Preemption: the notice, the holder's answers, the deadline, and the place in line of the work that goes on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.leases import lifecycle
from corral.planner.leases.lifecycle import LeaseRecord, LeaseTable, Refused
from corral.schemas import codec
from corral.schemas.requests import Assignment, Error, LeaseEvent, LeaseEventKind, LeaseState, Preemption, WorkRequest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client as Bus
from support.lease_examples import START
from support.planner_rig import FakeHosts, PlannerProcess, ask, lease_events, queued, running, until_ready

GRACE = 60.0
WIRE = Path(__file__).parents[1] / "wire_compat"
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["notify", "withdraw", "saved", "busy", "renew", "warn", "store", "release"]),
        st.floats(0.1, 50.0),
    ),
    max_size=14,
)


def preemptible(**fields: Any) -> LeaseRecord:
    request = {"owner": "me", "preemptible": True, "grace_seconds": GRACE, "min_run_seconds": 20.0, "ttl_seconds": 1e6}
    return lifecycle.grant(
        WorkRequest(**{**request, **fields}),
        [],
        lease_id="l1",
        now=START,
        digest="",
        planner="p",
        environment={},
        service_seconds=0.0,
        asked_at=START - timedelta(seconds=100),
    )


def notice(now: datetime, claimant: str = "r") -> Preemption:
    return Preemption(notified_at=now, ends_at=now, reason="why", claimant=claimant)


@given(STEPS)
def test_a_deadline_moves_once_at_most_and_by_the_grace_at_most(steps: list[tuple[str, float]]) -> None:
    """Whatever comes between notice and end; and the record in the bucket has all of it."""
    record, now = preemptible(), START
    noticed: datetime | None = None
    for name, seconds in steps:
        now += timedelta(seconds=seconds)
        before = record
        if record.lease.state is not LeaseState.ACTIVE:
            return
        if name == "notify":
            if now < START + timedelta(seconds=20):
                with pytest.raises(Refused, match="min_run_seconds"):
                    lifecycle.notify(record, notice(now), now, "p")
                continue
            record = lifecycle.notify(record, notice(now), now, "p")
            if record is not before:
                noticed = now
                assert record.event().kind.value == "preempting"
        elif name == "withdraw":
            assert lifecycle.withdraw_notice(record, "another", now, "p") is record
            record = lifecycle.withdraw_notice(record, "r", now, "p")
            assert record.lease.preemption is None
            noticed = None
        elif name == "saved":
            record = lifecycle.saved(record, now, "p")
            assert record.lease.saved_at == now
            assert (record.lease.state is LeaseState.EVICTED) == (noticed is not None)
        elif name == "busy":
            if noticed is None or before.lease.preemption is None or before.lease.preemption.extended:
                with pytest.raises(Refused):
                    lifecycle.busy(record, seconds, now, "p")
                continue
            record = lifecycle.busy(record, seconds, now, "p")
            assert record.lease.preemption is not None
            assert record.lease.preemption.ends_at >= before.lease.preemption.ends_at
        elif name == "renew":
            record = lifecycle.renew(record, None, now, "p")
            assert record.lease.preemption == before.lease.preemption
        elif name == "warn":
            record = lifecycle.warn(record, now, "p")
        elif name == "release":
            record = lifecycle.end(record, LeaseState.RELEASED, "", now, "p")
        else:
            record = codec.decode(codec.encode(record, codec.JSON), LeaseRecord, codec.JSON)
        deadline = lifecycle.deadline(record.lease)
        assert (deadline is None) == (noticed is None)
        if noticed is not None and deadline is not None:
            least = noticed + timedelta(seconds=GRACE)
            assert least <= deadline[0] <= least + timedelta(seconds=GRACE)
            assert deadline[1] is LeaseState.EVICTED


def test_a_lease_that_did_not_agree_is_not_preempted_and_one_without_grace_ends_at_once() -> None:
    later = START + timedelta(seconds=30)
    with pytest.raises(Refused, match="not preemptible"):
        lifecycle.notify(preemptible(preemptible=False), notice(later), later, "p")
    ended = lifecycle.notify(preemptible(grace_seconds=0), notice(later), later, "p")
    assert (ended.version, ended.kind.value, ended.lease.reason) == (2, "evicted", "preempted: why")
    assert isinstance(lifecycle.repeat_answer(ended), Error)
    limited = lifecycle.notify(preemptible(max_seconds=40), notice(later), later, "p")
    assert lifecycle.deadline(limited.lease) == (START + timedelta(seconds=40), LeaseState.EXPIRED)
    again = lifecycle.repeat_answer(limited)
    assert isinstance(again, Assignment)
    assert again.lease.expires_at == limited.lease.ends_at  # what was answered first, not a time to live beyond it


def test_only_the_owner_of_a_preempted_lease_gets_its_age_and_once() -> None:
    later = START + timedelta(seconds=30)
    record = lifecycle.notify(preemptible(), notice(later), later, "p")
    ended = lifecycle.preempted(record, record.lease, later, "p")
    table = LeaseTable([ended])
    assert lifecycle.requeued_age(table, "l1", "me") == START - timedelta(seconds=100)
    again = lifecycle.grant(
        WorkRequest(owner="me", requeue_of="l1", preemptible=True),
        [],
        lease_id="l2",
        now=later,
        digest="",
        planner="p",
        environment={},
        age_from=START - timedelta(seconds=100),
    )
    assert again.lease.requeued
    cases = [
        ("not_owner", LeaseTable([ended]), "l1", "you"),
        ("not_found", LeaseTable([ended]), "l2", "me"),
        ("conflict", LeaseTable([record]), "l1", "me"),
        ("conflict", LeaseTable([ended, again]), "l1", "me"),
        ("refused", LeaseTable([lifecycle.end(preemptible(), LeaseState.RELEASED, "", later, "p")]), "l1", "me"),
    ]
    for code, leases, lease_id, owner in cases:
        with pytest.raises(Refused) as refused:
            lifecycle.requeued_age(leases, lease_id, owner)
        assert (refused.value.error.code, refused.value.error.field) == (code, "$.requeue_of")
    noticed = lifecycle.notify(again, notice(later), later, "p")
    twice = LeaseTable([lifecycle.preempted(noticed, noticed.lease, later, "p")])
    assert lifecycle.requeued_age(twice, "l2", "me") == START - timedelta(seconds=100)


@pytest.fixture
async def hosts(nc: Bus) -> AsyncIterator[FakeHosts]:
    made = FakeHosts(nc, hosts=1, devices=2)
    await made.start()
    yield made
    await made.stop()


async def listed(nc: Bus, lease_id: str) -> dict[str, Any]:
    found = await ask(nc, "leases", {"lease_id": lease_id, "states": ["active", "evicted", "released"]})
    return found["leases"][0]


async def until_ended(nc: Bus, lease_id: str) -> dict[str, Any]:
    for _ in range(600):
        lease = await listed(nc, lease_id)
        if lease["state"] != "active":
            return lease
        await asyncio.sleep(0.05)
    raise TimeoutError(f"lease {lease_id} never ended")


def stamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


async def test_the_deadline_outlives_the_planner(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts, tmp_path: Path
) -> None:
    """Killed with -9 between notice and deadline: the next planner ends the lease, and not before."""
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 2)
    body = {"owner": "ann", "gpus": 2, "preemptible": True, "grace_seconds": 2, "ttl_seconds": 600}
    lease_id = (await ask(nc, "request", body))["lease"]["lease_id"]
    noticed = await ask(nc, "preempt", {"lease_id": lease_id, "reason": "a course", "operator": "olga"})
    deadline = stamp(noticed["preemption"]["ends_at"])
    planner.kill()
    planner.start()
    await until_ready(nc, 2)
    renewed = await ask(nc, "renew", {"owner": "ann", "lease_id": lease_id})
    if renewed["type"] == "lease":  # a slow machine may start the planner after the deadline
        assert renewed["preemption"] == noticed["preemption"]
    ended = await until_ended(nc, lease_id)
    assert time.time() >= deadline
    assert (ended["state"], ended["reason"]) == ("evicted", "preempted: a course (by olga)")
    assert stamp(ended["ended_at"]) >= deadline
    assert ended["preemption"] == noticed["preemption"]
    got = await ask(nc, "request", {"owner": "bob", "gpus": 2, "wait_seconds": 30}, timeout=30)
    assert got["type"] == "assignment"
    planner.stop()
    kinds = [event["kind"] for _, event in await lease_events(nc) if event["lease"]["lease_id"] == lease_id]
    assert [kind for kind in kinds if kind != "renewed"] == ["granted", "preempting", "evicted"]


async def test_a_holder_answers_a_notice_and_its_work_keeps_its_place_in_line(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    async with running(server.url, order="fifo"):
        await until_ready(nc, 2)
        body = {"owner": "ann", "gpus": 2, "preemptible": True, "grace_seconds": 500, "ttl_seconds": 600}
        lease = (await ask(nc, "request", body))["lease"]
        lease_id = lease["lease_id"]
        waiting = {"owner": "bob", "gpus": 2, "wait_seconds": 60}
        others = [
            asyncio.create_task(ask(nc, "request", {**waiting, "request_id": name}, timeout=60))
            for name in ("b1", "b2")
        ]
        await queued(nc, 2)
        refused = await ask(nc, "request", {**waiting, "owner": "ann", "requeue_of": lease_id})
        assert (refused["code"], refused["field"]) == ("conflict", "$.requeue_of")
        assert (await ask(nc, "checkpoint", {"lease_id": lease_id, "owner": "bob", "saved": True}))[
            "code"
        ] == "not_owner"
        assert (await ask(nc, "checkpoint", {"lease_id": lease_id, "owner": "ann"}))["code"] == "invalid"
        saved = await ask(nc, "checkpoint", {"lease_id": lease_id, "owner": "ann", "saved": True})
        assert (saved["state"], saved["expires_at"]) == ("active", lease["expires_at"])
        early = await ask(nc, "checkpoint", {"lease_id": lease_id, "owner": "ann", "busy_seconds": 9})
        assert early["code"] == "refused"
        first = await ask(nc, "preempt", {"lease_id": lease_id, "reason": "why"})
        assert (await ask(nc, "preempt", {"lease_id": lease_id, "reason": "again"}))["preemption"] == first[
            "preemption"
        ]
        busy = {"lease_id": lease_id, "owner": "ann", "busy_seconds": 3600}
        extended = (await ask(nc, "checkpoint", busy))["preemption"]
        assert stamp(extended["ends_at"]) == pytest.approx(stamp(first["preemption"]["ends_at"]) + 500)
        assert extended["extended"]
        assert (await ask(nc, "checkpoint", busy))["code"] == "refused"
        # Whoever waits for the devices is expected to start then, at the latest.
        for _ in range(400):
            forecast = (await ask(nc, "queue"))["entries"][0]["forecast"]
            if forecast and stamp(forecast["latest_start"]) <= stamp(extended["ends_at"]) + 1:
                break
            await asyncio.sleep(0.05)
        assert stamp(forecast["latest_start"]) <= stamp(extended["ends_at"]) + 1

        # The requeued request was asked last, and is the first in line by its age.
        ended = await ask(nc, "checkpoint", {"lease_id": lease_id, "owner": "ann", "saved": True})
        assert (ended["state"], ended["reason"]) == ("evicted", "preempted: why")
        assert await ask(nc, "checkpoint", {"lease_id": lease_id, "owner": "ann", "saved": True}) == ended
        assert (await others[0])["type"] == "assignment"
        again = {**body, "wait_seconds": 60, "requeue_of": lease_id, "request_id": "again"}
        requeued = asyncio.create_task(ask(nc, "request", again, timeout=60))
        entries = await queued(nc, 2)
        assert [entry["request_id"] for entry in entries] == ["again", "b2"]
        assert entries[0]["waiting_seconds"] < entries[1]["waiting_seconds"]
        double = await ask(nc, "request", {**body, "requeue_of": lease_id})
        assert double["code"] == "conflict"
        held = (await others[0])["lease"]["lease_id"]
        await ask(nc, "release", {"owner": "bob", "lease_id": held})
        granted = (await requeued)["lease"]
        assert granted["requeued"]
        assert stamp(granted["asked_at"]) > stamp(lease["granted_at"])
        await ask(nc, "release", {"owner": "ann", "lease_id": granted["lease_id"]})
        assert (await others[1])["type"] == "assignment"


def test_what_an_earlier_planner_wrote_is_read_and_it_reads_what_this_one_writes() -> None:
    record = codec.decode((WIRE / "v1-lease-record.json").read_bytes(), LeaseRecord, codec.JSON)
    event = codec.decode((WIRE / "v1-lease-event.json").read_bytes(), LeaseEvent, codec.JSON)
    assert record.lease.lease_id == event.lease.lease_id
    assert (record.lease.preemptible, record.lease.preemption, event.lease.saved_at) == (False, None, None)
    later = START + timedelta(seconds=30)
    noticed = lifecycle.notify(preemptible(), notice(later), later, "p")
    assert noticed.event().kind is LeaseEventKind.PREEMPTING
    written = json.loads(codec.encode(noticed, codec.JSON))
    assert written["kind"] in {"granted", "renewed", "expiring"}, "an earlier planner would give its devices away"
