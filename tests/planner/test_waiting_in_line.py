"""Requests that wait at a real planner: what is kept for them, and what others still get."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.planner.queue.order import Asked
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory
from nats.aio.client import Client as Bus
from support.planner_rig import GIB, FakeHosts, ask, running, until_ready


class MixedHosts(FakeHosts):
    """One host with two H100, one with two T4; the first has a label."""

    def inventory(self, name: str) -> Inventory:
        big = name == "node0"
        devices = [
            DeviceInfo(
                uuid=uuid,
                host=name,
                index=index,
                name="NVIDIA H100" if big else "Tesla T4",
                memory_bytes=self.memory if big else 16 * GIB,
                compute_capability="9.0" if big else "7.5",
            )
            for index, uuid in enumerate(self.devices[name])
        ]
        host = HostInfo(name=name, cpus=16, memory_bytes=64 * GIB, labels={"rack": "r9" if big else "r1"})
        return Inventory(host=host, agent="fake", time_ns=1, devices=devices)


async def until(check: Any, seconds: float = 15.0) -> Any:
    """What a check returns, once that is true."""
    for _ in range(int(seconds / 0.05)):
        found = await check()
        if found:
            return found
        await asyncio.sleep(0.05)
    raise TimeoutError(check)


async def test_who_waits_keeps_what_it_could_take_and_nothing_else(server: EmbeddedServer, nc: Bus) -> None:
    """However it names its devices; `request`, `explain` and the queue say the same, and name it."""
    hosts = MixedHosts(nc, hosts=2, devices=2)
    await hosts.start()
    async with running(server.url):
        await until_ready(nc, 4)
        held = (await ask(nc, "request", {"owner": "bob", "gpus": 2, "models": ["*h100*"]}))["lease"]["lease_id"]
        for number, names in enumerate(
            [
                {"models": ["*H100*"]},
                {"hosts": ["node0"]},
                {"host_labels": {"rack": "r9"}},
                {"gpu_memory_bytes": 60 * GIB},
                {"min_compute_capability": "9.0"},
                {"cpus": 15, "models": ["*h100*"]},
            ]
        ):
            body = {"owner": "alice", "request_id": f"w{number}", "wait_seconds": 60, **names}
            waits = asyncio.create_task(ask(nc, "request", body, timeout=60))

            async def kept() -> Any:
                entries = (await ask(nc, "queue"))["entries"]
                return entries and entries[0].get("reserved_devices") == 1

            await until(kept)
            for fits in ({}, {"gpus": 2}, {"gpu_share": 0.5, "gpu_memory_bytes": GIB}, {"hosts": ["node1"]}):
                told = await ask(nc, "explain", {"request": {"owner": "carol", **fits}})
                got = await ask(nc, "request", {"owner": "carol", **fits})
                assert (told["granted"], got["type"]) == (True, "assignment"), (names, fits, got)
                assert {grant["host"] for grant in got["lease"]["grants"]} == {"node1"}
                await ask(nc, "release", {"owner": "carol", "lease_id": got["lease"]["lease_id"]})
            if number == 0:
                await ask(nc, "release", {"owner": "bob", "lease_id": held})
                lease = (await waits)["lease"]
                await ask(nc, "release", {"owner": "alice", "lease_id": lease["lease_id"]})
                again = await ask(nc, "request", {"owner": "bob", "gpus": 2, "models": ["*h100*"]})
                held = again["lease"]["lease_id"]
            else:
                await ask(nc, "withdraw", {"owner": "alice", "request_id": f"w{number}"})
                assert (await waits)["code"] == "withdrawn"
    await hosts.stop()


async def test_nothing_is_kept_for_who_waits_for_a_drained_or_lost_host(server: EmbeddedServer, nc: Bus) -> None:
    hosts = MixedHosts(nc, hosts=2, devices=2)
    await hosts.start()
    async with running(server.url, stale_after_seconds=1.0):
        await until_ready(nc, 4)
        body = {"owner": "alice", "request_id": "w", "wait_seconds": 60, "gpus": 2}
        await ask(nc, "drain", {"hosts": ["node0"], "drain": True, "reason": "disk", "operator": "op"})
        drained = asyncio.create_task(ask(nc, "request", {**body, "hosts": ["node0"]}, timeout=60))
        hosts.silent.add("node1")

        async def usable() -> Any:
            return (await ask(nc, "fleet"))["usable_devices"] == 0

        await until(usable)
        silent = asyncio.create_task(
            ask(nc, "request", {**body, "owner": "dan", "request_id": "s", "hosts": ["node1"]}, timeout=60)
        )
        await asyncio.sleep(0.7)
        entries = (await ask(nc, "queue"))["entries"]
        assert [entry.get("reserved_devices", 0) for entry in entries] == [0, 0]
        hosts.silent.clear()
        assert (await silent)["type"] == "assignment"
        explained = await ask(nc, "explain", {"request": {"owner": "carol", "hosts": ["node0"]}})
        assert {reason["code"] for reason in explained["rejection"]["reasons"]} == {"drained", "host"}
        await ask(nc, "drain", {"hosts": ["node0"], "drain": False, "operator": "op"})
        assert (await drained)["type"] == "assignment"
    await hosts.stop()


async def test_a_stream_of_requests_for_cores_does_not_starve_one_for_a_device(server: EmbeddedServer, nc: Bus) -> None:
    hosts = MixedHosts(nc, hosts=2, devices=2)
    await hosts.start()
    stopped = False

    async def stream(number: int) -> int:
        granted = 0
        while not stopped:
            got = await ask(nc, "request", {"owner": f"c{number}", "gpus": 0, "cpus": 4, "hosts": ["node0"]})
            if got["type"] == "assignment":
                granted += 1
                await asyncio.sleep(0.3)
                await ask(nc, "release", {"owner": f"c{number}", "lease_id": got["lease"]["lease_id"]})
            else:
                await asyncio.sleep(0.02)
        return granted

    async with running(server.url):
        await until_ready(nc, 4)
        streams = [asyncio.create_task(stream(number)) for number in range(6)]
        await asyncio.sleep(0.3)
        body = {"owner": "train", "gpus": 1, "cpus": 16, "hosts": ["node0"], "wait_seconds": 30}
        got = await ask(nc, "request", body, timeout=40)
        assert got["type"] == "assignment"
        explained = await ask(nc, "explain", {"request": {"owner": "x", "hosts": ["node0"]}})
        assert explained["granted"]  # its other device needs no cores
        stopped = True
        assert sum(await asyncio.gather(*streams)) >= 4
    await hosts.stop()


async def test_a_rule_of_the_site_that_fails_does_not_stop_the_queue(
    server: EmbeddedServer, nc: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(asked: Asked) -> Any:
        if asked.seconds == 77:  # also of an array, whose truth is an error
            raise ZeroDivisionError("a rule of the site")
        return float("nan")

    site = ModuleType("site_order")
    vars(site)["rule"] = rule
    monkeypatch.setitem(sys.modules, "site_order", site)
    hosts = MixedHosts(nc, hosts=1, devices=2)
    await hosts.start()
    async with running(server.url, order="site_order:rule"):
        await until_ready(nc, 2)
        lease = (await ask(nc, "request", {"owner": "bob", "gpus": 2}))["lease"]["lease_id"]
        waiting = {
            name: asyncio.create_task(
                ask(nc, "request", {"owner": "ann", "gpus": 2, "wait_seconds": 60, **body}, timeout=60)
            )
            for name, body in {
                "fails": {"request_id": "fails", "expected_seconds": 77},
                "no number": {"request_id": "nan", "expected_seconds": 5},
            }.items()
        }

        async def both() -> bool:
            return len((await ask(nc, "queue"))["entries"]) == 2

        await until(both)
        while waiting:
            await ask(nc, "release", {"owner": "bob" if len(waiting) == 2 else "ann", "lease_id": lease})
            done, _ = await asyncio.wait(waiting.values(), return_when=asyncio.FIRST_COMPLETED, timeout=15)
            assert done
            for name in [name for name, task in waiting.items() if task in done]:
                got = await waiting.pop(name)
                assert got["type"] == "assignment", (name, got)
                lease = got["lease"]["lease_id"]
    await hosts.stop()
