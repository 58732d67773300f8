"""The simulated fleet: the same from the same seed, within what is possible, and obedient to leases."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from corral.cli.local.server import EmbeddedServer
from corral.collectors.processes.lease_feed import LeaseFeed
from corral.collectors.service import collect
from corral.collectors.simulated.models import MODELS
from corral.collectors.simulated.source import SimulatedSource
from corral.collectors.source import SourceEvent, Tick
from corral.schemas import codec, columns, subjects
from corral.schemas.metrics import METRICS, DeviceSample
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState
from corral.schemas.telemetry import Link, ProcessBatch, SampleBatch, Severity
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from nats.aio.client import Client

GIB = 2**30
START_NS = 1_800_000_000 * 10**9


class Clock:
    def __init__(self) -> None:
        self.now_ns = START_NS

    def __call__(self) -> int:
        return self.now_ns


def rows(ticks: list[Tick]) -> list[DeviceSample]:
    found: list[DeviceSample] = []
    for tick in ticks:
        batch = SampleBatch(
            host=tick.host,
            agent="a",
            sequence=1,
            source="simulated",
            devices=tick.devices,
            times_ns=tick.times_ns,
            columns=tick.columns,
            nulls=tick.nulls,
        )
        columns.check(batch)
        found += columns.rows(batch)
    return found


def played(source: SimulatedSource, clock: Clock, seconds: int, step: float = 1.0) -> list[DeviceSample]:
    """Play it for a while; the samples of the last tick."""
    ticks: list[Tick] = []
    for _ in range(round(seconds / step)):
        clock.now_ns += int(step * 1e9)
        ticks = list(source.read())
    return rows(ticks)


def lease(
    device: str, memory: int, lease_id: str = "l1", state: LeaseState = LeaseState.ACTIVE, granted_ns: int = START_NS
) -> Lease:
    now = datetime.now(UTC)
    return Lease(
        lease_id=lease_id,
        owner="ada",
        state=state,
        granted_at=datetime.fromtimestamp(granted_ns / 1e9, UTC),
        expires_at=now + timedelta(hours=1),
        ttl_seconds=3600,
        grants=[Grant(host="sim-0001", device=device, memory_bytes=memory)],
        name="train",
    )


def test_the_same_seed_is_the_same_fleet_and_a_larger_one_begins_alike() -> None:
    def fleet(hosts: int, seed: int) -> tuple[list[str], list[Tick]]:
        clock = Clock()
        source = SimulatedSource(hosts, 4, seed=seed, background=0.5, clock_ns=clock)
        source.open(lambda event: None)
        for _ in range(5):
            clock.now_ns += 10**9
            ticks = list(source.read())
        return [device.uuid for inventory in source.inventory() for device in inventory.devices], ticks

    assert fleet(6, 7) == fleet(6, 7)
    assert fleet(6, 7)[1] != fleet(6, 8)[1]
    assert not set(fleet(6, 7)[0]) & set(fleet(6, 8)[0])
    assert fleet(3, 7) == (fleet(6, 7)[0][:12], fleet(6, 7)[1][:3])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 9), st.floats(0, 1), st.sampled_from([0.02, 1, 600]))
def test_every_value_is_possible(seed: int, hosts: int, devices: int, background: float, step: float) -> None:
    clock = Clock()
    source = SimulatedSource(
        hosts, devices, seed=seed, background=background, faults_per_device_day=200, clock_ns=clock
    )
    events: list[SourceEvent] = []
    source.open(events.append)
    memory = {device.uuid: device.memory_bytes for inventory in source.inventory() for device in inventory.devices}
    before: dict[str, DeviceSample] = {}
    for _ in range(6):
        clock.now_ns += int(step * 1e9)
        for sample in rows(list(source.read())):
            for name, metric in METRICS.items():
                value = getattr(sample, name)
                if value is not None:
                    assert metric.minimum is None or value >= metric.minimum, (name, value)
                    assert metric.maximum is None or value <= metric.maximum, (name, value)
            parts = (sample.memory_used_bytes, sample.memory_free_bytes, sample.memory_reserved_bytes)
            assert sum(part or 0 for part in parts) == sample.memory_total_bytes == memory[sample.device]
            earlier = before.get(sample.device)
            if earlier is not None:
                assert (sample.energy_millijoules or 0) >= (earlier.energy_millijoules or 0)
                assert (sample.ecc_corrected_count or 0) >= (earlier.ecc_corrected_count or 0)
            before[sample.device] = sample
    assert set(before) <= set(memory)
    assert {event.device for event in events} <= set(memory)


def test_memory_load_heat_and_energy_follow_a_lease() -> None:
    clock = Clock()
    source = SimulatedSource(1, 2, models="H100", background=0, faults_per_device_day=0, clock_ns=clock)
    source.open(lambda event: None)
    device = source.inventory()[0].devices[0].uuid
    idle = played(source, clock, 120)[0]
    assert idle.memory_used_bytes == 0
    assert idle.gpu_utilization_percent == 0

    source.set_leases([lease(device, 20 * GIB, granted_ns=clock.now_ns)])
    early = played(source, clock, 2)[0]
    busy, other = played(source, clock, 60)
    assert 0 < (early.memory_used_bytes or 0) < (busy.memory_used_bytes or 0)
    assert 0.5 * 20 * GIB < (busy.memory_used_bytes or 0) <= 20 * GIB
    assert (busy.gpu_utilization_percent or 0) > 20
    assert (busy.power_watts or 0) > 2 * (idle.power_watts or 0)
    assert (busy.temperature_celsius or 0) > (idle.temperature_celsius or 0) + 5
    assert busy.performance_state == 0
    assert other.memory_used_bytes == 0

    processes = source.processes()["sim-0001"]
    assert [(process.device, process.lease, process.user) for process in processes] == [(device, "l1", "ada")]
    assert processes[0].memory_used_bytes == busy.memory_used_bytes

    # Energy is the integral of power.
    joules = 0.0
    for _ in range(50):
        clock.now_ns += 10**8
        now = rows(list(source.read()))[0]
        joules += (now.power_watts or 0) * 0.1
    assert (now.energy_millijoules or 0) - (busy.energy_millijoules or 0) == pytest.approx(joules * 1000, rel=1e-4)

    source.set_leases([])
    free = played(source, clock, 300)[0]
    assert free.memory_used_bytes == 0
    assert free.gpu_utilization_percent == 0
    assert (free.temperature_celsius or 0) < (busy.temperature_celsius or 0)


def test_a_device_in_bad_air_throttles_and_keeps_below_its_limit() -> None:
    clock = Clock()
    source = SimulatedSource(
        150, 2, models="A100,L40S,RTX4090,T4", background=0, faults_per_device_day=0, clock_ns=clock
    )
    source.open(lambda event: None)
    devices = [device.uuid for inventory in source.inventory() for device in inventory.devices]
    source.set_leases([lease(device, 0, f"l{at}") for at, device in enumerate(devices)])
    samples = played(source, clock, 900, step=5.0)
    hot = [sample for sample in samples if (sample.throttle_reasons_bitmask or 0) & 0x20]
    assert 0 < len(hot) < len(samples) / 4
    by_name = {model.memory_bytes: model for model in MODELS.values()}
    for sample in samples:
        model = by_name[sample.memory_total_bytes or 0]
        assert (sample.temperature_celsius or 0) < model.slowdown + 6
        assert (sample.power_watts or 0) <= model.power_limit * 1.02
    assert all((sample.sm_clock_megahertz or 0) < (sample.sm_clock_max_megahertz or 0) for sample in hot)


def test_a_device_that_falls_off_the_bus_is_left_out_and_comes_back() -> None:
    clock = Clock()
    source = SimulatedSource(8, 8, models="H100", seed=3, faults_per_device_day=60, clock_ns=clock)
    events: list[SourceEvent] = []
    source.open(events.append)
    seen: list[int] = []
    for _ in range(400):
        clock.now_ns += 30 * 10**9
        seen.append(sum(len(tick.devices) for tick in source.read()))
    kinds = {event.kind for event in events}
    assert {"xid", "ecc", "device_lost", "device_returned"} <= kinds
    assert min(seen) < 64 == max(seen)
    serious = [event for event in events if event.severity in (Severity.RESET, Severity.HARDWARE)]
    cleared = [event for event in events if event.severity is Severity.CLEARED]
    assert {event.device for event in cleared} <= {event.device for event in serious}
    assert cleared


def test_links_tell_what_joins_the_devices() -> None:
    source = SimulatedSource(2, 4, models="H100,T4")
    by_model = {inventory.devices[0].name: inventory for inventory in source.inventory()}
    nvlinked = by_model["NVIDIA H100 80GB HBM3"]
    assert nvlinked.links[0] == [Link.SAME, Link.NVLINK, Link.NVLINK, Link.NVLINK]
    assert nvlinked.nvlink_counts[0] == [0, 18, 18, 18]
    plain = by_model["Tesla T4"]
    assert plain.links[0] == [Link.SAME, Link.PCIE_SWITCH, Link.SYSTEM, Link.SYSTEM]
    for inventory in by_model.values():
        transposed = [list(row) for row in zip(*inventory.links, strict=True)]
        assert transposed == inventory.links


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hosts": 0}, "0 hosts"),
        ({"devices_per_host": 65}, "65 devices"),
        ({"models": "H200X"}, "no simulated model"),
        ({"models": "H100:-1"}, "weight"),
        ({"background": 1.5}, "background"),
        ({"time_scale": 0.0}, "time scale"),
        ({"faults_per_device_day": -1.0}, "faults"),
    ],
)
def test_an_impossible_fleet_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedSource(**arguments)


async def test_leases_are_followed_from_before_the_start_and_live(nc: Client) -> None:
    js = nc.jetstream()

    async def announce(kind: LeaseEventKind, what: Lease, at: datetime) -> None:
        event = LeaseEvent(kind=kind, time=at, lease=what)
        await js.publish(subjects.lease_subject(kind, what.lease_id), codec.encode(event, codec.JSON))

    now = datetime.now(UTC)
    await announce(LeaseEventKind.GRANTED, lease("d1", GIB, "old"), now)
    await announce(LeaseEventKind.GRANTED, lease("d2", GIB, "gone"), now)
    await announce(LeaseEventKind.RELEASED, lease("d2", GIB, "gone", LeaseState.RELEASED), now + timedelta(seconds=1))
    await nc.publish(f"{subjects.LEASE_EVENTS}.granted.x", b"no lease")

    known: list[set[str]] = []
    changed = asyncio.Event()

    def on_change(leases: list[Lease], complete: bool) -> None:
        known.append({found.lease_id for found in leases})
        changed.set()

    async def until(expected: set[str]) -> None:
        async with asyncio.timeout(5):
            while not known or known[-1] != expected:
                changed.clear()
                await changed.wait()

    following = asyncio.create_task(LeaseFeed(on_change).follow(nc))
    await until({"old"})
    await announce(LeaseEventKind.GRANTED, lease("d3", GIB, "new"), now + timedelta(seconds=2))
    await until({"old", "new"})
    # An older announcement that comes late does not bring a lease back.
    await announce(LeaseEventKind.EXPIRED, lease("d1", GIB, "old", LeaseState.EXPIRED), now + timedelta(seconds=3))
    await until({"new"})
    await announce(LeaseEventKind.RENEWED, lease("d1", GIB, "old"), now + timedelta(seconds=1))
    # An event that is delivered under another lease's name is none.
    false = LeaseEvent(
        kind=LeaseEventKind.RELEASED,
        time=now + timedelta(seconds=9),
        lease=lease("d3", GIB, "new", LeaseState.RELEASED),
    )
    await nc.publish(subjects.lease_subject("released", "old"), codec.encode(false, codec.JSON))
    await announce(LeaseEventKind.GRANTED, lease("d2", GIB, "last"), now + timedelta(seconds=3))
    await until({"new", "last"})
    await announce(LeaseEventKind.RELEASED, lease("d2", GIB, "last", LeaseState.RELEASED), now + timedelta(seconds=4))
    await until({"new"})
    await announce(LeaseEventKind.EVICTED, lease("d3", GIB, "new", LeaseState.EVICTED), now + timedelta(seconds=4))
    await until(set())
    following.cancel()


def test_some_misbehave_where_that_is_asked_for() -> None:
    clock = Clock()
    source = SimulatedSource(1, 8, background=0, faults_per_device_day=0, misbehaving=1.0, clock_ns=clock)
    source.open(lambda event: None)
    devices = [device.uuid for device in source.inventory()[0].devices]
    held = [
        replace(one, grants=[replace(one.grants[0], share=0.5)])
        for one in (lease(uuid, 4 * GIB, f"lease-{number}") for number, uuid in enumerate(devices))
    ]
    source.set_leases(held)
    played(source, clock, 60)
    found = source.processes()["sim-0001"]
    started = {process.pid: process.started_ns for process in found}
    for one in held:
        mine = [process for process in found if process.device == one.grants[0].device]
        used = sum(process.memory_used_bytes or 0 for process in mine if process.lease == one.lease_id)
        beyond, stranger = used > 4 * GIB, any(process.lease == "" for process in mine)
        assert beyond != stranger
    strangers = sum(process.lease == "" for process in found)
    assert 0 < strangers < len(held), "both happen"
    played(source, clock, 10)
    assert {process.pid: process.started_ns for process in source.processes()["sim-0001"]} == started


async def test_a_lease_on_the_bus_shows_in_samples_and_processes(
    server: EmbeddedServer, nc: Client, tmp_path: Path
) -> None:
    source = SimulatedSource(2, 2, background=0, faults_per_device_day=0)
    inventory = source.inventory()[1]
    device = inventory.devices[1].uuid
    samples = await nc.subscribe(subjects.samples_subject(inventory.host.name))
    processes = await nc.subscribe(subjects.processes_subject(inventory.host.name))
    work = collect(
        source,
        name="sim",
        nats_url=server.url,
        interval_seconds=0.05,
        batch_seconds=0.1,
        processes_seconds=0.2,
        state=tmp_path,
    )
    running = asyncio.create_task(work)
    first = codec.decode((await samples.next_msg(timeout=10)).data, SampleBatch)
    assert columns.column(first, "memory_used_bytes") is not None
    assert not any(sample.memory_used_bytes for sample in columns.rows(first))
    granted = lease(device, 8 * GIB, granted_ns=time.time_ns())
    event = LeaseEvent(kind=LeaseEventKind.GRANTED, time=datetime.now(UTC), lease=granted)
    await nc.publish(subjects.lease_subject("granted", "l1"), codec.encode(event, codec.JSON))
    async with asyncio.timeout(10):
        async for message in samples.messages:
            batch = codec.decode(message.data, SampleBatch)
            columns.check(batch)
            used = {sample.device for sample in columns.rows(batch) if sample.memory_used_bytes}
            if used:
                break
        assert used == {device}
        async for message in processes.messages:
            found = codec.decode(message.data, ProcessBatch).processes
            if found:
                break
    assert [(process.device, process.lease) for process in found] == [(device, "l1")]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_faults_show_whatever_the_shipped_alerts_look_for() -> None:
    """In a few hours of a fleet that fails often, each condition lasts for as long as its alert waits."""
    clock = Clock()
    source = SimulatedSource(4, 8, background=1.0, faults_per_device_day=300, clock_ns=clock)
    events: list[SourceEvent] = []
    source.open(events.append)
    fleet = {device.uuid for inventory in source.inventory() for device in inventory.devices}
    assert {device.name for i in source.inventory() for device in i.devices} >= {"NVIDIA GeForce RTX 4090"}
    since: dict[tuple[str, str], int] = {}
    lasted: dict[str, float] = {}
    before: dict[str, int] = {}
    samples: list[DeviceSample] = []

    def shown() -> list[bool]:
        """Each condition, each kind of event, and a reset: it begins the counters since the driver's start anew."""
        return [
            all(lasted.get(name, 0) > 330 for name in ("hot", "memory_hot", "throttled", "missing")),
            {"pending", "failed", "errors", "fan", "compute"} <= lasted.keys(),
            {event.severity for event in events if event.kind == "xid"} >= {Severity.RESET, Severity.HARDWARE},
            any(one.ecc_uncorrected_count and not one.ecc_uncorrected_volatile_count for one in samples),
        ]

    for _ in range(1500):
        clock.now_ns += 10 * 10**9
        samples = rows(list(source.read()))
        holds = {("missing", uuid) for uuid in fleet - {d.uuid for i in source.inventory() for d in i.devices}}
        for one in samples:
            holds |= {
                (name, one.device)
                for name, true in (
                    ("hot", (one.temperature_celsius or 0) > 85),
                    ("memory_hot", (one.memory_temperature_celsius or 0) > 95),
                    ("throttled", (one.throttle_reasons_bitmask or 0) & 0x60),
                    ("pending", one.remapped_rows_pending),
                    ("failed", one.remapped_rows_failure),
                    ("errors", (one.ecc_uncorrected_volatile_count or 0) > before.get(one.device, 1 << 30)),
                    ("fan", one.fan_percent),
                    ("compute", one.graphics_active_percent),
                )
                if true
            }
            before[one.device] = one.ecc_uncorrected_volatile_count or 0
        since = {key: since.get(key, clock.now_ns) for key in holds}
        for (name, _), began in since.items():
            lasted[name] = max(lasted.get(name, 0), (clock.now_ns - began) / 1e9)
        if all(shown()):
            break
    assert all(shown()), lasted


def test_the_memory_of_one_grant_does_not_depend_on_a_violation_under_another() -> None:
    def used(misbehaving: float) -> list[int]:
        clock = Clock()
        source = SimulatedSource(1, 8, background=0, faults_per_device_day=0, misbehaving=misbehaving, clock_ns=clock)
        source.open(lambda event: None)
        devices = [device.uuid for device in source.inventory()[0].devices]
        one = lease(devices[0], 4 * GIB)
        source.set_leases([replace(one, grants=[replace(one.grants[0], device=uuid, share=0.5) for uuid in devices])])
        played(source, clock, 60)
        return [process.memory_used_bytes or 0 for process in source.processes()["sim-0001"] if process.lease]

    well, badly = used(0.0), used(1.0)
    exceeded = [amount > 4 * GIB for amount in badly]
    assert exceeded.index(False, exceeded.index(True)) > 0, "one that behaves comes after one that does not"
    assert [amount for amount, beyond in zip(badly, exceeded, strict=True) if not beyond] == [
        amount for amount, beyond in zip(well, exceeded, strict=True) if not beyond
    ]
