"""Elastic leases: they grow into idle devices and give them back, each time with the consent of the holder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client as Bus
from support.planner_rig import FakeHosts, ask, lease_events, persist, running, until_ready

SHARED = ("granted", "resize_offered", "resize_requested", "resized")


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
        assert (await answer(nc, lease, devices=sorted(new)))["code"] == "invalid"  # three are asked for
        chosen = sorted(devices(lease))[:3]
        left = await answer(nc, lease, devices=chosen)
        assert devices(left) == devices(grown) - set(chosen)
        got = (await waiting)["lease"]
        assert set(chosen) < devices(got)
        assert (await answer(nc, lease, devices=sorted(devices(left))[:2]))["code"] == "invalid"  # two are its fewest
        one = sorted(devices(left))[0]
        assert len((await answer(nc, lease, devices=[one]))["grants"]) == 2  # unasked
    events = [(subject.split(".")[3], event) for subject, event in await lease_events(nc)]
    of_ann = [(kind, event) for kind, event in events if event["lease"]["owner"] == "ann" and kind in SHARED]
    assert [kind for kind, _ in of_ann if kind != "resize_offered"] == [
        *("granted", "resized", "resize_requested", "resized", "resized"),
    ]
    returned = [{grant["device"] for grant in event["returned"]} for kind, event in of_ann if kind == "resized"]
    assert returned == [set(), set(chosen), {one}]
