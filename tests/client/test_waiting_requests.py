"""Queued requests: they read the queue sparingly, survive a change of planner, and are granted at most once."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import Client, Rejected, TooManyRequests, connect
from corral.client import waiting as line
from corral.planner.limits import Limits
from corral.schemas import codec
from corral.schemas.operations import Queue
from corral.schemas.requests import Error, Rejection, RejectionCode, WorkRequest
from corral.schemas.subjects import PlanSubject
from nats.aio.client import Client as Bus
from nats.aio.msg import Msg
from support.local_cluster import CORRAL, environment
from support.published_fleet import devices, planner, until_ready


async def until_in_line(client: Client, owner: str) -> None:
    async with asyncio.timeout(20):
        while owner not in [entry.owner for entry in await client.queue()]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def crowd(nc: Bus, count: int) -> None:
    """So many others get in line, each with a long name."""
    for number in range(count):
        body = {"owner": "crowd", "gpus": 2, "wait_seconds": 600, "request_id": f"c-{number}", "name": "x" * 250}
        await nc.publish(PlanSubject.REQUEST, json.dumps(body).encode(), reply="nowhere")
    await nc.flush()


async def test_who_waits_reads_a_long_queue_seldom_and_does_not_need_it(
    server: EmbeddedServer, nc: Bus, tmp_path: Path
) -> None:
    limits = Limits(burst=10_000, waiting=10_000)
    read: list[Msg] = []

    async def count(message: Msg) -> None:
        read.append(message)

    async with (
        devices(server.url, tmp_path),
        planner(server.url, limits, silence_seconds=600.0),  # the crowd says nothing more
        connect(server.url, owner="ann", patience=60) as ann,
    ):
        await until_ready(ann)
        blocker = (await ann.request(gpus=2, ttl="1h")).lease.lease_id
        await crowd(nc, 200)
        async with asyncio.timeout(60):
            while (await ann.fleet()).waiting_requests < 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await nc.subscribe(PlanSubject.QUEUE, cb=count)
        await nc.flush()
        away = {"wait": "60s", "request_id": "far", "priority": -1}  # else the smaller request goes first
        far = asyncio.create_task(ann.request(gpus=1, on_wait=lambda _: None, **away))  # type: ignore[arg-type]
        await asyncio.sleep(3.5)
        assert [json.loads(message.data)["request_id"] for message in read] == ["far"]
        far.cancel()
        waiting = asyncio.create_task(ann.request(gpus=1, wait="60s", priority=9))
        # The queue may be larger than a message, and is listed in parts.
        await crowd(nc, 3000)
        async with asyncio.timeout(60):
            while (await ann.fleet()).waiting_requests < 3001:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert len(await ann.queue()) == 3001
        also = asyncio.create_task(ann.request(gpus=1, wait="60s", priority=9))
        await asyncio.sleep(1.5)
        assert (waiting.done(), also.done()) == (False, False)
        await ann.release(blocker)
        async with asyncio.timeout(60):
            granted = {(await waiting).lease.lease_id, (await also).lease.lease_id}
        assert len(granted) == 2


async def test_who_gives_up_is_in_line_no_more(server: EmbeddedServer, nc: Bus, tmp_path: Path) -> None:
    async with (
        devices(server.url, tmp_path),
        connect(server.url, owner="ann", patience=10, timeout=1) as ann,
    ):
        in_line = asyncio.Event()
        async with planner(server.url):
            await until_ready(ann)
            await ann.request(gpus=2, ttl="1h")
            waiting = asyncio.create_task(ann.request(gpus=1, wait="4s", on_wait=lambda _: in_line.set()))
            await in_line.wait()
        # The next one goes on with its wait, and turns it away in time.
        async with planner(server.url):
            await until_in_line(ann, "ann")
            with pytest.raises(Rejected) as given_up:
                await waiting
            assert await ann.queue() == []
            assert given_up.value.rejection.code is RejectionCode.TIMED_OUT
            answer = await ann.withdraw(given_up.value.rejection.request_id)
            assert isinstance(answer, Rejection)
            assert answer.code is RejectionCode.TIMED_OUT
            # Neither is who closes the connection.
            async with connect(server.url, owner="ben") as ben:
                left = asyncio.create_task(ben.request(gpus=1, wait="60s"))
                await until_in_line(ann, "ben")
            assert await ann.queue() == []
            await asyncio.gather(left, return_exceptions=True)


async def test_a_refusal_for_longer_than_the_wait_is_told_at_once(server: EmbeddedServer, nc: Bus) -> None:
    later = Error(code="too_many_requests", message="much later", retry_after_seconds=3600.0)
    withdrawn: list[Msg] = []

    async def refuse(message: Msg) -> None:
        await message.respond(codec.encode(later, codec.JSON))

    async def withdraw(message: Msg) -> None:
        withdrawn.append(message)
        gone = Rejection(code=RejectionCode.WITHDRAWN, message="", could_ever_fit=True)
        await message.respond(codec.encode(gone, codec.JSON))

    await nc.subscribe(PlanSubject.REQUEST, cb=refuse)
    await nc.subscribe(PlanSubject.WITHDRAW, cb=withdraw)
    await nc.flush()
    async with connect(server.url, owner="ann", timeout=2) as ann, asyncio.timeout(10):
        with pytest.raises(TooManyRequests, match="much later"):
            await ann.request(gpus=1, wait="1m")
    assert len(withdrawn) == 1


async def test_a_request_is_asked_again_where_its_planner_was_killed(
    server: EmbeddedServer, nc: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "_LEADER_SECONDS", 0.5)
    monkeypatch.setattr(line, "_QUEUE_SECONDS", 600.0)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*CORRAL, "plan"], env=environment(CORRAL_NATS_URL=server.url))

    first = start()
    try:
        async with devices(server.url, tmp_path), connect(server.url, owner="ann", patience=20) as ann:
            await until_ready(ann)
            await ann.request(gpus=2, ttl="1h", owner="blocker")
            waiting = asyncio.create_task(ann.request(gpus=1, wait="60s"))
            await asyncio.sleep(1.5)
            await until_in_line(ann, "ann")
            first.kill()
            first.wait()
            first = start()
            await until_in_line(ann, "ann")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert await ann.queue() == []
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize("steps", range(5))
async def test_it_ends_when_it_is_cancelled_as_a_reply_comes(server: EmbeddedServer, nc: Bus, steps: int) -> None:
    """`asyncio.wait_for` returns the reply then until Python 3.12, and the cancellation is lost."""

    async def nothing(_: Msg) -> None:
        """A planner that keeps the request in its queue."""

    async def queue() -> Queue:
        return Queue(entries=[], total=0)

    await nc.subscribe("plan", cb=nothing)
    request = WorkRequest(owner="ann", gpus=1, wait_seconds=600.0, request_id=f"after-{steps}")
    waiting = line.QueuedRequest(nc, "plan", request, queue, timeout=1.0, patience=1.0, on_wait=None)
    task = asyncio.create_task(waiting.answer())
    async with asyncio.timeout(20):
        while True:
            subscriptions = [one for one in nc._subs.values() if one.subject == waiting._inbox]
            if subscriptions and subscriptions[0]._pending_next_msgs_calls:
                break
            await asyncio.sleep(0)
    reply = codec.encode(await queue(), codec.JSON)
    subscriptions[0]._pending_size += len(reply)
    subscriptions[0]._pending_queue.put_nowait(Msg(nc, data=reply, subject=waiting._inbox))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=10)
    assert done, "it goes on as if it had not been cancelled"
    assert task.cancelled()
