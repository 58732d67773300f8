"""A small cluster with load on it, to be broken."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from corral.bus.connect import URL_VARIABLE
from corral.schemas import codec, subjects
from corral.schemas.telemetry import Inventory
from support.chaos.load import (
    Account,
    Load,
    account_for_leases,
    account_for_telemetry,
    connect,
    limit_cores,
    read_stream,
)
from support.chaos.parts import CORRAL, Bus, Host, Network, Part, Place

HOSTS, DEVICES = 2, 4
COLLECTORS = 2


class World:
    """Servers, two planners, a processor and two collectors of simulated fleets, each a process.

    Args:
        folder: for everything.
        account: of the run; faults add to it.
        servers: one, or three that form a cluster.
        spread: each part on a network host of its own.
        planner: options of the planners.
        processor: options of the processor.
        bus_store: where the servers keep their streams.
        bus_options: more of their `jetstream` block.
        history: the database's path.
        clock: environment that gives the second collector a clock of its own.
    """

    def __init__(
        self,
        folder: Path,
        account: Account,
        *,
        servers: int = 1,
        spread: bool = False,
        planner: Sequence[str] = (),
        processor: Sequence[str] = (),
        bus_store: Sequence[Path] = (),
        bus_options: str = "",
        history: Path | None = None,
        clock: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.account = folder, account
        self.seed = random.SystemRandom().getrandbits(32)
        self.random = random.Random(self.seed)
        self.network = Network() if spread else None
        self.bus = Bus(folder, [self.place() for _ in range(servers)], store=bus_store, options=bus_options)
        self.db = history or folder / "history" / "history.duckdb"
        self.db.parent.mkdir(parents=True, exist_ok=True)
        self.processor = self.part("processor", "process", "--db", str(self.db), *processor)
        self.planners = [self.part(f"planner{number}", "plan", *planner) for number in range(2)]
        self.collectors = [
            self.collector(f"c{number}", environment=clock if number else None) for number in range(COLLECTORS)
        ]
        self.load = Load(self.bus.urls)
        self.fault_at = 0.0
        self.lost_hosts: set[str] = set()
        self.load.hosts = COLLECTORS * HOSTS

    def place(self) -> Place:
        return self.network.host() if self.network is not None else Place()

    def part(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> Part:
        given = {URL_VARIABLE: self.bus.url, **(environment or {})}
        return Part(name, [*CORRAL, *arguments], self.folder, self.place(), given)

    def collector(self, prefix: str, *options: str, environment: dict[str, str] | None = None) -> Part:
        arguments = ["collect", "--source", "simulated", "--prefix", prefix, "--hosts", str(HOSTS)]
        arguments += ["--devices", str(DEVICES), "--models", "H100", "--background", "0", "--faults", "0"]
        arguments += ["--interval", "200ms", "--batch", "200ms", "--state", str(self.folder / f"state-{prefix}")]
        return self.part(f"collector-{prefix}", *arguments, *options, environment=environment)

    @property
    def parts(self) -> list[Part]:
        return [self.processor, *self.planners, *self.collectors]

    async def start(self) -> None:
        self.bus.start()
        for part in self.parts:
            part.start()
        nc = await connect(self.bus.urls)
        try:
            deadline = time.monotonic() + 60
            fleet: dict[str, Any] = {}
            while fleet.get("usable_devices", 0) < COLLECTORS * HOSTS * DEVICES:
                if time.monotonic() > deadline:
                    tails = "\n".join(f"{part.name}: {part.tail(600)}" for part in [*self.bus.servers, *self.parts])
                    raise AssertionError(f"the cluster did not come up: {fleet}\n{tails}")
                await asyncio.sleep(0.1)
                with contextlib.suppress(Exception):
                    fleet = json.loads((await nc.request("corral.v1.plan.fleet", b"", timeout=0.5)).data)
            inventories = await read_stream(nc, subjects.INVENTORY_STREAM)
            limit_cores(max(codec.decode(data, Inventory).host.cpus for _, data in inventories))
        finally:
            await nc.close()
        await self.load.start(self.seed)
        await self.load.until_served()
        # What starting cost is not the fault's.
        self.fault_at = time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def finish(self, *, back: float = 180.0) -> None:
        """Wait until all is served again, end the load, and make the account."""
        account, load = self.account, self.load
        await load.until_served(back)
        account.placement_back_seconds = round(load.placement.outage(self.fault_at), 1)
        account.history_back_seconds = round(load.records.outage(self.fault_at), 1)
        await load.stop()
        codes = [(part.name, await asyncio.to_thread(part.stop)) for part in self.collectors if part.running]
        account.wrong += [f"{name} ended with code {code}" for name, code in codes if code]
        await account_for_telemetry(load, account)
        for planner in self.planners:
            if planner.running:
                await asyncio.to_thread(planner.stop)
        await account_for_leases(load, account, lost_hosts=frozenset(self.lost_hosts))
        if self.processor.running:
            await asyncio.to_thread(self.processor.stop)

    async def close(self) -> None:
        await self.load.close()
        for part in [*self.parts, *self.bus.servers]:
            with contextlib.suppress(ProcessLookupError):
                part.kill()
        if self.network is not None:
            self.network.close()

    def host(self, part: Part) -> Host:
        assert isinstance(part.place, Host)
        return part.place


@contextlib.asynccontextmanager
async def world(folder: Path, account: Account, **options: Any) -> AsyncIterator[World]:
    """A cluster that serves and has load on it; afterwards the account is made, unless the block failed."""
    made = World(folder, account, **options)
    try:
        await made.start()
        yield made
        await made.finish()
        account.note = f"{account.note} seed {made.seed}".strip()
    finally:
        await made.close()
