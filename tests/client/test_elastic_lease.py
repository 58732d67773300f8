"""Notices to the holder of an elastic lease to grow or shrink, and answers that change its devices."""

from __future__ import annotations

import asyncio
import threading

import pytest
from corral.client import InvalidRequest, Refused, SyncClient, connect
from corral.client.request import work_request
from corral.schemas import GpuRange, LeaseEventKind, Resize, ResizeKind
from support.local_cluster import LocalCluster

HOST = "sim-0002"


async def test_a_coroutine_takes_devices_and_gives_others_back(cluster: LocalCluster) -> None:
    async with connect(cluster.url, owner="ann") as ann, connect(cluster.url, owner="bob") as bob:
        seen: list[ResizeKind] = []
        answered = {kind: asyncio.Event() for kind in ResizeKind}

        async def resize(notice: Resize) -> None:
            seen.append(notice.kind)
            await held.accept_resize(first if notice.kind is ResizeKind.REQUEST else ())
            answered[notice.kind].set()

        blocker = await bob.request(gpus=3, hosts=HOST)
        async with ann.lease(gpus="1-3", hosts=HOST, ttl=60, on_resize=resize) as held:
            first = held.devices
            assert (len(first), held.lease.elastic) == (1, GpuRange(min=1, max=3))
            await bob.release(blocker.lease.lease_id)
            await asyncio.wait_for(answered[ResizeKind.OFFER].wait(), 20)
            assert (len(held.devices), held.resize) == (3, None)
            assert len(next(iter(held.lease.environment.values()))["CUDA_VISIBLE_DEVICES"].split(",")) == 3
            got = await bob.request(gpus=2, hosts=HOST, wait="30s")
            assert first[0] in [grant.device for grant in got.lease.grants]  # the one that was named
            # The planner may answer bob before ann, who has agreed.
            await asyncio.wait_for(answered[ResizeKind.REQUEST].wait(), 20)
            assert first[0] not in held.devices
            await bob.release(got.lease.lease_id)
        assert seen[:2] == [ResizeKind.OFFER, ResizeKind.REQUEST]


async def test_a_lease_without_a_callback_keeps_its_devices(cluster: LocalCluster) -> None:
    async with connect(cluster.url, owner="ann") as ann, connect(cluster.url, owner="bob") as bob:
        async with ann.lease(gpus=GpuRange(min=1, max=4), hosts=HOST, ttl=60) as held:
            assert len(held.devices) == 4
            events = ann.lease_events(lease_id=held.lease_id)
            heard = asyncio.create_task(until_declined(events))
            await asyncio.sleep(0)
            await ann.nc.flush()
            waiting = asyncio.create_task(bob.request(gpus=1, hosts=HOST, wait="30s"))
            await asyncio.wait_for(heard, 20)
            assert len(held.devices) == 4
            with pytest.raises(Refused, match="no notice"):
                await held.decline_resize()
        await bob.release((await waiting).lease.lease_id)


async def until_declined(events: object) -> None:
    asked = False
    async for event in events:  # type: ignore[attr-defined]
        asked = asked or event.kind is LeaseEventKind.RESIZE_REQUESTED
        if asked and event.lease.resize is None:
            return


def test_a_thread_gives_back_without_asyncio(cluster: LocalCluster) -> None:
    given = threading.Event()
    with SyncClient(cluster.url, owner="ann") as ann:

        def resize(notice: Resize) -> None:
            assert notice.claimant_owner == "bob"
            held.accept_resize()
            given.set()

        with (
            ann.lease(gpus="2-4", hosts=HOST, ttl=60, on_resize=resize) as held,
            SyncClient(cluster.url, owner="bob") as bob,
        ):
            got = bob.request(gpus=2, hosts=HOST, wait="30s")
            assert given.wait(20)
            assert len(held.devices) == 2
            bob.release(got.lease.lease_id)


def test_a_range_is_said_in_several_ways() -> None:
    for gpus in ("2-8", GpuRange(min=2, max=8)):
        request = work_request("ann", {"gpus": gpus})
        assert (request.gpus, request.gpus_max) == (2, 8)
    assert work_request("ann", {"gpus": "4"}).gpus == 4
    for wrong in ("8-2", "2-", "many"):
        with pytest.raises(InvalidRequest):
            work_request("ann", {"gpus": wrong})
