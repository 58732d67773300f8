"""What is kept for those who have waited longer than their patience, first in line first.

Each reservation is chosen beside those of all ahead of it (see `placement.reservations`). A decision sees those of all
who are ahead of its request: of higher priority, or of the same and earlier. So they are a stack in the queue's order,
of which the fleet shows so many as the last decision had ahead of it; most decisions take none off and put none on.

The choices follow the fleet: they are looked at again in turns, some each time that the queue is served, so that a
decision never waits for them. As long as nobody has waited for so long, all of this costs a comparison.
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
from .queue import PATIENCE_SECONDS, Order, Waiting

MOST_RESERVATIONS: Final = 128
"""All of them are taken off and put on where requests of two priorities alternate: 3 ms.

Who waits behind so many others that something is kept for gets nothing kept until one of them is served."""
_CLASSES_A_TURN: Final = 2048
"""Host classes that are gone through for new choices each time that the queue is served."""
_MOST_A_TURN: Final = 32
_CHECK_TURNS: Final = 4
"""A choice whose turn has not come is checked so seldom: what it keeps of a host that is gone is in nobody's way."""


def newcomer(priority: int) -> Order:
    """The place of a request that is not in line: behind all of its priority."""
    return (-priority, math.inf)


class Reservations:
    """All that is kept.

    Args:
        fleet: live state.
        ends: when a lease ends.
        patience_seconds: who has waited for so long gets something kept.
    """

    def __init__(self, fleet: Fleet, ends: Ends, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._fleet = fleet
        self._ends = ends
        self._patience = patience_seconds
        self._entries: list[Waiting] = []
        """Those with a reservation, in the queue's order."""
        self._shown = 0
        """So many of them, from the first, are applied to the fleet."""
        self._turn = 0
        self._due: frozenset[Waiting] = frozenset()
        self._choices_left = 0
        self._hopeless: set[Ask] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def show(self, place: Order) -> None:
        """Let the fleet hide what is kept for those ahead of a place, and nothing else."""
        entries, shown = self._entries, self._shown
        while shown and entries[shown - 1].order >= place:
            shown -= 1
            self._unreserve(entries[shown])
        while shown < len(entries) and entries[shown].order < place:
            self._reserve(entries[shown])
            shown += 1
        self._shown = shown

    def begin(self, queue: Iterable[Waiting], now: float) -> None:
        """Begin a turn: whose choice is looked at in it."""
        self._turn += 1
        self._hopeless.clear()
        waited = [entry for entry in queue if now - entry.arrived_at >= self._patience]
        self._choices_left = max(1, min(_MOST_A_TURN, _CLASSES_A_TURN // (len(self._fleet.index.classes) + 1)))
        most = 8 * self._choices_left
        if len(waited) > most:
            waited = nsmallest(most, waited, key=lambda entry: entry.looked_at)
        self._due = frozenset(waited)

    def renew(self, entry: Waiting, ask: Ask) -> None:
        """Choose again for one who can not be granted now, if its turn has come."""
        if entry in self._due and (self._choices_left or ask in self._hopeless):
            self.show(entry.order)
            entry.looked_at = self._turn
            self._choose(entry, ask)
        elif entry.reservation is not None and not self._turn % _CHECK_TURNS:
            self.show(entry.order)
            if not holds(self._fleet, ask, entry.reservation):
                self.drop(entry)

    def keep(self, entry: Waiting, ask: Ask) -> None:
        """Choose for one who could be granted now, and is not yet."""
        self.show(entry.order)
        self._choose(entry, ask)

    def _choose(self, entry: Waiting, ask: Ask) -> None:
        full = len(self._entries) >= MOST_RESERVATIONS
        if entry.reservation is None and full and self._entries[-1].order < entry.order:
            return
        found = None
        # What could not be kept beside those ahead can't be kept beside more of them.
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

    def drop(self, entry: Waiting) -> None:
        """Keep nothing more for one: it has left the line, or could not be served."""
        if entry.reservation is None:
            return
        at = bisect_left(self._entries, entry.order, key=lambda other: other.order)
        if at < self._shown:
            self._shown -= 1
            self._unreserve(entry)
        del self._entries[at]
        entry.reservation = None

    def clear(self) -> None:
        """Keep nothing any more."""
        while self._entries:
            self.drop(self._entries[-1])

    def _reserve(self, entry: Waiting) -> None:
        assert entry.reservation is not None
        reserve(self._fleet, entry.reservation)

    def _unreserve(self, entry: Waiting) -> None:
        assert entry.reservation is not None
        unreserve(self._fleet, entry.reservation)
