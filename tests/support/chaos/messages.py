"""Messages that no collector of this version sends: broken, repeated, out of order, from another version."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
from corral.schemas import codec, columns, subjects
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import DeviceInfo, HostInfo, Inventory, SampleBatch

FROZEN = Path(__file__).parents[2] / "wire_compat"
"""What the encoders of earlier versions wrote, byte by byte: never written again."""


def batch(host: str, sequence: int, *, agent: str = "", devices: int = 4, time_ns: int | None = None) -> SampleBatch:
    """A tick of a host."""
    names = [f"GPU-{host}-{index}" for index in range(devices)]
    packed = {
        name: columns.pack(METRICS[name], [float(sequence % 100)] * devices)
        for name in ("gpu_utilization_percent", "power_watts", "memory_used_bytes", "memory_total_bytes")
    }
    return SampleBatch(
        host=host,
        agent=agent or f"agent-{host}",
        sequence=sequence,
        source="simulated",
        devices=names,
        times_ns=columns.pack_times([time_ns or time.time_ns()] * devices),
        columns={name: pair[0] for name, pair in packed.items() if pair is not None},
    )


def inventory(host: str, devices: int = 4) -> Inventory:
    """What a host has."""
    return Inventory(
        host=HostInfo(name=host, cpus=32, memory_bytes=2**38),
        agent=f"agent-{host}",
        time_ns=time.time_ns(),
        devices=[
            DeviceInfo(uuid=f"GPU-{host}-{at}", host=host, index=at, name="Tesla T4", memory_bytes=16 * 2**30)
            for at in range(devices)
        ],
    )


def poison() -> list[tuple[str, bytes]]:
    """Messages on every subject that nobody can make sense of."""
    good = batch("bad", 1)
    fields: dict[str, Any] = msgspec.msgpack.decode(codec.encode(good))
    broken: list[dict[str, Any]] = [
        {**fields, "times_ns": b"\0" * 7},
        {**fields, "columns": {"power_watts": b"\0" * 3}},
        {**fields, "columns": {"power_watts": b"\0\0\xc0\x7f" * 4}},  # NaN
        {**fields, "columns": {"memory_used_bytes": b"\xff" * 32}},  # below 0
        {**fields, "devices": ["one", "one", "two", "three"]},
        {**fields, "host": "someone-else"},
        {**fields, "version": 99},
        {**fields, "sequence": "many"},
        {**fields, "times_ns": columns.pack_times([2**62] * 4)},
    ]
    samples = [msgspec.msgpack.encode(fields) for fields in broken] + [b"", b"\xc1", b"{}", b"\x81\xa4host" * 1000]
    found = [(subjects.samples_subject("bad"), payload) for payload in samples]
    for subject in (
        subjects.processes_subject("bad"),
        subjects.agent_subject("bad"),
        subjects.inventory_subject("bad"),
        subjects.events_subject("bad"),
        subjects.lease_subject("granted", "no-such-lease"),
    ):
        found += [(subject, b"\xc1"), (subject, b"not what it should be" * 100), (subject, codec.encode(good))]
    return found


def requests() -> list[bytes]:
    """Bodies that a planner must turn down and go on."""
    return [
        b"", b"{", b"[]", b"null", b'{"gpus": -1}', b'{"gpus": 1e99}', b'{"owner": "x", "gpus": "many"}', b"\xff" * 100,
        b'{"owner":"x","gpus":1,"ttl_seconds":-5}', b"[" * 5000, b'{"owner":"' + b"a" * 100_000 + b'"}',
    ]  # fmt: skip


def another_version(message: SampleBatch, *, newer: bool) -> bytes:
    """The same, with a field that this version does not know, and without one that it has a default for."""
    fields: dict[str, Any] = msgspec.msgpack.decode(codec.encode(message))
    fields.pop("version", None)
    if newer:
        fields["rack_position"] = {"row": 3, "slot": 12}
        fields["clock_source"] = "ptp"
    else:
        fields["uptime_seconds"] = 12345.6
    return msgspec.msgpack.encode(fields)
