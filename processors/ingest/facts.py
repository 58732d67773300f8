"""Decode the less frequent messages row by row: processes, agents' reports, inventories, events, leases, jobs.

Each kind of message has a decoder in `_DECODERS`. Rows have the columns of the tables that they are appended to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
from msgspec import Struct, field
from msgspec.structs import replace

from ...schemas import codec, speakers, subjects
from ...schemas.inventory import check as check_inventory
from ...schemas.request_events import RequestEvents
from ...schemas.requests import LeaseEvent
from ...schemas.telemetry import AgentReport, DeviceEvent, Inventory, ProcessBatch, ProcessSample
from ...schemas.values import clocks
from ...schemas.work.jobs import JobEvent
from ..storage.protocol import ArrowTable, Asked
from ..storage.rows import Columns, arrow_schema
from .columnar import EARLIEST_NS
from .hostclocks import HostClocks
from .incoming import Incoming, Refusal

_LIMITS: Final = {pa.int64(): (0, 2**63), pa.int32(): (-(2**31), 2**31)}
"""Range of the integers in a column, by its type."""


class _CheckedColumns(Columns):
    """Columns of a table; numbers that do not fit are refused, since MessagePack has integers larger than a BIGINT.

    Args:
        table: name in `schema.TABLES`.
        source: type of the structs.
        given: names of the columns that are given.
        path: of the struct in its message.
    """

    def __init__(self, table: str, source: type[Struct], given: Sequence[str], path: str = "$") -> None:
        super().__init__(arrow_schema(table), source, given)
        types = {name: self.schema.field(name).type for name in self.read}
        self._checked = [
            (at, *_LIMITS[types[name]], f"{path}.{name}")
            for at, name in enumerate(self.read, len(given))
            if types[name] in _LIMITS
        ]

    def row(self, source: Struct, /, **given: Any) -> tuple[Any, ...]:
        """Values of one row.

        Raises:
            DecodeError: a number does not fit its column.
        """
        found = (*self._given(given), *self._read(source))
        for at, low, high, path in self._checked:
            number = found[at]
            if number is not None and not low <= number < high:
                raise _out_of_range(number, path)
        return found


_PROCESSES: Final = _CheckedColumns("processes", ProcessSample, ("time", "host", "started"), "$.processes[...]")
_WITHOUT_PROCESSES: Final = _CheckedColumns("store.without_processes", ProcessBatch, ("time",))
_AGENTS: Final = _CheckedColumns("agents", AgentReport, ("time",))
_EVENTS: Final = _CheckedColumns("events", DeviceEvent, ("time", "severity", "data", "stored"))

TABLES: Final[Mapping[str, Columns]] = {
    "processes": _PROCESSES,
    "store.without_processes": _WITHOUT_PROCESSES,
    "agents": _AGENTS,
    "events": _EVENTS,
}
"""Columns of the tables that these messages are appended to."""


class Facts(Struct):
    """Contents of a sequence of decoded messages.

    Attributes:
        accepted: messages that were decoded.
        rows: by table.
        inventories: in order.
        leases: in order.
        requests: in order.
        request_events: messages that these are from, in order.
        jobs: in order.
        refused: messages that were not decoded.
        duplicates: number of messages that were delivered before.
    """

    accepted: list[Incoming] = field(default_factory=list)
    rows: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    inventories: list[Inventory] = field(default_factory=list)
    leases: list[LeaseEvent] = field(default_factory=list)
    requests: list[Asked] = field(default_factory=list)
    request_events: list[RequestEvents] = field(default_factory=list)
    jobs: list[JobEvent] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    duplicates: int = 0

    def tables(self) -> dict[str, ArrowTable]:
        """The rows as Arrow tables."""
        return {name: TABLES[name].table(rows) for name, rows in self.rows.items() if rows}


class _State(Struct):
    """State that decoders read and extend.

    Attributes:
        facts: of all messages.
        is_new, host_clocks, without_processes: see `decode`.
    """

    facts: Facts
    is_new: Callable[[str, str, int], bool]
    host_clocks: HostClocks | None
    without_processes: set[str] | None

    def append(self, table: str, *rows: tuple[Any, ...]) -> None:
        self.facts.rows.setdefault(table, []).extend(rows)

    def accept(self, host: str, message: ProcessBatch | AgentReport | DeviceEvent) -> bool:
        """Record a message of an agent's run; False if it is a duplicate."""
        return self.is_new(host, message.agent, message.sequence)

    def observe_clock(self, host: str, time_ns: int, stored_ns: int) -> None:
        """Observe the clock of a host whose times are off, or that is watched."""
        off = abs(stored_ns - time_ns) > clocks.AHEAD_SECONDS * 1e9
        if self.host_clocks is not None and (off or self.host_clocks.watches(host)):
            self.host_clocks.observe(host, time_ns, stored_ns)


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
    state = _State(facts, is_new, host_clocks, without_processes)
    for message in messages:
        try:
            if _decoder(message.subject)(state, message, message.stored_ns or now_ns):
                facts.accepted.append(message)
            else:
                facts.duplicates += 1
        except codec.DecodeError as error:
            facts.refused.append(Refusal(message, error.code, str(error)))
    return facts


