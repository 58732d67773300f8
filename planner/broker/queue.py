"""Requests that wait for devices: by priority, then by arrival.

Whoever fits may go first while those before it wait for something bigger, since idle devices serve nobody. That has an
end: once a request has waited for its patience, what would serve it soonest is kept for it (see `reserving`), and
whoever is of the same or lower priority is placed beside that.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from msgspec import json

from ...schemas.operations import Queue, QueueEntry, QueueFilter
from ...schemas.requests import Rejection, WorkRequest
from ..fleet.lru import Kept
from ..fleet.reservation import Reservation

PATIENCE_SECONDS: Final = 30.0
MOST_WAITING: Final = 10_000
EVERYBODY: Final = QueueFilter()
_HOSTS_LISTED: Final = 10
_PLACE_SECONDS: Final = 600.0
"""The place of one who left the line unheard is kept for so long."""

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
        heard_at: when it was last heard, by the clock of `Presence`.
        told: it was told to ask again since.
    """

    __slots__ = (
        "arrived_at",
        "deadline",
        "heard_at",
        "looked_at",
        "order",
        "payload",
        "rejection",
        "request",
        "reservation",
        "told",
    )

    def __init__(
        self, request: WorkRequest, arrived_at: float, rejection: Rejection, payload: Any, number: float
    ) -> None:
        self.request = request
        self.arrived_at = arrived_at
        self.deadline = arrived_at + request.wait_seconds
        self.rejection = rejection
        self.payload = payload
        self.order: Order = (-request.priority, number)
        self.reservation: Reservation | None = None
        self.looked_at = -1
        self.heard_at = 0.0
        self.told = False


class Place(NamedTuple):
    """The place of one who left the line because it was not heard: it gets it back if it comes again soon."""

    digest: str
    arrived_at: float
    number: float
    left_at: float
    deadline: float


class WaitingQueue:
    """All that wait, first in line first."""

    def __init__(self) -> None:
        self._entries: list[Waiting] = []
        self._members: set[Waiting] = set()
        self._named: dict[str, list[Waiting]] = {}
        self._of = Counter[str]()
        self._count = 0
        self._left: Kept[tuple[str, str], Place] = Kept(MOST_WAITING)
        """By owner and id."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._entries)

    def __contains__(self, entry: Waiting) -> bool:
        return entry in self._members

    def add(self, request: WorkRequest, now: float, rejection: Rejection, payload: Any, digest: str = "") -> Waiting:
        """Get in line; with the digest of one who left it unheard a while ago, at its old place."""
        self._count += 1
        before = self._left.get((request.owner, request.request_id or "")) if digest else None
        if before is None or before.digest != digest or not now < min(before.left_at + _PLACE_SECONDS, before.deadline):
            entry = Waiting(request, now, rejection, payload, self._count)
        else:
            entry = Waiting(request, before.arrived_at, rejection, payload, before.number)
        insort(self._entries, entry, key=lambda waiting: waiting.order)
        self._members.add(entry)
        self._named.setdefault(request.request_id or "", []).append(entry)
        self._of[request.owner] += 1
        return entry

    def remove(self, entry: Waiting) -> None:
        """Leave the line."""
        del self._entries[self.position(entry) - 1]
        self._members.discard(entry)
        named = self._named[entry.request.request_id or ""]
        named.remove(entry)
        if not named:
            del self._named[entry.request.request_id or ""]
        self._of[entry.request.owner] -= 1
        if not self._of[entry.request.owner]:
            del self._of[entry.request.owner]

    def count_of(self, owner: str) -> int:
        """How many requests of an owner wait."""
        return self._of[owner]

    def named(self, request_id: str) -> list[Waiting]:
        """Those under an id."""
        return self._named.get(request_id, [])

    def position(self, entry: Waiting) -> int:
        """The place of one in line, from 1."""
        return bisect_left(self._entries, entry.order, key=lambda waiting: waiting.order) + 1

    def told(self, entry: Waiting, now: float) -> Queue:
        """Where one stands."""
        return Queue(entries=[_listed(entry, self.position(entry), now, 0.0)], total=1)

    def leave(self, entry: Waiting, now: float, digest: str) -> None:
        """Leave the line for not being heard; the place is remembered for one who has an id."""
        self.remove(entry)
        if digest:
            place = Place(digest, entry.arrived_at, entry.order[1], now, entry.deadline)
            self._left.put((entry.request.owner, entry.request.request_id or ""), place)

    def expired(self, now: float) -> list[Waiting]:
        """Those that have waited as long as they wanted to."""
        return [entry for entry in self._entries if entry.deadline <= now]

    def listing(
        self,
        now: float,
        only: QueueFilter = EVERYBODY,
        silence: Callable[[Waiting], float] | None = None,
        most_bytes: int = 0,
    ) -> Queue:
        """For people: who waits, at which place, for how long, and why.

        Args:
            now: the time.
            only: who is listed.
            silence: seconds since one was heard.
            most_bytes: of all entries as JSON; a longer list is cut there. 0 for any length.
        """
        listed: list[QueueEntry] = []
        found = size = 0
        full = False
        if only.request_id is None:
            entries = enumerate(self._entries, 1)
        else:
            entries = [(self.position(entry), entry) for entry in self.named(only.request_id)]
        for position, entry in entries:
            if only.owner is not None and entry.request.owner != only.owner:
                continue
            found += 1
            if full or found <= only.offset or (only.limit is not None and len(listed) >= only.limit):
                continue
            one = _listed(entry, position, now, 0.0 if silence is None else silence(entry))
            size += len(json.encode(one)) + 1 if most_bytes else 0
            full = size > most_bytes > 0 and bool(listed)
            if not full:
                listed.append(one)
        return Queue(entries=listed, total=found)


def _listed(entry: Waiting, position: int, now: float, silence: float) -> QueueEntry:
    request, kept = entry.request, entry.reservation
    return QueueEntry(
        request_id=request.request_id or "",
        owner=request.owner,
        position=position,
        waiting_seconds=round(max(0.0, now - entry.arrived_at), 3),
        message=entry.rejection.message,
        gpus=request.gpus,
        name=request.name,
        heard_seconds=round(max(0.0, silence), 3),
        reserved_devices=0 if kept is None else len(kept.devices),
        reserved_hosts=[] if kept is None else sorted(name for name, _, _ in kept.hosts)[:_HOSTS_LISTED],
    )
