"""A source that fails, hangs and comes back: the agent tells, goes on, and skips what is late."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
from corral.collectors.agent import agent as agent_module
from corral.collectors.agent import reader as reader_module
from corral.collectors.agent.agent import Agent, AgentSettings
from corral.collectors.agent.outbox import Outbox
from corral.collectors.service import state_folder
from corral.collectors.source import Emit, EndOfData, SourceEvent, SourceUnavailable, Tick
from corral.schemas import codec, columns
from corral.schemas.telemetry import AgentReport, DeviceEvent, DeviceInfo, HostInfo, Inventory, SampleBatch, Severity


class Script:
    """A source that does what it is told: one step a read."""

    name = "script"

    def __init__(self, steps: list[object]) -> None:
        self.steps = steps
        self.opened = 0
        self.threads: set[int] = set()
        self.hang = threading.Event()
        self.devices = ["d0"]

    def open(self, emit: Emit) -> None:
        self.opened += 1
        self.emit = emit

    def inventory(self) -> list[Inventory]:
        devices = [DeviceInfo(uuid=uuid, host="h", index=at) for at, uuid in enumerate(self.devices)]
        return [Inventory(host=HostInfo(name="h"), agent="", time_ns=1, devices=devices)]

    def read(self) -> list[Tick]:
        self.threads.add(threading.get_ident())
        if not self.steps:
            raise EndOfData
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        if step == "hang":
            self.hang.wait(5)
        if step == "grow":
            self.devices.append("d1")
            self.emit(SourceEvent(host="h", time_ns=1, kind="mig_changed"))
        if isinstance(step, float):
            time.sleep(step)
        return [Tick(host="h", devices=["d0"], times_ns=columns.pack_times([time.time_ns()]), columns={})]

    def processes(self) -> dict[str, list]:
        return {}

    def close(self) -> None:
        pass


async def run(source: Script, **settings: float) -> dict[str, list]:
    """Run an agent to the end of the data; what it wanted to publish, by kind."""
    outbox = Outbox(2**20)
    agent = Agent(
        source,
        outbox,
        AgentSettings(name="h", interval_seconds=0.02, batch_seconds=0.02, **settings),
        wake=lambda: None,
        published=lambda: 0,
    )
    async with asyncio.timeout(20):
        await agent.run()
    types = {"samples": SampleBatch, "events": DeviceEvent, "agents": AgentReport, "inventory": Inventory}
    found: dict[str, list] = {kind: [] for kind in types}
    nonces: set[str] = set()
    while entry := outbox.take():
        number = len(nonces) + 1
        nonce, _, rest = entry.message_id.partition(".")
        assert rest == f"{agent.id}-{number}"
        # Nobody can tell the next one's id from this one's.
        assert len(bytes.fromhex(nonce)) == 8
        nonces.add(nonce)
        kind = entry.subject.split(".")[2]
        found[kind].append(codec.decode(entry.payload, types[kind]))
    return found


async def test_a_driver_that_goes_and_comes_is_told_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "RETRY_SECONDS", 0.01)
    gone = [SourceUnavailable("no driver"), SourceUnavailable("no driver"), ValueError("a bug")]
    source = Script([None, *gone, None, None])
    found = await run(source)
    assert len(found["samples"]) == 3
    assert source.opened == 4
    assert len(source.threads) == 1
    events = [(event.kind, event.severity) for event in found["events"]]
    assert events == [
        ("agent_started", Severity.INFO),
        ("driver_lost", Severity.WARNING),
        ("driver_returned", Severity.CLEARED),
        ("agent_stopped", Severity.INFO),
    ]
    assert found["agents"][-1].read_errors == 3
    assert found["agents"][-1].ticks == 3


async def test_a_slow_tick_costs_the_ticks_that_it_covers_and_no_more() -> None:
    found = await run(Script([None, 0.2, None, None]))
    report = found["agents"][-1]
    assert report.ticks == len(found["samples"]) == 4
    # 0.2 s hold ten ticks of 20 ms: the one that took so long, and those that it covered.
    assert report.late_ticks >= 8
    assert report.read_seconds_max >= 0.2


async def test_a_read_that_hangs_is_told_while_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "HANG_SECONDS", 0.1)
    source = Script([None, "hang", None])
    asyncio.get_running_loop().call_later(0.6, source.hang.set)
    found = await run(source, report_seconds=0.1)
    kinds = [event.kind for event in found["events"]]
    assert kinds.count("driver_hangs") == kinds.count("driver_returned") == 1
    hanging = [report for report in found["agents"] if report.ticks == 1]
    assert hanging[-1].late_ticks > 5
    assert hanging[-1].read_seconds_max > 0.2


async def test_an_inventory_is_published_at_the_start_and_when_it_changes() -> None:
    found = await run(Script([None, None, "grow", None, None]))
    assert [len(inventory.devices) for inventory in found["inventory"]] == [1, 2]
    assert {inventory.source for inventory in found["inventory"]} == {"script"}


def test_the_state_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CORRAL_STATE_DIR", "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert state_folder("h") == Path("/home/ada/.local/state/corral/collector/h")
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert state_folder("h") == Path("/x/corral/collector/h")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/corral:/var/lib/other")
    assert state_folder("h") == Path("/var/lib/corral/collector/h")
    monkeypatch.setenv("CORRAL_STATE_DIR", "/c")
    assert state_folder("h") == Path("/c/collector/h")
    assert state_folder("h", Path("/given")) == Path("/given/collector/h")
