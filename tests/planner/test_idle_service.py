"""Idle leases through a real planner: warned, spared once they are active, and then ended or made preemptible."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client
from support.planner_rig import FakeHosts, PlannerProcess, ask, until_ready

SOON = {"below_percent": 5, "after_seconds": 1}
LAB = {"name": "lab", "members": ["ann"], "idle": {**SOON, "action": "end", "warn_seconds": 1}}
BATCH = {"name": "lab/batch", "members": ["bob"], "idle": {**SOON, "action": "preemptible", "warn_seconds": 0}}
EXEMPT = {"name": "lab/exempt", "members": ["eve"], "idle": {"action": "off"}}
TTL = {"ttl_seconds": 600}


@pytest.fixture
def planner(server: EmbeddedServer, tmp_path: Path) -> Iterator[PlannerProcess]:
    """A planner, not started yet, that does not outlive the test."""
    process = PlannerProcess(server.url, tmp_path / "planner.log")
    yield process
    process.kill()


async def until(nc: Client, owner: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The lease of an owner, ended or not, once it is as it should be."""
    states = ["active", "evicted"]
    while True:
        (lease,) = (await ask(nc, "leases", {"owner": owner, "states": states}))["leases"]
        if reached(lease):
            return lease
        await asyncio.sleep(0.05)


async def test_idle_leases_are_warned_spared_and_taken_back(nc: Client, planner: PlannerProcess) -> None:
    hosts = FakeHosts(nc, hosts=1)
    await hosts.start(interval=0.1)
    planner.start()
    await until_ready(nc, 4)
    leases = {
        owner: (await ask(nc, "request", {"owner": owner, **TTL}))["lease"] for owner in ("ann", "bob", "eve", "zoe")
    }
    (device,) = [grant["device"] for grant in leases["ann"]["grants"]]
    hosts.load[device] = 50.0
    assert (await ask(nc, "set_groups", {"set": [LAB, BATCH, EXEMPT]}))["revision"] == 1

    # Of bob's lease the notice says why it is preemptible. It stays so, and may be preempted at once.
    made = await until(nc, "bob", lambda lease: lease["preemptible"])
    assert (made["idle"]["group"], made["idle"]["mean_percent"]) == ("lab/batch", 0.0)
    assert made["idle"]["acted_at"] is not None
    status = (await ask(nc, "groups", {"name": "lab/batch"}))["groups"][0]
    assert status["preemptible_gpus"] == 1.0
    taken = await ask(nc, "preempt", {"lease_id": made["lease_id"], "reason": "a test", "operator": "olga"})
    assert taken.get("preemption"), taken

    # Ann works, then not, and works again after the warning.
    assert (await until(nc, "ann", lambda lease: True))["idle"] is None
    hosts.load[device] = 2.0
    warned = (await until(nc, "ann", lambda lease: lease["idle"] is not None))["idle"]
    assert (warned["rule"], warned["acted_at"]) == ("below 5% for 1s: end after 1s", None)
    assert warned["since"] < warned["noticed_at"] < warned["acts_at"]
    hosts.load[device] = 50.0
    assert (await until(nc, "ann", lambda lease: lease["idle"] is None))["state"] == "active"
    # The warning of a planner that is gone is withdrawn: the next has seen too little to act.
    hosts.load[device] = 2.0
    first = (await until(nc, "ann", lambda lease: lease["idle"] is not None))["idle"]
    planner.stop()
    hosts.load[device] = 50.0
    await asyncio.sleep(0.2)  # until the samples say so
    hosts.load[device] = 2.0
    planner.start()
    await until_ready(nc, 4)
    ended = await until(nc, "ann", lambda lease: lease["state"] == "evicted")
    assert ended["idle"]["since"] > first["noticed_at"]
    evidence = "(rule of group lab); GPU activity 2.0% on average, 2.0% at most since "
    assert ended["reason"].startswith(f"idle: below 5% for 1s: end after 1s {evidence}")
    for owner in ("eve", "zoe"):
        spared = await until(nc, owner, lambda lease: True)
        assert (spared["state"], spared["idle"], spared["preemptible"]) == ("active", None, False)
    await hosts.stop()
