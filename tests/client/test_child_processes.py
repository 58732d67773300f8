"""Processes that a program started under a lease delay its release at the end of the block, for a limited time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from corral.client import SyncClient, connect
from corral.client.leases.child_processes import children_under, ticks_now
from support.local_cluster import LocalCluster, wait_for


def block(cluster: LocalCluster, kind: str, grace: float, inside: Callable[[str], object]) -> None:
    """A lease that is held while something runs."""
    fields = {"gpus": 1, "hosts": "any", "ttl": 3, "set_environment": True, "children_grace": grace}
    if kind == "with":
        with SyncClient(cluster.url, owner="ann") as client, client.lease(**fields) as lease:
            inside(lease.lease_id)
        return

    async def asynchronous() -> None:
        async with connect(cluster.url, owner="ann") as client, client.lease(**fields) as lease:
            inside(lease.lease_id)

    asyncio.run(asynchronous())


def state(cluster: LocalCluster, lease_id: str) -> str:
    return cluster.json("leases", "--ended", "--lease", lease_id)["leases"][0]["state"]


@pytest.mark.parametrize("kind", ["with", "async with"])
@pytest.mark.filterwarnings("ignore:the GPUs of lease:RuntimeWarning")
def test_a_lease_is_held_until_its_children_are_gone(
    cluster: LocalCluster, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    leases: list[str] = []

    def inside(lease_id: str) -> None:
        leases.append(lease_id)
        started.append(subprocess.Popen(["sleep", "60"]))

    program = threading.Thread(target=block, args=(cluster, kind, 60.0, inside))
    program.start()
    try:
        wait_for(lambda: started and f"pid {started[0].pid} (sleep)" in caplog.text)
        assert state(cluster, leases[0]) == "active"
    finally:
        wait_for(lambda: started)[0].kill()
    program.join(20)
    assert not program.is_alive()
    assert state(cluster, leases[0]) == "released"
    started[0].wait()


@pytest.mark.parametrize("kind", ["with", "async with"])
@pytest.mark.filterwarnings("ignore:the GPUs of lease:RuntimeWarning")
def test_children_that_stay_are_named_and_hold_it_no_longer_than_told(cluster: LocalCluster, kind: str) -> None:
    # One that is marked, one that nothing but its parent tells of.
    children = [["sleep", "60"], ["env", "-i", sys.executable, "-c", "import time; time.sleep(60)"]]
    started: list[subprocess.Popen[bytes]] = []
    leases: list[str] = []

    def inside(lease_id: str) -> None:
        leases.append(lease_id)
        started.extend(map(subprocess.Popen, children))

    try:
        with pytest.warns(ResourceWarning, match="is released while") as told:
            block(cluster, kind, 0.2, inside)
        said = str(next(one.message for one in told if one.category is ResourceWarning))
        assert all(f"pid {child.pid} (" in said for child in started), said
        assert state(cluster, leases[0]) == "released"
    finally:
        for child in started:
            child.kill()
            child.wait()


def test_what_is_not_of_the_lease_does_not_hold_it() -> None:
    before = subprocess.Popen(["sleep", "60"])
    wait_for(lambda: ticks_now() > os.sysconf("SC_CLK_TCK") and children_under("ours", 0))
    wait_for(lambda: before.pid not in [one.pid for one in children_under("ours", ticks_now())])
    since = ticks_now()
    others = [
        subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], "CORRAL_LEASE": "another"}),
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import os, time; from multiprocessing.resource_tracker import main; time.sleep(60)",
            ]
        ),
    ]
    ours = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], "CORRAL_LEASE": "ours"})
    try:
        wait_for(lambda: [one.pid for one in children_under("ours", since)] == [ours.pid])
    finally:
        for child in (before, *others, ours):
            child.kill()
            child.wait()
