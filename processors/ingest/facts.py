"""Decode the less frequent messages row by row: processes, agents' reports, inventories, events, leases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import pyarrow as pa
from msgspec import Struct, field
from msgspec.structs import replace

from ...schemas import clocks, codec, speakers, subjects
from ...schemas.inventory import check as check_inventory
from ...schemas.requests import LeaseEvent
from ...schemas.telemetry import AgentReport, DeviceEvent, Inventory, ProcessBatch
from ..storage.protocol import ArrowTable
from .columnar import EARLIEST_NS, TIME_TYPE, Incoming, Refusal
from .hostclocks import HostClocks

_INT: Final = pa.int64()
_FLOAT: Final = pa.float32()
_TEXT: Final = pa.string()

TABLES: Final[dict[str, pa.Schema]] = {
    "processes": pa.schema(
        [
            ("time", TIME_TYPE),
            ("host", _TEXT),
            ("device", _TEXT),
            ("pid", _INT),
            ("kind", _TEXT),
            ("memory_used_bytes", _INT),
            ("sm_utilization_percent", _FLOAT),
            ("memory_utilization_percent", _FLOAT),
            ("encoder_utilization_percent", _FLOAT),
            ("decoder_utilization_percent", _FLOAT),
            ("name", _TEXT),
            ("user", _TEXT),
            ("container", _TEXT),
            ("lease", _TEXT),
            ("started", TIME_TYPE),
            ("command", _TEXT),
        ]
    ),
    "store.without_processes": pa.schema([("time", TIME_TYPE), ("host", _TEXT)]),
    "agents": pa.schema(
        [
            ("time", TIME_TYPE),
            ("host", _TEXT),
            ("agent", _TEXT),
            ("source", _TEXT),
            ("ticks", _INT),
            ("late_ticks", _INT),
            ("read_seconds_mean", pa.float64()),
            ("read_seconds_max", pa.float64()),
            ("read_errors", _INT),
            ("published_messages", _INT),
            ("buffered_bytes", _INT),
            ("dropped_messages", _INT),
            ("dropped_samples", _INT),
            ("cpu_seconds", pa.float64()),
            ("resident_bytes", _INT),
            ("corral_version", _TEXT),
            ("samples", _INT),
        ]
    ),
    "events": pa.schema(
        [
            ("time", TIME_TYPE),
            ("host", _TEXT),
            ("agent", _TEXT),
            ("sequence", _INT),
            ("kind", _TEXT),
            ("severity", _TEXT),
            ("device", _TEXT),
            ("code", pa.int32()),
            ("message", _TEXT),
            ("data", _TEXT),
            ("stored", TIME_TYPE),
        ]
    ),
    "lease_events": pa.schema(
        [
            ("time", TIME_TYPE),
            ("kind", _TEXT),
            ("lease_id", _TEXT),
            ("owner", _TEXT),
            ("name", _TEXT),
            ("state", _TEXT),
            ("planner", _TEXT),
            ("reason", _TEXT),
            ("expires_at", TIME_TYPE),
            ("devices", pa.list_(_TEXT)),
        ]
    ),
}
"""Columns of the tables that these messages are appended to."""


class Facts(Struct):
    """Contents of a sequence of decoded messages.

    Attributes:
        accepted: messages that were decoded.
        rows: by table, in the order of its columns.
        inventories: in order.
        leases: in order.
        refused: messages that were not decoded.
        duplicates: number of messages that were delivered before.
    """

    accepted: list[Incoming] = field(default_factory=list)
    rows: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    inventories: list[Inventory] = field(default_factory=list)
    leases: list[LeaseEvent] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    duplicates: int = 0

    def tables(self) -> dict[str, ArrowTable]:
        """The rows as Arrow tables."""
        return {name: _arrow(TABLES[name], rows) for name, rows in self.rows.items() if rows}


def decode(
    messages: Sequence[Incoming],
    is_new: Callable[[str, str, int], bool],
    now_ns: int,
    host_clocks: HostClocks | None = None,
    without_processes: set[str] | None = None,
) -> Facts:
    """Decode messages of any subject except samples.

    Args:
        messages: in the order of the stream.
        is_new: true if a message of an agent's run is no duplicate.
        now_ns: used as the time when a message was stored, if that is not known.
        host_clocks: observes messages whose times are off.
        without_processes: hosts whose last list of processes was empty; it is updated. Of several empty lists in a row
            only the first becomes a row. Without the set each does.
    """
    facts = Facts()
    for message in messages:
        try:
            if _one(message, facts, is_new, message.stored_ns or now_ns, host_clocks, without_processes):
                facts.accepted.append(message)
            else:
                facts.duplicates += 1
        except codec.DecodeError as error:
            facts.refused.append(Refusal(message, error.code, str(error)))
    return facts


def _one(
    message: Incoming,
    facts: Facts,
    is_new: Callable[[str, str, int], bool],
    stored_ns: int,
    host_clocks: HostClocks | None,
    without_processes: set[str] | None,
) -> bool:
    subject = message.subject
    kind = subject[len(subjects.PREFIX) + 1 :].partition(".")[0]
    # The host is the last token, behind the partition where there are several.
    token = subject.rpartition(".")[2]
    if kind == "leases":
        named = codec.JSON if message.payload[:1] == b"{" else codec.MSGPACK
        event = codec.decode(message.payload, LeaseEvent, named)
        _check_lease(event)
        facts.leases.append(event)
        return True
    if kind == "inventory":
        inventory = codec.decode(message.payload, Inventory)
        _check(inventory, inventory.time_ns, subject)
        check_inventory(inventory)
        # An inventory is dated by when it was stored: the latest counts, even if the host's clock was set meanwhile.
        facts.inventories.append(replace(inventory, time_ns=stored_ns))
        return True
    if kind == "processes":
        batch = codec.decode(message.payload, ProcessBatch)
        _check(batch, batch.time_ns, subject)
        time_us = clocks.set_right(batch.time_ns, stored_ns) // 1000
        rows = [
            (
                time_us,
                batch.host,
                p.device,
                _fits(p.pid, "$.processes[...].pid"),
                p.kind,
                _maybe(p.memory_used_bytes, "$.processes[...].memory_used_bytes"),
                p.sm_utilization_percent,
                p.memory_utilization_percent,
                p.encoder_utilization_percent,
                p.decoder_utilization_percent,
                p.name,
                p.user,
                p.container,
                p.lease,
                _fits(p.started_ns, "$.processes[...].started_ns") // 1000 or None,
                p.command,
            )
            for p in batch.processes
        ]
        if not is_new(token, batch.agent, batch.sequence):
            return False
        _look_at_clock(host_clocks, token, batch.time_ns, stored_ns)
        facts.rows.setdefault("processes", []).extend(rows)
        if not rows and token not in (without_processes or ()):
            facts.rows.setdefault("store.without_processes", []).append((time_us, batch.host))
        if without_processes is not None:
            (without_processes.discard if rows else without_processes.add)(token)
        return True
    if kind == "agents":
        report = codec.decode(message.payload, AgentReport)
        _check(report, report.time_ns, subject)
        counts = (
            report.ticks, report.late_ticks, report.read_seconds_mean, report.read_seconds_max, report.read_errors,
            report.published_messages, report.buffered_bytes, report.dropped_messages, report.dropped_samples,
            report.cpu_seconds, report.resident_bytes,
        )  # fmt: skip
        for number in counts:
            if isinstance(number, int):
                _fits(number, "$")
        first = (clocks.set_right(report.time_ns, stored_ns) // 1000, report.host, report.agent, report.source)
        last = (report.corral_version, _fits(report.samples, "$.samples"))
        if not is_new(token, report.agent, report.sequence):
            return False
        _look_at_clock(host_clocks, token, report.time_ns, stored_ns)
        facts.rows.setdefault("agents", []).append((*first, *counts, *last))
        return True
    if kind == "events":
        event = codec.decode(message.payload, DeviceEvent)
        _check(event, event.time_ns, subject)
        _fits(event.sequence, "$.sequence")
        if not -(2**31) <= event.code < 2**31:
            raise codec.DecodeError(f"{event.code} is too large - at `$.code`", "out_of_range", "$.code")
        if not is_new(token, event.agent, event.sequence):
            return False
        facts.rows.setdefault("events", []).append(
            (
                clocks.set_right(event.time_ns, stored_ns) // 1000,
                event.host,
                event.agent,
                event.sequence,
                event.kind,
                event.severity.value,
                event.device,
                event.code,
                event.message,
                json.dumps(_storable(event.data)) if event.data else None,
                stored_ns // 1000,
            )
        )
        return True
    raise codec.DecodeError(f"Nothing is known of the subject {subject}", "invalid")


def _storable(data: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities in an event's data with null, since JSON has neither."""
    return {name: None if isinstance(at, float) and not math.isfinite(at) else at for name, at in data.items()}


