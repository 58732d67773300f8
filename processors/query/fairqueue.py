"""Fair queue of queries: askers take turns, and none may fill all slots.

Pure state; `service.py` drives it. An asker with fifty waiting queries comes after another asker's first. Half of the
slots are for askers with no running query. If these are full, too, there is an express slot. The first query of a
newcomer runs there, and is requeued if it turns out to be long while other newcomers wait.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Turn(NamedTuple, Generic[T]):
    """An entry that may run.

    Attributes:
        asker: that it belongs to.
        entry: as it was put in.
        express: true if it runs in an express slot, and may be requeued.
    """

    asker: str
    entry: T
    express: bool


class _Waiting(NamedTuple, Generic[T]):
    entry: T
    long: bool


class FairQueue(Generic[T]):
    """Queue of entries by asker, served round-robin.

    Args:
        slots: number of entries that may run at the same time.
        per_asker: the same for one asker; the second and later ones only run while half of the slots are free.
        waiting: number of entries that may wait, of all askers; at most half of them of one asker.
        express: number of additional slots for the first entry of an asker.
    """

    def __init__(self, slots: int, per_asker: int, waiting: int, express: int = 0) -> None:
        self._slots = slots
        self._per_asker = per_asker
        self._waiting = waiting
        self._express = express
        self._lines: OrderedDict[str, deque[_Waiting[T]]] = OrderedDict()
        self._running: dict[str, int] = {}
        self._tried = 0

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @property
    def running(self) -> int:
        """Number of running entries."""
        return sum(self._running.values())

    @property
    def newcomers(self) -> bool:
        """True if an asker waits whose next entry could run in an express slot."""
        return any(self._may_be_tried(asker, line) for asker, line in self._lines.items())

    def put(self, asker: str, entry: T) -> list[T] | None:
        """Add an entry to the queue.

        Returns:
            Entries that were evicted for it: if the queue is full, the last entry of the asker with the most makes room
            for an asker with fewer. None if there is no room for the entry itself.
        """
        own = len(self._lines.get(asker, ()))
        left: list[T] = []
        if own >= max(1, self._waiting // 2):
            return None
        if len(self) >= self._waiting:
            longest = max(self._lines, key=lambda one: len(self._lines[one]))
            if len(self._lines[longest]) <= own + 1:
                return None
            left.append(self._lines[longest].pop().entry)
        self._lines.setdefault(asker, deque()).append(_Waiting(entry, False))
        return left

    def set_back(self, asker: str, entry: T) -> None:
        """Requeue a long entry from an express slot, at the head of its asker's line; there is always room for it."""
        self._lines.setdefault(asker, deque()).appendleft(_Waiting(entry, True))

    def take(self) -> Turn[T] | None:
        """Take the next entry that may run; it counts as running until `done`. None if there is none, or no slot."""
        regular = self.running - self._tried
        if regular < self._slots:
            for asker in self._lines:
                own = self._running.get(asker, 0)
                if own == 0 or (own < self._per_asker and regular < self._slots - self._slots // 2):
                    return self._taken(asker, express=False)
        if self._tried < self._express:
            for asker, line in self._lines.items():
                if self._may_be_tried(asker, line):
                    self._tried += 1
                    return self._taken(asker, express=True)
        return None

    def _may_be_tried(self, asker: str, line: deque[_Waiting[T]]) -> bool:
        return not self._running.get(asker) and not line[0].long

    def _taken(self, asker: str, express: bool) -> Turn[T]:
        line = self._lines[asker]
        entry = line.popleft().entry
        if line:
            self._lines.move_to_end(asker)
        else:
            del self._lines[asker]
        self._running[asker] = self._running.get(asker, 0) + 1
        return Turn(asker, entry, express)

    def done(self, asker: str, express: bool = False) -> None:
        """Free the slot of an entry that has ended, or is requeued."""
        self._tried -= express
        left = self._running[asker] - 1
        if left:
            self._running[asker] = left
        else:
            del self._running[asker]

    def remove(self, entry: T) -> bool:
        """Remove a waiting entry; False if it does not wait."""
        return bool(self.remove_if(lambda one: one is entry))

    def remove_if(self, wanted: Callable[[T], bool]) -> list[T]:
        """Remove the waiting entries that match, and return them."""
        found: list[T] = []
        for asker, line in list(self._lines.items()):
            gone = [one for one in line if wanted(one.entry)]
            found += [one.entry for one in gone]
            if len(gone) == len(line):
                del self._lines[asker]
            elif gone:
                self._lines[asker] = deque(one for one in line if one not in gone)
        return found
