"""Queue of requests that wait for devices: by priority, then by arrival.

A request that fits may overtake those ahead that wait for more devices (backfill), since idle devices are of no use.
That has a limit: once a request has been queued for its patience, the devices that can serve it soonest are reserved
for it (see `reserving`). Requests behind it, of the same or lower priority, get only what is left.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from msgspec import json

from ...schemas.operations import Queue, QueueEntry, QueueFilter
from ...schemas.requests import Rejection, WorkRequest
from ..fleet.lru import LRUCache
from ..fleet.reservation import Reservation

PATIENCE_SECONDS: Final = 30.0
MAX_WAITING: Final = 10_000
EVERYBODY: Final = QueueFilter()
_HOSTS_LISTED: Final = 10
_PLACE_SECONDS: Final = 600.0
"""Time for which the place of a request is kept that left the queue because its client was silent."""

Order = tuple[int, float]
"""Negative priority, and number of arrival: the smaller is ahead."""


class QueuedRequest:
    """A request in the queue.

    Attributes:
        request: with its id.
        arrived_at: seconds, by the caller's clock.
        deadline: time at which it is rejected, by the same clock.
        rejection: reason why it waits.
        payload: opaque data of the caller, to answer it.
        order: its place.
        reservation: devices that are reserved for it; None if none are.
        chosen_turn: number of the last turn in which a reservation was sought for it.
        heard_at: when its client was last heard, by the clock of `Presence`.
        asked_to_retry: true if its client was told to ask again since.
    """

    __slots__ = (
        "arrived_at",
        "asked_to_retry",
        "chosen_turn",
        "deadline",
        "heard_at",
        "order",
        "payload",
        "rejection",
        "request",
        "reservation",
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
        self.chosen_turn = -1
        self.heard_at = 0.0
        self.asked_to_retry = False


class Place(NamedTuple):
    """Place of a request that left the queue because its client was silent, and gets it back if it comes again soon."""

    digest: str
    arrived_at: float
    number: float
    left_at: float
    deadline: float


class WaitingQueue:
    """The queued requests, first in line first."""

    def __init__(self) -> None:
        self._entries: list[QueuedRequest] = []
        self._members: set[QueuedRequest] = set()
        self._named: dict[str, list[QueuedRequest]] = {}
        self._of = Counter[str]()
        self._count = 0
        self._left: LRUCache[tuple[str, str], Place] = LRUCache(MAX_WAITING)
        """Places of requests that left, by owner and request id."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._entries)

    def __contains__(self, entry: QueuedRequest) -> bool:
        return entry in self._members

    def add(
        self, request: WorkRequest, now: float, rejection: Rejection, payload: Any, digest: str = ""
    ) -> QueuedRequest:
        """Enqueue a request.

        If its digest equals that of a request which left the queue recently because its client was silent, it gets that
        place again. An empty digest gets a new place.
        """
        self._count += 1
        before = self._left.get((request.owner, request.request_id or "")) if digest else None
        if before is None or before.digest != digest or not now < min(before.left_at + _PLACE_SECONDS, before.deadline):
            entry = QueuedRequest(request, now, rejection, payload, self._count)
        else:
            entry = QueuedRequest(request, before.arrived_at, rejection, payload, before.number)
        insort(self._entries, entry, key=lambda waiting: waiting.order)
        self._members.add(entry)
        self._named.setdefault(request.request_id or "", []).append(entry)
        self._of[request.owner] += 1
        return entry

    def remove(self, entry: QueuedRequest) -> None:
        """Remove an entry."""
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
        """Number of queued requests of an owner."""
        return self._of[owner]

    def named(self, request_id: str) -> list[QueuedRequest]:
        """Entries with a request id, of any owner."""
        return self._named.get(request_id, [])

    def position(self, entry: QueuedRequest) -> int:
        """Position of an entry in the queue, from 1."""
        return bisect_left(self._entries, entry.order, key=lambda waiting: waiting.order) + 1

    def entry_listing(self, entry: QueuedRequest, now: float) -> Queue:
        """Listing of one entry alone, with its position."""
        return Queue(entries=[_listed(entry, self.position(entry), now, 0.0)], total=1)

    def remove_silent(self, entry: QueuedRequest, now: float, digest: str) -> None:
        """Remove an entry whose client is silent. The place is kept if it has a digest, that is, a request id."""
        self.remove(entry)
        if digest:
            place = Place(digest, entry.arrived_at, entry.order[1], now, entry.deadline)
            self._left.put((entry.request.owner, entry.request.request_id or ""), place)

    def expired(self, now: float) -> list[QueuedRequest]:
        """Entries past their deadline."""
        return [entry for entry in self._entries if entry.deadline <= now]

    def listing(
        self,
        now: float,
        only: QueueFilter = EVERYBODY,
        silence: Callable[[QueuedRequest], float] | None = None,
        max_bytes: int = 0,
    ) -> Queue:
        """List entries with position, time in the queue, and the reason why they wait.

        Args:
            now: seconds, by the clock of `arrived_at`.
            only: filter and page.
            silence: returns the seconds since an entry's client was heard.
            max_bytes: size of all entries as JSON, at which the list is cut; at least one is listed. 0 for no limit.
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
            size += len(json.encode(one)) + 1 if max_bytes else 0
            full = size > max_bytes > 0 and bool(listed)
            if not full:
                listed.append(one)
        return Queue(entries=listed, total=found)


def _listed(entry: QueuedRequest, position: int, now: float, silence: float) -> QueueEntry:
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
