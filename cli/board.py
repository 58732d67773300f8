"""What `corral top` shows: one look at the fleet, what it was like before, and rows by which it can be sorted."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Struct

from ..client import Client, CorralError
from ..schemas import bus, codec, requests
from ..schemas.telemetry import ProcessBatch, ProcessSample

HISTORY: Final = 120
"""Looks that a sparkline remembers."""
SPARKS: Final = "▁▂▃▄▅▆▇█"


class Look(Struct, kw_only=True):
    """The fleet at one moment, as the planner sees it."""

    time: datetime
    fleet: requests.FleetSummary
    devices: list[requests.DeviceStatus]
    leases: list[requests.Lease]
    queue: list[requests.QueueEntry]


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

    async def refresh(self) -> None:
        """Look again; a failure is kept as a text, and the last look with it."""
        try:
            seen = await look(self.client, self._hosts, self._models)
        except CorralError as error:
            self.error = str(error)
            return
        self.last, self.error = seen, ""
        for device in seen.devices:
            past = self.past.get(device.uuid)
            if past is None:
                past = self.past[device.uuid] = deque(maxlen=HISTORY)
            past.append(device.utilization_percent)
        self.mean_past.append(seen.fleet.utilization_percent_mean)

    async def follow_processes(self) -> None:
        """Keep the processes of every host, until cancelled."""
        subscription = await self.client.nc.subscribe(bus.processes_subject("*"), pending_msgs_limit=1024)
        async for message in subscription.messages:
            with contextlib.suppress(codec.DecodeError):
                batch = codec.decode(message.data, ProcessBatch)
                self.processes[batch.host] = batch.processes

    def processes_on(self, device: requests.DeviceStatus) -> list[ProcessSample]:
        """The processes on a device, the largest first."""
        found = [process for process in self.processes.get(device.host, ()) if process.device == device.uuid]
        return sorted(found, key=lambda process: -(process.memory_used_bytes or 0))


def sparkline(values: Sequence[float | None], width: int, most: float = 100.0) -> str:
    """The last values as bars, one a character, the newest at the right."""
    recent = list(values)[-width:]
    bars = "".join(
        " " if value is None else SPARKS[min(len(SPARKS) - 1, int(max(value, 0) / most * len(SPARKS)))]
        for value in recent
    )
    return bars.rjust(width)


Key = Callable[[requests.DeviceStatus], Any]


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
    devices: Sequence[requests.DeviceStatus], sort: str, reverse: bool, text: str
) -> list[requests.DeviceStatus]:
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


def _says(device: requests.DeviceStatus, word: str) -> bool:
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


def by_host(devices: Sequence[requests.DeviceStatus]) -> list[HostRow]:
    """One row a host, by name."""
    groups: dict[str, list[requests.DeviceStatus]] = {}
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
                models=", ".join(sorted({short(one.model) for one in members})),
            )
        )
    return rows


def short(model: str) -> str:
    """A model without what is the same for all of its maker's."""
    for prefix in ("NVIDIA GeForce ", "NVIDIA ", "AMD Instinct ", "AMD Radeon ", "AMD "):
        if model.startswith(prefix):
            return model[len(prefix) :]
    return model
