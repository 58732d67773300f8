"""A name for each device that is its own: the driver's uuid where that is one, else made of where the device sits.

Virtual functions and partitions of a board have shared one uuid, and virtual machines have had one of zeros alone. Such
a name says nothing. Host, PCI address and serial tell devices apart instead, and are the same after a reboot.
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
    """What is known of a device before it has a name.

    Attributes:
        uuid: as the driver gives it; empty if it gives none.
        address: on the PCI bus; empty if unknown.
        serial: of the board; empty if it has none.
        index: the driver's.
    """

    uuid: str
    address: str = ""
    serial: str = ""
    index: int = 0


class Identities:
    """The names of a host's devices.

    Args:
        host: its name.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._shared: set[str] = set()
        self._read: dict[str, str] = {}

    def uuid_at(self, address: str, uuid: str | None) -> str | None:
        """The driver's uuid of the device at an address, as it was read before where it can't be read now.

        Args:
            address: on the PCI bus.
            uuid: as read; None where the driver did not give it this time.
        """
        if uuid is not None and address:
            self._read[address] = uuid
        return self._read.get(address) if uuid is None else uuid

    def names(self, seats: Sequence[Seat]) -> list[str]:
        """A name for each device, no two alike; that of the driver where it is good for one.

        A uuid that was once shared is never a name again while this runs, whichever of its devices are there.
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
    """Whether a uuid tells a device from another: not zeros or ones alone, and of AMD's form not a serial of zeros."""
    lowered = uuid.lower()
    form = _AMD.fullmatch(lowered)
    digits = "".join(form.groups()) if form else re.sub(r"[^0-9a-f]", "", lowered)
    return bool(digits.strip("0")) and bool(digits.strip("f"))
