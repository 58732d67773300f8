"""Attribution in the history: who uses GPUs without a lease or beyond it, asked in SQL and by `corral ps`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from corral.cli.local.server import EmbeddedServer
from corral.client import Client, CorralError, connect
from corral.collectors.service import collect
from corral.collectors.simulated.source import MISDEED_LABEL, SimulatedSource
from corral.planner.service import Settings, plan
from corral.processors.embedded import EmbeddedHistory
from corral.processors.service import process
from nats.aio.client import Client as Bus
from support.local_cluster import invoke

GIB = 2**30


async def rows(client: Client, sql: str, least: int) -> list[dict[str, Any]]:
    """The rows of a query, once there are so many."""
    found: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    end = loop.time() + 60
    while (began := loop.time()) < end:
        try:
            found = (await client.query(sql, format="json")).dicts()
        except CorralError:  # the processor starts
            found = []
        if len(found) >= least:
            return found
        # An expensive question is asked less often: what answers it needs the time.
        await asyncio.sleep(max(0.1, 3 * (loop.time() - began)))
    raise AssertionError((sql, found))


async def test_who_uses_gpus_without_a_lease_or_beyond_it(server: EmbeddedServer, nc: Bus, tmp_path: Path) -> None:
    source = SimulatedSource(1, 4, models="H100", background=0, faults_per_device_day=0, time_scale=20)
    stop = asyncio.Event()
    parts = [
        asyncio.create_task(plan(server.url, Settings(), stop=stop)),
        asyncio.create_task(process(EmbeddedHistory(tmp_path / "history.duckdb"), nats_url=server.url)),
    ]

    def start(source: SimulatedSource) -> asyncio.Task[None]:
        return asyncio.create_task(
            collect(
                source, name="sim", nats_url=server.url, interval_seconds=0.2, processes_seconds=0.2,
                grace_seconds=0.5, state=tmp_path,
            )
        )  # fmt: skip

    agent = start(source)
    async with connect(server.url, owner="ann", patience=15) as client:
        async with asyncio.timeout(20):
            while (await client.fleet()).usable_devices < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        fields: dict[str, Any] = {"gpus": 1, "share": 0.5, "memory": 10 * GIB, "ttl": "1h"}
        good = (await client.request(**fields, name="good")).lease
        greedy = (await client.request(**fields, name="greedy", labels={MISDEED_LABEL: "exceed-memory"})).lease
        victim = (await client.request(**fields, name="victim", labels={MISDEED_LABEL: "stranger"})).lease

        begun = await rows(client, "FROM lease_violations ORDER BY kind", 2)
        assert [row["kind"] for row in begun] == ["lease_memory_exceeded", "process_without_lease"]
        memory, stranger = begun
        assert (memory["lease_id"], memory["owner"], memory["name"]) == (greedy.lease_id, "ann", "greedy")
        assert memory["memory_used_bytes_peak"] > memory["memory_granted_bytes"] == 10 * GIB
        assert (stranger["device"], stranger["lease_id"]) == (victim.grants[0].device, "")
        assert {row["severity"] for row in begun} == {"application"}
        assert all(row["until"] is None and row["hours"] > 0 for row in begun)

        now = await rows(client, "FROM processes_now", 4)
        concerns = {(row["name"], row["concern"]) for row in now}
        assert concerns == {("good", ""), ("greedy", "beyond its lease"), ("victim", ""), (None, "no lease")}
        asked = await asyncio.to_thread(invoke, "ps", "--concern", "--json", url=server.url)
        assert {row["concern"] for row in json.loads(asked.stdout)["processes"]} == {"beyond its lease", "no lease"}
        shown = await asyncio.to_thread(invoke, "ps", "--lease", good.lease_id, url=server.url)
        assert shown.stdout.count(good.lease_id) == 1

        # What ends has an end; what a stopped collector has left open ends with it, and the next one tells it anew.
        await client.release(greedy.lease_id)
        [ended] = await rows(client, "FROM lease_violations WHERE until IS NOT NULL", 1)
        assert (ended["kind"], ended["until"] > ended["since"]) == ("lease_memory_exceeded", True)
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
        agent = start(source)
        again = await rows(client, "FROM lease_violations WHERE kind = 'process_without_lease' ORDER BY since", 2)
        assert [row["until"] is None for row in again] == [False, True]
    agent.cancel()
    stop.set()
    parts[1].cancel()
    await asyncio.gather(agent, *parts, return_exceptions=True)