def _look_at_clock(host_clocks: HostClocks | None, host: str, time_ns: int, stored_ns: int) -> None:
    off = abs(stored_ns - time_ns) > clocks.AHEAD_SECONDS * 1e9
    if host_clocks is not None and (off or host_clocks.watches(host)):
        host_clocks.observe(host, time_ns, stored_ns)


def _check(message: Inventory | ProcessBatch | AgentReport | DeviceEvent, time_ns: int, subject: str) -> None:
    speakers.check(message, subject)
    if time_ns < EARLIEST_NS:
        raise codec.DecodeError(
            "The time lies before 2000: the host's clock is not set - at `$.time_ns`", "out_of_range", "$.time_ns"
        )


def _check_lease(event: LeaseEvent) -> None:
    """Check that numbers fit their columns and that times have a time zone."""
    lease = event.lease
    times = {"time": event.time, "lease.granted_at": lease.granted_at, "lease.expires_at": lease.expires_at}
    for name, at in times.items() if lease.ended_at is None else (times | {"lease.ended_at": lease.ended_at}).items():
        if at.tzinfo is None:
            raise codec.DecodeError(f"{at} has no time zone - at `$.{name}`", "invalid", f"$.{name}")
    for grant in lease.grants:
        _fits(grant.index, "$.lease.grants[...].index", 31)
        for name in ("memory_bytes", "host_memory_bytes"):
            _fits(getattr(grant, name), f"$.lease.grants[...].{name}")


def _fits(number: int, path: str, bits: int = 63) -> int:
    """Check that a number is not negative and fits its column: MessagePack has integers larger than a BIGINT."""
    if not 0 <= number < 2**bits:
        raise codec.DecodeError(f"{number} is no possible value - at `{path}`", "out_of_range", path)
    return number


def _maybe(number: int | None, path: str) -> int | None:
    return None if number is None else _fits(number, path)


def _arrow(schema: Any, rows: Sequence[tuple[Any, ...]]) -> ArrowTable:
    columns = zip(*rows, strict=True)
    return pa.Table.from_arrays(
        [
            # Times are counted in microseconds already, but those of leases are datetimes.
            pa.array(column, type=field.type)
            for field, column in zip(schema, columns, strict=True)
        ],
        schema=schema,
    )
