"""Clients that ask a planner as fast as it answers, and a fleet that it hears of, for the benchmarks of the planner."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from typing import Any

import uvloop
from corral.bus.connect import connect
from corral.planner.limits import Limits
from corral.planner.service import Settings, plan
from corral.schemas import codec, columns, subjects
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, SampleBatch
from nats.aio.client import Client

GIB = 2**30
PER_HOST = 8
HEADER = f"{'':34}{'clients':>8}{'per s':>10}{'p50 ms':>9}{'p99 ms':>9}"


class Raw(asyncio.Protocol):
    """A NATS client with one inbox that sends the next message as soon as it has an answer."""

    def __init__(self, number: int, subject: str, body: Callable[[int, bytes], tuple[str, bytes] | None]) -> None:
        self.inbox = f"_INBOX.bench{os.getpid()}x{number}"
        self.subject = subject
        self.body = body
        self.sent_at = 0.0
        self.count = 0
        self.latencies: list[float] = []
        self.running = False
        self.buffer = b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(b'CONNECT {"verbose":false,"headers":true,"no_responders":true,"protocol":1}\r\n')
        transport.write(f"SUB {self.inbox} 1\r\nPING\r\n".encode())

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            line, found, rest = self.buffer.partition(b"\r\n")
            if not found:
                return
            if line.startswith((b"MSG", b"HMSG")):
                words = line.split(b" ")
                size, headers = int(words[-1]), int(words[-2]) if line.startswith(b"HMSG") else 0
                if len(rest) < size + 2:
                    return
                self.buffer = rest[size + 2 :]
                self.answered(rest[headers:size])
            else:
                self.buffer = rest
                if line == b"PING":
                    self.transport.write(b"PONG\r\n")

    def answered(self, data: bytes) -> None:
        self.latencies.append(time.perf_counter() - self.sent_at)
        self.send(data)

    def send(self, answer: bytes = b"") -> None:
        made = self.body(self.count, answer) if self.running else None
        if made is None:
            if not self.over.done():
                self.over.set_result(None)
            return
        self.count += 1
        subject, payload = made
        self.sent_at = time.perf_counter()
        self.transport.write(b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), self.inbox.encode(), len(payload), payload))


async def drive(
    label: str, url: str, clients: int, seconds: float, body: Callable[[int], Callable[[int, bytes], Any]]
) -> tuple[float, float, float]:
    """So many clients for so long; print what they saw."""
    loop = asyncio.get_running_loop()
    host, port = url.removeprefix("nats://").split(":")
    raws: list[Raw] = []
    for number in range(clients):
        _, raw = await loop.create_connection(lambda n=number: Raw(n, "", body(n)), host, int(port))
        raws.append(raw)
    await asyncio.sleep(0.2)
    started = time.perf_counter()
    for raw in raws:
        raw.running = True
        raw.send()
    await asyncio.sleep(seconds)
    for raw in raws:
        raw.running = False
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.gather(*(raw.over for raw in raws)), 5)
    took = time.perf_counter() - started
    latencies = sorted(latency for raw in raws for latency in raw.latencies)
    for raw in raws:
        raw.transport.close()
    rate, p50, p99 = (
        len(latencies) / took,
        latencies[len(latencies) // 2] * 1e3,
        latencies[int(len(latencies) * 0.99)] * 1e3,
    )
    print(f"{label:34}{clients:>8}{rate:>10,.0f}{p50:>9.2f}{p99:>9.2f}", flush=True)
    return rate, p50, p99


async def feed(url: str, gpus: int, stop: Any) -> None:
    """Inventories once, then samples of every host each 2 s, less often in fleets of over 40,000 devices."""
    interval = max(2.0, gpus / 20_000)
    nc = await connect(url)
    hosts = [f"node{number:05d}" for number in range(gpus // PER_HOST)]
    uuids = {host: [f"GPU-{host}-{index}" for index in range(PER_HOST)] for host in hosts}
    models = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "Tesla T4")
    for at, host in enumerate(hosts):
        info = Inventory(
            host=HostInfo(name=host, cpus=128, memory_bytes=1024 * GIB),
            agent="bench",
            time_ns=time.time_ns(),
            devices=[
                DeviceInfo(uuid=uuid, host=host, index=index, name=models[at % 4], memory_bytes=80 * GIB)
                for index, uuid in enumerate(uuids[host])
            ],
        )
        await nc.publish(subjects.inventory_subject(host), codec.encode(info))
    packed = {
        metric: columns.pack(METRICS[metric], [value] * PER_HOST)
        for metric, value in (("memory_used_bytes", 0), ("memory_total_bytes", 80 * GIB), ("temperature_celsius", 40.0))
    }
    sequence = 0
    while not stop.is_set():
        started = time.monotonic()
        for host in hosts:
            sequence += 1
            batch = SampleBatch(
                host=host,
                agent="bench",
                sequence=sequence,
                source="simulated",
                devices=uuids[host],
                times_ns=columns.pack_times([time.time_ns()] * PER_HOST),
                columns={metric: pair[0] for metric, pair in packed.items() if pair is not None},
            )
            await nc.publish(subjects.samples_subject(host), codec.encode(batch))
        await nc.flush()
        await asyncio.sleep(max(0.0, interval - (time.monotonic() - started)))
    await nc.close()


def run_feed(url: str, gpus: int, stop: Any) -> None:
    uvloop.run(feed(url, gpus, stop))


def run_planner(url: str, profile: str, policy: str | None) -> None:
    settings = Settings(stale_after_seconds=60.0, policy=policy, limits=Limits(requests_per_second=0, waiting=100_000))
    if not profile:
        uvloop.run(plan(url, settings))
        return
    import cProfile

    profiler = cProfile.Profile()
    profiler.enable()
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        uvloop.run(plan(url, settings))
    profiler.disable()
    profiler.dump_stats(profile)


def start_planner(url: str, gpus: int, stop: Any, profile: str = "", policy: str | None = None) -> list[SpawnProcess]:
    """A planner, and a fleet that it hears of until `stop` is set, as processes."""
    context = multiprocessing.get_context("spawn")
    parts = [
        context.Process(target=run_planner, args=(url, profile, policy)),
        context.Process(target=run_feed, args=(url, gpus, stop)),
    ]
    for part in parts:
        part.start()
    return parts


async def until_usable(nc: Client, gpus: int) -> None:
    """Wait until the planner sees all devices."""
    ready = 0
    while ready < gpus // PER_HOST * PER_HOST:
        await asyncio.sleep(0.5)
        with contextlib.suppress(Exception):
            fleet = json.loads((await nc.request("corral.v1.plan.fleet", b"", timeout=5)).data)
            ready = fleet["usable_devices"]


def grants_only(shares: int) -> Callable[[int], Callable[[int, bytes], Any]]:
    """Every request takes a little of a device and keeps it."""

    def client(number: int) -> Callable[[int, bytes], Any]:
        payload = json.dumps(
            {"owner": f"client{number}", "gpus": 1, "gpu_share": shares / 1000, "ttl_seconds": 3600}
        ).encode()

        def body(count: int, answer: bytes) -> tuple[str, bytes]:
            if count and b'"assignment"' not in answer[:100]:
                raise SystemExit(f"not granted: {answer.decode()[:500]}")
            return "corral.v1.plan.request", payload

        return body

    return client


def grant_and_release(number: int) -> Callable[[int, bytes], Any]:
    """Whole devices, each given back before the next is asked for."""
    owner = f"client{number}"
    payload = json.dumps({"owner": owner, "gpus": 1, "ttl_seconds": 3600}).encode()

    def body(count: int, answer: bytes) -> tuple[str, bytes]:
        if count % 2:
            lease = json.loads(answer)["lease"]["lease_id"]
            return "corral.v1.plan.release", json.dumps({"owner": owner, "lease_id": lease}).encode()
        return "corral.v1.plan.request", payload

    return body
