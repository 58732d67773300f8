"""What the planner's service tests share: a fleet on the bus, planners as processes, and bare requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from corral.planner.service import Settings, plan
from corral.schemas import codec, columns, subjects
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, SampleBatch
from nats.aio.client import Client
from nats.js import api

GIB = 2**30


class FakeHosts:
    """Publishes inventories once and samples at an interval, as collectors do."""

    def __init__(
        self,
        nc: Client,
        hosts: int = 2,
        devices: int = 4,
        memory: int = 80 * GIB,
        prefix: str = "node",
        model: str = "NVIDIA H100",
        **host: Any,
    ) -> None:
        self.nc = nc
        self.model = model
        self.names = [f"{prefix}{number}" for number in range(hosts)]
        self.devices = {name: [f"GPU-{name}-{index}" for index in range(devices)] for name in self.names}
        self.memory = memory
        self.host = host
        self.silent: set[str] = set()
        self.used: dict[str, int] = {}
        self.load: dict[str, float] = {}
        self._sequence = 0
        self._task: asyncio.Task[None] | None = None

    def inventory(self, name: str) -> Inventory:
        return Inventory(
            host=HostInfo(name=name, **{"cpus": 64, "memory_bytes": 512 * GIB, **self.host}),
            agent="fake",
            time_ns=time.time_ns(),
            devices=[
                DeviceInfo(uuid=uuid, host=name, index=index, name=self.model, memory_bytes=self.memory)
                for index, uuid in enumerate(self.devices[name])
            ],
        )

    def samples(self, name: str) -> SampleBatch:
        self._sequence += 1
        uuids = self.devices[name]
        values = {
            "memory_used_bytes": [self.used.get(uuid, 0) for uuid in uuids],
            "memory_total_bytes": [self.memory] * len(uuids),
            "temperature_celsius": [40.0] * len(uuids),
            "gpu_utilization_percent": [self.load.get(uuid, 0.0) for uuid in uuids],
        }
        packed = {metric: columns.pack(METRICS[metric], column) for metric, column in values.items()}
        return SampleBatch(
            host=name,
            agent="fake",
            sequence=self._sequence,
            source="simulated",
            devices=uuids,
            times_ns=columns.pack_times([time.time_ns()] * len(uuids)),
            columns={metric: pair[0] for metric, pair in packed.items() if pair is not None},
        )

    async def publish(self) -> None:
        for name in self.names:
            if name not in self.silent:
                await self.nc.publish(subjects.samples_subject(name), codec.encode(self.samples(name)))

    async def start(self, interval: float = 0.5) -> None:
        for name in self.names:
            await self.nc.publish(subjects.inventory_subject(name), codec.encode(self.inventory(name)))
        await self.publish()
        await self.nc.flush()

        async def run() -> None:
            while True:
                await asyncio.sleep(interval)
                with contextlib.suppress(Exception):
                    await self.publish()

        self._task = asyncio.create_task(run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class PlannerProcess:
    """`corral plan` as a process that can be killed."""

    def __init__(self, url: str, log: Any, *options: str) -> None:
        self.url = url
        self.log = log
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """As `corral plan` would, with its log in a file."""
        code = (
            "import asyncio, ctypes, faulthandler, signal, sys, logging, uvloop, msgspec\n"
            "ctypes.CDLL(None).prctl(1, 9)  # never outlive the test\n"
            "from corral.planner.service import Settings, plan\n"
            "logging.basicConfig(level=logging.INFO, format='%(asctime)s %(levelname)s %(name)s %(message)s')\n"
            "faulthandler.register(signal.SIGUSR2)\n"
            "def stacks():\n"
            "    for task in asyncio.all_tasks():\n"
            "        print(task.get_name(), task.cancelling(), flush=True)\n"
            "        at = task.get_coro()\n"
            "        while at is not None:\n"
            "            print('   ', at, flush=True)\n"
            "            at = getattr(at, 'cr_await', None) or getattr(at, 'gi_yieldfrom', None)\n"
            "async def main():\n"
            "    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stacks)\n"
            "    await plan(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Settings))\n"
            "uvloop.run(main())\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, self.url, self.options[0] if self.options else "{}"],
            stdout=open(self.log, "ab"),  # noqa: SIM115
            stderr=subprocess.STDOUT,
        )

    def kill(self) -> None:
        """As a crash would: no good-bye."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def pause(self, on: bool) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP if on else signal.SIGCONT)

    def print_stacks(self) -> None:
        """Have it print into its log where its threads are, and its tasks if its event loop goes on."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR2)
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(1.0)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.print_stacks()
                self.kill()
                raise


@contextlib.asynccontextmanager
async def running(url: str, **settings: Any) -> AsyncIterator[None]:
    """A planner in this process, for as long as the block lasts."""
    stop = asyncio.Event()
    task = asyncio.create_task(plan(url, Settings(**settings), stop=stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def ask(nc: Client, verb: str, body: Any = None, timeout: float = 5.0, headers: Any = None) -> dict[str, Any]:
    """A request as any NATS client makes it: JSON in, JSON out, no Corral."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = await nc.request(f"corral.v1.plan.{verb}", data, timeout=timeout, headers=headers)
    return json.loads(reply.data)


async def persist(nc: Client, verb: str, body: dict[str, Any], seconds: float = 60.0) -> dict[str, Any]:
    """Ask until there is an answer."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Exception):
            reply = await ask(nc, verb, body, timeout=1.0)
            if reply.get("code") != "unavailable":
                return reply
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer to {verb}")
        await asyncio.sleep(0.05)


async def until_ready(nc: Client, devices: int = 0, timeout: float = 60.0) -> dict[str, Any]:
    """Wait until a planner answers and sees so many usable devices."""
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(Exception):
            fleet = await ask(nc, "fleet", timeout=0.5)
            if fleet.get("usable_devices", 0) >= devices and fleet.get("type") == "fleet":
                return fleet
        if time.monotonic() > deadline:
            raise TimeoutError("no planner is ready")
        await asyncio.sleep(0.05)


async def queued(nc: Client, count: int) -> list[dict[str, Any]]:
    """The queue, once it has so many entries."""
    for _ in range(600):
        entries = (await ask(nc, "queue"))["entries"]
        if len(entries) == count:
            return entries
        await asyncio.sleep(0.05)
    raise TimeoutError(f"the queue never had {count} entries")


async def lease_events(nc: Client) -> list[tuple[str, dict[str, Any]]]:
    """All lease events on the stream of facts."""
    events = stream(nc, subjects.FACTS_STREAM, f"{subjects.LEASE_EVENTS}.>")
    return [(message.subject, json.loads(message.data)) async for message in events]


async def stream(nc: Client, name: str, subject: str) -> AsyncIterator[Any]:
    """Every message of a stream."""
    config = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE)
    subscription = await nc.jetstream().pull_subscribe(subject, stream=name, config=config)
    info = await subscription.consumer_info()
    left = info.num_pending or 0
    while left:
        for message in await subscription.fetch(min(left, 500), timeout=5):
            left -= 1
            yield message
    await subscription.unsubscribe()
