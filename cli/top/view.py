"""Data for `corral top`: snapshots of the fleet, the history of each device, and rows and sort keys of its tables."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Struct
from rich.text import Text

from ...client import Client, CorralError
from ...client.notebook import short_model
from ...collectors.processes.attribution import attribute
from ...schemas import codec, operations, requests, subjects
from ...schemas.telemetry import AttributionKind, ProcessBatch, ProcessSample
from ...schemas.units import format_bytes

HISTORY: Final = 120
"""Number of snapshots in the history of a sparkline."""
LOOKS_SHARE: Final = 4
"""Minimum pause between two snapshots, as a multiple of the time that a snapshot takes."""
ROWS_SECONDS: Final = 2.0
"""Minimum time between updates of the process list; collectors publish processes every ten seconds."""
SPARKS: Final = "▁▂▃▄▅▆▇█"


class FleetSnapshot(Struct, kw_only=True):
    """Snapshot of the fleet, as the planner sees it."""

    time: datetime
    fleet: operations.FleetSummary
    devices: list[operations.DeviceStatus]
    leases: list[requests.Lease]
    queue: list[operations.QueueEntry]


class ProcessRow(Struct, kw_only=True):
    """A process on a device.

    Attributes:
        host: host of the device.
        index: index of the device on its host; -1 if it isn't in the fleet (any more).
        process: the process as its collector published it.
        owner: owner of the process's lease; empty if the lease isn't active.
        concern: lease violation by the process, in words; empty if none.
    """

    host: str
    index: int
    process: ProcessSample
    owner: str = ""
    concern: str = ""

    @property
    def key(self) -> str:
        """Unique key of the row."""
        return f"{self.process.device}/{self.process.pid}"


_RECALLED: Final = {
    "host": "host",
    "device": "device",
    "pid": "pid",
    "kind": "kind",
    "memory_used_bytes": "memory_used_bytes",
    "sm_utilization_percent": "sm_utilization_percent",
    "process": "name",
    "user": "user",
    "container": "container",
    "lease_id": "lease",
}
"""Columns of the view `processes_now`, with the corresponding fields of a `ProcessSample`."""


async def take_snapshot(client: Client, hosts: Sequence[str] = (), models: Sequence[str] = ()) -> FleetSnapshot:
    """Take a snapshot: ask the planner for fleet, devices, leases and queue concurrently."""
    fleet, devices, leases, queue = await asyncio.gather(
        client.fleet(hosts=hosts, models=models),
        client.devices(hosts=hosts, models=models),
        client.leases(),
        client.queue(),
    )
    return FleetSnapshot(time=datetime.now(UTC), fleet=fleet, devices=devices, leases=leases, queue=queue)


class FleetView:
    """The last snapshot, and the history of each device.

    Attributes:
        last: the last snapshot; None before the first.
        error: error of the last attempt; empty if it succeeded.
        past: utilization of each device in percent, oldest first; None where it is unknown.
        mean_past: mean utilization of the fleet in percent, oldest first; None where it is unknown.
        processes: processes by host, as the host's collector published them last.
        took_seconds: duration of the last snapshot.
    """

    def __init__(self, client: Client, hosts: Sequence[str] = (), models: Sequence[str] = ()) -> None:
        self.client = client
        self._hosts = hosts
        self._models = models
        self.last: FleetSnapshot | None = None
        self.error = ""
        self.past: dict[str, deque[float | None]] = {}
        self.mean_past: deque[float | None] = deque(maxlen=HISTORY)
        self.processes: dict[str, list[ProcessSample]] = {}
        self.took_seconds = 0.0
        self._rows: list[ProcessRow] = []
        self._rows_at = -ROWS_SECONDS

    async def refresh(self) -> None:
        """Take a new snapshot. If that fails, keep the last one and set `error`."""
        started = time.monotonic()
        try:
            seen = await take_snapshot(self.client, self._hosts, self._models)
        except CorralError as error:
            self.error = str(error)
            return
        self.last, self.error = seen, ""
        self.took_seconds = time.monotonic() - started
        for device in seen.devices:
            past = self.past.get(device.uuid)
            if past is None:
                past = self.past[device.uuid] = deque(maxlen=HISTORY)
            past.append(device.utilization_percent)
        self.mean_past.append(seen.fleet.utilization_percent_mean)

    def pause(self, interval: float) -> float:
        """Seconds until the next snapshot: longer for a large fleet, to leave the planner time for requests."""
        return max(interval, LOOKS_SHARE * self.took_seconds)

    async def follow_processes(self) -> None:
        """Keep the processes of every host up to date, until cancelled."""
        subscription = await self.client.nc.subscribe(subjects.processes_subject("*"), pending_msgs_limit=1024)
        with contextlib.suppress(CorralError):  # without a history, each host's next message has them
            await self._recall_processes()
        async for message in subscription.messages:
            with contextlib.suppress(codec.DecodeError):
                batch = codec.decode(message.data, ProcessBatch)
                self.processes[batch.host] = batch.processes

    async def _recall_processes(self) -> None:
        """Load the last processes of each host from the history, for hosts that have published none since the start.

        Hosts publish them every ten seconds.
        """
        columns = ", ".join(f'"{name}"' for name in _RECALLED)
        found = await self.client.query(f"SELECT {columns} FROM processes_now", limit=100_000)
        by_host: dict[str, list[ProcessSample]] = {}
        for row in found.dicts():
            host = row.pop("host")
            process = ProcessSample(**{_RECALLED[name]: value for name, value in row.items() if value is not None})
            by_host.setdefault(host, []).append(process)
        for host, processes in by_host.items():
            self.processes.setdefault(host, processes)

    def processes_on(self, device: operations.DeviceStatus) -> list[ProcessRow]:
        """Processes on a device, those with the most memory first."""
        leases = self.last.leases if self.last is not None else []
        rows = process_rows(device.host, self.processes.get(device.host, ()), leases, {device.uuid: device.index})
        found = [row for row in rows if row.process.device == device.uuid]
        return sorted(found, key=lambda row: -(row.process.memory_used_bytes or 0))

    def process_rows(self) -> list[ProcessRow]:
        """Processes on all devices in the snapshot: lease violations first, then by host and device."""
        now = time.monotonic()
        if self.last is not None and now - self._rows_at >= ROWS_SECONDS:
            self._rows_at = now
            indices = {device.uuid: device.index for device in self.last.devices}
            leases: dict[str, list[requests.Lease]] = {}
            for lease in self.last.leases:
                for host in {grant.host for grant in lease.grants}:
                    leases.setdefault(host, []).append(lease)
            self._rows = [
                row
                for host, processes in self.processes.items()
                for row in process_rows(host, processes, leases.get(host, ()), indices)
                if row.index >= 0
            ]
            self._rows.sort(key=lambda row: (not row.concern, row.host, row.index, row.process.pid))
        return self._rows


def process_rows(
    host: str, processes: Sequence[ProcessSample], leases: Sequence[requests.Lease], indices: dict[str, int]
) -> list[ProcessRow]:
    """Rows for a host's processes, each with its lease violation, if any.

    Args:
        host: the host's name.
        processes: processes on its devices.
        leases: active leases of the host; those of other hosts have no effect.
        indices: index of each device, by UUID.
    """
    active = {lease.lease_id: lease for lease in leases}
    _, violations = attribute(processes, leases)
    beyond = {(one.lease, one.device) for one in violations if one.kind is AttributionKind.LEASE_MEMORY_EXCEEDED}
    without = {(one.device, one.pid) for one in violations if one.kind is AttributionKind.PROCESS_WITHOUT_LEASE}
    rows: list[ProcessRow] = []
    for process in processes:
        concern = ""
        if (process.device, process.pid) in without:
            concern = "no lease"
            if process.lease:
                concern = "not its device" if process.lease in active else "lease has ended"
        elif (process.lease, process.device) in beyond:
            concern = "beyond its lease"
        owner = active[process.lease].owner if process.lease in active else ""
        index = indices.get(process.device, -1)
        rows.append(ProcessRow(host=host, index=index, process=process, owner=owner, concern=concern))
    return rows


def sparkline(values: Sequence[float | None], width: int, most: float = 100.0) -> str:
    """Sparkline of the last `width` values, one character each, the newest at the right; `most` is the full height."""
    recent = list(values)[-width:]
    bars = "".join(
        " " if value is None else SPARKS[min(len(SPARKS) - 1, int(max(value, 0) / most * len(SPARKS)))]
        for value in recent
    )
    return bars.rjust(width)


Key = Callable[[operations.DeviceStatus], Any]


def _or_least(value: float | None) -> float:
    return -1.0 if value is None else value


SORTS: Final[dict[str, tuple[Key, bool]]] = {
    "host": (lambda device: (device.host, device.index), False),
    "util": (lambda device: _or_least(device.utilization_percent), True),
    "memory": (lambda device: _or_least(device.memory_used_bytes), True),
    "free": (lambda device: device.memory_free_bytes, True),
    "temp": (lambda device: _or_least(device.temperature_celsius), True),
    "power": (lambda device: _or_least(device.power_watts), True),
    "state": (lambda device: (device.usable, not device.leases), False),
    "model": (lambda device: device.model, False),
}
"""Sort keys for devices, and whether the greatest comes first."""


def filter_and_sort(
    devices: Sequence[operations.DeviceStatus], sort: str, reverse: bool, text: str
) -> list[operations.DeviceStatus]:
    """Filter and sort devices. Devices with equal keys are sorted by host and index.

    Args:
        devices: devices to filter.
        sort: sort key, one of `SORTS`.
        reverse: reverse the order.
        text: words, each of which must occur in host, model, UUID, lease or state (`free`, `leased`, `drained`, …);
            a word with `*` or `?` is a glob over each of them.
    """
    key, greatest_first = SORTS[sort]
    words = text.lower().split()
    found = [device for device in devices if all(_matches(device, word) for word in words)]
    found.sort(key=SORTS["host"][0])
    found.sort(key=key, reverse=greatest_first != reverse)
    return found


def _matches(device: operations.DeviceStatus, word: str) -> bool:
    texts = [device.host, device.model, device.uuid, *device.leases, *device.why_not]
    texts.append("leased" if device.leases else "free" if device.usable else "unusable")
    lowered = [text.lower() for text in texts]
    if set(word) & set("*?["):
        return any(fnmatch.fnmatchcase(text, word) for text in lowered)
    return any(word in text for text in lowered)


class HostRow(Struct, kw_only=True):
    """Aggregates over the devices of one host."""

    host: str
    devices: int
    usable: int
    leased: int
    utilization_percent: float | None
    memory_used_bytes: int
    memory_total_bytes: int
    temperature_celsius_max: float | None
    power_watts: float | None
    models: str


def by_host(devices: Sequence[operations.DeviceStatus]) -> list[HostRow]:
    """Aggregate devices to one row per host, sorted by name."""
    groups: dict[str, list[operations.DeviceStatus]] = {}
    for device in devices:
        groups.setdefault(device.host, []).append(device)
    rows: list[HostRow] = []
    for host, members in sorted(groups.items()):
        utilization = [one.utilization_percent for one in members if one.utilization_percent is not None]
        temperature = [one.temperature_celsius for one in members if one.temperature_celsius is not None]
        power = [one.power_watts for one in members if one.power_watts is not None]
        rows.append(
            HostRow(
                host=host,
                devices=len(members),
                usable=sum(one.usable for one in members),
                leased=sum(bool(one.leases) for one in members),
                utilization_percent=sum(utilization) / len(utilization) if utilization else None,
                memory_used_bytes=sum(one.memory_used_bytes or 0 for one in members),
                memory_total_bytes=sum(one.memory_total_bytes for one in members),
                temperature_celsius_max=max(temperature, default=None),
                power_watts=sum(power) if power else None,
                models=", ".join(sorted({short_model(one.model) for one in members})),
            )
        )
    return rows


def summary_line(seen: FleetSnapshot, past: Any = ()) -> Text:
    """Summary of the fleet in one line."""
    fleet = seen.fleet
    line = Text()
    line.append(f"{fleet.devices} GPUs", "bold").append(f" on {fleet.hosts} hosts")
    unusable = fleet.devices - fleet.usable_devices
    line.append(f" · {fleet.leased_devices} leased")
    if fleet.in_use_devices:
        line.append(f" · {fleet.in_use_devices} in use without a lease", "magenta")
    if unusable:
        line.append(f" · {unusable} unusable", "red")
    if fleet.utilization_percent_mean is not None:
        line.append(f" · util {fleet.utilization_percent_mean:.0f}%")
        if past:
            line.append(f" {sparkline(past, min(len(past), 12))}", "green")
    line.append(f" · {format_bytes(fleet.memory_used_bytes)} of {format_bytes(fleet.memory_total_bytes)}")
    if fleet.power_watts_total is not None:
        line.append(f" · {fleet.power_watts_total / 1000:.1f} kW")
    if fleet.waiting_requests:
        line.append(f" · {fleet.waiting_requests} waiting", "yellow")
    return line
