"""What does it cost a host to know whose work is on its devices?

- `join`: one list of a host's processes joined to its leases, and what begins or ends found out; of one host with 8
  devices, and of a simulated fleet of 625 hosts. The limit beside it is encoding the same list for the bus, which is
  done anyway.
- `descent`: the names of a real process and its ancestors from /proc. Beside it what is read of each process anyway.
- `leases`: a lease event of another host, as each host gets them; on a real bus, in CPU time of the process. Beside it
  the same with a listener that does nothing with them.

    python bench/attribution.py [--processes 4] [--events 20000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import uvloop
from corral.bus.connect import connect
from corral.bus.process_identity import lineage
from corral.cli.local.server import EmbeddedServer
from corral.collectors.processes.lease_feed import HostLeaseFeed
from corral.collectors.processes.proc import ProcessTable
from corral.collectors.processes.violations import Attribution
from corral.schemas import codec, subjects
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState
from corral.schemas.telemetry import ProcessBatch, ProcessSample

GIB = 2**30
NOW = datetime.now(UTC)


def lease(number: int, host: str, device: str) -> Lease:
    return Lease(
        lease_id=f"5f0c7a1b2d-1-{number:x}",
        owner="alice",
        state=LeaseState.ACTIVE,
        granted_at=NOW,
        expires_at=NOW + timedelta(hours=1),
        ttl_seconds=60.0,
        grants=[Grant(host=host, device=device, model="NVIDIA H100 80GB HBM3", memory_bytes=40 * GIB, share=0.5)],
        name="train",
        environment={host: {"CUDA_VISIBLE_DEVICES": device, "CORRAL_LEASE": f"5f0c7a1b2d-1-{number:x}"}},
        holder="0d0c8c3e-6d5c-4d0b-9b1c-6f0c6f2f6d11/4711/123456",
    )


def host_of(number: int, devices: int, each: int) -> tuple[str, list[Lease], list[ProcessSample]]:
    host = f"node-{number:04}"
    leases: list[Lease] = []
    processes: list[ProcessSample] = []
    for device in range(devices):
        uuid = f"GPU-{number:08}-{device:04}-4444-8888-123456789abc"
        leases.append(lease(number * devices + device, host, uuid))
        for at in range(each):
            named = leases[-1].lease_id if at else ""
            processes.append(
                ProcessSample(
                    device=uuid, pid=10_000 + device * each + at, memory_used_bytes=11 * GIB, name="python3",
                    user="alice", lease=named, started_ns=1,
                )
            )  # fmt: skip
    return host, leases, processes


def timed(function: Callable[[], Any], seconds: float = 1.0) -> float:
    """Microseconds of CPU time a call, the best of three."""
    best = float("inf")
    for _ in range(3):
        count, started = 0, time.process_time()
        while time.process_time() - started < seconds / 3:
            function()
            count += 1
        best = min(best, (time.process_time() - started) / count)
    return best * 1e6


def join(hosts: int, devices: int, each: int) -> dict[str, Any]:
    made = [host_of(number, devices, each) for number in range(hosts)]
    attribution = Attribution(30.0, lambda event: None, here=False)
    attribution.set_leases([one for _, leases, _ in made for one in leases])
    ancestry = {process.pid: [f"boot/{n}/1" for n in range(6)] for _, _, found in made for process in found}
    step = [time.time_ns()]

    def take() -> None:
        step[0] += 10 * 10**9
        for host, _, processes in made:
            attribution.take(host, processes, ancestry, step[0])

    def encode() -> None:
        for host, _, processes in made:
            codec.encode(ProcessBatch(host=host, agent="a", sequence=1, time_ns=1, processes=processes))

    return {
        "part": "join", "hosts": hosts, "processes": hosts * devices * each,
        "microseconds": round(timed(take), 1), "limit: encode": round(timed(encode), 1),
    }  # fmt: skip


def descent() -> dict[str, Any]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        table = ProcessTable()
        names = list(lineage(child.pid))
        return {
            "part": "descent", "ancestors": len(names) - 1,
            "microseconds": round(timed(lambda: list(lineage(child.pid)), 0.5), 1),
            "beside: facts": round(timed(lambda: table.facts(child.pid), 0.5), 1),
        }  # fmt: skip
    finally:
        child.communicate(b"\n")


async def followed(url: str, events: int, feed: bool) -> float:
    """CPU seconds of this process for receiving so many events of other hosts, sending not counted."""
    sender = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--send", url, str(events), stdin=asyncio.subprocess.PIPE
    )
    nc = await connect(url)
    seen = 0
    done = asyncio.Event()

    async def count(message: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == events:
            done.set()

    if feed:
        known: list[Any] = []
        following = HostLeaseFeed("elsewhere", known.append)
        work = following._on_message  # pyright: ignore[reportPrivateUsage]

        async def count_and_look(message: Any) -> None:
            await work(message)
            await count(message)

        await nc.subscribe(
            f"{subjects.LEASE_EVENTS}.>", cb=count_and_look, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
    else:
        await nc.subscribe(f"{subjects.LEASE_EVENTS}.>", cb=count, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await nc.flush()
    started = time.process_time()
    assert sender.stdin is not None
    sender.stdin.write(b"\n")
    await done.wait()
    spent = time.process_time() - started
    await nc.close()
    await sender.wait()
    return spent


async def send(url: str, events: int) -> None:
    nc = await connect(url)
    payloads = [
        codec.encode(
            LeaseEvent(kind=LeaseEventKind.GRANTED, time=NOW, lease=lease(n, f"node-{n:04}", f"GPU-{n}")), codec.JSON
        )
        for n in range(100)
    ]
    await asyncio.to_thread(sys.stdin.readline)
    for number in range(events):
        await nc.publish(subjects.lease_subject("granted", f"l{number}"), payloads[number % 100])
        if number % 500 == 0:
            await nc.flush()
    await nc.flush()
    await nc.close()


async def leases(events: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder) / "nats")
        server.start()
        try:
            bare = await followed(server.url, events, feed=False)
            feed = await followed(server.url, events, feed=True)
        finally:
            server.kill()
    return {
        "part": "leases", "events": events, "microseconds_each": round(feed / events * 1e6, 1),
        "limit: bare listener": round(bare / events * 1e6, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="on each device")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--send", nargs=2, metavar=("URL", "EVENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send:
        uvloop.run(send(arguments.send[0], int(arguments.send[1])))
        return
    print(json.dumps({"python": platform.python_version(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}))
    print(json.dumps(join(1, 8, arguments.processes)))
    print(json.dumps(join(625, 8, arguments.processes)))
    print(json.dumps(descent()))
    print(json.dumps(uvloop.run(leases(arguments.events))))


if __name__ == "__main__":
    main()
