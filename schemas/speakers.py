"""Who may say what: a host speaks for itself and its own devices, on subjects that end on its name.

A server that authenticates lets a host publish on those subjects alone, so the subject is what can be believed. Whoever
reads what hosts say holds it against the subject, by the functions here. A device that two hosts list is the one's
that listed it first, for as long as that one lists it and is heard, and has not said that it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

from .codec import DecodeError
from .telemetry import AgentReport, DeviceEvent, Inventory, ProcessBatch, SampleBatch

SILENT_SECONDS: Final = 180.0
"""A host that was not heard for three inventories no longer keeps its devices from others."""

_DAY_SECONDS: Final = 86400.0


def check(message: SampleBatch | ProcessBatch | Inventory | DeviceEvent | AgentReport, subject: str) -> None:
    """Refuse a message that names another host than its subject.

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
    """Refuse a host's name that is not its subject's.

    Raises:
        DecodeError: `invalid`, with the path of the field.
    """
    speaker = subject.rpartition(".")[2]
    if host != speaker:
        raise DecodeError(f"Host {host!r} published as {speaker!r} - at `{field}`", "invalid", field)


class Owners:
    """Which host each device belongs to, by what hosts list.

    Args:
        silent_seconds: see `SILENT_SECONDS`.
    """

    def __init__(self, silent_seconds: float = SILENT_SECONDS) -> None:
        self._silent_seconds = silent_seconds
        self._owner: dict[str, str] = {}
        self._devices: dict[str, set[str]] = {}
        self._heard: dict[str, float] = {}

    def owner(self, device: str) -> str | None:
        """The host that a device belongs to."""
        return self._owner.get(device)

    def know(self, device: str, host: str, heard: float) -> None:
        """Take over what was known before: a host has a device, and was heard last at a time."""
        self._owner[device] = host
        self._devices.setdefault(host, set()).add(device)
        self.hear(host, heard)

    def hear(self, host: str, at: float) -> None:
        """A host has said something, at a time in seconds by any one clock."""
        known = self._heard.get(host, at)
        # One that lies far ahead is of a clock that has been set back since.
        self._heard[host] = at if known > at + SILENT_SECONDS else max(at, known)

    def claim(self, host: str, devices: Iterable[str], at: float) -> dict[str, str]:
        """A host lists its devices.

        Returns:
            Those that are another host's, with that host: the claim changes nothing about them.
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
        """A time that lies ahead by more than a day is of a clock that was wrong: nobody would ever be silent by it."""
        return -_DAY_SECONDS <= at - self._heard.get(host, -math.inf) <= self._silent_seconds

    def leave(self, host: str) -> None:
        """Nobody speaks for a host any more: its devices are the next one's that lists them."""
        self._heard[host] = -math.inf

    def forget(self, host: str) -> None:
        """A host is gone, and so are its claims."""
        for device in list(self._devices.get(host, ())):
            self._drop(device)
        self._devices.pop(host, None)
        self._heard.pop(host, None)

    def _drop(self, device: str) -> None:
        owner = self._owner.pop(device, None)
        if owner is not None:
            self._devices[owner].discard(device)
