"""A holder hears of a preemption, by the event or by its next renewal, and answers."""

from __future__ import annotations

import asyncio
import threading

import pytest
from corral.client import LeaseLost, Refused, SyncClient, connect
from corral.client.leases.context import AsyncHeldLease
from corral.client.leases.lease import hold
from corral.client.request import work_request
from corral.schemas import Lease, LeaseState, Preemption
from support.local_cluster import LocalCluster


async def test_a_coroutine_saves_and_gives_the_lease_back(cluster: LocalCluster) -> None:
    async with connect(cluster.url, owner="ann") as ann, connect(cluster.url, owner="olga") as olga:
        seen: list[Preemption] = []
        with pytest.raises(Refused, match="not preemptible"):
            async with ann.lease(gpus=1, ttl=60) as held:
                await olga.preempt(held.lease_id, reason="a course")
        lease_id = ""

        async def work() -> None:
            nonlocal lease_id

            async def save(notice: Preemption) -> None:
                seen.append(notice)
                await held.busy(60)
                assert held.preemption is not None
                seen.append(held.preemption)
                await held.saved()

            async with ann.lease(gpus=1, ttl=60, preemptible=True, grace="40s", on_preempt=save) as held:
                lease_id = held.lease_id
                await held.saved()  # without a notice it goes on
                await olga.preempt(lease_id, reason="a course")
                await asyncio.Event().wait()

        with pytest.raises(LeaseLost, match="preempted: a course"):
            await asyncio.wait_for(work(), 20)
        first, second = seen
        assert first.ends_at < second.ends_at
        assert (first.extended, second.extended) == (False, True)
        [ended] = await ann.leases(lease_id=lease_id, states=list(LeaseState))
        assert ended.state is LeaseState.EVICTED
        assert ended.saved_at is not None
        again = await ann.request(gpus=1, requeue_of=lease_id)
        assert again.lease.requeued
        await ann.release(again.lease.lease_id)


async def test_a_renewal_shows_a_notice_whose_event_was_missed(cluster: LocalCluster) -> None:
    async with connect(cluster.url, owner="ann") as ann, connect(cluster.url, owner="olga") as olga:
        seen: list[Preemption] = []
        request = work_request("ann", {"gpus": 1, "ttl": 60, "preemptible": True, "grace": 600})

        def made(lease: Lease, confirmed_at: float) -> AsyncHeldLease:
            return AsyncHeldLease(ann, lease, lambda _: None, confirmed_at=confirmed_at, on_preempt=seen.append)

        held = await hold(ann, request, None, made)  # it is not started, so it listens to nothing
        noticed = await olga.preempt(held.lease_id, reason="a course")
        for _ in range(2):
            await held.confirm()
        assert seen == [noticed.preemption] == [held.preemption]
        await held.release()


def test_a_thread_saves_without_asyncio(cluster: LocalCluster) -> None:
    saved, lost = threading.Event(), threading.Event()
    with SyncClient(cluster.url, owner="ann") as client:

        def save(notice: Preemption) -> None:
            assert notice.reason.startswith("a course")
            held.saved()
            saved.set()

        with client.lease(
            gpus=1, ttl=60, preemptible=True, grace=60, on_preempt=save, on_lost=lambda _: lost.set()
        ) as held:
            client.preempt(held.lease_id, reason="a course", operator="olga")
            assert saved.wait(20)
            assert lost.wait(20)
        with pytest.raises(LeaseLost, match=r"preempted: a course \(by olga\)"):
            held.check()
