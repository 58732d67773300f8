"""Which hosts and devices a fleet is expected to have: what was there lately, and did not leave in order.

A series that ends says nothing: the exporter may have ended with it. So the exporter itself says who is silent and what
is missing, from inventories and events that outlive it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

from ..schemas.telemetry import DeviceEvent, DeviceInfo, Inventory

EXPECTED_SECONDS: Final = 7 * 86_400.0
"""What was last seen longer ago is expected no more."""


class Seen(Struct, frozen=True):
    """A board as it was seen last, and when (seconds since the epoch)."""

    device: DeviceInfo
    at: float


class Boards:
    """The whole devices that each host has had, by slot: another board in the same slot takes the place of the last."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Seen] = {}

    def take(self, host: str, devices: Iterable[DeviceInfo], at: float) -> None:
        """What a host has now."""
        for device in devices:
            if device.mig_parent is None:
                self._seen[host, _slot(device)] = Seen(device, at)

    def take_event(self, event: DeviceEvent, at: float) -> None:
        """That a device was watched, by a collector that no inventory is kept of any more."""
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
        """A host is gone, and what it had with it."""
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] != host}

    def missing(self, inventories: Mapping[str, Inventory], now: float) -> list[DeviceInfo]:
        """Those that are not where they were, nor anywhere else, by host and index.

        Args:
            inventories: the last one of each host.
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
    """Whether a host is to be heard.

    Args:
        inventory: its last one.
        silent_seconds: since it was heard.
        elsewhere: devices that hosts which are heard list: one that has another name now is not missed under the old.
    """
    uuids = {device.uuid for device in inventory.devices}
    renamed = bool(uuids) and uuids <= elsewhere
    return not inventory.leaving and silent_seconds < EXPECTED_SECONDS and not renamed
