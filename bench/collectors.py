"""What does a collector cost: at 1 Hz, at 50 Hz, and for a fleet of 2,000 hosts in one process?

Each row is a process of its own that runs for some seconds against a real `nats-server` on this machine; its CPU is
that of the whole process once it is warm, and nobody else's.

- `readers`: what one tick of one device costs the NVML source, pynvml's wrappers, nvitop, gpustat and, with a real
  driver, nvidia-smi (`bench/nvml.py`, which takes the interpreter that has the peers).
- `agent`: a host with 8 devices whose source costs nearly nothing (a fixed tick), so what is measured is Corral's own
  pacing, packing and publishing. The limit beside it is the same source read on the same grid by a bare loop.
- `fleet`: the simulated fleet at 1 Hz, physics included. Beside it the peer: the same values as one JSON object a
  device, published in the same way, which is what most exporters of device telemetry send.
- `outage`: messages are put on disk while the bus is away, found by the next run, and sent when it is back. Beside the
  last is nats-py's own pipelined publication of the same messages, from memory.

    python bench/collectors.py [--seconds 10] [--hosts 2000] [--devices 8] [--only readers agent fleet outage]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from corral.bus.connect import connect
from corral.bus.layout import ensure_layout
from corral.cli.local.server import EmbeddedServer
from corral.collectors.agent.outbox import Outbox
from corral.collectors.agent.pacing import Pace
from corral.collectors.agent.publisher import Publisher
from corral.collectors.service import collect
from corral.collectors.simulated.source import SimulatedSource
from corral.collectors.source import Emit, EndOfData, Tick
from corral.schemas import codec, columns, subjects
from corral.schemas.telemetry import AgentReport, Inventory, ProcessSample, SampleBatch

PARTS = ("readers", "agent", "fleet", "outage")
WARM_SECONDS = 2.5
"""Connecting, and all that a run does once, is over by then."""
Result = dict[str, Any]


class Timed:
    """A source that ends after so long and notes what the process has cost since its first tick."""

    def __init__(self, source: Any, seconds: float, *, fixed: bool = False) -> None:
        self.source = source
        self.name = "simulated"
        self.seconds = seconds
        self.fixed = fixed
        self.ticks: Sequence[Tick] = ()
        self.first = self.started = self.ended = 0.0
        self.cpu_at_start = self.cpu = 0.0
        self.reads = 0

    def open(self, emit: Emit) -> None:
        self.source.open(emit)
        self.ticks = self.source.read()

    def inventory(self) -> Sequence[Inventory]:
        return self.source.inventory()

    def read(self) -> Sequence[Tick]:
        now = time.monotonic()
        self.first = self.first or now
        if not self.started and now - self.first > WARM_SECONDS:
            self.started, self.cpu_at_start, self.reads = now, cpu_seconds(), 0
        if self.started and now - self.started >= self.seconds:
            if not self.ended:
                self.ended, self.cpu = now, cpu_seconds() - self.cpu_at_start
            raise EndOfData
        self.reads += 1
        return self.ticks if self.fixed else self.source.read()

    def processes(self) -> dict[str, list[ProcessSample]]:
        return self.source.processes()

    def close(self) -> None:
        self.source.close()

    def result(self) -> Result:
        return {"cpu": self.cpu / (self.ended - self.started), "reads": self.reads}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_agent(url: str, state: str, interval: float, seconds: float, hosts: int, devices: int, fixed: bool) -> Result:
    source = Timed(
        SimulatedSource(hosts, devices, models="H100" if fixed else "", background=0.3), seconds, fixed=fixed
    )

    async def work() -> Result:
        await collect(
            source,  # pyright: ignore[reportArgumentType]
            name="bench",
            nats_url=url,
            interval_seconds=interval,
            report_seconds=seconds,
            state=Path(state),
        )
        nc = await connect(url)
        last = await nc.jetstream().get_last_msg(subjects.TELEMETRY_STREAM, subjects.agent_subject("bench"))
        report = codec.decode(last.data, AgentReport)
        await nc.close()
        return source.result() | {
            "late": report.late_ticks,
            "dropped": report.dropped_messages,
            "messages": report.published_messages,
            "read_ms": report.read_seconds_mean * 1e3,
            "rss_mib": report.resident_bytes / 2**20,
        }

    return uvloop.run(work())


def run_bare(interval: float, seconds: float, devices: int) -> Result:
    """The limit: read on the grid, and nothing else."""
    source = Timed(SimulatedSource(1, devices, models="H100", background=0.3), seconds, fixed=True)
    source.open(lambda event: None)
    pace = Pace(time.monotonic(), interval)
    while True:
        try:
            source.read()
        except EndOfData:
            return source.result()
        time.sleep(pace.next(time.monotonic()))


def run_objects(url: str, hosts: int, devices: int, ticks: int, encode: Callable[[Any], bytes] | None) -> Result:
    """The peer: one JSON object a device and tick, acknowledged and pipelined like ours. CPU a tick, packing apart."""
    source = SimulatedSource(hosts, devices, background=0.3)
    source.open(lambda event: None)

    async def work() -> Result:
        outbox = Outbox(2**30)
        publisher = Publisher(outbox, url, name="objects")
        task = asyncio.create_task(publisher.run())
        spent = 0.0
        number = 0
        for _ in range(ticks):
            rows = [msgspec.to_builtins(row) for tick in source.read() for row in columns.rows(_batch(tick))]
            start = cpu_seconds()
            for row in rows:
                number += 1
                payload = json.dumps(row).encode() if encode is None else encode(row)
                outbox.put(subjects.samples_subject(row["host"]), f"objects-{number}", payload)
                if number % 64 == 0:
                    publisher.wake()
                    await asyncio.sleep(0)
            publisher.wake()
            await publisher.drained()
            spent += cpu_seconds() - start
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return {"cpu": spent / ticks, "messages": number}

    return uvloop.run(work())


def _batch(tick: Tick) -> SampleBatch:
    return SampleBatch(
        host=tick.host,
        agent="a",
        sequence=1,
        source="simulated",
        devices=tick.devices,
        times_ns=tick.times_ns,
        columns=tick.columns,
        nulls=tick.nulls,
    )


def _call(pipe: Any, function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))
    pipe.close()


def apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """In a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--hosts", type=int, default=2000)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, load before {load:.1f}")
    if "readers" in options.only:
        readers = Path(__file__).with_name("nvml.py")
        subprocess.run([sys.executable, str(readers), "--devices", str(options.devices)], check=True)
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedServer(Path(folder) / "nats")
        server.start()
        try:
            if "agent" in options.only:
                agent(options, server.url, folder)
            if "fleet" in options.only:
                fleet(options, server.url, folder)
            if "outage" in options.only:
                outage(server.url, folder)
        finally:
            server.stop()


