"""Requests that wait for devices: by priority, then by arrival.

Whoever fits may go first while those before it wait for something bigger, since idle devices serve nobody. That has an
end: once a request has waited for its patience, nothing behind it that could take the same devices is granted any
more, so that they gather until it fits. New requests without a wait are held to the same rule.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

from ...schemas import globs
from ...schemas.operations import Queue, QueueEntry
from ...schemas.requests import Rejection, WorkRequest
from ..fleet.fleet import Fleet
from ..fleet.kept import Kept

PATIENCE_SECONDS: Final = 30.0
MOST_WAITING: Final = 10_000
_PATTERNS_KEPT: Final = 1024
"""What a pattern fits takes a bit a name: 2 KiB at 16,000 hosts."""
_PATTERNS_MOST: Final = 64
"""Whose request has more of them is taken to reach everything: each is compared with every name."""
_EVERYTHING: Final = -1


class Reach(NamedTuple):
    """What a request could take by what it names.

    Attributes:
        devices: whether it asks for devices at all.
        models: a bit for each model that it allows; all of them where it names none.
        hosts: likewise.
    """

    devices: bool
    models: int
    hosts: int

    def meets(self, other: Reach) -> bool:
        """Whether another one could take the same."""
        return self.devices == other.devices and bool(self.models & other.models) and bool(self.hosts & other.hosts)


class _Names:
    """Names in lower case, each with a bit of its own, and what patterns fit of them."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._fits: Kept[str, tuple[int, int]] = Kept(_PATTERNS_KEPT)
        """By pattern: how many names it was compared with, and the bits of those that it fits."""

    def update(self, names: Collection[str]) -> None:
        """There are these now. A name that is gone keeps its bit until there are too many of them."""
        if len(self._places) > 2 * len(names) + 64:
            self._places.clear()
            self._fits.clear()
        for name in names:
            self._places.setdefault(name, len(self._places))

    def fit(self, patterns: Sequence[str]) -> int:
        """The bits of the names that one of some patterns fits; all of them without a pattern."""
        if not patterns or sum(_is_pattern(glob) for glob in patterns) > _PATTERNS_MOST:
            return _EVERYTHING
        found = 0
        for glob in patterns:
            found |= self._fit(glob.lower())
        return found

    def _fit(self, glob: str) -> int:
        if not _is_pattern(glob):
            place = self._places.get(glob)
            return 0 if place is None else 1 << place
        seen, bits = self._fits.get(glob) or (0, 0)
        if seen < len(self._places):
            new = list(self._places)[seen:]
            fits = "".join("1" if globs.matches(name, glob) else "0" for name in reversed(new))
            bits |= int(fits, 2) << seen
            self._fits.put(glob, (len(self._places), bits))
        return bits


def _is_pattern(glob: str) -> bool:
    return "*" in glob or "?" in glob or "[" in glob


class Reaches:
    """What requests could take of a fleet, worked out once as long as its hosts and models stay.

    Args:
        fleet: live state.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._version = -1
        self._models = _Names()
        self._hosts = _Names()

    def version(self) -> int:
        """What was worked out at another one is worked out again."""
        version = self._fleet.shape_version
        if version != self._version:
            self._version = version
            models = {device.model for device in self._fleet.devices.values()}
            self._models.update({model.name.lower() for model in models})
            self._hosts.update([name.lower() for name in self._fleet.hosts])
        return version

    def of(self, request: WorkRequest) -> Reach:
        """What a request could take, as of `version`."""
        return Reach(bool(request.gpus), self._models.fit(request.models), self._hosts.fit(request.hosts))


class Waiting:
    """A request in the queue.

    Attributes:
        request: with its id.
        arrived_at: seconds, by the caller's clock.
        deadline: it is turned down then.
        rejection: why it waits.
        payload: whatever the caller needs to answer it.
        reach: what it could take, with the version of the fleet that this is of.
    """

    __slots__ = ("arrived_at", "deadline", "order", "payload", "reach", "rejection", "request")

    def __init__(
        self, request: WorkRequest, arrived_at: float, rejection: Rejection, payload: Any, number: int
    ) -> None:
        self.request = request
        self.arrived_at = arrived_at
        self.deadline = arrived_at + request.wait_seconds
        self.rejection = rejection
        self.payload = payload
        self.order = (-request.priority, number)
        self.reach: tuple[int, Reach] | None = None


class WaitingQueue:
    """All that wait, first in line first.

    Args:
        reaches: says which requests could take the same devices.
        patience_seconds: after it, nothing may overtake.
    """

    def __init__(self, reaches: Reaches, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._reaches = reaches
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
        entry.reach = self._reaches.version(), self._reaches.of(request)
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
        version = self._reaches.version()
        mine: Reach | None = None
        for entry in self._entries:
            if entry is before or (before is None and entry.order[0] > -request.priority):
                return None
            if now - entry.arrived_at < self._patience:
                continue
            mine = mine or self._reaches.of(request)
            kept = entry.reach
            if kept is None or kept[0] != version:
                kept = entry.reach = version, self._reaches.of(entry.request)
            if kept[1].meets(mine):
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
