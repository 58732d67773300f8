"""Reservations for requests that have been queued for longer than their patience, first in line first.

Each reservation is chosen from what those ahead of it leave (see `placement.reservations`). A decision respects the
reservations of all requests ahead of its own: of higher priority, or of the same priority and earlier. So reservations
are a stack in the queue's order, and as many of them are applied to the fleet as the last decision had ahead of it.
Most decisions take none off and put none on.

Choices are renewed as the fleet changes: some of them each time that the queue is served, round-robin, so that a
decision never waits for them. As long as no request has waited for so long, all of this costs a comparison.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from heapq import nsmallest
from typing import Final

from ..fleet.fleet import Fleet
from ..fleet.reserved import reserve, unreserve
from ..fleet.state import Ask
from ..placement.reservations import Ends, choose, holds
from .queue import PATIENCE_SECONDS, Order, QueuedRequest

MAX_RESERVATIONS: Final = 128
"""Limit on reservations: all are taken off and put on where requests of two priorities alternate, which takes 3 ms.
A request behind so many others with a reservation gets none until one of them is served."""
_CLASSES_A_TURN: Final = 2048
"""Host classes that are searched for new choices each time that the queue is served."""
_MAX_CHOICES_A_TURN: Final = 32
_CHECK_TURNS: Final = 4
"""Turns between checks of a choice whose turn has not come: what it reserves of a lost host is no loss to others."""


def newcomer(priority: int) -> Order:
    """Place of a request that is not queued: behind all of its priority."""
    return (-priority, math.inf)


class Reservations:
    """The reservations of a queue.

    Args:
        fleet: live state.
        ends: returns when a lease ends.
        patience_seconds: a request that has been queued for so long gets a reservation.
    """

    def __init__(self, fleet: Fleet, ends: Ends, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._fleet = fleet
        self._ends = ends
        self._patience = patience_seconds
        self._entries: list[QueuedRequest] = []
        """Entries with a reservation, in the queue's order."""
        self._shown = 0
        """Number of them, from the first, that are applied to the fleet."""
        self._turn = 0
        self._due: frozenset[QueuedRequest] = frozenset()
        self._choices_left = 0
        self._hopeless: set[Ask] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def show(self, place: Order) -> None:
        """Apply to the fleet the reservations of entries ahead of a place, and no others."""
        entries, shown = self._entries, self._shown
        while shown and entries[shown - 1].order >= place:
            shown -= 1
            self._unreserve(entries[shown])
        while shown < len(entries) and entries[shown].order < place:
            self._reserve(entries[shown])
            shown += 1
        self._shown = shown

    def begin(self, queue: Iterable[QueuedRequest], now: float) -> None:
        """Begin a turn: select the entries that may get a new choice in it, those first that had one longest ago."""
        self._turn += 1
        self._hopeless.clear()
        waited = [entry for entry in queue if now - entry.arrived_at >= self._patience]
        self._choices_left = max(1, min(_MAX_CHOICES_A_TURN, _CLASSES_A_TURN // (len(self._fleet.index.classes) + 1)))
        most = 8 * self._choices_left
        if len(waited) > most:
            waited = nsmallest(most, waited, key=lambda entry: entry.chosen_turn)
        self._due = frozenset(waited)

    def renew(self, entry: QueuedRequest, ask: Ask) -> None:
        """Choose anew for an entry that can't be granted now, if its turn has come; else check it now and then."""
        if entry in self._due and (self._choices_left or ask in self._hopeless):
            self.show(entry.order)
            entry.chosen_turn = self._turn
            self._choose(entry, ask)
        elif entry.reservation is not None and not self._turn % _CHECK_TURNS:
            self.show(entry.order)
            if not holds(self._fleet, ask, entry.reservation):
                self.drop(entry)

    def keep(self, entry: QueuedRequest, ask: Ask) -> None:
        """Choose for an entry that could be granted now, and is not yet."""
        self.show(entry.order)
        self._choose(entry, ask)

    def _choose(self, entry: QueuedRequest, ask: Ask) -> None:
        full = len(self._entries) >= MAX_RESERVATIONS
        if entry.reservation is None and full and self._entries[-1].order < entry.order:
            return
        found = None
        # What could not be reserved with some reservations ahead can't be with more of them.
        if ask not in self._hopeless:
            self._choices_left -= 1
            found = choose(self._fleet, ask, entry.request.owner, self._ends, entry.reservation)
        if found is None:
            self._hopeless.add(ask)
            self.drop(entry)
        elif entry.reservation is not None:
            entry.reservation = found
        else:
            if full:
                self.drop(self._entries[-1])
            entry.reservation = found
            insort(self._entries, entry, key=lambda other: other.order)

    def drop(self, entry: QueuedRequest) -> None:
        """Drop the reservation of an entry, if any: it has left the queue, or can't be served."""
        if entry.reservation is None:
            return
        at = bisect_left(self._entries, entry.order, key=lambda other: other.order)
        if at < self._shown:
            self._shown -= 1
            self._unreserve(entry)
        del self._entries[at]
        entry.reservation = None

    def clear(self) -> None:
        """Drop all reservations."""
        while self._entries:
            self.drop(self._entries[-1])

    def _reserve(self, entry: QueuedRequest) -> None:
        assert entry.reservation is not None
        reserve(self._fleet, entry.reservation)

    def _unreserve(self, entry: QueuedRequest) -> None:
        assert entry.reservation is not None
        unreserve(self._fleet, entry.reservation)
