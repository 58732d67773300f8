"""Messages that are read together give what they give one by one, whatever is between them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from corral.processors.ingest.columnar import Decoder, Incoming, Refusal
from corral.processors.ingest.deduplication import Arrivals
from corral.processors.ingest.hostclocks import HostClocks
from corral.processors.storage.protocol import Arrival, HostClock, Series
from corral.schemas import codec, subjects
from corral.schemas.metrics import METRICS
from corral.schemas.telemetry import SampleBatch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

S = 10**9
NOW = 1_800_000_000 * S
NAMES = ("power_watts", "memory_used_bytes", "gpu_utilization_percent", "performance_state", "of_a_newer_version")
OLD = msgspec.msgpack.decode((Path(__file__).parents[1] / "wire_compat/v1-samples.msgpack").read_bytes())


def collector(dice: random.Random, number: int) -> dict[str, Any]:
    """What the messages of a collector have in common."""
    return {
        "host": f"h{dice.randrange(3)}",
        "agent": f"run-{number}",
        "source": dice.choice(("nvml", "replay")),
        "devices": [f"GPU-{at}" for at in range(dice.choice((1, 2, 2)))],
        "names": dice.sample(NAMES, dice.choice((1, 2, 3, 3))),
        "masked": dice.sample(NAMES, dice.choice((0, 0, 1, 2))),
        "ticks": dice.choice((1, 1, 1, 3)),
        "fields": dice.choice(("", "", "extra", "reversed", "version")),
        "late_ns": dice.choice((0, 0, 0, 900 * S, -900 * S)),
    }


def message(dice: random.Random, one: dict[str, Any], place: int, sequence: int) -> Incoming:
    """A message of a collector, sometimes with something that is wrong or unusual in it."""
    one = {**one, **({"names": dice.sample(NAMES, 2)} if dice.random() < 0.05 else {})}
    count = len(one["devices"]) * one["ticks"]
    noise = np.random.default_rng(dice.randrange(2**32))
    stored_ns = NOW + place * S
    columns: dict[str, bytes] = {}
    for name in one["names"]:
        dtype = METRICS[name].row.unit.dtype if name in METRICS else "<i4"
        values = noise.integers(0, 50, count).astype(dtype)
        if dice.random() < 0.05:
            values[0] = dice.choice((-5, 2**31 - 1)) if dtype != "<f4" else dice.choice((np.nan, np.inf, -1, 1e9))
        columns[name] = values.tobytes()
    fields: dict[str, Any] = {
        "type": "sample_batch",
        "host": one["host"],
        "agent": one["agent"],
        "sequence": dice.choice((sequence,) * 12 + (0, -1, 127, 128, 65535, 65536, 2**32 - 1, 2**32, 2**63, 5.0, "x")),
        "source": one["source"],
        "devices": one["devices"],
        "times_ns": np.full(count, stored_ns - one["late_ns"] if dice.random() < 0.97 else 5, "<i8").tobytes(),
        "columns": columns,
        "nulls": {name: noise.integers(0, 2, count, np.uint8).tobytes() for name in one["masked"]},
    }
    if one["fields"] == "extra":
        fields = {"a_newer_field": [1, "x"], **fields, "another": b"12345678"}
    elif one["fields"] == "reversed":
        fields = dict(reversed(fields.items()))
    elif one["fields"] == "version":
        fields["version"] = 1 if dice.random() < 0.9 else 2
    payload = codec.encode(fields)
    kind = dice.random()
    if kind < 0.06:  # any byte: of the structure, a name, a number
        at = dice.randrange(len(payload))
        payload = payload[:at] + bytes([dice.randrange(256)]) + payload[at + 1 :]
    elif kind < 0.08:
        payload = payload[: dice.randrange(len(payload))]
    elif kind < 0.1:
        payload += b"\xc0"
    subject = subjects.samples_subject(one["host"] if dice.random() < 0.98 else "h1")
    return Incoming(subject, payload, place, None, stored_ns)


def of_version_1(place: int) -> Incoming:
    """What an agent of the first version sent, with another number."""
    payload = codec.encode({**OLD, "sequence": place})
    return Incoming(subjects.samples_subject(OLD["host"]), payload, place, None, NOW + place * S)


class Result(msgspec.Struct):
    rows: list[str]
    accepted: list[Incoming]
    refused: list[Refusal]
    duplicates: int
    impossible: dict[str, int]
    arrivals: list[Arrival]
    clocks: list[HostClock]


def decoded(batches: list[list[Incoming]], few: int) -> Result:
    series, arrivals, clocks = Series(), Arrivals(), HostClocks()
    decoder = Decoder(series, clocks, few)
    rows: list[str] = []
    accepted: list[Incoming] = []
    refused: list[Refusal] = []
    for batch in batches:
        table, good, bad = decoder.decode(batch, arrivals.is_new, NOW)
        accepted += sorted(good, key=lambda one: one.sequence)
        refused += sorted(bad, key=lambda one: one.message.sequence)
        if table is not None:
            table.validate(full=True)
            assert isinstance(table, pa.Table)
            names = [series.names[number] for number in table["series"].to_pylist()]
            rows += sorted(map(str, zip(names, table.drop_columns("series").to_pylist(), strict=True)))
    changed = sorted(arrivals.take_changed(), key=lambda run: run.agent)
    found = sorted(clocks.take_changed(), key=lambda clock: clock.host)
    return Result(rows, accepted, refused, decoder.duplicates, decoder.impossible, changed, found)


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_messages_read_together_give_what_each_gives_by_itself(seed: int, collectors: int) -> None:
    dice = random.Random(seed)
    sources = [collector(dice, number) for number in range(collectors)]
    sent: list[Incoming] = []
    for tick in range(1, 16):
        for one in sources:
            sent.append(message(dice, one, len(sent) + 1, tick + 100 * dice.randrange(3)))
            if dice.random() < 0.1:
                sent.append(replace(dice.choice(sent), sequence=len(sent) + 1))
        if seed % 3 == 0:
            sent.append(of_version_1(len(sent) + 1))
    batches = [sent[first : first + 20] for first in range(0, len(sent), 20)]
    assert decoded(batches, 1) == decoded(batches, 10**9)


def test_a_message_with_any_byte_changed_is_read_as_by_itself() -> None:
    one = collector(random.Random(1), 1) | {
        "names": NAMES[:2], "masked": NAMES[:1], "devices": ["a"], "fields": "extra", "late_ns": 0
    }  # fmt: skip
    first = message(random.Random(3), one, 1, 999)
    fields = msgspec.msgpack.decode(first.payload)
    good = replace(first, payload=codec.encode(fields | {"sequence": 999}))
    sent: list[Incoming] = []
    for at in range(len(good.payload)):
        for change in (1, 2, 0x80):
            payload = bytearray(codec.encode(fields | {"sequence": 1000 + len(sent)}))
            payload[at % len(payload)] ^= change
            sent.append(Incoming(good.subject, bytes(payload), len(sent), None, NOW))
    assert decoded([[good], sent], 1) == decoded([[good], sent], 10**9)


def test_a_fleet_is_read_together_after_its_first_batch() -> None:
    """Hosts with names of any length, and numbers of any width; all that is read one by one is the odd one out."""
    series = Series()
    decoder = Decoder(series)
    opened: list[Incoming] = []
    one_by_one = decoder._open

    def open_one(position: int, message: Incoming) -> Any:
        opened.append(message)
        return one_by_one(position, message)

    decoder._open = open_one

    def watts(host: int, sequence: int) -> float:
        return (host + sequence) % 1000 / 8

    def batch(host: int, sequence: int, metric: str = "power_watts") -> Incoming:
        body = SampleBatch(
            host=f"node-{host}", agent=f"run-{host}", sequence=sequence, source="nvml",
            devices=[f"GPU-{host}-0", f"GPU-{host}-1"], times_ns=np.full(2, NOW + sequence * S).tobytes(),
            columns={metric: np.full(2, watts(host, sequence), "<f4").tobytes()},
        )  # fmt: skip
        return Incoming(subjects.samples_subject(body.host), codec.encode(body), sequence, None, NOW)

    is_new = Arrivals().is_new
    hosts = (1, 22, 333)
    decoder.decode([batch(host, sequence) for sequence in range(1, 40) for host in hosts], is_new, NOW)
    opened.clear()
    numbers = (*range(100, 140), *range(300, 320), 70_000)
    odd = batch(22, 70_001, "temperature_celsius")
    later = [batch(host, sequence) for sequence in numbers for host in hosts]
    table, accepted, refused = decoder.decode([*later, odd], is_new, NOW)
    assert opened == [odd]
    assert len(accepted) == len(later) + 1
    assert not refused
    assert table is not None
    columns = (table[name].to_pylist() for name in ("series", "power_watts", "temperature_celsius"))
    found = {(series.names[number], watts, degrees) for number, watts, degrees in zip(*columns, strict=True)}
    assert table.num_rows == len(found) == 2 * len(later) + 2
    devices = [(host, (f"node-{host}", f"GPU-{host}-{at}")) for host in hosts for at in (0, 1)]
    wanted = {(device, watts(host, number), None) for host, device in devices for number in numbers}
    assert found == wanted | {(device, None, watts(host, 70_001)) for host, device in devices if host == 22}
