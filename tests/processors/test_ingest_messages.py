"""What collectors and planners publish is in the tables; what can't be is with the dead letters, and stops nothing."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta, tzinfo
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from corral.processors.ingest import ingest
from corral.schemas import codec, subjects
from corral.schemas.health import ServiceHealth
from corral.schemas.metrics import METRICS
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState
from corral.schemas.telemetry import (
    AgentReport,
    DeadLetter,
    DeviceEvent,
    DeviceInfo,
    HostInfo,
    Inventory,
    Link,
    ProcessBatch,
    ProcessSample,
    SampleBatch,
    Severity,
)
from msgspec.structs import replace
from nats.aio.client import Client
from support.history import Asking, sample_batch


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def lease_event(index: int = 0, memory_bytes: int = 0, zone: tzinfo | None = UTC) -> bytes:
    now = datetime.now(zone)
    grant = Grant(host="h1", device="GPU-0", index=index, memory_bytes=memory_bytes)
    lease = Lease(
        lease_id="x",
        owner="ann",
        state=LeaseState.ACTIVE,
        granted_at=now,
        expires_at=now,
        ttl_seconds=9.0,
        grants=[grant],
    )
    return codec.encode(LeaseEvent(kind=LeaseEventKind.GRANTED, time=now, lease=lease, planner="p"), codec.JSON)


async def test_malformed_messages_of_many_kinds_stop_nothing(nc: Client, processor: Asking) -> None:
    js = nc.jetstream()
    good = sample_batch("h1", 1, devices=2, ticks=1)
    host = subjects.samples_subject("h1")
    encoded = codec.encode(good)

    def changed(sequence: int, **changes: object) -> bytes:
        return codec.encode(replace(good, agent="bad", sequence=sequence, **changes))

    power = {"power_watts": floats(1, 2)}
    bad: dict[str, tuple[str, bytes, str, str]] = {
        "empty": (host, b"", "undecodable", ""),
        "no msgpack": (host, b"\xc1\xff\x00", "undecodable", ""),
        "cut short": (host, encoded[: len(encoded) // 2], "undecodable", ""),
        "json": (host, codec.encode(good, codec.JSON), "invalid", ""),
        "no field": (host, codec.encode({"host": "h1"}), "invalid", "agent"),
        "wrong type": (
            host,
            codec.encode(msgspec.structs.asdict(good) | {"agent": "bad", "devices": 5}),
            "invalid",
            "$.devices",
        ),
        "no devices": (host, changed(20, devices=[]), "invalid", "$.devices"),
        "device twice": (host, changed(21, devices=["GPU-a", "GPU-a"]), "invalid", "$.devices"),
        "other host": (subjects.samples_subject("h2"), changed(22), "invalid", "$.host"),
        "times cut": (host, changed(23, times_ns=good.times_ns[:-3]), "invalid", "$.times_ns"),
        "column cut": (host, changed(24, columns={"power_watts": b"\0\0"}), "invalid", "$.columns.power_watts"),
        "nulls cut": (host, changed(25, columns=power, nulls={"power_watts": b"\1"}), "invalid", "$.nulls.power"),
        "1970": (host, changed(31, times_ns=np.array([5, 5], "<i8").tobytes()), "out_of_range", "$.times_ns"),
        "version": (host, changed(32, version=9), "invalid", "$.version"),
        "nested": (host, b"\x91" * 100_000, "", ""),
        "process": (subjects.processes_subject("h1"), b"nothing", "invalid", ""),
        "pid": (
            subjects.processes_subject("h1"),
            codec.encode(
                ProcessBatch(
                    host="h1",
                    agent="a",
                    sequence=2,
                    time_ns=time.time_ns(),
                    processes=[ProcessSample(device="GPU-h1-0", pid=2**64 - 1)],
                )
            ),
            "out_of_range",
            "pid",
        ),
        "inventory": (
            subjects.inventory_subject("h1"),
            codec.encode(
                Inventory(
                    host=HostInfo(name="h1"),
                    agent="a",
                    time_ns=time.time_ns(),
                    devices=[DeviceInfo(uuid="GPU-h1-0", host="h1", index=0, sm_count=2**40)],
                )
            ),
            "out_of_range",
            "sm_count",
        ),
        "event": (subjects.events_subject("h1"), codec.encode({"host": "h1", "severity": "awful"}), "invalid", ""),
        "lease": (subjects.lease_subject("granted", "x"), b'{"kind":"granted"}', "invalid", ""),
        "index": (subjects.lease_subject("granted", "x"), lease_event(index=2**31), "out_of_range", "index"),
        "bytes": (
            subjects.lease_subject("granted", "x"),
            lease_event(memory_bytes=2**63),
            "out_of_range",
            "memory_bytes",
        ),
        "no zone": (subjects.lease_subject("granted", "x"), lease_event(zone=None), "invalid", "time"),
    }
    letters = await js.pull_subscribe(f"{subjects.DEAD_LETTERS}.*", "letters")
    for sequence, (subject, payload, _, _) in enumerate(bad.values()):
        await js.publish(host, codec.encode(replace(good, sequence=100 + sequence)))
        await js.publish(subject, payload)

    await processor.until("SELECT count(*) FROM samples", 2 * len(bad))
    await processor.until("SELECT sum(messages) FROM dead_letters", len(bad))
    assert (await processor.status()).dead_letters == len(bad)

    found: list[DeadLetter] = []
    while len(found) < len(bad):
        for message in await letters.fetch(len(bad), timeout=5):
            found.append(codec.decode(message.data, DeadLetter))
            await message.ack()
    by_payload = {letter.payload: letter for letter in found}
    for name, (subject, payload, code, path) in bad.items():
        letter = by_payload[payload[: 256 * 1024]]
        assert letter.subject == subject, name
        assert code in ("", letter.code), (name, letter)
        assert path in letter.reason, (name, letter)
    counted = dict(await processor.rows("SELECT code, sum(messages) FROM dead_letters GROUP BY 1"))
    assert counted == {code: sum(letter.code == code for letter in found) for code in counted}


async def test_values_that_cannot_be_are_null_and_counted_and_what_is_beside_them_stays(
    nc: Client, processor: Asking
) -> None:
    js = nc.jetstream()
    good = sample_batch("h1", 1, devices=2, ticks=1)
    most = METRICS["power_watts"].maximum
    assert most is not None
    largest = np.array([2**63 - 1, 5], "<i8").tobytes()
    columns = [
        {"power_watts": floats(250, np.nan), "temperature_celsius": floats(40, 50)},
        {"power_watts": floats(np.inf, 250)},
        {"power_watts": floats(4_294_967.0, most)},
        {"power_watts": floats(-np.inf, -1), "memory_used_bytes": b"\xff" * 16},
        {"gpu_utilization_percent": floats(101, 100), "sm_active_percent": floats(117, 100.4)},
        {"energy_millijoules": largest, "pcie_replay_count": largest},
    ]
    for sequence, found in enumerate(columns, 1):
        await js.publish(subjects.samples_subject("h1"), codec.encode(replace(good, sequence=sequence, columns=found)))
    # A number that is null means nothing, and is not counted; one beside it is.
    masked = replace(good, sequence=9, columns={"power_watts": floats(np.nan, 9e9)}, nulls={"power_watts": b"\1\0"})
    await js.publish(subjects.samples_subject("h1"), codec.encode(masked))
    await processor.until("SELECT count(*) FROM samples", 2 * len(columns) + 2)
    known = await processor.rows(
        "SELECT list(power_watts ORDER BY power_watts) FILTER (power_watts IS NOT NULL), max(temperature_celsius), "
        "count(memory_used_bytes), max(gpu_utilization_percent), max(sm_active_percent), max(energy_millijoules), "
        "max(pcie_replay_count) FROM samples"
    )
    assert known == [[[250.0, 250.0, most], 50.0, 0, 100.0, 117.0, 5, 5]]
    answer = await nc.request(f"{subjects.HEALTH}.processor", timeout=5)
    health = codec.decode(answer.data, ServiceHealth, codec.JSON)
    counted = {
        measure.labels["metric"]: measure.value for measure in health.measures if measure.name == "impossible_values"
    }
    assert counted == {
        "power_watts": 6,
        "memory_used_bytes": 2,
        "gpu_utilization_percent": 1,
        "energy_millijoules": 1,
        "pcie_replay_count": 1,
    }
    assert (await processor.status()).dead_letters == 0


async def test_every_kind_of_message_has_its_table(nc: Client, processor: Asking) -> None:
    js = nc.jetstream()
    now = datetime.now(UTC)
    time_ns = time.time_ns()
    uuids = ["GPU-0", "GPU-1"]
    inventory = Inventory(
        host=HostInfo(name="h1", address="h1.example", cpus=64, memory_bytes=2**39, labels={"rack": "r1"}),
        agent="a",
        time_ns=time_ns,
        devices=[DeviceInfo(uuid=uuid, host="h1", index=at, name="H100") for at, uuid in enumerate(uuids)],
        links=[[Link.SAME, Link.NVLINK], [Link.NVLINK, Link.SAME]],
        nvlink_counts=[[0, 18], [18, 0]],
    )
    await js.publish(subjects.inventory_subject("h1"), codec.encode(inventory))
    await processor.until("SELECT count(*) FROM links WHERE nvlinks = 18", 2)
    # The later one counts, though the host's clock was set back meanwhile.
    moved = replace(inventory, time_ns=time_ns - 30 * 10**9, devices=inventory.devices[:1], links=[], nvlink_counts=[])
    await js.publish(subjects.inventory_subject("h1"), codec.encode(moved))
    event = DeviceEvent(
        host="h1", agent="a", sequence=2, time_ns=time_ns, kind="xid", severity=Severity.RESET, device="GPU-0", code=79
    )
    for _ in range(2):  # the same message without a message id: stored once
        await js.publish(subjects.events_subject("h1"), codec.encode(event))
    await js.publish(
        subjects.processes_subject("h1"),
        codec.encode(
            ProcessBatch(
                host="h1",
                agent="a",
                sequence=3,
                time_ns=time_ns,
                processes=[ProcessSample(device="GPU-0", pid=7, memory_used_bytes=2**30, name="python", lease="l1")],
            )
        ),
    )
    await js.publish(
        subjects.agent_subject("h1"),
        codec.encode(AgentReport(host="h1", agent="a", sequence=4, time_ns=time_ns, ticks=9)),
    )
    lease = Lease(
        lease_id="l1",
        owner="ann",
        state=LeaseState.ACTIVE,
        granted_at=now,
        expires_at=now + timedelta(minutes=5),
        ttl_seconds=300.0,
        name="train",
        labels={"team": "vision"},
        grants=[Grant(host="h1", device=uuid, index=at, memory_bytes=2**34) for at, uuid in enumerate(uuids)],
    )
    ended = replace(lease, state=LeaseState.RELEASED, ended_at=now + timedelta(seconds=9), reason="done")
    for kind, found, seconds in (
        (LeaseEventKind.GRANTED, lease, 0),
        (LeaseEventKind.RELEASED, ended, 9),
        (LeaseEventKind.RENEWED, lease, 5),  # out of order: the lease stays ended
    ):
        event_of_lease = LeaseEvent(kind=kind, time=now + timedelta(seconds=seconds), lease=found, planner="p")
        await js.publish(subjects.lease_subject(kind.value, "l1"), codec.encode(event_of_lease, codec.JSON))

    await processor.until("SELECT count(*) FROM lease_events", 3)
    await processor.until("SELECT count(*) FROM agents", 1)
    assert await processor.rows("SELECT host, cpus, labels['rack'], devices FROM hosts") == [["h1", 64, "r1", 1]]
    assert await processor.rows("SELECT device, name, present FROM devices ORDER BY 1") == [
        ["GPU-0", "H100", True],
        ["GPU-1", "H100", False],
    ]
    assert await processor.rows("SELECT count(*) FROM links") == [[0]]
    assert await processor.rows("SELECT kind, severity, device, code FROM events") == [["xid", "reset", "GPU-0", 79]]
    assert await processor.rows("SELECT pid, name, lease, started FROM processes") == [[7, "python", "l1", None]]
    assert await processor.rows("SELECT owner, state, reason, devices, labels['team'] FROM leases") == [
        ["ann", "released", "done", uuids, "vision"]
    ]
    assert await processor.rows("SELECT device, memory_bytes FROM lease_devices ORDER BY index") == [
        ["GPU-0", 2**34],
        ["GPU-1", 2**34],
    ]


async def test_a_message_that_comes_again_changes_nothing(nc: Client, processor: Asking) -> None:
    """Beyond the stream's own window too: here the messages have no id at all."""
    js = nc.jetstream()
    batches = [sample_batch("h1", sequence) for sequence in (1, 2, 4, 3, 5, 100)]
    for _ in range(2):
        for batch in batches:
            await js.publish(subjects.samples_subject("h1"), codec.encode(batch))
    await js.publish(subjects.samples_subject("h1"), codec.encode(sample_batch("h1", 1, agent="another-run")))
    await processor.until("SELECT count(*) FROM samples", 7 * 12)
    await asyncio.sleep(0.5)
    assert await processor.rows("SELECT count(*) FROM samples") == [[7 * 12]]
    assert (await processor.status()).duplicates == 6


