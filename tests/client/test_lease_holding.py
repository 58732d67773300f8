"""The end of a held lease: only the planner's answer or the time to live ends it, never a forged event."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from corral.cli.local.server import EmbeddedServer
from corral.client import HeldLease, LeaseLost, connect
from corral.planner.limits import Limits
from corral.schemas import codec, subjects
from corral.schemas.requests import Error, Lease, LeaseEvent, LeaseEventKind, LeaseState
from msgspec.structs import replace
from nats.aio.client import Client as Bus
from nats.aio.msg import Msg
from support.local_cluster import LocalCluster
from support.published_fleet import devices, planner, until_ready

FACTS = f"$JS.API.DIRECT.GET.{subjects.FACTS_STREAM}"


async def tell_released(nc: Bus, lease: Lease) -> None:
    """As the planner would tell of the lease's end, by whoever can have a message delivered there."""
    ended = replace(lease, state=LeaseState.RELEASED, ended_at=datetime.now(UTC))
    event = LeaseEvent(kind=LeaseEventKind.RELEASED, time=datetime.now(UTC), lease=ended)
    await nc.publish(subjects.lease_subject("released", lease.lease_id), codec.encode(event, codec.JSON))
    await nc.flush()


async def ends_within(held: HeldLease, seconds: float) -> LeaseLost | None:
    """Why it has ended; None if it still holds after so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while held.lost is None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    return held.lost


async def test_nobody_ends_anothers_lease_by_having_a_stored_event_delivered(cluster: LocalCluster) -> None:
    async with connect(cluster.url, owner="bob") as bob, connect(cluster.url, owner="vera") as vera:
        past = await vera.request(gpus=1)
        events = vera.lease_events(lease_id=past.lease.lease_id, kind="released")
        heard = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.1)
        await vera.release(past.lease.lease_id)
        await heard
        async with bob.lease(gpus=1, ttl=60, on_lost=lambda _: None) as held:
            stored = f"{FACTS}.{subjects.lease_subject('released', past.lease.lease_id)}"
            seen = bob.lease_events(lease_id=held.lease_id)
            told = asyncio.ensure_future(anext(seen))
            await asyncio.sleep(0.1)
            await vera.nc.publish(stored, b"", reply=subjects.lease_subject("released", held.lease_id))
            await tell_released(vera.nc, held.lease)
            assert (await told).lease.lease_id == held.lease_id, "an event of another lease is none of this one"
            assert await ends_within(held, 1.5) is None
            # A true end is believed at once, since the planner says so too.
            await vera.evict(held.lease_id, reason="maintenance")
            assert "maintenance" in str(await ends_within(held, 5))


async def test_a_false_end_is_not_believed_while_the_planner_is_away(
    server: EmbeddedServer, nc: Bus, tmp_path: Path
) -> None:
    async with connect(server.url, owner="bob", patience=0.1, timeout=0.5) as bob, devices(server.url, tmp_path):
        async with planner(server.url):
            bob.patience = 10
            await until_ready(bob)
            bob.patience = 0.1
            strict = await bob.lease(gpus=1, ttl=2, on_lost=lambda _: None, on_outage="stop").__aenter__()
            held = await bob.lease(gpus=1, ttl=2, on_lost=lambda _: None).__aenter__()
        await tell_released(nc, held.lease)
        assert await ends_within(held, 0.8) is None
        assert "could not be renewed" in str(await ends_within(strict, 5))
        async with asyncio.timeout(10):
            while not held.overdue:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await ends_within(held, 0.5) is None, "its time alone ends nothing"
        await strict.release()
        await held.release()


async def test_a_renewal_that_is_refused_for_now_is_tried_again(server: EmbeddedServer, tmp_path: Path) -> None:
    limits = Limits(requests_per_second=0.5, burst=3.0)
    async with (
        devices(server.url, tmp_path),
        planner(server.url, limits),
        connect(server.url, owner="bob", patience=10) as bob,
    ):
        await until_ready(bob)
        async with bob.lease(gpus=1, ttl=4.5, on_lost=lambda _: None) as held:
            flood = asyncio.create_task(_flood(bob.nc, seconds=1.8))  # the first renewal is due after 1.5 s
            assert await ends_within(held, 5) is None
            await flood


async def _flood(nc: Bus, seconds: float) -> None:
    """Take all that the owner may ask about leases."""
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        await nc.publish(subjects.PlanSubject.RENEW, b'{"lease_id": "none", "owner": "bob"}', reply="nowhere")
        await asyncio.sleep(0.02)


async def test_only_the_end_itself_is_an_answer_that_ends_a_lease(server: EmbeddedServer, nc: Bus) -> None:
    now = datetime.now(UTC)
    lease = Lease(
        lease_id="one",
        owner="bob",
        state=LeaseState.ACTIVE,
        granted_at=now,
        expires_at=now + timedelta(seconds=1),
        ttl_seconds=1.0,
        grants=[],
    )
    answers = iter([Error(code="internal", message="The planner failed"), lease])

    async def answer(message: Msg) -> None:
        """As a planner that fails once, then renews, then says that the lease has ended."""
        reply = next(answers, Error(code="ended", message="Lease one was evicted"))
        await message.respond(codec.encode(reply, codec.JSON))

    await nc.subscribe(subjects.PlanSubject.RENEW, cb=answer)
    async with connect(server.url, owner="bob") as bob:
        held = HeldLease(bob, lease, lambda _: None)
        held.start()
        assert await ends_within(held, 0.6) is None
        assert "was evicted" in str(await ends_within(held, 2))
        await held.release()
