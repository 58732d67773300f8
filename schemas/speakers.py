"""Authorization of hosts: a host speaks only for itself and its own devices, on subjects that end in its name.

A server that authenticates lets a host publish on those subjects alone, so the subject can be trusted. Readers compare
each message with its subject, by the functions here. A device that two hosts list belongs to the one that listed it
first, for as long as that host lists it, is heard, and has not announced that it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from .codec import DecodeError
from .telemetry import AgentReport, DeviceEvent, Inventory, ProcessBatch, SampleBatch

SILENT_SECONDS: Final = 180.0
"""A host that was not heard for this long, that is for three inventories, no longer keeps its devices from others."""

_DAY_SECONDS: Final = 86400.0


def check(message: SampleBatch | ProcessBatch | Inventory | DeviceEvent | AgentReport, subject: str) -> None:
    """Refuse a message that names a different host than its subject.

    Raises:
        DecodeError: `invalid`, with the path of the field.
    """
    if not isinstance(message, Inventory):
        check_host(message.host, subject)
        return
    check_host(message.host.name, subject, "$.host.name")
    if any(device.host != message.host.name for device in message.devices):
        raise DecodeError("A device names another host - at `$.devices[...].host`", "invalid", "$.devices")


def check_host(host: str, subject: str, field: str = "$.host") -> None:
    """Refuse a host name that differs from that of the subject.

    Raises:
        DecodeError: `invalid`, with the path of the field.
    """
    speaker = subject.rpartition(".")[2]
    if host != speaker:
        raise DecodeError(f"Host {host!r} published as {speaker!r} - at `{field}`", "invalid", field)


class Owners:
    """Ownership of devices: assigns each device to one host, by the devices that hosts list.

    Args:
        silent_seconds: see `SILENT_SECONDS`.
    """

    def __init__(self, silent_seconds: float = SILENT_SECONDS) -> None:
        self._silent_seconds = silent_seconds
        self._owner: dict[str, str] = {}
        self._devices: dict[str, set[str]] = {}
        self._heard: dict[str, float] = {}

    def owner(self, device: str) -> str | None:
        """The host that a device belongs to; None if unknown."""
        return self._owner.get(device)

    def know(self, device: str, host: str, heard: float) -> None:
        """Restore earlier knowledge: a host has a device, and was last heard at a time in seconds."""
        self._owner[device] = host
        self._devices.setdefault(host, set()).add(device)
        self.hear(host, heard)

    def hear(self, host: str, at: float) -> None:
        """Record that a host was heard, at a time in seconds by any one clock."""
        known = self._heard.get(host, at)
        # A known time far ahead comes from a clock that has been set back since.
        self._heard[host] = at if known > at + SILENT_SECONDS else max(at, known)

    def claim(self, host: str, devices: Iterable[str], at: float) -> dict[str, str]:
        """Record the devices that a host lists now; others that it had are released.

        Returns:
            Listed devices that belong to another host, with that host: the claim changes nothing about them.
        """
        self.hear(host, at)
        mine = self._devices.setdefault(host, set())
        listed = set(devices)
        for gone in mine - listed:
            self._drop(gone)
        others: dict[str, str] = {}
        for device in listed - mine:
            owner = self._owner.get(device)
            if owner is not None and self._is_heard(owner, at):
                others[device] = owner
                continue
            self._drop(device)
            self._owner[device] = host
            mine.add(device)
        return others

    def _is_heard(self, host: str, at: float) -> bool:
        """True if a host was heard within `silent_seconds`.

        A time more than a day ahead comes from a wrong clock and does not count: by it a host would never be silent.
        """
        return -_DAY_SECONDS <= at - self._heard.get(host, -math.inf) <= self._silent_seconds

    def leave(self, host: str) -> None:
        """Record that a host has left in order: its devices go to the next host that lists them."""
        self._heard[host] = -math.inf

    def forget(self, host: str) -> None:
        """Forget a host that is gone, with its claims."""
        for device in list(self._devices.get(host, ())):
            self._drop(device)
        self._devices.pop(host, None)
        self._heard.pop(host, None)

    def _drop(self, device: str) -> None:
        owner = self._owner.pop(device, None)
        if owner is not None:
            self._devices[owner].discard(device)
