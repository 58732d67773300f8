"""Who comes while a term ends is passed on or told, and a grant that fails holds nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from corral.bus.connect import connect
from corral.bus.layout import until_laid_out
from corral.cli.local.server import EmbeddedServer
from corral.planner.api.endpoints import Endpoints
from corral.planner.durable.election import LeaderElection
from corral.planner.durable.store import Store
from corral.planner.service import Planner, Settings
from corral.schemas.requests import Error, Placement, WorkRequest
from msgspec import Struct
from msgspec.structs import replace
from nats.aio.client import Client as Nats
from support.planner_rig import FakeHosts, ask, persist, running, until_ready


class Asker:
    """One who asked, and what came of it."""

    line = ""
    reply_to = "_INBOX.asker.1"

    def __init__(self) -> None:
        self.told: list[Struct] = []
        self.passed_on: list[Struct] = []

    async def answer(self, reply: Struct) -> None:
        self.told.append(reply)

    def forward(self, body: Struct) -> None:
        self.passed_on.append(body)


async def test_who_is_read_while_the_term_ends_does_not_wait_in_a_line_that_nobody_serves(
    server: EmbeddedServer, nc: Nats
) -> None:
    connections = [await connect(server.url, name=name) for name in ("planner", "telemetry", "leader")]
    await until_laid_out(connections[0].jetstream())
    planner = Planner(*connections, Settings())
    await planner.start()
    try:
        async with asyncio.timeout(60):
            await planner.leading.wait()
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        broker: Any = planner._broker
        assert (await ask(nc, "request", {"owner": "bob", "gpus": 4}))["type"] == "assignment"
        late = WorkRequest(owner="ann", gpus=8, wait_seconds=600, request_id="late", placement=Placement.FEWEST_HOSTS)
        unnamed = replace(late, request_id=None)
        shutdown_error = Error(code="unavailable", message="This planner is stopping: ask again")
        for last, waits in ((shutdown_error, unnamed), (None, late)):
            await broker.close(last)
            asker = Asker()
            await broker.request(waits, asker)
            assert not len(broker.queue)
            assert asker.told == ([] if last is None else [last])
            assert asker.passed_on == ([late] if last is None else [])
        # Whatever was passed on to nobody is let go of with the planner.
        planner._endpoints._tasks.start(asyncio.sleep(3600))
        await hosts.stop()
    finally:
        await planner.stop()
        assert not len(planner._endpoints._tasks)
        for connection in connections:
            await connection.close()


async def test_a_grant_that_can_not_be_written_down_holds_nothing(
    server: EmbeddedServer, nc: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(server.url):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)

        def broken(*_: Any) -> dict[str, dict[str, str]]:
            raise ValueError("no words for it")

        with monkeypatch.context() as patch:
            patch.setattr("corral.planner.broker.broker.environment", broken)
            failed = await ask(nc, "request", {"owner": "ann", "gpus": 4, "request_id": "again"}, timeout=30)
            assert failed["code"] == "internal"
        for number in range(2):
            body = {"owner": "ann", "gpus": 4, "request_id": f"again{number or ''}"}
            assert (await ask(nc, "request", body, timeout=30))["type"] == "assignment"
        await hosts.stop()


async def test_a_planner_that_is_deposed_while_its_term_begins_stands_by(server: EmbeddedServer, nc: Nats) -> None:
    """A request of nats-py that is answered just then swallows the cancellation, as `wait_for` does before 3.12."""
    await until_laid_out(nc.jetstream())
    began, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def term(_: int) -> AsyncGenerator[None]:
        began.set()
        with contextlib.suppress(asyncio.CancelledError):
            await go_on.wait()
        try:
            yield
        finally:
            ended.set()

    async def reachable() -> bool:
        return True

    store = Store(nc)
    await store.open()
    election = LeaderElection(store, "first", term, reachable)
    running_election = asyncio.create_task(election.run())
    try:
        async with asyncio.timeout(30):
            await began.wait()
            assert await store.claim(b"{}", election.term) is not None
            await ended.wait()
    finally:
        running_election.cancel()
        await asyncio.gather(running_election, return_exceptions=True)
        await store.close()


async def test_a_deposed_leader_forwards_a_message_once_while_it_still_hears_itself(
    server: EmbeddedServer, nc: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its endpoints are closed one by one, with a round trip each: what it publishes meanwhile comes back to it."""
    closing, close, forwarded = asyncio.Event(), asyncio.Event(), asyncio.Event()
    standby = Endpoints.standby

    async def late(endpoints: Endpoints) -> None:
        closing.set()
        await close.wait()
        await standby(endpoints)

    seen = Counter[str]()

    async def lead(message: Any) -> None:
        verb = message.subject.rpartition(".")[2]
        seen[verb] += 1
        if verb == "queue":
            await message.respond(b"{}")
        elif seen[verb] == 2:
            forwarded.set()

    connections = [await connect(server.url, name=name) for name in ("planner", "telemetry", "leader")]
    await until_laid_out(connections[0].jetstream())
    planner = Planner(*connections, Settings())
    await planner.start()
    try:
        async with asyncio.timeout(60):
            await planner.leading.wait()
            monkeypatch.setattr(Endpoints, "standby", late)
            for verb in ("queue", "renew"):
                await nc.subscribe(f"corral.v1.plan.{verb}", cb=lead)
            store = Store(nc)
            await store.open()
            assert await store.claim(b"{}", planner._election.term) is not None
            await closing.wait()
            body = json.dumps({"owner": "ann", "lease_id": "l"}).encode()
            await nc.publish("corral.v1.plan.renew", body, reply=nc.new_inbox())
            await forwarded.wait()
        for _ in range(20):
            await connections[0].flush()
            await nc.flush()
        assert seen == {"renew": 2, "queue": 1}
    finally:
        close.set()
        await planner.stop()
        for connection in connections:
            await connection.close()


async def test_nobody_loses_anything_to_a_leader_that_can_not_be_asked_yet(
    server: EmbeddedServer, nc: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A term whose endpoints are late: leases are not renewed meanwhile, and who waits can't ask again."""
    hosts = FakeHosts(nc, hosts=1, devices=1)
    await hosts.start()
    holds = {"owner": "ann", "request_id": "holds", "ttl_seconds": 2}
    waits = {"owner": "bob", "request_id": "waits", "wait_seconds": 600}
    inbox = nc.new_inbox()  # of one subject: its client is heard only when it asks again
    answers = await nc.subscribe(inbox)
    async with running(server.url, silence_seconds=2.0):
        await until_ready(nc, 1)
        lease = (await ask(nc, "request", holds))["lease"]
        await nc.publish("corral.v1.plan.request", json.dumps(waits).encode(), reply=inbox)
        while not (await persist(nc, "queue", {}))["entries"]:
            await persist(nc, "renew", {"owner": "ann", "lease_id": lease["lease_id"]})
    opens = Endpoints.open

    async def late(endpoints: Endpoints, *answering: Any) -> None:
        await asyncio.sleep(6.0)
        await opens(endpoints, *answering)

    monkeypatch.setattr(Endpoints, "open", late)
    async with running(server.url, silence_seconds=2.0):
        renewed = await persist(nc, "renew", {"owner": "ann", "lease_id": lease["lease_id"]})
        assert renewed["type"] == "lease", renewed
        assert [entry["request_id"] for entry in (await persist(nc, "queue", {}))["entries"]] == ["waits"]
    await answers.unsubscribe()
    await hosts.stop()
