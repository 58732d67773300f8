"""Elastic leases: they grow into idle devices and give them back, each time with the consent of the holder."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.leases import lifecycle, resizing
from corral.planner.leases.lifecycle import LeaseRecord, Refused
from corral.planner.leases.resizing import Claimant, devices_of
from corral.schemas import codec
from corral.schemas.requests import Grant, LeaseState, ResizeAction, WorkRequest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client as Bus
from support.lease_examples import START
from support.planner_rig import FakeHosts, PlannerProcess, ask, lease_events, persist, queued, running, until_ready

SHARED = ("granted", "resize_offered", "resize_requested", "resized")


FEWEST, MOST = 2, 5
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "ask", "accept", "name", "decline", "withdraw", "renew", "notify", "store"]),
        st.floats(0.1, 40.0),
        st.sets(st.integers(0, 7), max_size=4),
    ),
    max_size=20,
)


def grants_of(numbers: set[int]) -> list[Grant]:
    return [Grant(host="h", device=f"d{number}", cpus=1.0) for number in sorted(numbers)]


def elastic() -> LeaseRecord:
    request = WorkRequest(owner="me", gpus=FEWEST, gpus_max=MOST, preemptible=True, grace_seconds=20, ttl_seconds=1e6)
    return lifecycle.grant(
        request,
        grants_of({0, 1}),
        lease_id="l1",
        now=START,
        digest="",
        planner="p",
        environment={},
        service_seconds=0.0,
    )


def answered(record: LeaseRecord, action: ResizeAction, now: datetime) -> LeaseRecord:
    """The record after an answer of its holder, as the planner carries it out."""
    about = resizing.answered(record, action, now)
    if about is None:
        return record
    if not about and record.lease.resize is not None:
        return resizing.withdraw(record, record.lease.resize.number, now, "p")
    named = {grant.device for grant in about}
    had = record.lease.grants
    kept = [grant for grant in had if grant.device not in named]
    return resizing.resized(record, kept if len(kept) < len(had) else [*had, *about], {}, {}, now, "p")


@given(STEPS)
def test_only_an_answer_changes_the_devices_and_their_seconds_are_exact(
    steps: list[tuple[str, float, set[int]]],
) -> None:
    record, now, seconds = elastic(), START, 0.0
    for name, pause, numbers in steps:
        if record.lease.state is not LeaseState.ACTIVE:
            break
        now += timedelta(seconds=pause)
        seconds += pause * len(record.lease.grants)
        before, resize = record, record.lease.resize
        try:
            if name == "offer":
                new = {number for number in numbers if f"d{number}" not in devices_of(record.lease)}
                record = resizing.offer(record, grants_of(new), now, "p")
            elif name == "ask":
                uuids = {f"d{number}" for number in numbers}
                record = resizing.ask_back(record, uuids, Claimant("r", "you"), now, "p")
            elif name in ("accept", "name", "decline"):
                named = [f"d{number}" for number in numbers] if name == "name" else []
                number = None if resize is None else resize.number
                action = ResizeAction(lease_id="l1", owner="me", accept=name != "decline", number=number, devices=named)
                record = answered(record, action, now)
                if resize is not None:
                    assert now <= resize.ends_at
                    assert record.lease.resize is None
                if name != "decline" and number is not None:
                    assert answered(record, action, now) is record  # repeated
            elif name == "withdraw" and resize is not None:
                assert resizing.withdraw(record, resize.number + 1, now, "p") is record
                record = resizing.withdraw(record, resize.number, now, "p")
            elif name == "renew":
                record = lifecycle.renew(record, None, now, "p")
            elif name == "notify":
                notice = lifecycle.Preemption(notified_at=now, ends_at=now)
                record = lifecycle.withdraw_notice(lifecycle.notify(record, notice, now, "p"), None, now, "p")
            else:
                record = codec.decode(codec.encode(record, codec.JSON), LeaseRecord, codec.JSON)
        except Refused:
            assert record is before
        assert FEWEST <= len(record.lease.grants) <= MOST
        assert len(set(devices_of(record.lease))) == len(record.lease.grants)
        if name not in ("accept", "name"):
            assert devices_of(record.lease) == devices_of(before.lease)
        if record.event_kind.value == "resized" and record is not before and name in ("accept", "name"):
            event = record.event()
            had, has = set(devices_of(before.lease)), set(devices_of(event.lease))
            assert {grant.device for grant in event.returned} == had - has
            assert {grant.device for grant in event.lease.grants if grant.since == now} >= has - had
    since = START.timestamp()
    shapes = [*resizing.shapes(record, since), (now.timestamp(), [])]
    found = sum((until - at) * len(held) for (at, held), (until, _) in pairwise(shapes))
    assert math.isclose(found, seconds, abs_tol=1e-3)


def test_an_offer_that_is_over_is_not_accepted() -> None:
    record = resizing.offer(elastic(), grants_of({2}), START, "p")
    late = START + timedelta(seconds=resizing.OFFER_SECONDS + 0.1)
    with pytest.raises(Refused, match="was over at"):
        resizing.answered(record, ResizeAction(lease_id="l1", owner="me"), late)


def test_a_lease_that_is_being_preempted_gives_back_all_or_nothing() -> None:
    grown = resizing.resized(elastic(), grants_of({0, 1, 2}), {}, {}, START, "p")
    record = lifecycle.notify(grown, lifecycle.Preemption(notified_at=START, ends_at=START), START, "p")
    with pytest.raises(Refused, match="is being preempted: release it"):
        resizing.answered(record, ResizeAction(lease_id="l1", owner="me", devices=["d2"]), START)


@pytest.fixture
async def hosts(nc: Bus) -> AsyncIterator[FakeHosts]:
    made = FakeHosts(nc, hosts=1, devices=8)
    await made.start()
    yield made
    await made.stop()


async def until_noticed(nc: Bus, lease_id: str, kind: str = "") -> dict[str, Any]:
    """The lease once it has a notice of a kind; without a kind, once it has none."""
    for _ in range(600):
        lease = (await persist(nc, "leases", {"lease_id": lease_id}))["leases"][0]
        if (lease["resize"] or {"kind": ""})["kind"] == kind:
            return lease
        await asyncio.sleep(0.05)
    raise TimeoutError(f"lease {lease_id} never had the notice {kind!r}")


def devices(lease: dict[str, Any]) -> set[str]:
    return {grant["device"] for grant in lease["grants"]}


async def answer(nc: Bus, lease: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return await ask(nc, "resize", {"lease_id": lease["lease_id"], "owner": lease["owner"], **fields})


async def test_a_lease_grows_and_gives_back_by_consent_alone(server: EmbeddedServer, nc: Bus, hosts: FakeHosts) -> None:
    async with running(server.url):
        await until_ready(nc, 8)
        other = await ask(nc, "request", {"owner": "bob", "gpus": 4, "ttl_seconds": 600})
        body = {"owner": "ann", "gpus": {"min": 2, "max": 6}, "cpus": 4, "ttl_seconds": 600, "grace_seconds": 60}
        lease = (await ask(nc, "request", body))["lease"]
        assert (len(lease["grants"]), lease["elastic"]) == (4, {"min": 2, "max": 6})
        assert sum(grant["cpus"] for grant in lease["grants"]) == 8  # two for each device, as for the fewest
        assert (await answer(nc, lease))["code"] == "refused"  # there is no notice

        await ask(nc, "release", {"lease_id": other["lease"]["lease_id"], "owner": "bob"})
        offered = await until_noticed(nc, lease["lease_id"], "offer")
        assert devices(offered) == devices(lease)  # nothing has changed by an offer
        new = {grant["device"] for grant in offered["resize"]["grants"]}
        assert len(new) == 2
        assert not new & devices(lease)
        assert (await answer(nc, lease, number=1))["code"] == "conflict"
        number = offered["resize"]["number"]
        grown = await answer(nc, lease, number=number)
        assert devices(grown) == devices(lease) | new
        assert grown["environment"]["node0"]["CUDA_VISIBLE_DEVICES"].count(",") == 5
        assert devices(await answer(nc, lease, number=number)) == devices(grown)  # a repeated answer
        assert sum(grant["cpus"] for grant in grown["grants"]) == 12

        waiting = asyncio.create_task(ask(nc, "request", {"owner": "bob", "gpus": 5, "wait_seconds": 60}, 60))
        asked = await until_noticed(nc, lease["lease_id"], "request")
        assert asked["resize"]["claimant_owner"] == "bob"
        back = {grant["device"] for grant in asked["resize"]["grants"]}
        assert len(back) == 3
        assert new < back  # those that came last go first
        assert devices(asked) == devices(grown)
        assert not waiting.done()
        moves = await ask(nc, "moves")
        assert moves["message"].endswith("; elastic leases have been asked to give 3 devices back for it")
        assert (await answer(nc, lease, devices=sorted(new)))["code"] == "invalid"  # three are asked for
        chosen = sorted(devices(lease))[:3]
        left = await answer(nc, lease, devices=chosen)
        assert devices(left) == devices(grown) - set(chosen)
        got = (await waiting)["lease"]
        assert set(chosen) < devices(got)
        assert (await answer(nc, lease, devices=sorted(devices(left))[:2]))["code"] == "invalid"  # two are its fewest
        one = sorted(devices(left))[0]
        assert len((await answer(nc, lease, devices=[one]))["grants"]) == 2  # unasked: it wants no more for now
    events = [(subject.split(".")[3], event) for subject, event in await lease_events(nc)]
    of_ann = [(kind, event) for kind, event in events if event["lease"]["owner"] == "ann" and kind in SHARED]
    assert [kind for kind, _ in of_ann if kind != "resize_offered"] == [
        *("granted", "resized", "resize_requested", "resized", "resized"),
    ]
    returned = [{grant["device"] for grant in event["returned"]} for kind, event in of_ann if kind == "resized"]
    assert returned == [set(), set(chosen), {one}]


async def test_notices_outlive_the_planner_and_who_does_not_agree_keeps_what_it_has(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts, tmp_path: Path
) -> None:
    others = FakeHosts(nc, hosts=1, devices=4, prefix="old", model="NVIDIA A100")
    await others.start()
    planner = PlannerProcess(server.url, tmp_path / "planner.log")
    planner.start()
    await until_ready(nc, 12)
    body = {"owner": "ann", "gpus": 2, "gpus_max": 4, "ttl_seconds": 600, "grace_seconds": 1}
    blocker = await ask(nc, "request", {"owner": "bob", "gpus": 6, "models": ["*H100*"], "ttl_seconds": 600})
    growing = (await ask(nc, "request", {**body, "models": ["*H100*"]}))["lease"]
    asked = (await ask(nc, "request", {**body, "models": ["*A100*"]}))["lease"]
    await ask(nc, "release", {"lease_id": blocker["lease"]["lease_id"], "owner": "bob"})
    offered = await until_noticed(nc, growing["lease_id"], "offer")
    waiting = {"owner": "bob", "gpus": 2, "models": ["*A100*"], "wait_seconds": 60, "request_id": "old"}
    answer_to_bob = asyncio.create_task(persist(nc, "request", waiting))
    before = await until_noticed(nc, asked["lease_id"], "request")
    planner.kill()
    planner.start()
    await until_ready(nc, 12)
    named = {"lease_id": growing["lease_id"], "owner": "ann", "number": offered["resize"]["number"]}
    assert len((await persist(nc, "resize", named))["grants"]) == 4
    kept = await until_noticed(nc, asked["lease_id"])  # the grace is over: nothing has changed
    assert devices(kept) == devices(before) == devices(asked)
    late = await answer(nc, asked, number=before["resize"]["number"])
    assert (late["code"], late["field"]) == ("conflict", "$.number")
    answer_to_bob.cancel()
    planner.stop()
    await others.stop()


async def test_a_declined_offer_is_not_repeated_and_one_that_others_want_is_withdrawn(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    async def taken(count: int) -> dict[str, str]:
        lease = (await ask(nc, "request", {"owner": "bob", "gpus": count, "ttl_seconds": 600}))["lease"]
        return {"lease_id": lease["lease_id"], "owner": "bob"}

    async with running(server.url):
        await until_ready(nc, 8)
        body = {"owner": "ann", "gpus": {"min": 1, "max": 2}, "ttl_seconds": 600}
        blockers = [await taken(count) for count in (5, 1, 1)]
        first = (await ask(nc, "request", body))["lease"]
        asking = asyncio.create_task(ask(nc, "request", {**body, "wait_seconds": 60}, 60))
        await queued(nc, 1)
        await ask(nc, "release", blockers[1])  # who waits gets it: no lease grows
        second = (await asking)["lease"]
        assert (len(first["grants"]), len(second["grants"])) == (1, 1)
        await ask(nc, "release", blockers[2])
        offered = await until_noticed(nc, first["lease_id"], "offer")  # the oldest first
        declined = await answer(nc, first, accept=False, number=offered["resize"]["number"])
        assert (declined["resize"], devices(declined)) == (None, devices(first))
        offered = await until_noticed(nc, second["lease_id"], "offer")
        assert (await until_noticed(nc, first["lease_id"]))["resize"] is None
        waiting = asyncio.create_task(ask(nc, "request", {"owner": "bob", "gpus": 8, "wait_seconds": 60}, 60))
        await until_noticed(nc, second["lease_id"])
        assert (await answer(nc, second, number=offered["resize"]["number"]))["code"] == "conflict"
        waiting.cancel()


async def booked(nc: Bus, owner: str, begins: float, lasts: float, **fields: Any) -> None:
    times = {"starts_at": begins, "ends_at": begins + lasts}
    window = {name: datetime.fromtimestamp(time.time() + at, UTC).isoformat() for name, at in times.items()}
    window |= {"owners": [owner], "lead_seconds": 1, "reason": "course", **fields}
    assert (await ask(nc, "book", {"book": window}))["type"] == "windows"


async def test_a_lease_grows_into_what_is_booked_for_its_owner_now_or_once_it_has_ended(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    """No other lease grows there, and no offer is made that would have to be withdrawn."""
    others = FakeHosts(nc, hosts=1, devices=4, prefix="old", model="NVIDIA A100")
    await others.start()
    async with running(server.url):
        await until_ready(nc, 12)
        body = {"owner": "bob", "gpus": 2, "hosts": ["old0"], "max_seconds": 300, "ttl_seconds": 600}
        before = (await ask(nc, "request", body))["lease"]
        later = (await ask(nc, "request", {**body, "gpus": {"min": 1, "max": 4}}))["lease"]
        await booked(nc, "ann", 301.1, 600, gpus=4, hosts=["old0"])  # closes just after both have ended
        await booked(nc, "ann", 0.5, 600, gpus=8, hosts=["node0"])
        body = {"owner": "ann", "hosts": ["node0"], "ttl_seconds": 600, "wait_seconds": 60}
        first = (await ask(nc, "request", body, 60))["lease"]
        inside = (await ask(nc, "request", {**body, "gpus": {"min": 1, "max": 8}}))["lease"]
        assert (len(inside["grants"]), inside["window"]) == (7, first["window"])
        for other, lease, most in ((first, inside, 8), (before, later, 4)):
            await ask(nc, "release", {"lease_id": other["lease_id"], "owner": other["owner"]})
            offered = await until_noticed(nc, lease["lease_id"], "offer")
            kept = await answer(nc, lease, number=offered["resize"]["number"])
            assert (len(kept["grants"]), kept["ends_at"]) == (most, lease["ends_at"])
    await others.stop()


async def test_growth_counts_for_groups_and_goes_back_before_anything_is_preempted(
    server: EmbeddedServer, nc: Bus, hosts: FakeHosts
) -> None:
    vision = {"name": "vision", "guarantee": {"gpus": {"*": 6}}, "members": ["ann"]}
    nlp = {"name": "nlp", "limit": {"gpus": {"*": 4}}, "members": ["bob"]}
    async with running(server.url):
        await until_ready(nc, 8)
        await ask(nc, "set_groups", {"set": [vision, nlp]})
        body = {"owner": "bob", "preemptible": True, "ttl_seconds": 600, "grace_seconds": 1}
        fixed = (await ask(nc, "request", body))["lease"]
        lease = (await ask(nc, "request", {**body, "gpus": {"min": 1, "max": 8}}))["lease"]
        assert len(lease["grants"]) == 3  # four are the limit of the group
        await ask(nc, "release", {"lease_id": fixed["lease_id"], "owner": "bob"})
        offered = await until_noticed(nc, lease["lease_id"], "offer")
        assert len(offered["resize"]["grants"]) == 1
        assert (await groups(nc))["nlp"]["gpus_used"] == {hosts.model: 3}
        await answer(nc, lease)
        assert (await groups(nc))["nlp"]["gpus_used"] == {hosts.model: 4}

        got = await ask(nc, "request", {"owner": "ann", "gpus": 6, "wait_seconds": 60, "ttl_seconds": 600}, 60)
        assert len(got["lease"]["grants"]) == 6
    events = [event for _, event in await lease_events(nc) if event["lease"]["lease_id"] == lease["lease_id"]]
    kinds = [event["kind"] for event in events]
    assert kinds.index("resize_requested") < kinds.index("preempting") < kinds.index("evicted")


async def groups(nc: Bus) -> dict[str, dict[str, Any]]:
    return {group["group"]["name"]: group for group in (await ask(nc, "groups", {}))["groups"]}
