"""Messages for tests of the history, and how to ask it."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from corral.processors.ingest import facts
from corral.processors.ingest.columnar import SCHEMA, Incoming
from corral.processors.ingest.deduplication import Arrivals
from corral.processors.storage import Batch, Database
from corral.processors.storage.embedded import rollups
from corral.schemas import codec, subjects
from corral.schemas.metrics import METRICS
from corral.schemas.query import ProcessorStatus
from corral.schemas.requests import LeaseEvent
from corral.schemas.telemetry import AgentReport, DeviceInfo, HostInfo, Inventory, SampleBatch
from msgspec import Struct
from nats.aio.client import Client
from support.empty_history import empty_history


def sample_batch(
    host: str = "h1",
    sequence: int = 1,
    *,
    agent: str = "",
    devices: int = 4,
    ticks: int = 3,
    start_ns: int | None = None,
    step_ns: int = 1_000_000_000,
    noisy: bool = False,
    metrics: tuple[str, ...] = ("gpu_utilization_percent", "power_watts", "memory_used_bytes", "energy_millijoules"),
) -> SampleBatch:
    """A batch whose values say where they come from: each column counts its values from the sequence on.

    `noisy` ones do not compress.
    """
    start = time.time_ns() - ticks * step_ns if start_ns is None else start_ns
    count = devices * ticks
    times = np.repeat(start + np.arange(ticks, dtype="<i8") * step_ns, devices)
    values = np.random.default_rng(sequence).random(count) * 100 if noisy else (np.arange(count) + sequence) % 100
    return SampleBatch(
        host=host,
        agent=agent or f"run-{host}",
        sequence=sequence,
        source="simulated",
        devices=[f"GPU-{host}-{at}" for at in range(devices)],
        times_ns=times.astype("<i8").tobytes(),
        columns={name: values.astype(METRICS[name].row.unit.dtype).tobytes() for name in metrics},
    )


def known_since_version_3() -> facts.Facts:
    """An agent's report and an inventory with what tables of version 2 had no column for."""
    now = time.time_ns()
    devices = [
        DeviceInfo(uuid="GPU-1", host="h1", index=0, mig_enabled=True),
        DeviceInfo(uuid="MIG-1", host="h1", index=1, mig_parent="GPU-1", mig_profile="1g.10gb", mig_instance=5),
    ]
    told = [
        (subjects.agent_subject("h1"), AgentReport(host="h1", agent="a", sequence=1, time_ns=now, ticks=3, samples=17)),
        (
            subjects.inventory_subject("h1"),
            Inventory(host=HostInfo(name="h1"), agent="a", time_ns=now, devices=devices),
        ),
    ]
    messages = [Incoming(subject, codec.encode(body), at) for at, (subject, body) in enumerate(told, 1)]
    found = facts.decode(messages, lambda *_: True, now)
    assert not found.refused
    return found


class Asking:
    """Asks a processor over the bus, as a client would."""

    def __init__(self, nc: Client) -> None:
        self.nc = nc

    async def rows(self, sql: str) -> list[list[Any]]:
        """The rows of a query."""
        body = json.dumps({"sql": sql}).encode()
        answer = json.loads((await self.nc.request(subjects.QUERY, body, timeout=60)).data)
        assert answer["type"] == "result", answer
        return answer["rows"]

    async def until(self, sql: str, value: Any, seconds: float = 60.0) -> None:
        """Wait until a query answers with one value."""
        deadline = time.monotonic() + seconds
        found: Any = None
        while (began := time.monotonic()) < deadline:
            found = (await self.rows(sql))[0][0]
            if found == value:
                return
            # An expensive query is asked less often: what is waited for needs the time.
            await asyncio.sleep(max(0.05, min(2 * (time.monotonic() - began), 1.0)))
        raise AssertionError(f"{sql}: {found}, not {value}")

    async def status(self) -> ProcessorStatus:
        """What the processor says of itself."""
        return codec.decode((await self.nc.request(subjects.HISTORY_STATUS, b"")).data, ProcessorStatus, codec.JSON)


def inventory(host: str, *devices: str, name: str = "H100") -> Inventory:
    found = [DeviceInfo(uuid=uuid, host=host, index=at, name=name) for at, uuid in enumerate(devices)]
    return Inventory(host=HostInfo(name=host), agent="a", time_ns=10**18, devices=found)


class History:
    """Messages on their subjects, each stored a second after the one before."""

    def __init__(self, path: Path) -> None:
        self.database = Database(Path(shutil.copy(empty_history(), path)))
        self.stored_ns = time.time_ns() - 30 * 10**9
        self.sequence = 0
        self.without_processes: set[str] = set()

    def take(self, subject: str, message: Struct, *, after: float = 1.0) -> list[str]:
        self.sequence += 1
        self.stored_ns += int(after * 1e9)
        kind = codec.JSON if isinstance(message, LeaseEvent) else codec.MSGPACK
        incoming = Incoming(subject, codec.encode(message, kind), self.sequence, None, self.stored_ns)
        found = facts.decode([incoming], Arrivals().is_new, 0, without_processes=self.without_processes)
        self.database.commit(
            Batch(
                stream="S", sequence=self.sequence, tables=found.tables(), inventories=found.inventories,
                leases=found.leases,
            )
        )  # fmt: skip
        return [refusal.code for refusal in found.refused]

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.database.cursor().execute(sql).fetchall()

    def sample(self, series: int, at: datetime, **values: float) -> None:
        """One sample of a device, in the rollups too."""
        self.sequence += 1
        columns = {field.name: [values.get(field.name)] for field in list(SCHEMA)[2:]}
        table = pa.table({"time": [at], "series": [series]} | columns, schema=SCHEMA)
        self.database.commit(Batch(stream="S", sequence=self.sequence, samples=table))
        for level in rollups.LEVELS:
            rollups.refresh(self.database.cursor(), level, sorted(self.database.days))
