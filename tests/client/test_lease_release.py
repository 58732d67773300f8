"""Release of leases that no process will use; a lease that another process holds is never released."""

from __future__ import annotations

import asyncio
import warnings
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from corral.bus.process_identity import own_name
from corral.client import SyncClient, TimedOut, connect
from corral.client.leases.calls import LeaseCalls
from corral.client.leases.grant_confirmation import confirmed, release_on_failure
from corral.client.leases.holder import held_by_this_process
from corral.schemas.requests import Assignment, Lease, LeaseState, WorkRequest
from support.local_cluster import LocalCluster

OWN = own_name()
ELSEWHERE = "11111111-2222-3333-4444-555555555555/7/8"


def lease(holder: str, ttl: float = 60.0) -> Lease:
    now = datetime.now(UTC)
    return Lease(
        lease_id="l1", owner="a", state=LeaseState.ACTIVE, granted_at=now, expires_at=now, ttl_seconds=ttl,
        grants=[], request_id="x", holder=holder,
    )  # fmt: skip


class Planner:
    """Takes leases back, and answers late."""

    timeout = 0.2

    def __init__(self, late_seconds: float = 0.0) -> None:
        self.released: list[str] = []
        self._late = late_seconds

    async def release(self, lease_id: str, *, owner: str | None = None) -> None:
        self.released.append(lease_id)

    async def leases(self, *, lease_id: str) -> list[Lease]:
        await asyncio.sleep(self._late)
        return [lease(OWN, ttl=1.0)]

    async def renew(self, lease_id: str, *, owner: str, holder: str) -> Lease:
        await asyncio.sleep(self._late)
        return lease(OWN, ttl=1.0)


@pytest.mark.parametrize(
    ("holder", "here", "given_back"),
    [("", False, True), (OWN, False, True), (f"{OWN.split('/')[0]}/1/1", False, None), (ELSEWHERE, False, False),
     (OWN, True, False)],
    ids=["nobody", "this process", "one that is gone", "another machine's", "this process's other part"],
)  # fmt: skip
async def test_who_only_asked_again_gives_nothing_back_that_another_may_hold(
    holder: str, here: bool, given_back: bool | None
) -> None:
    planner: Any = Planner()
    if here:
        held_by_this_process.add("l1")
    work = asyncio.create_task(release_on_failure(planner, lease(holder), OWN, asyncio.sleep(60)))
    await asyncio.sleep(0)
    work.cancel()
    try:
        with pytest.raises(asyncio.CancelledError):
            await work
    finally:
        held_by_this_process.discard("l1")
    # A process of this machine that is gone: whether that can be told depends on where this runs.
    assert given_back is None or planner.released == ["l1"] * given_back


async def test_a_planner_that_always_answers_too_late_is_not_asked_for_ever() -> None:
    planner = Planner(late_seconds=0.6)

    async def ask(_: WorkRequest) -> Assignment:
        return Assignment(lease=lease(OWN, ttl=1.0))

    request = WorkRequest(owner="a", request_id="x", ttl_seconds=1.0, holder=OWN)
    async with asyncio.timeout(10):
        with pytest.raises(TimedOut, match="too late for a lease of 1 s"):
            await confirmed(cast("LeaseCalls", planner), request, ask)
    assert planner.released == ["l1"]


async def test_a_block_that_never_begins_holds_nothing(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_HOST", "sim-0001")
    other: dict[str, Any] = {"gpus": 1, "hosts": "sim-0002", "set_environment": True}
    async with connect(cluster.url, owner="never") as client:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning):
                await client.lease(**other).__aenter__()
            assert await client.leases(owner="never") == []

            def begin() -> None:
                with SyncClient(cluster.url, owner="never") as sync:
                    sync.lease(**other).__enter__()

            with pytest.raises(RuntimeWarning):
                await asyncio.to_thread(begin)
        assert await client.leases(owner="never") == []
