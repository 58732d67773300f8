"""Hosts and devices that a fleet is expected to have: those seen lately that did not leave in order.

A series that ends says nothing: the exporter may have ended with it. So the exporter itself reports silent hosts and
missing devices, from inventories and events that outlive it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

from ..schemas.telemetry import DeviceEvent, DeviceInfo, Inventory

EXPECTED_SECONDS: Final = 7 * 86_400.0
"""A host or board that was last seen longer ago is no longer expected."""


class LastSeenDevice(Struct, frozen=True):
    """A board as it was last seen, and the time (seconds since the epoch)."""

    device: DeviceInfo
    at: float


class ExpectedDevices:
    """Whole devices that each host has had, by slot: a new board in a slot replaces the last one there."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], LastSeenDevice] = {}

    def take(self, host: str, devices: Iterable[DeviceInfo], at: float) -> None:
        """Record the devices that a host has now; MIG instances are left out."""
        for device in devices:
            if device.mig_parent is None:
                self._seen[host, _slot(device)] = LastSeenDevice(device, at)

    def take_event(self, event: DeviceEvent, at: float) -> None:
        """Record a device by the event that it was watched, for hosts whose inventory is no longer kept."""
        address, index, name = (event.data.get(key) for key in ("pcie_address", "index", "name"))
        if event.kind != "device_started" or event.device is None or not isinstance(address, str):
            return
        known = self._seen.get((event.host, address))
        if known is None or known.at < at:
            self.take(
                event.host,
                [
                    DeviceInfo(
                        uuid=event.device,
                        host=event.host,
                        index=index if isinstance(index, int) else -1,
                        name=name if isinstance(name, str) else "",
                        pcie_address=address,
                    )
                ],
                at,
            )

    def forget(self, host: str) -> None:
        """Forget a host that is gone, with its boards."""
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] != host}

    def missing(self, inventories: Mapping[str, Inventory], now: float) -> list[DeviceInfo]:
        """List the boards that are neither where they were nor anywhere else, by host and index.

        Args:
            inventories: the last inventory of each host.
            now: seconds since the epoch.
        """
        there = {device.uuid for inventory in inventories.values() for device in inventory.devices}
        taken = {(host, _slot(device)) for host, found in inventories.items() for device in found.devices}
        found = [
            seen.device
            for (host, slot), seen in self._seen.copy().items()
            if (host, slot) not in taken
            and seen.device.uuid not in there
            and now - seen.at < EXPECTED_SECONDS
            and host in inventories
            and not inventories[host].leaving
        ]
        return sorted(found, key=lambda device: (device.host, device.index, device.uuid))


def _slot(device: DeviceInfo) -> str:
    return device.pcie_address or device.uuid


def expected(inventory: Inventory, silent_seconds: float, elsewhere: set[str]) -> bool:
    """True if a host is expected to be heard: it has not left in order, and was heard in the last week.

    Args:
        inventory: its last inventory.
        silent_seconds: time since it was heard.
        elsewhere: uuids of devices that heard hosts list: a host that has a new name is not expected under the old one.
    """
    uuids = {device.uuid for device in inventory.devices}
    renamed = bool(uuids) and uuids <= elsewhere
    return not inventory.leaving and silent_seconds < EXPECTED_SECONDS and not renamed
