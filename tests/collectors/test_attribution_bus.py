"""Attribution from the driver to the bus: real processes of a real `corral run`, on devices of the fake library."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.client import Client, connect
from corral.collectors.nvml.source import NvmlSource
from corral.collectors.processes.lease_feed import HostLeaseFeed
from corral.collectors.service import collect
from corral.planner.service import Settings, plan
from corral.schemas import codec, subjects
from corral.schemas.requests import Lease, LeaseEvent, LeaseEventKind, LeaseState
from corral.schemas.telemetry import AttributionKind, DeviceEvent, ProcessBatch, ProcessSample, Severity
from msgspec.structs import replace
from nats.aio.client import Client as Bus
from support.fake_nvml import FakeNvml
from support.local_cluster import CORRAL, environment

HOST = "gpu-7"
GIB = 2**30


class Rig:
    """A host of the fake library with its agent and a planner, and what the agent says."""

    def __init__(self, nvml: FakeNvml, client: Client) -> None:
        self.nvml = nvml
        self.client = client
        self.processes: list[ProcessSample] = []
        self.events: list[DeviceEvent] = []
        self.heard = asyncio.Condition()
        self.started: list[subprocess.Popen[str]] = []

    async def listen(self, nc: Bus) -> None:
        async def processes(message: Any) -> None:
            async with self.heard:
                self.processes = codec.decode(message.data, ProcessBatch).processes
                self.heard.notify_all()

        async def events(message: Any) -> None:
            async with self.heard:
                self.events.append(codec.decode(message.data, DeviceEvent))
                self.heard.notify_all()

        await nc.subscribe(subjects.processes_subject(HOST), cb=processes)
        await nc.subscribe(subjects.events_subject(HOST), cb=events)

    async def until(self, condition: Any, seconds: float = 20.0) -> Any:
        async with asyncio.timeout(seconds), self.heard:
            return await self.heard.wait_for(condition)

    def lease_of(self, pid: int) -> str | None:
        return next((process.lease for process in self.processes if process.pid == pid), None)

    def told(self, kind: AttributionKind) -> list[DeviceEvent]:
        return [event for event in self.events if event.kind == kind]

    def start(self, *command: str, url: str, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            env=environment(CORRAL_NATS_URL=url, CORRAL_HOST=HOST, **more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
async def rig(
    server: EmbeddedServer, nc: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[Rig]:
    """A host with its collector, which lists processes each 0.1 s, or each `request.param`."""
    nvml = FakeNvml()
    nvml.install(monkeypatch)
    stop = asyncio.Event()
    planner = asyncio.create_task(plan(server.url, Settings(), stop=stop))
    agent = asyncio.create_task(
        collect(
            NvmlSource(HOST),
            name=HOST,
            nats_url=server.url,
            interval_seconds=0.1,
            processes_seconds=getattr(request, "param", 0.1),
            grace_seconds=0.4,
            state=tmp_path,
        )
    )
    async with connect(server.url, owner="tester", patience=10) as client:
        made = Rig(nvml, client)
        await made.listen(nc)
        async with asyncio.timeout(20):
            while (await client.fleet()).usable_devices < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        yield made
    for process in made.started:  # each ends, and its children with it, when its input does
        await asyncio.to_thread(process.communicate, "", timeout=20)
    agent.cancel()
    await asyncio.gather(agent, return_exceptions=True)
    stop.set()
    await planner


@pytest.mark.parametrize("rig", [3600.0], indirect=True)
async def test_processes_are_listed_soon_after_a_lease_has_ended(rig: Rig) -> None:
    """Until then its device counts as in use: the lease was taken from its holder, whose processes may go on."""
    lease = (await rig.client.request(gpus=1, allow_in_use=True)).lease
    # The host learns of the lease, and that it has ended, by asking for its leases.
    await asyncio.sleep(1.5)
    left = os.getpid()
    next(d for d in rig.nvml.devices if d.uuid == lease.grants[0].device).compute = [(left, GIB)]
    await rig.client.evict(lease.lease_id, reason="maintenance")
    await rig.until(lambda: rig.lease_of(left) == "")


GRANDCHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={})
print(child.pid, flush=True)
sys.stdin.read()
child.kill()
"""