def agent(options: argparse.Namespace, url: str, folder: str) -> None:
    print(f"\none host × {options.devices} devices, {options.seconds:.0f} s each: CPU of one core")
    for hertz in (1, 50):
        bare = apart(run_bare, 1 / hertz, options.seconds, options.devices)
        ours = apart(run_agent, url, f"{folder}/{hertz}", 1 / hertz, options.seconds, 1, options.devices, True)
        each = (ours["cpu"] - bare["cpu"]) / hertz / options.devices * 1e6
        print(
            f"{hertz:3d} Hz: Corral {ours['cpu']:7.3%}   bare loop {bare['cpu']:7.3%}   "
            f"{each:6.1f} µs a device and tick above it   late {ours['late']}, dropped {ours['dropped']}, "
            f"{ours['rss_mib']:.0f} MiB resident",
            flush=True,
        )


def fleet(options: argparse.Namespace, url: str, folder: str) -> None:
    hosts, devices = options.hosts, options.devices
    print(f"\n{hosts} hosts × {devices} devices at 1 Hz in one process, {options.seconds:.0f} s: CPU of one core")
    ours = apart(run_agent, url, f"{folder}/fleet", 1.0, options.seconds, hosts, devices, False)
    print(
        f"Corral: {ours['cpu']:.1%}, a tick read in {ours['read_ms']:.0f} ms   late {ours['late']}, "
        f"dropped {ours['dropped']}, {ours['messages']} messages, {ours['rss_mib']:.0f} MiB resident",
        flush=True,
    )
    for label, encode in (("json module", None), ("msgspec", msgspec.json.encode)):
        peer = apart(run_objects, url, hosts, devices, 2, encode)
        print(f"an object a device, {label}: {peer['cpu']:.1%} to encode and publish alone", flush=True)


OUTAGE_MESSAGES = 20_000
OUTAGE_BYTES = 2_700
"""A tick of a host with 8 devices."""


def run_outage(url: str, folder: str) -> Result:
    payload = os.urandom(OUTAGE_BYTES)

    async def work() -> Result:
        nc = await connect(url)
        await ensure_layout(nc.jetstream())
        state = Path(folder) / "outage"
        outbox = Outbox(2**30, state)
        outbox.spill()
        marks = [time.perf_counter()]
        for number in range(OUTAGE_MESSAGES):
            outbox.put(subjects.samples_subject(f"h{number % 50}"), f"run-{number + 1}", payload, 8)
        marks.append(time.perf_counter())
        outbox.close()
        outbox = Outbox(2**30, state)
        marks.append(time.perf_counter())
        publisher = Publisher(outbox, url, name="outage")
        task = asyncio.create_task(publisher.run())
        await publisher.drained()
        marks.append(time.perf_counter())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        js = nc.jetstream()
        marks.append(time.perf_counter())
        acks = [
            await js.publish_async(subjects.samples_subject("peer"), payload, headers={"Nats-Msg-Id": f"peer-{number}"})
            for number in range(OUTAGE_MESSAGES)
        ]
        await asyncio.gather(*acks)
        marks.append(time.perf_counter())
        await nc.close()
        spilt, found, sent, _, peer = (after - before for before, after in pairwise(marks))
        return {"spilt": spilt, "found": found, "sent": sent, "peer": peer}

    return uvloop.run(work())


def outage(url: str, folder: str) -> None:
    print(f"\n{OUTAGE_MESSAGES} messages of {OUTAGE_BYTES} bytes over an outage, messages a second")
    result = apart(run_outage, url, folder)
    rates = {name: OUTAGE_MESSAGES / seconds for name, seconds in result.items()}
    print(
        f"put on disk {rates['spilt']:.0f}, found by the next run {rates['found']:.0f}, "
        f"sent from disk in order {rates['sent']:.0f}   nats-py publish_async from memory {rates['peer']:.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
