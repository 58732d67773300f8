"""What `corral top` shows: one look at the fleet, what it was like before, and rows by which it can be sorted."""

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
"""Looks that a sparkline remembers."""
LOOKS_SHARE: Final = 4
"""Between two looks passes so many times what a look takes."""
ROWS_SECONDS: Final = 2.0
"""Processes are listed anew no sooner: collectors send them every ten seconds."""
SPARKS: Final = "▁▂▃▄▅▆▇█"


class Look(Struct, kw_only=True):
    """The fleet at one moment, as the planner sees it."""

    time: datetime
    fleet: operations.FleetSummary
    devices: list[operations.DeviceStatus]
    leases: list[requests.Lease]
    queue: list[operations.QueueEntry]


class ProcessRow(Struct, kw_only=True):
    """A process on a device.

    Attributes:
        host: of the device.
        index: of the device on it; -1 if it is not in the fleet (any more).
        process: as its collector published it.
        owner: of its lease; empty if that is not active.
        concern: what is wrong with its being there, in words; empty if nothing.
    """

    host: str
    index: int
    process: ProcessSample
    owner: str = ""
    concern: str = ""

    @property
    def key(self) -> str:
        """Names the row."""
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
"""Columns of the view `processes_now`, and what they are in a `ProcessSample`."""


async def look(client: Client, hosts: Sequence[str] = (), models: Sequence[str] = ()) -> Look:
    """Ask for all of it at once."""
    fleet, devices, leases, queue = await asyncio.gather(
        client.fleet(hosts=hosts, models=models),
        client.devices(hosts=hosts, models=models),
        client.leases(),
        client.queue(),
    )
    return Look(time=datetime.now(UTC), fleet=fleet, devices=devices, leases=leases, queue=queue)


class Board:
    """The last look, and the past of each device.

    Attributes:
        last: None before the first.
        error: why the last attempt failed; empty if it did not.
        past: of each device, utilization in percent, oldest first; None where it is not known.
        processes: of each host, as its collector published them last.
        took_seconds: how long the last look took.
    """

    def __init__(self, client: Client, hosts: Sequence[str] = (), models: Sequence[str] = ()) -> None:
        self.client = client
        self._hosts = hosts
        self._models = models
        self.last: Look | None = None
        self.error = ""
        self.past: dict[str, deque[float | None]] = {}
        self.mean_past: deque[float | None] = deque(maxlen=HISTORY)
        self.processes: dict[str, list[ProcessSample]] = {}
        self.took_seconds = 0.0
        self._rows: list[ProcessRow] = []
        self._rows_at = -ROWS_SECONDS

    async def refresh(self) -> None:
        """Look again; a failure is kept as a text, and the last look with it."""
        started = time.monotonic()
        try:
            seen = await look(self.client, self._hosts, self._models)
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
        """Seconds until the next look: at a huge fleet it takes the planner's time, which is for requests."""
        return max(interval, LOOKS_SHARE * self.took_seconds)

    async def follow_processes(self) -> None:
        """Keep the processes of every host, until cancelled."""
        subscription = await self.client.nc.subscribe(subjects.processes_subject("*"), pending_msgs_limit=1024)
        with contextlib.suppress(CorralError):  # without a history they come with the next list of each host
            await self._recall_processes()
        async for message in subscription.messages:
            with contextlib.suppress(codec.DecodeError):
                batch = codec.decode(message.data, ProcessBatch)
                self.processes[batch.host] = batch.processes

    async def _recall_processes(self) -> None:
        """What each host said last, for those from which nothing has come yet: they send it every ten seconds."""
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
        """The processes on a device, the largest first."""
        leases = self.last.leases if self.last is not None else []
        rows = process_rows(device.host, self.processes.get(device.host, ()), leases, {device.uuid: device.index})
        found = [row for row in rows if row.process.device == device.uuid]
        return sorted(found, key=lambda row: -(row.process.memory_used_bytes or 0))

    def process_rows(self) -> list[ProcessRow]:
        """The processes on all devices that were looked at: what is wrong first, then by host and device."""
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
    """A host's processes, each with what is wrong with it.

    Args:
        host: the host's name.
        processes: on its devices.
        leases: active ones; others do no harm.
        indices: of devices, by uuid.
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
    """The last values as bars, one a character, the newest at the right."""
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
"""By which devices can be sorted, and whether the greatest comes first."""


def picked(
    devices: Sequence[operations.DeviceStatus], sort: str, reverse: bool, text: str
) -> list[operations.DeviceStatus]:
    """Devices that a filter lets through, sorted; those that are equal by host and index.

    Args:
        devices: as they came.
        sort: one of `SORTS`.
        reverse: the other way round.
        text: words that must all be found in host, model, uuid, lease, or state (`free`, `leased`, `drained`, …);
            a word with `*` or `?` is a glob over each of them.
    """
    key, greatest_first = SORTS[sort]
    words = text.lower().split()
    found = [device for device in devices if all(_says(device, word) for word in words)]
    found.sort(key=SORTS["host"][0])
    found.sort(key=key, reverse=greatest_first != reverse)
    return found


def _says(device: operations.DeviceStatus, word: str) -> bool:
    texts = [device.host, device.model, device.uuid, *device.leases, *device.why_not]
    texts.append("leased" if device.leases else "free" if device.usable else "unusable")
    lowered = [text.lower() for text in texts]
    if set(word) & set("*?["):
        return any(fnmatch.fnmatchcase(text, word) for text in lowered)
    return any(word in text for text in lowered)


class HostRow(Struct, kw_only=True):
    """The devices of one host together."""

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
    """One row a host, by name."""
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


def summary_line(seen: Look, past: Any = ()) -> Text:
    """The fleet in one line."""
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