async def test_grandchildren_strangers_and_greed_are_told_apart(server: EmbeddedServer, rig: Rig) -> None:
    run = rig.start(
        *(*CORRAL, "run", "--share", "0.5", "--memory", "10GiB", "--name", "train"),
        *("--", "sh", "-c", f"'{sys.executable}' -c '{GRANDCHILD}'; exit 7"),
        url=server.url,
    )
    assert run.stdout is not None
    grandchild = int(await asyncio.to_thread(run.stdout.readline))
    [lease] = await rig.client.leases()
    device = next(d for d in rig.nvml.devices if d.uuid == lease.grants[0].device)
    # The host asks the planner once a second at most, and this rig's grace is shorter than the product's 30 s.
    await asyncio.sleep(2.5)
    device.compute = [(grandchild, 8 * GIB)]
    await rig.until(lambda: rig.lease_of(grandchild) == lease.lease_id)

    device.compute = [(grandchild, 12 * GIB)]
    await rig.until(lambda: rig.told(AttributionKind.LEASE_MEMORY_EXCEEDED))
    [beyond] = rig.told(AttributionKind.LEASE_MEMORY_EXCEEDED)
    assert (beyond.device, beyond.severity) == (device.uuid, Severity.APPLICATION)
    assert (beyond.data["lease"], beyond.data["owner"]) == (lease.lease_id, "tester")
    assert (beyond.data["memory_used_bytes"], beyond.data["memory_granted_bytes"]) == (12 * GIB, 10 * GIB)

    stranger = rig.start(sys.executable, "-c", "import sys; sys.stdin.read()", url=server.url)
    device.compute = [(grandchild, 8 * GIB), (stranger.pid, GIB)]
    await rig.until(lambda: rig.told(AttributionKind.LEASE_MEMORY_EXCEEDED_ENDED))
    await rig.until(lambda: rig.told(AttributionKind.PROCESS_WITHOUT_LEASE))
    [without] = rig.told(AttributionKind.PROCESS_WITHOUT_LEASE)
    assert (without.data["pid"], without.data["leased"], without.severity) == (stranger.pid, True, Severity.APPLICATION)
    assert rig.lease_of(stranger.pid) == ""
    # It is no matter of the device's health: it takes work, and is not ranked below its twin for it.
    status = (await rig.client.devices(devices=[device.uuid]))[0]
    assert (status.usable, status.health) == (True, "")

    # The work ends in order: its lease is released, and nothing more is told of it.
    device.compute = []
    await asyncio.to_thread(run.communicate, "", timeout=20)
    assert run.returncode == 7
    await rig.until(lambda: rig.told(AttributionKind.PROCESS_WITHOUT_LEASE_ENDED))
    kinds = [event.kind for event in rig.events if event.kind in set(AttributionKind)]
    assert sorted(kinds) == sorted(AttributionKind), "each once"
    for kind in ("lease_memory_exceeded", "process_without_lease"):
        begin, end = (next(e for e in rig.events if e.kind == k) for k in (kind, f"{kind}_ended"))
        assert [begin.data[k] for k in ("violation", "since_ns")] == [end.data[k] for k in ("violation", "since_ns")]


async def test_a_holder_without_a_readable_environment_is_known_by_its_children(
    server: EmbeddedServer, rig: Rig
) -> None:
    """A lease in a process that runs already can't be in the environment that others see of it."""
    script = (
        "import os, subprocess, sys\n"
        "from corral.client import lease\n"
        "with lease(gpus=1, allow_in_use=True, set_environment=True) as held:\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], env={})\n"
        "    print(os.getpid(), child.pid, held.devices[0], held.lease_id, flush=True)\n"
        "    sys.stdin.read()\n"
        "    child.kill()\n"
    )
    process = rig.start(sys.executable, "-c", script, url=server.url)
    assert process.stdout is not None
    own, child, uuid, lease_id = (await asyncio.to_thread(process.stdout.readline)).split()
    device = next(d for d in rig.nvml.devices if d.uuid == uuid)
    device.compute = [(int(own), GIB), (int(child), GIB)]
    await rig.until(lambda: rig.lease_of(int(own)) == rig.lease_of(int(child)) == lease_id)
    # Its lease is gone while it stays: it is without one, once the grace time is over.
    await rig.client.evict(lease_id, reason="test")
    await rig.until(lambda: len(rig.told(AttributionKind.PROCESS_WITHOUT_LEASE)) == 2)
    assert {event.severity for event in rig.told(AttributionKind.PROCESS_WITHOUT_LEASE)} == {Severity.INFO}


async def test_a_host_learns_its_leases_from_the_planner_and_from_events(server: EmbeddedServer, rig: Rig) -> None:
    other = HostLeaseFeed("elsewhere", lambda leases: elsewhere.append(leases))
    elsewhere: list[list[Lease] | None] = []
    here: list[set[str] | None] = []
    changed = asyncio.Event()

    def on_change(leases: list[Lease] | None) -> None:
        here.append(None if leases is None else {lease.lease_id for lease in leases})
        changed.set()

    async def until(expected: set[str]) -> None:
        async with asyncio.timeout(10):
            while not here or here[-1] != expected:
                changed.clear()
                await changed.wait()

    before = (await rig.client.request(gpus=1, ttl="1h", allow_in_use=True)).lease.lease_id
    async with connect(server.url) as own:
        tasks = [asyncio.create_task(feed.follow(own.nc)) for feed in (HostLeaseFeed(HOST, on_change), other)]
        await until({before})
        after = (await rig.client.request(gpus=1, ttl="1h", allow_in_use=True)).lease.lease_id
        await until({before, after})
        # An end that the planner does not confirm is none, whether its body fits its subject or not.
        there = (await rig.client.leases(lease_id=before))[0]
        ended = LeaseEvent(kind=LeaseEventKind.RELEASED, time=datetime.now(UTC), lease=_ended(there))
        for lease_id in (before, after):
            await own.nc.publish(subjects.lease_subject("released", lease_id), codec.encode(ended, codec.JSON))
        asked = len(here)
        async with asyncio.timeout(10):
            while len(here) == asked:
                changed.clear()
                await changed.wait()
        assert here[asked:] == [{before, after}]
        await rig.client.release(before)
        await until({after})
        await rig.client.renew(after)
        await rig.client.evict(after, reason="test")
        await until(set())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert here[-1] is None, "without a bus nobody knows"
    assert elsewhere[0] == []
    assert len(elsewhere) == 2


def _ended(lease: Lease) -> Lease:
    return replace(lease, state=LeaseState.RELEASED, ended_at=datetime.now(UTC))
