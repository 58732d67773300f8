"""Requests that wait for devices: by priority, then by arrival.

Whoever fits may go first while those before it wait for something bigger, since idle devices serve nobody. That has an
end: once a request has waited for its patience, nothing behind it that could take the same devices is granted any
more, so that they gather until it fits. New requests without a wait are held to the same rule.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import Any, Final

from ...schemas import globs
from ...schemas.operations import Queue, QueueEntry
from ...schemas.requests import Rejection, WorkRequest
from ..fleet.fleet import Fleet

PATIENCE_SECONDS: Final = 30.0
MOST_WAITING: Final = 10_000


class Waiting:
    """A request in the queue.

    Attributes:
        request: with its id.
        arrived_at: seconds, by the caller's clock.
        deadline: it is turned down then.
        rejection: why it waits.
        payload: whatever the caller needs to answer it.
    """

    __slots__ = ("arrived_at", "deadline", "order", "payload", "rejection", "request")

    def __init__(
        self, request: WorkRequest, arrived_at: float, rejection: Rejection, payload: Any, number: int
    ) -> None:
        self.request = request
        self.arrived_at = arrived_at
        self.deadline = arrived_at + request.wait_seconds
        self.rejection = rejection
        self.payload = payload
        self.order = (-request.priority, number)


class WaitingQueue:
    """All that wait, first in line first.

    Args:
        competes: whether two requests could take the same devices.
        patience_seconds: after it, nothing may overtake.
    """

    def __init__(
        self, competes: Callable[[WorkRequest, WorkRequest], bool], patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._competes = competes
        self._patience = patience_seconds
        self._entries: list[Waiting] = []
        self._members: set[Waiting] = set()
        self._impatient_at = 0.0
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
        self._impatient_at = min(self._impatient_at, now + self._patience) if len(self) > 1 else now + self._patience
        return entry

    def remove(self, entry: Waiting) -> None:
        """Leave the line."""
        self._entries.remove(entry)
        self._members.discard(entry)

    def expired(self, now: float) -> list[Waiting]:
        """Those that have waited as long as they wanted to; they leave the line."""
        over = [entry for entry in self._entries if entry.deadline <= now]
        for entry in over:
            self.remove(entry)
        return over

    def next_deadline(self) -> float | None:
        """When the next one has waited long enough; None for an empty queue."""
        return min((entry.deadline for entry in self._entries), default=None)

    def blocker(self, request: WorkRequest, now: float, before: Waiting | None = None) -> Waiting | None:
        """Who must not be overtaken by a request.

        Args:
            request: new, or of an entry.
            now: the time.
            before: the request's own entry, if it has one: only those ahead of it count.

        Returns:
            The first that has lost its patience and could take the same devices; None if the way is free.
        """
        if now < self._impatient_at:
            return None
        for entry in self._entries:
            if entry is before or (before is None and entry.order[0] > -request.priority):
                return None
            if now - entry.arrived_at >= self._patience and self._competes(entry.request, request):
                return entry
        return None

    def listing(self, now: float) -> Queue:
        """For people: who waits, at which place, for how long, and why."""
        return Queue(
            entries=[
                QueueEntry(
                    request_id=entry.request.request_id or "",
                    owner=entry.request.owner,
                    position=position,
                    waiting_seconds=round(max(0.0, now - entry.arrived_at), 3),
                    message=entry.rejection.message,
                    gpus=entry.request.gpus,
                    name=entry.request.name,
                )
                for position, entry in enumerate(self._entries, 1)
            ]
        )


def competes(fleet: Fleet, one: WorkRequest, other: WorkRequest) -> bool:
    """Whether two requests could take the same devices of a fleet, by what they ask for."""
    if bool(one.gpus) != bool(other.gpus):
        return False
    if one.models and other.models and set(one.models) != set(other.models):
        names = {device.info.name.lower() for device in fleet.devices.values()}
        if not any(_any(name, one.models) and _any(name, other.models) for name in names):
            return False
    if one.hosts and other.hosts and set(one.hosts) != set(other.hosts):
        return any(_any(name.lower(), one.hosts) and _any(name.lower(), other.hosts) for name in fleet.hosts)
    return True


def _any(name: str, wanted: list[str]) -> bool:
    return any(globs.matches(name, glob.lower()) for glob in wanted)
