"""Events of leases are small and few: no owner pushes the others' off the stream that keeps 30 days of them."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from corral.cli.local.server import EmbeddedServer
from corral.planner.leases import lifecycle
from corral.planner.leases.event_rate import MIN_INTERVAL_SECONDS, PASSING, EventBudget, Pace, slim
from corral.schemas import codec
from corral.schemas.requests import Grant, Lease, LeaseEventKind, LeaseState, UnassignedItem, WorkRequest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from nats.aio.client import Client
from support.planner_rig import FakeHosts, ask, lease_events, running, until_ready

START = datetime(2026, 1, 1, tzinfo=UTC)
LOOK_SECONDS = 0.5


def lease(ttl_seconds: float = 300.0, grants: int = 1, items: int = 0, labels: int = 0) -> Lease:
    made = [
        Grant(
            host=f"h{n}", device=f"GPU-{n}", score=1.0, score_parts={"fit": 1.0}, items=[f"i{k}" for k in range(items)]
        )
        for n in range(grants)
    ]
    return lifecycle.grant(
        WorkRequest(owner="ann", ttl_seconds=ttl_seconds, labels={f"k{n}": "v" * 200 for n in range(labels)}),
        made,
        lease_id="l",
        now=START,
        digest="",
        planner="p",
        environment={f"h{n}": {"CUDA_VISIBLE_DEVICES": f"GPU-{n}"} for n in range(grants)},
        unassigned=[UnassignedItem(id=f"u{n}", reason="no room " * 10) for n in range(items)],
    ).lease


@settings(max_examples=40)
@given(st.integers(0, 3000), st.integers(1, 300), st.integers(0, 60), st.sampled_from(LeaseEventKind))
def test_an_event_says_who_holds_what_and_is_small(items: int, grants: int, labels: int, kind: LeaseEventKind) -> None:
    whole = lease(grants=grants, items=items if grants < 9 else 0, labels=labels)
    told = slim(whole, kind)
    size = len(codec.encode(told, codec.JSON))
    assert (told.lease_id, told.owner, told.expires_at, told.state) == ("l", "ann", whole.expires_at, LeaseState.ACTIVE)
    assert not told.unassigned
    assert not any(grant.items for grant in told.grants)
    if kind in PASSING and kind is not LeaseEventKind.RESIZED:
        assert size < 8192
        assert not told.grants or len(told.grants) == grants
    else:
        assert [grant.device for grant in told.grants] == [grant.device for grant in whole.grants]
        assert size < 2048 + 700 * grants + (16 * 1024 if kind is LeaseEventKind.GRANTED else 0)
    if kind is LeaseEventKind.GRANTED:
        assert told.labels == whole.labels
        assert told.environment == whole.environment


@settings(max_examples=40)
@given(
    st.floats(1, 4000),
    st.lists(st.floats(0.001, 0.6), min_size=1, max_size=120),
    st.floats(0.01, 1.0),
    st.booleans(),
)
def test_no_lease_is_past_the_end_that_was_told_while_it_is_renewed(
    ttl: float, pauses: list[float], pace: float, over_share: bool
) -> None:
    """By a model of the announcer: it tells a renewal, or looks at it again twice a second."""
    clock, held = Pace(), lease(ttl)
    now, looked, told = 0.0, 0.0, held
    clock.note_published(held, LeaseEventKind.GRANTED, START, now)
    withheld: Lease | None = None
    count = renewals = 0

    def tell(renewed: Lease, at: datetime) -> None:
        nonlocal told, count, withheld
        clock.note_published(renewed, LeaseEventKind.RENEWED, at, now)
        told, withheld, count = renewed, None, count + 1

    for pause in pauses:
        until = now + pause * ttl * pace
        while looked + LOOK_SECONDS < until:
            now = looked = looked + LOOK_SECONDS
            at = START + timedelta(seconds=now)
            if withheld is not None and not clock.may_withhold("l", over_share, at, now):
                tell(withheld, at)
            assert told.expires_at >= min(at, held.expires_at)
        now = until
        at = START + timedelta(seconds=now)
        held = replace(held, expires_at=at + timedelta(seconds=ttl))
        renewals += 1
        if clock.may_withhold("l", over_share, at, now):
            withheld = held
        else:
            tell(held, at)
    shortest = min(MIN_INTERVAL_SECONDS, 0.29 * ttl) if not over_share else 0.29 * min(ttl, 1.0)
    assert count <= min(renewals, now / shortest + 2)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 50_000), st.sampled_from("ab"), st.integers(1, 40_000)), max_size=80))
def test_an_owner_who_takes_a_quarter_of_the_stream_waits_and_others_do_not(
    steps: list[tuple[float, str, int]],
) -> None:
    budget, now = EventBudget(1_000_000), 0.0
    taken = {"a": 0.0, "b": 0.0}
    for pause, owner, size in steps:
        now += pause
        for name in taken:
            taken[name] = max(0.0, taken[name] - pause * 250_000 / 86_400)
        taken[owner] += size
        budget.spend(owner, size, now)
        for name, left in taken.items():
            after = budget.wait_seconds(name, now)
            assert (after > 0) == (left > 250_000 + 1e-3) or abs(left - 250_000) < 1
            assert budget.wait_seconds(name, now + after + 1.0) == 0
            assert budget.over_share(name, now) == (left > 31_250) or abs(left - 31_250) < 1
        assert budget.wait_seconds("c", now) == 0


async def test_a_fat_lease_that_is_renewed_all_the_time_is_told_seldom_and_rightly(
    server: EmbeddedServer, nc: Client
) -> None:
    async with running(server.url):
        hosts = FakeHosts(nc)
        await hosts.start()
        await until_ready(nc, 8)
        body = {"owner": "ann", "gpus": 2, "distribution": {"items": 5_000}, "labels": {"team": "x"}}
        held = (await ask(nc, "request", body, timeout=30))["lease"]
        action = {"owner": "ann", "lease_id": held["lease_id"], "ttl_seconds": 600}
        last: dict[str, Any] = {}
        began = time.monotonic()
        for _ in range(40):
            last = await ask(nc, "renew", action)
        assert last["type"] == "lease"

        async def until(kind: str, key: str, value: str) -> list[dict[str, Any]]:
            while True:
                events = [event for _, event in await lease_events(nc)]
                if events[-1]["kind"] == kind and events[-1]["lease"][key] == value:
                    return events
                await asyncio.sleep(0.1)

        told = await until("renewed", "expires_at", last["expires_at"])
        assert len(told) <= time.monotonic() - began + 3
        assert (await ask(nc, "release", action))["state"] == "released"
        events = await until("released", "state", "released")
        assert all(len(json.dumps(event)) < 4096 for event in events)
        assert events[0]["lease"]["labels"] == {"team": "x"}
        assert {event["lease"]["grants"][0]["device"] for event in events} == {held["grants"][0]["device"]}
        assert events[-1]["lease"]["expires_at"] == last["expires_at"]
        await hosts.stop()
