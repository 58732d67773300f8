"""Who runs next: askers take turns, and none may fill all slots.

Pure state; `query.py` drives it. An asker with fifty queries in line waits behind another's first, and while one
asker's queries run for minutes there is still a slot that only others can take.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Entries by asker, given out in turns.

    Args:
        slots: entries that may run at the same time.
        per_asker: of one asker.
        waiting: entries that may wait, of all askers; half of it of one asker.
    """

    def __init__(self, slots: int, per_asker: int, waiting: int) -> None:
        self._slots = slots
        self._per_asker = per_asker
        self._waiting = waiting
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._running: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @property
    def running(self) -> int:
        """Entries that run."""
        return sum(self._running.values())

    def put(self, asker: str, entry: T) -> bool:
        """Take an entry into line; False if there is no room for it."""
        line = self._lines.get(asker)
        if len(self) >= self._waiting or (line is not None and len(line) >= max(1, self._waiting // 2)):
            return False
        self._lines.setdefault(asker, deque()).append(entry)
        return True

    def take(self) -> tuple[str, T] | None:
        """The next entry that may run, counted as running until `done`; None if there is none, or no slot."""
        if self.running >= self._slots:
            return None
        for asker, line in self._lines.items():
            if self._running.get(asker, 0) >= self._per_asker:
                continue
            entry = line.popleft()
            if line:
                self._lines.move_to_end(asker)
            else:
                del self._lines[asker]
            self._running[asker] = self._running.get(asker, 0) + 1
            return asker, entry
        return None

    def done(self, asker: str) -> None:
        """An entry of the asker has ended."""
        left = self._running[asker] - 1
        if left:
            self._running[asker] = left
        else:
            del self._running[asker]

    def remove(self, entry: T) -> bool:
        """Take an entry out of line; False if it is in none."""
        for asker, line in self._lines.items():
            if entry in line:
                line.remove(entry)
                if not line:
                    del self._lines[asker]
                return True
        return False

    def remove_if(self, wanted: Callable[[T], bool]) -> list[T]:
        """Take out of line all entries that are wanted."""
        found = [entry for line in self._lines.values() for entry in line if wanted(entry)]
        for entry in found:
            self.remove(entry)
        return found
