"""A host is lost when it is silent, and not when the planner's clock or connection says so alone."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from corral.cli.local.server import EmbeddedServer
from nats.aio.client import Client
from support.planner_rig import FakeHosts, ask, running, until_ready

LOST_AFTER = 4.0


async def test_a_clock_that_jumps_ahead_loses_no_host_and_turns_nobody_away(
    server: EmbeddedServer, nc: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = FakeHosts(nc, hosts=2, devices=1)
    await hosts.start(1.5)
    async with running(server.url, lost_after_seconds=LOST_AFTER):
        await until_ready(nc, 2)
        body = {"owner": "ann", "gpus": 2, "placement": "spread", "ttl_seconds": 600}
        lease = (await ask(nc, "request", body))["lease"]
        waits = {"owner": "bob", "gpus": 2, "placement": "spread", "wait_seconds": 300, "request_id": "w"}
        await nc.publish("corral.v1.plan.request", json.dumps(waits).encode(), reply=f"{nc.new_inbox()}.1")
        while not (await ask(nc, "queue", {}))["entries"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        right = time.time
        monkeypatch.setattr(time, "time", lambda: right() + 600)
        await asyncio.sleep(LOST_AFTER + 1.5)
        listed = (await ask(nc, "leases", {"owner": "ann"}))["leases"]
        assert [(entry["lease_id"], entry["state"]) for entry in listed] == [(lease["lease_id"], "active")]
        assert [entry["request_id"] for entry in (await ask(nc, "queue", {}))["entries"]] == ["w"]
        # Who is silent from then on is lost as ever.
        lost = await nc.subscribe(f"corral.v1.leases.lost.{lease['lease_id']}")
        hosts.silent.add("node1")
        await lost.next_msg(timeout=LOST_AFTER + 3)
    await hosts.stop()
