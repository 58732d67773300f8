"""From NVML to the bus: the source under the real agent, on a real server."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pynvml
import pytest
from corral.cli.local.server import EmbeddedServer
from corral.collectors.nvml.source import NvmlSource
from corral.collectors.service import collect
from corral.schemas import codec, columns, subjects
from corral.schemas.telemetry import DeviceEvent, Inventory, ProcessBatch, SampleBatch, Severity
from nats.aio.client import Client
from support.fake_nvml import FakeNvml


async def test_samples_events_processes_and_inventory_arrive(
    server: EmbeddedServer, nc: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml()
    nvml.install(monkeypatch)
    nvml.devices[1].compute = [(os.getpid(), 2**30)]
    got: dict[str, list[Any]] = {"samples": [], "events": [], "processes": [], "inventory": []}
    kinds = {"samples": SampleBatch, "events": DeviceEvent, "processes": ProcessBatch, "inventory": Inventory}
    arrived = asyncio.Condition()

    async def until(condition: Any) -> None:
        async with asyncio.timeout(10), arrived:
            await arrived.wait_for(condition)

    for token, kind in kinds.items():

        async def take(message: Any, token: str = token, kind: Any = kind) -> None:
            async with arrived:
                got[token].append(codec.decode(message.data, kind))
                arrived.notify_all()

        await nc.subscribe(f"{subjects.PREFIX}.{token}.gpu-7", cb=take)

    source = NvmlSource("gpu-7", {})
    agent = asyncio.create_task(
        collect(
            source,
            name="gpu-7",
            nats_url=server.url,
            interval_seconds=0.02,
            batch_seconds=0.1,
            processes_seconds=0.1,
            state=tmp_path,
        )
    )
    await until(lambda: got["samples"] and got["processes"] and got["inventory"])
    batch: SampleBatch = got["samples"][-1]
    columns.check(batch)
    assert batch.source == "nvml"
    assert batch.devices == [device.uuid for device in nvml.devices]
    assert all(watts == pytest.approx(512.345) for watts in columns.column(batch, "power_watts") or (None,))
    assert [d.name for d in got["inventory"][0].devices] == ["NVIDIA H100 80GB HBM3"] * 2
    assert [(p.device, p.pid) for p in got["processes"][0].processes] == [(nvml.devices[1].uuid, os.getpid())]

    raised = time.time_ns()
    nvml.raise_event(nvml.devices[0], pynvml.nvmlEventTypeXidCriticalError, 79)
    await until(lambda: any(event.kind == "xid" for event in got["events"]))
    (xid,) = [event for event in got["events"] if event.kind == "xid"]
    assert (xid.code, xid.severity, xid.device) == (79, Severity.HARDWARE, nvml.devices[0].uuid)
    assert xid.time_ns >= raised

    # The device goes for good; the other one is still sampled, and the batch changes its shape.
    nvml.devices[0].dead = 15
    await until(lambda: got["samples"][-1].devices == [nvml.devices[1].uuid])
    assert any(event.kind == "device_lost" for event in got["events"])

    agent.cancel()
    with pytest.raises(asyncio.CancelledError):
        await agent
    assert nvml.initialized == 0
    assert nvml.open_sets == 0