def _processes(state: _State, message: Incoming, stored_ns: int) -> bool:
    batch = codec.decode(message.payload, ProcessBatch)
    _check(batch, batch.time_ns, message.subject)
    host = _host(message.subject)
    time_us = clocks.set_right(batch.time_ns, stored_ns) // 1000
    rows = [
        _PROCESSES.row(
            process,
            time=time_us,
            host=batch.host,
            started=_fits(process.started_ns, "$.processes[...].started_ns") // 1000 or None,
        )
        for process in batch.processes
    ]
    if not state.accept(host, batch):
        return False
    state.observe_clock(host, batch.time_ns, stored_ns)
    state.append("processes", *rows)
    known = state.without_processes
    if not rows and host not in (known or ()):
        state.append("store.without_processes", _WITHOUT_PROCESSES.row(batch, time=time_us))
    if known is not None:
        (known.discard if rows else known.add)(host)
    return True


def _agents(state: _State, message: Incoming, stored_ns: int) -> bool:
    report = codec.decode(message.payload, AgentReport)
    _check(report, report.time_ns, message.subject)
    host = _host(message.subject)
    row = _AGENTS.row(report, time=clocks.set_right(report.time_ns, stored_ns) // 1000)
    if not state.accept(host, report):
        return False
    state.observe_clock(host, report.time_ns, stored_ns)
    state.append("agents", row)
    return True


def _events(state: _State, message: Incoming, stored_ns: int) -> bool:
    event = codec.decode(message.payload, DeviceEvent)
    _check(event, event.time_ns, message.subject)
    row = _EVENTS.row(
        event,
        time=clocks.set_right(event.time_ns, stored_ns) // 1000,
        severity=event.severity.value,
        data=json.dumps(_storable(event.data)) if event.data else None,
        stored=stored_ns // 1000,
    )
    if not state.accept(_host(message.subject), event):
        return False
    state.append("events", row)
    return True


def _requests(state: _State, message: Incoming, stored_ns: int) -> bool:
    batch = codec.decode(message.payload, RequestEvents, codec.JSON)
    _check_requests(batch)
    state.facts.requests.extend(Asked(event, batch.planner) for event in batch.events)
    state.facts.request_events.append(batch)
    return True


def _jobs(state: _State, message: Incoming, stored_ns: int) -> bool:
    event = codec.decode(message.payload, JobEvent, codec.JSON)
    _check_job(event, message.subject)
    state.facts.jobs.append(event)
    return True


def _inventory(state: _State, message: Incoming, stored_ns: int) -> bool:
    inventory = codec.decode(message.payload, Inventory)
    _check(inventory, inventory.time_ns, message.subject)
    check_inventory(inventory)
    # An inventory is dated by when it was stored: the latest counts, even if the host's clock was set meanwhile.
    state.facts.inventories.append(replace(inventory, time_ns=stored_ns))
    return True


def _leases(state: _State, message: Incoming, stored_ns: int) -> bool:
    kind = codec.JSON if message.payload[:1] == b"{" else codec.MSGPACK
    event = codec.decode(message.payload, LeaseEvent, kind)
    _check_lease(event)
    state.facts.leases.append(event)
    return True


_DECODERS: Final[Mapping[str, Callable[[_State, Incoming, int], bool]]] = {
    "processes": _processes,
    "agents": _agents,
    "events": _events,
    "inventory": _inventory,
    "leases": _leases,
    "requests": _requests,
    "jobs": _jobs,
}
"""Decoders by the token of the subject after its prefix: of a message and its time in the stream; False if it is a
duplicate."""


def _decoder(subject: str) -> Callable[[_State, Incoming, int], bool]:
    found = _DECODERS.get(subject[len(subjects.PREFIX) + 1 :].partition(".")[0])
    if found is None:
        raise codec.DecodeError(f"Nothing is known of the subject {subject}", "invalid")
    return found


def _host(subject: str) -> str:
    """Host in a subject: the last token, behind the partition where there are several."""
    return subject.rpartition(".")[2]


def _storable(data: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities in an event's data with null, since JSON has neither."""
    return {name: None if isinstance(at, float) and not math.isfinite(at) else at for name, at in data.items()}


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


def _check_requests(told: RequestEvents) -> None:
    """Check that times have a time zone and that numbers fit their columns."""
    for event in told.events:
        for name in ("asked_at", "ended_at"):
            if getattr(event, name).tzinfo is None:
                raise codec.DecodeError(f"{name} has no time zone - at `$.events[...].{name}`", "invalid")
        _fits(event.position, "$.events[...].position")
    for waiting in told.waiting:
        for name in ("asked_at", "until"):
            if getattr(waiting, name).tzinfo is None:
                raise codec.DecodeError(f"{name} has no time zone - at `$.waiting[...].{name}`", "invalid")
        _fits(waiting.position, "$.waiting[...].position")
    for span in told.drains:
        if span.since.tzinfo is None or (span.until is not None and span.until.tzinfo is None):
            raise codec.DecodeError("a time has no time zone - at `$.drains[...].since`", "invalid")


def _check_job(event: JobEvent, subject: str) -> None:
    """Check that the subject names the job, and that numbers fit their columns."""
    job = event.job
    if subject.rpartition(".")[2] != job.job_id:
        raise codec.DecodeError("The subject is that of another job - at `$.job.job_id`", "invalid", "$.job.job_id")
    _fits(event.version, "$.version")
    for name in ("gpus", "hosts", "tasks_per_host"):
        _fits(getattr(job, name), f"$.job.{name}", 31)
    for count in job.counts.values():
        _fits(count, "$.job.counts[...]", 31)
    for task in event.tasks:
        _fits(task.index, "$.tasks[...].index")
        for name in ("attempt", "retries_left"):
            # The next attempt fits, too.
            _fits(getattr(task, name) + 1, f"$.tasks[...].{name}", 31)
        for name in ("exit_code", "signal"):
            _fits((getattr(task, name) or 0) + 2**31, f"$.tasks[...].{name}", 32)
        for part in task.parts:
            for name in ("peak_memory_bytes", "log_bytes"):
                _fits(getattr(part, name), f"$.tasks[...].parts[...].{name}", 53)


def _fits(number: int, path: str, bits: int = 63) -> int:
    """Check that a number is not negative and has at most so many bits."""
    if not 0 <= number < 2**bits:
        raise _out_of_range(number, path)
    return number


def _out_of_range(number: int, path: str) -> codec.DecodeError:
    return codec.DecodeError(f"{number} is out of range - at `{path}`", "out_of_range", path)
