"""Devices and quota that a lease takes while it is made: kept once it is durable, given back if it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from ...schemas.requests import Grant
from ..fleet.fleet import Fleet
from ..fleet.holdings import free, hold
from .usage import UsageByOwner


class GrantReservation:
    """Devices that are held for a lease, and what it counts against its owner's quota.

    At the end of its `with` block all of that is given back, unless it was committed.

    Attributes:
        lease_id: of the lease.
        in_window: a device was booked for the owner when it was decided on.
    """

    __slots__ = ("_charged", "_owner", "_reservations", "in_window", "lease_id")

    def __init__(self, reservations: GrantReservations, lease_id: str, in_window: bool) -> None:
        self.lease_id = lease_id
        self.in_window = in_window
        self._reservations = reservations
        self._owner = ""
        self._charged = 0

    def charge(self, owner: str, size: int) -> None:
        """Count the lease, of so many bytes, as one of an owner until it is committed: from then on the table does."""
        self._owner, self._charged = owner, size
        self._reservations.owners.add(owner, 1, size)

    def commit(self) -> None:
        """Leave the devices to the lease, which is durable and goes into the table now."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lease_id in self._reservations.open:
            self.roll_back()

    def roll_back(self) -> None:
        """Give everything back, unless it was committed."""
        if self._close():
            free(self._reservations.fleet, self.lease_id)
            self._reservations.rolled_back(self.lease_id)

    def _close(self) -> bool:
        """End the reservation; False if it has ended before."""
        if self._reservations.open.pop(self.lease_id, None) is None:
            return False
        if self._charged:
            self._reservations.owners.add(self._owner, -1, -self._charged)
        return True


class GrantReservations:
    """The open reservations of a term.

    Args:
        fleet: live state, which holds the devices.
        owners: usage by owner.
        rolled_back: called with the id of each lease that is not granted after all.

    Attributes:
        open: reservations that are neither committed nor rolled back, by lease.
    """

    def __init__(self, fleet: Fleet, owners: UsageByOwner, rolled_back: Callable[[str], None]) -> None:
        self.fleet = fleet
        self.owners = owners
        self.rolled_back = rolled_back
        self.open: dict[str, GrantReservation] = {}

    def take(self, lease_id: str, grants: Sequence[Grant], *, in_window: bool) -> GrantReservation:
        """Hold devices for a lease, from the decision on. The reservation must be entered, by any task."""
        hold(self.fleet, lease_id, grants)
        reservation = self.open[lease_id] = GrantReservation(self, lease_id, in_window)
        return reservation

    def roll_back(self) -> None:
        """Roll back what is still open, such as that of a task which was cancelled before it began."""
        for reservation in list(self.open.values()):
            reservation.roll_back()
