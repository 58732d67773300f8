"""Requests that wait outlive the planner, leases end at their limit, and what became of each request is published."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import nats
import pytest
from corral.cli.local.server import EmbeddedServer
from corral.schemas import codec, subjects
from corral.schemas.request_events import RequestEvent, RequestEvents
from nats.aio.client import Client as Bus
from support.planner_rig import FakeHosts, PlannerProcess, ask, queued, running, stream, until_ready


@pytest.fixture
async def hosts(nc: Bus) -> AsyncIterator[FakeHosts]:
    made = FakeHosts(nc, hosts=1, devices=2)
    await made.start()
    yield made
    await made.stop()


class Waiter:
    """A client that asks once, and waits for the answer on an inbox of its own."""

    def __init__(self, nc: Bus) -> None:
        self.nc = nc
        self.inbox = nc.new_inbox()
        self.answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def ask(self, **fields: Any) -> None:
        async def answered(message: Any) -> None:
            if message.data:  # else the server asks whether anyone listens
                self.answers.put_nowait(json.loads(message.data))

        # As most clients do, one subscription for all answers: by it the server tells that the client is there.
        await self.nc.subscribe(f"{self.inbox}.*", cb=answered)
        body = {"owner": "ann", "wait_seconds": 600, **fields}
        await self.nc.publish("corral.v1.plan.request", json.dumps(body).encode(), reply=f"{self.inbox}.1")

    async def answer(self, seconds: float = 30.0) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            return await self.answers.get()


async def events(nc: Bus, count: int) -> list[RequestEvent]:
    """The events of requests, once there are so many."""
    found: list[RequestEvent] = []
    for _ in range(200):
        messages = stream(nc, subjects.REQUESTS_STREAM, f"{subjects.REQUEST_EVENTS}.*")
        batches = [codec.decode(message.data, RequestEvents, codec.JSON) async for message in messages]
        found = list({event.uid: event for batch in batches for event in batch.events}.values())
        if len(found) >= count:
            break
        await asyncio.sleep(0.1)
    assert len(found) == count
    return found


async def test_a_new_planner_has_every_waiting_request_in_order_with_its_age(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts, tmp_path: Path
) -> None:
    """Killed with -9: clients that never ask again get their answer; one that is gone gets no devices."""
    clients = [await nats.connect(server.url) for _ in range(3)]
    first, second, gone = (Waiter(client) for client in clients)
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 2)
    held = await ask(nc, "request", {"owner": "x", "gpus": 2, "ttl_seconds": 600})
    await events(nc, 1)
    await gone.ask(gpus=1, request_id="gone")
    await queued(nc, 1)
    await first.ask(gpus=1, name="first", expected_seconds=60)
    await queued(nc, 2)
    await second.ask(gpus=1, request_id="second", expected_seconds=60)
    before = await queued(nc, 3)
    planner.kill()
    await clients[2].close()
    planner.start()
    await until_ready(nc, 2)
    after = await queued(nc, 3)
    assert [(entry["request_id"], entry["name"]) for entry in after] == [
        (entry["request_id"], entry["name"]) for entry in before
    ]
    assert all(new["waiting_seconds"] >= old["waiting_seconds"] for new, old in zip(after, before, strict=True))
    await ask(nc, "release", {"owner": "x", "lease_id": held["lease"]["lease_id"]})
    granted = [await first.answer(), await second.answer()]
    assert [answer["type"] for answer in granted] == ["assignment", "assignment"]
    assert (await queued(nc, 1))[0]["request_id"] == "gone"
    found = {event.request.request_id or "": event for event in await events(nc, 3)}
    assert found["second"].outcome.value == "granted"
    assert found["second"].lease_id == granted[1]["lease"]["lease_id"]
    assert found["second"].queued
    assert (found["second"].ended_at - found["second"].asked_at).total_seconds() >= after[-1]["waiting_seconds"] - 1
    planner.stop()
    for client in clients[:2]:
        await client.close()


async def test_a_large_request_outlives_the_planner_with_its_items(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts, tmp_path: Path
) -> None:
    """Close to the most that the bus carries, as it came; what it took in the bucket is free once it is answered."""
    items = [f"{number:06d}-{'x' * 80}" for number in range(9_000)]
    waiter = Waiter(nc)
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 2)
    held = await ask(nc, "request", {"owner": "x", "gpus": 2, "ttl_seconds": 600})
    await waiter.ask(gpus=2, request_id="large", distribution={"items": items})
    await queued(nc, 1)
    await _until_stored(nc, True)
    planner.kill()
    planner.start()
    await until_ready(nc, 2)
    await queued(nc, 1)
    await ask(nc, "release", {"owner": "x", "lease_id": held["lease"]["lease_id"]})
    lease = (await waiter.answer())["lease"]
    assert sorted(item for grant in lease["grants"] for item in grant["items"]) == items
    await _until_stored(nc, False)
    planner.stop()


async def _until_stored(nc: Bus, there: bool) -> None:
    """Wait until the bucket has an entry of the queue with its body, or neither."""
    for _ in range(600):
        found: list[bool] = []
        for prefix in ("queue", "queue_body"):
            wanted = f"$KV.{subjects.PLANNER_BUCKET}.{prefix}.>"
            info = await nc.jetstream().stream_info(f"KV_{subjects.PLANNER_BUCKET}", subjects_filter=wanted)
            found.append(bool(info.state.subjects))
        if found == [there, there]:
            return
        await asyncio.sleep(0.05)
    raise TimeoutError("the bucket did not come to that")


async def test_what_was_answered_does_not_wait_again(server: EmbeddedServer, nc: Bus, hosts: FakeHosts) -> None:
    """Planners that stop and start leave nothing of a granted or withdrawn request behind."""
    waiter = Waiter(nc)
    async with running(server.url):
        await until_ready(nc, 2)
        held = await ask(nc, "request", {"owner": "x", "gpus": 2, "ttl_seconds": 600})
        await waiter.ask(gpus=1, request_id="granted")
        await waiter.ask(gpus=1, request_id="withdrawn")
        await waiter.ask(gpus=2, request_id="stays", wait_seconds=900)
        await queued(nc, 3)
        await ask(nc, "withdraw", {"owner": "ann", "request_id": "withdrawn"})
        await ask(nc, "release", {"owner": "x", "lease_id": held["lease"]["lease_id"]})
        await queued(nc, 1)
    async with running(server.url):
        await until_ready(nc, 1)
        assert [entry["request_id"] for entry in await queued(nc, 1)] == ["stays"]
        outcomes = {event.request.request_id: event.outcome.value for event in await events(nc, 3)}
        assert {outcomes["granted"], outcomes["withdrawn"]} == {"granted", "withdrawn"}


async def test_of_two_entries_of_a_request_the_later_stays_in_the_bucket(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    """As of one that left the line and came back, where the planner died before the first entry was deleted."""
    waiter = Waiter(nc)
    async with running(server.url):
        await until_ready(nc, 2)
        await ask(nc, "request", {"owner": "x", "gpus": 2, "ttl_seconds": 600})
        await waiter.ask(gpus=1, request_id="waits")
        await queued(nc, 1)
    bucket = await nc.jetstream().key_value(subjects.PLANNER_BUCKET)
    [key] = [key for key in await bucket.keys() if key.startswith("queue.")]
    entry = json.loads((await bucket.get(key)).value or b"")
    await bucket.put("queue.back", json.dumps({**entry, "uid": "back"}).encode())
    async with running(server.url):
        await until_ready(nc, 1)
        await queued(nc, 1)
        async with asyncio.timeout(10):
            while len(kept := [key for key in await bucket.keys() if key.startswith("queue.")]) > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert kept == ["queue.back"]


async def test_a_lease_that_reaches_its_limit_after_an_outage_says_so(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    """Its published end is before the limit, since it got the time of the outage again."""
    async with running(server.url):
        await until_ready(nc, 2)
        await ask(nc, "request", {"owner": "ann", "max_seconds": 3.5, "ttl_seconds": 3})
    await asyncio.sleep(0.5)  # more than a tenth of its time to live, which begins again then
    async with running(server.url):
        await until_ready(nc, 1)
        async with asyncio.timeout(20):
            while not (ended := (await ask(nc, "leases", {"states": ["expired"]}))["leases"]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert "max_seconds" in ended[0]["reason"]


async def test_a_lease_ends_at_its_limit_however_often_it_is_renewed(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    async with running(server.url):
        await until_ready(nc, 2)
        got = await ask(nc, "request", {"owner": "ann", "max_seconds": 3, "ttl_seconds": 2, "expected_seconds": 2})
        lease = got["lease"]
        limit = datetime.fromisoformat(lease["granted_at"]) + timedelta(seconds=3)
        assert datetime.fromisoformat(lease["ends_at"]) == limit
        assert lease["expected_seconds"] == 2
        answers = []
        while lease["state"] == "active":
            await asyncio.sleep(0.2)
            lease = (await ask(nc, "leases", {"lease_id": lease["lease_id"], "states": ["active", "expired"]}))[
                "leases"
            ][0]
            answer = await ask(nc, "renew", {"owner": "ann", "lease_id": lease["lease_id"]})
            answers.append(answer)
        assert lease["state"] == "expired"
        assert "max_seconds" in lease["reason"]
        renewed = [datetime.fromisoformat(answer["expires_at"]) for answer in answers if answer["type"] == "lease"]
        assert renewed
        assert max(renewed) <= limit
        assert datetime.fromisoformat(lease["ended_at"]) - limit < timedelta(seconds=2)


async def test_each_request_has_one_event_that_says_what_became_of_it(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    async with running(server.url):
        await until_ready(nc, 2)
        ids = [uuid.uuid4().hex for _ in range(4)]
        await ask(nc, "request", {"owner": "ann", "gpus": 2, "request_id": ids[0], "labels": {"a": "b"}})
        await ask(nc, "request", {"owner": "ann", "gpus": 2, "request_id": ids[1]})
        await ask(nc, "request", {"owner": "ann", "gpus": 2, "request_id": ids[1]})  # a retry is no other request
        await ask(nc, "request", {"owner": "ann", "gpus": 99, "request_id": ids[2]})
        await ask(nc, "request", {"owner": "ann", "gpus": 1, "wait_seconds": 0.5, "request_id": ids[3]}, timeout=10)
        found = {event.request.request_id: event for event in await events(nc, 4)}
    assert [found[one].outcome.value for one in ids] == ["granted", "rejected", "rejected", "timed_out"]
    assert [found[one].code for one in ids] == ["", "no_capacity", "impossible", "timed_out"]
    assert [found[one].queued for one in ids] == [False, False, False, True]
    assert found[ids[0]].request.labels == {"a": "b"}
    assert (found[ids[3]].ended_at - found[ids[3]].asked_at).total_seconds() >= 0.5
