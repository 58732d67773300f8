"""Rows of the tables of `corral top`: devices by filter and sort key, hosts, and processes with lease violations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct
from rich.text import Text

from ...client.fleet_view import STATE_WORDS, DeviceState, FleetSnapshot, FleetView, matches, state_counts
from ...client.notebook import short_model
from ...collectors.processes.attribution import attribute
from ...schemas import operations, requests
from ...schemas.telemetry import AttributionKind, ProcessSample
from ...schemas.values.units import format_bytes

HISTORY: Final = 120
"""Number of snapshots in the history of a sparkline."""
ROWS_SECONDS: Final = 2.0
"""Minimum time between updates of the process list; collectors publish processes every ten seconds."""
SPARKS: Final = "▁▂▃▄▅▆▇█"


class ProcessRow(Struct, kw_only=True):
    """A process on a device.

    Attributes:
        host: host of the device.
        index: index of the device on its host; -1 if it isn't in the fleet (any more).
        process: the process as its collector published it.
        lease: the process's lease; None if it isn't active.
        concern: lease violation by the process, in words; empty if none.
    """

    host: str
    index: int
    process: ProcessSample
    lease: requests.Lease | None = None
    concern: str = ""

    @property
    def key(self) -> str:
        """Unique key of the row."""
        return f"{self.process.device}/{self.process.pid}"


class ProcessTable:
    """Processes on the devices of a fleet, each with its lease violation.

    Args:
        view: the live view of the fleet.
    """

    def __init__(self, view: FleetView) -> None:
        self._view = view
        self._rows: list[ProcessRow] = []
        self._computed_at = -ROWS_SECONDS

    def on(self, device: operations.DeviceStatus) -> list[ProcessRow]:
        """Processes on a device, those with the most memory first."""
        leases = self._view.last.leases if self._view.last is not None else []
        processes = self._view.processes_of(device.host) or ()
        rows = process_rows(device.host, processes, leases, {device.uuid: device.index})
        found = [row for row in rows if row.process.device == device.uuid]
        return sorted(found, key=lambda row: -(row.process.memory_used_bytes or 0))

    def rows(self) -> list[ProcessRow]:
        """Processes on all devices in the snapshot: lease violations first, then by host and device."""
        now = time.monotonic()
        if self._view.last is not None and now - self._computed_at >= ROWS_SECONDS:
            self._computed_at = now
            self._rows = self._compute(self._view.last)
        return self._rows

    def _compute(self, seen: FleetSnapshot) -> list[ProcessRow]:
        indices = {device.uuid: device.index for device in seen.devices}
        leases: dict[str, list[requests.Lease]] = {}
        for lease in seen.leases:
            for host in {grant.host for grant in lease.grants}:
                leases.setdefault(host, []).append(lease)
        rows = [
            row
            for host in self._view.process_hosts
            for row in process_rows(host, self._view.processes_of(host) or (), leases.get(host, ()), indices)
            if row.index >= 0
        ]
        return sorted(rows, key=lambda row: (not row.concern, row.host, row.index, row.process.pid))


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
        index = indices.get(process.device, -1)
        lease = active.get(process.lease)
        rows.append(ProcessRow(host=host, index=index, process=process, lease=lease, concern=concern))
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


def _or_minus_one(value: float | None) -> float:
    return -1.0 if value is None else value


SORTS: Final[dict[str, tuple[Key, bool]]] = {
    "host": (lambda device: (device.host, device.index), False),
    "util": (lambda device: _or_minus_one(device.utilization_percent), True),
    "memory": (lambda device: _or_minus_one(device.memory_used_bytes), True),
    "free": (lambda device: device.memory_free_bytes, True),
    "temp": (lambda device: _or_minus_one(device.temperature_celsius), True),
    "power": (lambda device: _or_minus_one(device.power_watts), True),
    "state": (lambda device: (device.usable, not device.leases), False),
    "model": (lambda device: device.model, False),
}
"""Sort keys for devices, and whether the greatest comes first."""


def filter_and_sort(
    devices: Sequence[operations.DeviceStatus],
    sort: str,
    reverse: bool,
    text: str,
    holders: Mapping[str, str] | None = None,
) -> list[operations.DeviceStatus]:
    """Filter and sort devices. Devices with equal keys are sorted by host and index.

    Args:
        devices: devices to filter.
        sort: sort key, one of `SORTS`.
        reverse: reverse the order.
        text: words, all of which must match, as in `fleet_view.matches`.
        holders: holder of each active lease, by lease id.
    """
    key, greatest_first = SORTS[sort]
    words = text.lower().split()
    found = [device for device in devices if matches(device, words, holders or {})]
    found.sort(key=SORTS["host"][0])
    found.sort(key=key, reverse=greatest_first != reverse)
    return found


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


_STATE_STYLES: Final = {
    DeviceState.FREE: "green",
    DeviceState.SHARED: "",
    DeviceState.LEASED: "",
    DeviceState.IN_USE: "magenta",
    DeviceState.RESERVED: "blue",
    DeviceState.THROTTLED: "yellow",
}
"""Colors of states in the summary; all others are red."""


def summary_line(seen: FleetSnapshot, past: Any = ()) -> Text:
    """Summary of the fleet in one line."""
    fleet = seen.fleet
    line = Text()
    line.append(f"{fleet.devices} GPUs", "bold").append(f" on {fleet.hosts} hosts")
    counts = state_counts(seen.devices)
    for state, words in STATE_WORDS.items():
        if counts[state] or state in (DeviceState.FREE, DeviceState.LEASED):
            line.append(f" · {counts[state]} {words}", _STATE_STYLES.get(state, "red"))
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
