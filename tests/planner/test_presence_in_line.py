"""Who waits in line must be there: those who are gone leave it, and are granted nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import nats
import pytest
from corral.bus import connect as bus
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.client import connect, waiting
from corral.planner.broker.waiting.places import Places
from corral.planner.broker.waiting.presence import Presence
from corral.planner.broker.waiting.probe import Probe, probe_subject
from corral.planner.broker.waiting.queue import QueuedRequest, WaitingQueue
from corral.planner.durable.store import Store
from corral.planner.fleet.fleet import Fleet
from corral.planner.placement.decide import Policies
from corral.planner.queue.durations import unknown
from corral.planner.queue.line import Line
from corral.planner.queue.order import fifo
from corral.schemas.operations import QueueFilter
from corral.schemas.requests import Rejection, RejectionCode, WorkRequest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client as Bus
from nats.aio.msg import Msg
from support.planner_rig import FakeHosts, ask, running, until_ready

WHY = Rejection(code=RejectionCode.NO_CAPACITY, message="full")
SILENCE = 1.5


async def until(check: Callable[[], Awaitable[Any]], seconds: float = 20.0) -> Any:
    """What a check returns, once that is true."""
    for _ in range(int(seconds / 0.05)):
        found = await check()
        if found:
            return found
        await asyncio.sleep(0.05)
    raise TimeoutError("it did not come true")


async def in_line(nc: Bus) -> list[str]:
    return [entry["request_id"] for entry in (await ask(nc, "queue"))["entries"]]


async def asking(nc: Bus, inbox: str, request_id: str | None, **fields: Any) -> None:
    """Ask as a client does whose answers come to one subject of its own."""
    body = {"owner": "ann", "wait_seconds": 60, "request_id": request_id, **fields}
    await nc.publish("corral.v1.plan.request", json.dumps(body).encode(), reply=inbox)


def queue_of(*owners: str) -> WaitingQueue:
    queue = WaitingQueue(Line(Fleet(), Policies(), fifo))
    for owner in owners:
        request = WorkRequest(owner=owner, request_id=f"of-{owner}", wait_seconds=100)
        queue.add(request, 0.0, unknown(), WHY, None, steady=0.0)
    return queue


@given(st.lists(st.tuples(st.floats(0.01, 50), st.sampled_from(["there", "away", "again"])), max_size=30))
def test_only_time_in_which_somebody_could_be_heard_is_silence(steps: list[tuple[float, str]]) -> None:
    """A pause counts as a moment; an outage and what was before it do not count at all."""
    presence, [entry] = Presence(30.0), queue_of("a")
    presence.tick(0.0, 0)
    presence.note_heard(entry)
    now = expected = 0.0
    connection = 0
    for seconds, how in steps:
        now += seconds
        connection += how == "again"
        presence.tick(now, None if how == "away" else connection)
        expected = expected + min(seconds, 2.5) if how == "there" else 0.0
        if how == "away":
            connection += 1
            presence.tick(now, connection)
        assert presence.silence(entry) == pytest.approx(expected)
        assert presence.timed_out(entry) == (expected >= 30.0)
    presence.note_heard(entry)
    assert presence.silence(entry) == 0
    assert presence.is_fresh(entry)


async def test_a_place_is_given_back_for_a_while_and_to_its_owner_alone(server: EmbeddedServer, nc: Bus) -> None:
    await ensure_layout(nc.jetstream())
    store = Store(nc)
    await store.open()
    term = await store.claim(b"", 0)
    assert term is not None
    queue, places = queue_of("a", "b"), Places(store, term, [], 0.0)
    first = next(iter(queue))

    async def leave(entry: QueuedRequest, now: float) -> None:
        queue.remove(entry)
        await places.keep(f"at-{now:g}", entry, entry.request.owner, now)

    async def back(owner: str, digest: str, now: float) -> int:
        request = WorkRequest(owner=owner, request_id="of-a", wait_seconds=100)
        entry = queue.add(request, now, unknown(), WHY, None, places.take(request, digest, now))
        place = queue.position(entry)
        await leave(entry, now) if place == 1 else queue.remove(entry)
        return place

    await leave(first, 10.0)
    assert [await back("a", "a", 20.0), await back("x", "a", 20.0), await back("a", "other", 20.0)] == [1, 2, 2]
    stored = await store.get("place.at-20")
    assert stored is not None
    places = Places(store, term, [(stored.key, stored.value)], 20.0)
    assert await back("a", "a", 99.0) == 1
    assert await back("a", "a", 101.0) == 2  # it has waited as long as it wanted to
    await store.close()


def test_a_long_line_is_listed_in_parts_and_narrowed() -> None:
    queue = queue_of(*(f"o{number}" for number in range(50)))
    whole = queue.listing(1.0).entries
    found, parts = [], 0
    while len(found) < 50:
        part = queue.listing(1.0, QueueFilter(offset=len(found)), max_bytes=3000)
        assert part.total == 50
        found += part.entries
        parts += 1
    assert found == whole
    assert parts >= 3
    assert queue.listing(1.0, QueueFilter(owner="o7")).entries == [whole[7]]
    assert queue.listing(1.0, QueueFilter(request_id="of-o9")).entries == [whole[9]]
    assert queue.listing(1.0, QueueFilter(request_id="of-o9", owner="o7")).entries == []
    assert queue.listing(1.0, QueueFilter(offset=2, limit=3)).entries == whole[2:5]


async def test_the_server_tells_who_is_connected(server: EmbeddedServer, nc: Bus) -> None:
    probe = Probe(nc)
    replies: dict[str, str] = {}

    async def note(message: Msg) -> None:
        replies[message.data.decode()] = message.reply

    await nc.subscribe("who", cb=note)
    clients = {name: await nats.connect(server.url) for name in ("stays", "goes")}
    waits = {
        name: asyncio.create_task(client.request("who", name.encode(), timeout=60)) for name, client in clients.items()
    }
    await until(lambda: asyncio.sleep(0, len(replies) == 2))
    assert await probe.present(list(replies.values())) == set(replies.values())
    await clients["goes"].close()
    await until(lambda: _present(probe, replies, {"stays"}))
    assert not waits["stays"].done()  # it took nothing for its answer
    exact = nc.new_inbox()
    await nc.subscribe(exact)
    assert await probe.present([exact, "_R_.abc.def"]) == set()
    assert [probe_subject("_INBOX.ann"), probe_subject("_R_.a.b")] == [None, None]
    listener = await bus.connect(server.url)  # of which the server has what came before a flush
    await listener.subscribe(">")  # one who hears all: nothing is known of anybody
    await listener.flush()
    assert await probe.present(list(replies.values())) == set()
    await listener.close()
    await until(lambda: _present(probe, replies, {"stays"}))
    await nc.publish(replies["stays"], b"the answer")
    assert (await waits["stays"]).data == b"the answer"
    await clients["stays"].close()
    waits["goes"].cancel()
    await asyncio.gather(*waits.values(), return_exceptions=True)
    await probe.close()


async def _present(probe: Probe, replies: dict[str, str], names: set[str]) -> bool:
    return await probe.present(list(replies.values())) == {replies[name] for name in names}


async def test_who_is_gone_leaves_the_line_and_is_granted_nothing(server: EmbeddedServer, nc: Bus) -> None:
    """A connected one stays however long it says nothing; one that comes back has its place, from any planner."""
    hosts = FakeHosts(nc, hosts=1, devices=1)
    await hosts.start()
    gone = await nats.connect(server.url)
    async with AsyncExitStack() as planner:
        await planner.enter_async_context(running(server.url, silence_seconds=SILENCE))
        await until_ready(nc, 1)
        held = (await ask(nc, "request", {"owner": "bob"}))["lease"]["lease_id"]
        dies = asyncio.create_task(ask(gone, "request", {"owner": "x", "request_id": "dies", "wait_seconds": 60}, 60))
        await until(lambda: in_line(nc))
        inbox = nc.new_inbox()
        answers = await nc.subscribe(inbox)
        await asking(nc, inbox, "silent")
        await asking(nc, inbox, None)  # it can't come back
        waits = asyncio.create_task(ask(nc, "request", {"owner": "y", "request_id": "stays", "wait_seconds": 60}, 60))
        await until(lambda: asyncio.sleep(0.05, True))
        await gone.close()
        dies.cancel()
        await asyncio.gather(dies, return_exceptions=True)
        told = [json.loads((await answers.next_msg(timeout=20)).data) for _ in range(2)]
        for error in told:
            assert (error["type"], error["code"]) == ("error", "unavailable")
            assert "ask again with the same request_id" in error["message"].lower()

        async def only_one() -> bool:
            return await in_line(nc) == ["stays"]

        await until(only_one)
        await planner.aclose()
        await planner.enter_async_context(running(server.url, silence_seconds=SILENCE))
        await until_ready(nc, 0)
        await asking(nc, inbox, "silent")
        await until(lambda: _is(in_line(nc), ["silent", "stays"]))
        entries = (await ask(nc, "queue"))["entries"]
        assert entries[0]["heard_seconds"] < SILENCE
        assert entries[0]["waiting_seconds"] > SILENCE * 0.8
        for _ in range(6):  # it stays as long as it asks again
            await asyncio.sleep(SILENCE / 5)
            await asking(nc, inbox, "silent")
        assert await in_line(nc) == ["silent", "stays"]
        # Silent for too long to be granted, and still in line: it is asked first, and is granted once it answers.
        await until(lambda: _silent(nc, SILENCE * 0.55))
        await ask(nc, "release", {"owner": "bob", "lease_id": held})
        error = json.loads((await answers.next_msg(timeout=20)).data)
        assert error["code"] == "unavailable"
        await asking(nc, inbox, "silent")
        answer = json.loads((await answers.next_msg(timeout=20)).data)
        assert answer["lease"]["request_id"] == "silent"
        await ask(nc, "release", {"owner": "ann", "lease_id": answer["lease"]["lease_id"]})
        assert (await waits)["lease"]["request_id"] == "stays"
        leases = (await ask(nc, "leases", {"states": ["active", "released"]}))["leases"]
        assert {lease["request_id"] for lease in leases} >= {"silent", "stays"}
        assert "dies" not in {lease["request_id"] for lease in leases}
    await hosts.stop()


async def _is(found: Awaitable[Any], wanted: Any) -> bool:
    return await found == wanted


async def _silent(nc: Bus, seconds: float) -> bool:
    entries = (await ask(nc, "queue"))["entries"]
    return bool(entries) and entries[0]["request_id"] == "silent" and entries[0]["heard_seconds"] > seconds


async def test_nothing_is_granted_to_a_request_without_a_reply_subject(server: EmbeddedServer, nc: Bus) -> None:
    hosts = FakeHosts(nc, hosts=1, devices=1)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 1)
        for subject in ("corral.v1.plan.request", "corral.v1.plan.request.ann"):
            await nc.publish(subject, json.dumps({"owner": "ann", "wait_seconds": 60}).encode())
        assert (await ask(nc, "leases"))["leases"] == []
        assert await in_line(nc) == []
        health = json.loads((await nc.request("corral.v1.health.planner", timeout=5)).data)
        counted = {"name": "requests", "value": 2.0, "labels": {"outcome": "without_reply"}}
        assert counted in health["measures"]
        lease = (await ask(nc, "request", {"owner": "ann"}))["lease"]["lease_id"]
        await nc.publish("corral.v1.plan.release", json.dumps({"owner": "ann", "lease_id": lease}).encode())

        async def released() -> bool:
            return (await ask(nc, "leases"))["leases"] == []

        await until(released)  # that needs no answer
    await hosts.stop()


@pytest.mark.parametrize("again_seconds", [SILENCE / 5, 1000.0])
async def test_corrals_client_keeps_its_place(
    server: EmbeddedServer, nc: Bus, monkeypatch: pytest.MonkeyPatch, again_seconds: float
) -> None:
    """Also one of an earlier version, which asks again where it is told so."""
    monkeypatch.setattr(waiting, "RESEND_SECONDS", again_seconds)
    monkeypatch.setattr(waiting, "_ABSENCE_SECONDS", SILENCE / 5)  # as much shorter as the silence is
    hosts = FakeHosts(nc, hosts=1, devices=1)
    await hosts.start()
    async with running(server.url, silence_seconds=SILENCE), connect(server.url, owner="ann") as ann:
        await until_ready(nc, 1)
        held = (await ask(nc, "request", {"owner": "bob"}))["lease"]["lease_id"]
        places: list[int] = []
        task = asyncio.create_task(
            ann.request(request_id="mine", wait="60s", on_wait=lambda entry: places.append(entry.position))
        )
        await until(lambda: in_line(nc))
        other = asyncio.create_task(ask(nc, "request", {"owner": "c", "request_id": "c", "wait_seconds": 60}, 60))
        await asyncio.sleep(SILENCE * 2.2)
        assert await in_line(nc) == ["mine", "c"]
        await ask(nc, "release", {"owner": "bob", "lease_id": held})
        lease = (await task).lease
        assert (lease.request_id, set(places)) == ("mine", {1})
        await ask(nc, "release", {"owner": "ann", "lease_id": lease.lease_id})
        assert (await other)["lease"]["request_id"] == "c"
    await hosts.stop()
