"""Unique names of devices: the driver's uuid where it is unique, else a name made of the device's location.

Some virtual functions and partitions of a board share one uuid, and some virtual machines have one of zeros alone. Such
a uuid identifies nothing. Host, PCI address and serial tell devices apart instead, and are the same after a reboot.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final
from uuid import UUID, uuid5

from msgspec import Struct

_NAMESPACE: Final = UUID("6f1d3c6e-5f0b-4d53-9a55-5f2b1c0d7a11")
_AMD: Final = re.compile(
    r"([0-9a-f]{2})[0-9a-f]{2}[0-9a-f]{4}-[0-9a-f]{4}-1000-[0-9a-f]{2}([0-9a-f]{2})-([0-9a-f]{12})"
)
"""amdsmi's uuid: the serial's first byte, the partition, the product; then the serial's other bytes."""


class Seat(Struct, frozen=True, kw_only=True):
    """Facts about a device that has no name yet.

    Attributes:
        uuid: the driver's uuid; empty if it gives none.
        address: address on the PCI bus; empty if unknown.
        serial: serial number of the board; empty if it has none.
        index: the driver's index.
    """

    uuid: str
    address: str = ""
    serial: str = ""
    index: int = 0


class Identities:
    """Unique names of a host's devices.

    Args:
        host: name of the host.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._shared: set[str] = set()
        self._read: dict[str, str] = {}

    def uuid_at(self, address: str, uuid: str | None) -> str | None:
        """The driver's uuid of the device at an address; the last known one where it can't be read now.

        Args:
            address: address on the PCI bus.
            uuid: the uuid that was read; None where the driver did not give it this time.
        """
        if uuid is not None and address:
            self._read[address] = uuid
        return self._read.get(address) if uuid is None else uuid

    def names(self, seats: Sequence[Seat]) -> list[str]:
        """Give each device a unique name: the driver's uuid where that can be one.

        A uuid that two devices once shared is not used as a name again in this run, even if only one of them is left.
        """
        counts = Counter(seat.uuid.lower() for seat in seats)
        self._shared |= {uuid for uuid, count in counts.items() if count > 1}
        names: list[str] = []
        taken: set[str] = set()
        for seat in seats:
            name = seat.uuid if self._good(seat.uuid) else self._made(seat, 0)
            again = 0
            while name in taken:
                again += 1
                name = self._made(seat, again)
            taken.add(name)
            names.append(name)
        return names

    def _good(self, uuid: str) -> bool:
        lowered = uuid.lower()
        return lowered not in self._shared and says_something(lowered)

    def _made(self, seat: Seat, again: int) -> str:
        place = seat.address.lower() or f"index {seat.index}"
        return f"PCI-{uuid5(_NAMESPACE, f'{self._host}/{place}/{seat.serial}/{again}')}"


def says_something(uuid: str) -> bool:
    """True if a uuid can tell devices apart: its digits are not all 0 or all f; in AMD's form, those of the serial."""
    lowered = uuid.lower()
    form = _AMD.fullmatch(lowered)
    digits = "".join(form.groups()) if form else re.sub(r"[^0-9a-f]", "", lowered)
    return bool(digits.strip("0")) and bool(digits.strip("f"))
