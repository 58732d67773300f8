"""An agent reports all that it loses: the messages that are missing are those that it has counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from corral.collectors.agent.agent import Agent, AgentSettings
from corral.collectors.agent.outbox import Entry, Outbox
from corral.collectors.agent.publisher import _number
from corral.collectors.source import Emit, Tick
from corral.schemas import codec, columns
from corral.schemas import subjects as bus
from corral.schemas.telemetry import AgentReport, DeviceEvent, Inventory, ProcessSample

SETTINGS = AgentSettings(name="fleet", interval_seconds=0.02, batch_seconds=0.02, report_seconds=0.05)


class Bare:
    """Many hosts with a device each that has no metric: a message is smaller than any that tells of drops."""

    name = "simulated"

    def __init__(self, hosts: int) -> None:
        self.hosts = [f"h{number}" for number in range(hosts)]

    def open(self, emit: Emit) -> None: ...

    def inventory(self) -> Sequence[Inventory]:
        return ()

    def read(self) -> Sequence[Tick]:
        times = columns.pack_times([time.time_ns()])
        return [Tick(host=host, devices=["gpu"], times_ns=times, columns={}) for host in self.hosts]

    def processes(self) -> dict[str, list[ProcessSample]]:
        return {host: [] for host in self.hosts}

    def close(self) -> None: ...


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def full(*_: object, **__: object) -> list[int]:
    raise OSError(28, "No space left on device")


def missing(entries: Sequence[Entry]) -> int:
    """Number of sequences up to the last that are missing."""
    numbers = [_number(entry.message_id)[1] for entry in entries]
    assert numbers == sorted(set(numbers))
    return numbers[-1] - len(numbers)


@pytest.mark.parametrize("where", ["memory", "disk", "behind a full disk"])
async def test_nothing_is_dropped_for_what_tells_of_drops(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(20_000, None if where == "memory" else tmp_path, memory_bytes=10_000)
    if outbox._spill is not None:
        outbox.spill()
    if where == "behind a full disk":
        outbox.put("first", "run.first-0", b"-")
        monkeypatch.setattr(outbox._spill, "append", full)
    enough = asyncio.Event()

    def look() -> None:
        if outbox.dropped_messages >= 200:
            enough.set()

    agent = Agent(Bare(20), outbox, SETTINGS, wake=look, published=lambda: 0)
    task = asyncio.create_task(agent.run())
    async with asyncio.timeout(20):
        await enough.wait()
    await ended(task)
    found = [entry for entry in iter(outbox.take, None) if entry.subject != "first"]
    outbox.close(keep=False)
    reports = [codec.decode(entry.payload, AgentReport) for entry in found if bus.AGENTS in entry.subject]
    events = [codec.decode(entry.payload, DeviceEvent) for entry in found if bus.EVENTS in entry.subject]
    assert events[-1].kind == "agent_stopped"
    assert reports[-1].dropped_messages == outbox.dropped_messages == missing(found)
    assert reports[-1].dropped_samples == outbox.dropped_samples
    told = [event.data for event in events if event.kind == "samples_dropped"][-1]
    assert (told["messages_total"], told["samples_total"]) == (outbox.dropped_messages, outbox.dropped_samples)


async def test_a_reading_that_is_cut_short_by_the_end_is_taken_to_its_end() -> None:
    outbox = Outbox(2**20)
    task: asyncio.Task[None] | None = None

    def end() -> None:
        """Yield to other tasks, between the hosts of one reading."""
        if task is not None and agent.ticks and not task.cancelling():
            task.cancel()

    agent = Agent(Bare(200), outbox, SETTINGS, wake=end, published=lambda: 0)
    task = asyncio.create_task(agent.run())
    async with asyncio.timeout(20):
        await asyncio.gather(task, return_exceptions=True)
    subjects = [entry.subject.rpartition(".")[0] for entry in iter(outbox.take, None)]
    assert subjects.count(bus.SAMPLES) == 200 * agent.ticks > 0
    assert subjects.count(bus.PROCESSES) == 200
