"""Requests that wait for devices: by priority, then by arrival.

Whoever fits may go first while those before it wait for something bigger, since idle devices serve nobody. That has an
end: once a request has waited for its patience, what would serve it soonest is kept for it (see `reserving`), and
whoever is of the same or lower priority is placed beside that.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import Any, Final

from ...schemas.operations import Queue, QueueEntry
from ...schemas.requests import Rejection, WorkRequest
from ..fleet.reserved import Reservation

PATIENCE_SECONDS: Final = 30.0
MOST_WAITING: Final = 10_000
_HOSTS_LISTED: Final = 10

Order = tuple[int, float]
"""Priority turned round, and number of arrival: who is less is ahead."""


class Waiting:
    """A request in the queue.

    Attributes:
        request: with its id.
        arrived_at: seconds, by the caller's clock.
        deadline: it is turned down then.
        rejection: why it waits.
        payload: whatever the caller needs to answer it.
        order: its place.
        reservation: what is kept for it.
        looked_at: number of the look at the queue in which something to keep was last sought for it.
    """

    __slots__ = ("arrived_at", "deadline", "looked_at", "order", "payload", "rejection", "request", "reservation")

    def __init__(
        self, request: WorkRequest, arrived_at: float, rejection: Rejection, payload: Any, number: int
    ) -> None:
        self.request = request
        self.arrived_at = arrived_at
        self.deadline = arrived_at + request.wait_seconds
        self.rejection = rejection
        self.payload = payload
        self.order: Order = (-request.priority, number)
        self.reservation: Reservation | None = None
        self.looked_at = -1


class WaitingQueue:
    """All that wait, first in line first."""

    def __init__(self) -> None:
        self._entries: list[Waiting] = []
        self._members: set[Waiting] = set()
        self._count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._entries)

    def __contains__(self, entry: Waiting) -> bool:
        return entry in self._members

    def add(self, request: WorkRequest, now: float, rejection: Rejection, payload: Any) -> Waiting:
        """Get in line."""
        self._count += 1
        entry = Waiting(request, now, rejection, payload, self._count)
        insort(self._entries, entry, key=lambda waiting: waiting.order)
        self._members.add(entry)
        return entry

    def remove(self, entry: Waiting) -> None:
        """Leave the line."""
        self._entries.remove(entry)
        self._members.discard(entry)

    def expired(self, now: float) -> list[Waiting]:
        """Those that have waited as long as they wanted to."""
        return [entry for entry in self._entries if entry.deadline <= now]

    def next_deadline(self) -> float | None:
        """When the next one has waited long enough; None for an empty queue."""
        return min((entry.deadline for entry in self._entries), default=None)

    def listing(self, now: float) -> Queue:
        """For people: who waits, at which place, for how long, and why."""
        return Queue(entries=[_listed(entry, position, now) for position, entry in enumerate(self._entries, 1)])


def _listed(entry: Waiting, position: int, now: float) -> QueueEntry:
    request, kept = entry.request, entry.reservation
    return QueueEntry(
        request_id=request.request_id or "",
        owner=request.owner,
        position=position,
        waiting_seconds=round(max(0.0, now - entry.arrived_at), 3),
        message=entry.rejection.message,
        gpus=request.gpus,
        name=request.name,
        reserved_devices=0 if kept is None else len(kept.devices),
        reserved_hosts=[] if kept is None else sorted(name for name, _, _ in kept.hosts)[:_HOSTS_LISTED],
    )
