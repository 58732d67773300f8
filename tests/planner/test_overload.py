"""More messages than a planner can answer: what goes first, who is refused, and that all are served in the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from corral.bus.connect import connect
from corral.bus.layout import until_laid_out
from corral.cli.local.server import EmbeddedServer
from corral.planner.api import turns
from corral.planner.api.turns import IN_ORDER, Rank, Turns
from corral.planner.broker import retry_times
from corral.planner.durable import reachable
from corral.planner.durable.election import LeaderElection
from corral.planner.durable.reachable import Reachable
from corral.planner.durable.store import Store
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from support.planner_rig import FakeHosts, ask, running, until_ready

MESSAGES = st.lists(st.sampled_from(list(Rank)), max_size=40)


@given(MESSAGES, st.integers(0, 4))
def test_messages_are_handled_in_order_but_those_about_leases_pass_a_crowd(ranks: list[Rank], crowds: int) -> None:
    async def handled() -> list[tuple[int, Rank]]:
        done: list[tuple[int, Rank]] = []
        waiting = Turns(lambda work: asyncio.ensure_future(work))

        async def handle(number: int, rank: Rank) -> None:
            done.append((number, rank))

        for number, rank in enumerate([Rank.REQUESTS] * (crowds * IN_ORDER // 2) + ranks):
            assert waiting.add(rank, "someone", lambda number=number, rank=rank: handle(number, rank))
        while len(waiting):  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        return done

    done = asyncio.run(handled())
    count = crowds * IN_ORDER // 2 + len(ranks)
    assert sorted(number for number, _ in done) == list(range(count))
    for rank in Rank:  # of one rank the first that came is first
        own = [number for number, found in done if found is rank]
        assert own == sorted(own)
    others = [number for number, rank in done if rank is not Rank.LEASES]
    assert others == sorted(others)
    leases = sum(rank is Rank.LEASES for rank in ranks)
    if len(others) <= IN_ORDER:
        assert [number for number, _ in done] == list(range(count))
    elif len(others) > IN_ORDER + 20:
        assert sum(rank is Rank.LEASES for _, rank in done[: 2 * leases]) == leases


def test_a_crowd_is_refused_before_those_who_have_few_waiting() -> None:
    async def admitted() -> dict[str, int]:
        waiting = Turns(lambda work: None, most=100)

        async def handle() -> None:
            """Nothing to do."""

        found = {
            sender: sum(waiting.add(Rank.REQUESTS, sender, handle) for _ in range(count))
            for sender, count in (("crowd", 500), ("ann", 5), ("bob", 60))
        }
        assert all(waiting.add(Rank.LEASES, "crowd", handle) for _ in range(500))
        waiting.clear()
        assert waiting.add(Rank.REQUESTS, "crowd", handle)
        waiting.clear()
        await asyncio.sleep(0)
        return found

    found = asyncio.run(admitted())
    assert found["ann"] == 5
    assert 100 <= found["crowd"] <= 101
    assert found["bob"] < 60


async def test_in_a_flood_leases_are_renewed_and_everybody_is_served_in_the_end(
    server: EmbeddedServer, nc: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds ask for few devices, again when they were told to, and give back: no device is granted twice."""
    monkeypatch.setattr(turns, "MOST_WAITING", 40)
    monkeypatch.setattr(turns, "IN_ORDER", 8)
    monkeypatch.setattr(retry_times, "LEAST_SECONDS", 0.05)
    hosts = FakeHosts(nc, hosts=2)
    await hosts.start()
    async with running(server.url), asyncio.timeout(120):
        await until_ready(nc, 8)
        held = (await ask(nc, "request", {"owner": "holder", "ttl_seconds": 600}))["lease"]["lease_id"]
        count, inbox = 400, nc.new_inbox()
        left, refused, renewed = set(range(count)), 0, 0
        using: dict[str, str] = {}
        done = asyncio.Event()

        async def send(number: int) -> None:
            body = {"owner": f"o{number % 5}", "request_id": f"r{number}", "wait_seconds": 600, "ttl_seconds": 600}
            await nc.publish("corral.v1.plan.request", json.dumps(body).encode(), reply=f"{inbox}.{number}")

        async def answered(message: Msg) -> None:
            nonlocal refused
            if not message.data:
                return
            number, answer = int(message.subject.rpartition(".")[2]), json.loads(message.data)
            if answer["type"] == "error":
                assert answer["code"] == "too_many_requests", answer
                assert answer["retry_after_seconds"] > 0
                refused += 1
                asyncio.get_running_loop().call_later(
                    answer["retry_after_seconds"], lambda: asyncio.ensure_future(send(number))
                )
                return
            lease: dict[str, Any] = answer["lease"]
            (device,) = (grant["device"] for grant in lease["grants"])
            assert using.setdefault(device, lease["lease_id"]) == lease["lease_id"]
            if number not in left:
                return
            left.discard(number)
            del using[device]
            body = {"owner": lease["owner"], "lease_id": lease["lease_id"]}
            await nc.publish("corral.v1.plan.release", json.dumps(body).encode())
            if not left:
                done.set()

        await nc.subscribe(f"{inbox}.*", cb=answered)
        for number in range(count):
            await send(number)
        while not done.is_set():
            assert (await ask(nc, "renew", {"owner": "holder", "lease_id": held}, timeout=20))["type"] == "lease"
            renewed += 1
            await asyncio.sleep(0.05)
        assert refused
        assert renewed
        assert (await ask(nc, "fleet"))["planner"]
        leases = (await ask(nc, "leases", {"owner": "holder"}))["leases"]
        assert [lease["lease_id"] for lease in leases] == [held]
    await hosts.stop()


async def test_a_leader_that_requests_do_not_reach_leads_no_more(
    server: EmbeddedServer, nc: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reachable, "SILENT_SECONDS", 0.3)
    await until_laid_out(nc.jetstream())
    own = await connect(server.url)
    store, watch = Store(nc), Reachable(own)
    await store.open()
    await watch.open()

    @contextlib.asynccontextmanager
    async def term(_: int) -> AsyncGenerator[None]:
        yield

    election = LeaderElection(store, "first", term, watch.check)
    running_election = asyncio.create_task(election.run())
    try:
        async with asyncio.timeout(60):
            while not election.holds_leadership:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            subscription: Any = watch._subscription
            await subscription.unsubscribe()  # nothing comes back over it
            while election.holds_leadership:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert election.term  # another may take it, and this one has it again if its requests are back before
            await watch.open()
            while not election.holds_leadership:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        running_election.cancel()
        await asyncio.gather(running_election, return_exceptions=True)
        await store.close()
        await watch.close()
        await own.close()