async def test_a_clock_that_jumps_back_loses_no_sample(nc: Client, processor: Asking) -> None:
    js = nc.jetstream()
    now = time.time_ns()
    hour = 3600 * 10**9
    for sequence, start in enumerate((now - 5 * 10**9, now - 2 * hour, now - 30 * hour), 1):
        batch: SampleBatch = sample_batch("h1", sequence, start_ns=start)
        await js.publish(subjects.samples_subject("h1"), codec.encode(batch))
    await processor.until("SELECT count(*) FROM samples", 36)
    await processor.until("SELECT sum(samples) FROM rollup_10s", 36)
    assert await processor.rows("SELECT count(DISTINCT time) FROM samples WHERE device = 'GPU-h1-0'") == [[9]]


async def test_a_processor_whose_clock_is_behind_refuses_nothing(
    nc: Client, processor: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = SimpleNamespace(**vars(time) | {"time_ns": lambda: time.time_ns() - 3600 * 10**9})
    monkeypatch.setattr(ingest, "time", behind)
    js = nc.jetstream()
    await js.publish(subjects.samples_subject("h1"), codec.encode(sample_batch("h1", 1, devices=1, ticks=1)))
    await js.publish(
        subjects.agent_subject("h1"),
        codec.encode(AgentReport(host="h1", agent="a", sequence=1, time_ns=time.time_ns(), ticks=1)),
    )
    await processor.until("SELECT count(*) FROM agents", 1)
    await processor.until("SELECT count(*) FROM samples", 1)
