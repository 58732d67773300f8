"""Requests that wait, taken back: by their owner's word, or by a task that is cancelled."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import Client, Rejected, connect
from corral.planner.api.request_context import RequestContext
from corral.planner.durable.store import answer_key
from corral.schemas import subjects
from corral.schemas.operations import QueueEntry
from corral.schemas.requests import Assignment, Rejection, RejectionCode, WorkRequest
from nats.aio.client import Client as Bus
from nats.aio.msg import Msg
from nats.micro.request import Request
from support.planner_rig import FakeHosts, PlannerProcess, ask, persist, running, until_ready


async def waiting(client: Client, request_id: str, **fields: Any) -> asyncio.Task[Assignment]:
    """A request that is in the queue."""
    task = asyncio.create_task(client.request(request_id=request_id, wait="60s", **fields))
    await in_line(client, 1, request_id)
    return task


async def in_line(client: Client, least: int, request_id: str = "") -> list[QueueEntry]:
    """The queue, once there is something in it."""
    for _ in range(500):
        entries = [entry for entry in await client.queue() if request_id in ("", entry.request_id)]
        if len(entries) >= least:
            return entries
        await asyncio.sleep(0.02)
    raise AssertionError("nobody waits")


async def test_a_request_that_waits_is_withdrawn_and_its_caller_told(server: EmbeddedServer, nc: Bus) -> None:
    hosts = FakeHosts(nc, hosts=1, devices=2)
    await hosts.start()
    async with running(server.url), connect(server.url, owner="ann") as ann, connect(server.url, owner="bob") as bob:
        await until_ready(nc, 2)
        held = (await bob.request(gpus=2, ttl="1h")).lease
        first = await waiting(ann, "first", gpus=2)
        behind = await waiting(bob, "behind", gpus=1)
        # An id is its owner's own: what bob withdraws under it is his, and he hears nothing of ann's.
        mine = await bob.withdraw("first")
        assert isinstance(mine, Rejection)
        assert "did not wait" in mine.message
        for _ in range(2):  # again it is answered alike
            answer = await ann.withdraw("first")
            assert isinstance(answer, Rejection)
            assert (answer.code, answer.request_id) == (RejectionCode.WITHDRAWN, "first")
        with pytest.raises(Rejected) as rejected:
            await first
        assert rejected.value.code is RejectionCode.WITHDRAWN
        assert [entry.request_id for entry in await ann.queue()] == ["behind"]
        # On the subject that makes the owner certain, the body may leave it out and may not name another.
        assert (await ask(nc, "withdraw.ann", {"owner": "bob", "request_id": "behind"}))["code"] == "refused"
        assert "did not wait" in (await ask(nc, "withdraw.ann", {"request_id": "behind"}))["message"]

        # What was granted just before is told with its lease, whoever is faster.
        await bob.release(held.lease_id)
        granted = await behind
        answer = await bob.withdraw("behind")
        assert isinstance(answer, Assignment)
        assert answer.lease.lease_id == granted.lease.lease_id
        assert isinstance(await ann.withdraw("behind"), Rejection)

        # One that comes after its withdrawal finds it there, but nobody else's does.
        assert isinstance(await ann.withdraw("late"), Rejection)
        with pytest.raises(Rejected) as late:
            await ann.request(request_id="late", gpus=1)
        assert late.value.code is RejectionCode.WITHDRAWN
        free = await ask(nc, "request", {"owner": "bob", "request_id": "late"})
        assert free["type"] == "assignment"
        await bob.release(free["lease"]["lease_id"])
        # One without an id can be withdrawn under the id that the queue shows.
        anonymous = asyncio.create_task(ask(nc, "request", {"owner": "ann", "gpus": 2, "wait_seconds": 60}, timeout=20))
        await ann.withdraw((await in_line(ann, 1))[0].request_id)
        assert (await anonymous)["code"] == "withdrawn"
    await hosts.stop()


async def test_a_cancelled_request_leaves_neither_queue_entry_nor_lease(server: EmbeddedServer, nc: Bus) -> None:
    hosts = FakeHosts(nc, hosts=1, devices=2)
    await hosts.start()
    async with running(server.url), connect(server.url, owner="ann") as ann:
        await until_ready(nc, 2)
        held = (await ann.request(gpus=2, ttl="1h")).lease
        task = await waiting(ann, "cancelled", gpus=2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await ann.queue() == []
        await ann.release(held.lease_id)
        # Cancelled at any moment of its way to a grant, it holds nothing in the end.
        for turn in range(24):
            task = asyncio.create_task(ann.request(gpus=1, ttl="1h", wait="30s" if turn % 2 else 0))
            await asyncio.sleep(turn * 0.0004)
            task.cancel()
            done = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(done, Assignment):
                await ann.release(done.lease.lease_id)
        assert await ann.leases() == []
        assert await ann.queue() == []
    await hosts.stop()


async def test_a_withdrawal_outlives_its_planner(server: EmbeddedServer, nc: Bus, tmp_path: Any) -> None:
    hosts = FakeHosts(nc, hosts=1, devices=1)
    await hosts.start()
    planner = PlannerProcess(server.url, tmp_path / "log")
    planner.start()
    try:
        await until_ready(nc, 1)
        body = {"owner": "ann", "request_id": "gone"}
        assert (await ask(nc, "withdraw", body))["code"] == "withdrawn"
        planner.kill()
        store = await nc.jetstream().key_value(subjects.PLANNER_BUCKET)
        assert (await store.get(answer_key("gone"))).value
        planner.start()
        assert (await persist(nc, "request", {**body, "gpus": 1}))["code"] == "withdrawn"
    finally:
        planner.kill()
        await hosts.stop()


async def test_what_one_was_refused_is_told_to_nobody_else(server: EmbeddedServer, nc: Bus) -> None:
    hosts = FakeHosts(nc, hosts=1, devices=1)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 1)
        mine = await ask(nc, "request", {"owner": "ann", "gpus": 1, "models": ["secret*"], "request_id": "r1"})
        assert mine["type"] == "rejection"
        other = await ask(nc, "withdraw", {"owner": "bob", "request_id": "r1"})
        assert (other["code"], "secret" in str(other)) == ("withdrawn", False)
        assert await ask(nc, "withdraw", {"owner": "ann", "request_id": "r1"}) == mine
    await hosts.stop()


async def test_a_request_that_is_sent_again_and_again_is_answered_once_a_place(server: EmbeddedServer, nc: Bus) -> None:
    """And so many places get an answer, the newest; the bytes of the question are not kept meanwhile."""
    hosts = FakeHosts(nc, hosts=1, devices=1)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 1)
        held = (await ask(nc, "request", {"owner": "bob"}))["lease"]["lease_id"]
        body = json.dumps({"owner": "ann", "gpus": 1, "request_id": "again", "wait_seconds": 60}).encode()
        inbox = nc.new_inbox()
        answers = await nc.subscribe(f"{inbox}.*")
        for _ in range(100):
            await nc.publish("corral.v1.plan.request", body, reply=f"{inbox}.same")
        for number in range(100):
            await nc.publish("corral.v1.plan.request", body, reply=f"{inbox}.{number}")
        assert len((await ask(nc, "queue"))["entries"]) == 1
        await ask(nc, "release", {"owner": "bob", "lease_id": held})
        told = {(await answers.next_msg(timeout=5)).subject.rpartition(".")[2] for _ in range(64)}
        assert told == {str(number) for number in range(36, 100)}
        with pytest.raises(TimeoutError):
            await answers.next_msg(timeout=0.3)
    await hosts.stop()


def test_the_bytes_of_a_question_are_let_go() -> None:
    message = Msg(Bus(), "corral.v1.plan.request", "inbox", b'{"owner": "ann"}', {"X": "y" * 1000})
    asked = RequestContext(Request(message), None, 2**20, lambda *_: None)
    assert asked.decode(WorkRequest) == WorkRequest(owner="ann")
    asked.drop_body()
    assert (message.data, message.headers) == (b"", {"Content-Type": "application/json"})
