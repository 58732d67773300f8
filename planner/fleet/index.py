"""Hosts by state. A class is all hosts of equal state; a decision looks at classes, never at hosts one by one."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final

from .state import DeviceState, HostState

_LOG_FACTOR: Final = 4
LOG_SPARE: Final = 4096


class HostClass:
    """The hosts in one state.

    Attributes:
        state: theirs.
        members: names of the hosts → place in `pool`.
        pool: the names, in no order that means anything; one can be drawn from it at once.
    """

    __slots__ = ("_names", "members", "pool", "state")

    def __init__(self, state: HostState) -> None:
        self.state = state
        self.members: dict[str, int] = {}
        self.pool: list[str] = []
        self._names: list[str] = []

    def add(self, name: str) -> None:
        """A host has come into this state."""
        self.members[name] = len(self.pool)
        self.pool.append(name)
        heappush(self._names, name)
        if len(self._names) > 2 * len(self.members) + 16:
            self._names = list(self.members)
            heapify(self._names)

    def discard(self, name: str) -> None:
        """A host has left this state."""
        place = self.members.pop(name)
        last = self.pool.pop()
        if last != name:
            self.pool[place] = last
            self.members[last] = place

    def least(self, count: int) -> list[str]:
        """The least names among the members, ascending."""
        names, members = self._names, self.members
        found: list[str] = []
        while names and len(found) < count:
            name = heappop(names)
            # A member that left and came back stands there twice.
            if name in members and (not found or found[-1] != name):
                found.append(name)
        for name in found:
            heappush(names, name)
        return found

    def first(self) -> str:
        """The least name among the members: the same hosts give the same choice, however they came here."""
        names = self._names
        while names[0] not in self.members:
            heappop(names)
        return names[0]


class Index:
    """All classes, with a log of those that were filled, so that a ranking catches up with what is new to it.

    Attributes:
        classes: by state, those with members only.
        log: classes in the order in which they got their first member (again).
        base: how many entries have been cut off the log's front.
        moves: (core before, core after) of every host whose state's `core` changed, in order.
        moves_base: how many entries have been cut off the front of the moves.
        devices: how many devices are in each state, by `core`.
    """

    __slots__ = ("base", "classes", "devices", "log", "moves", "moves_base")

    def __init__(self) -> None:
        self.classes: dict[HostState, HostClass] = {}
        self.log: list[HostClass] = []
        self.base = 0
        self.moves: list[tuple[HostState | None, HostState | None]] = []
        self.moves_base = 0
        self.devices: dict[DeviceState, int] = {}

    @property
    def moves_end(self) -> int:
        """The place that the next move gets."""
        return self.moves_base + len(self.moves)

    @property
    def end(self) -> int:
        """The place in the log that the next class gets."""
        return self.base + len(self.log)

    def move(self, name: str, old: HostClass | None, state: HostState | None) -> HostClass | None:
        """Take a host from one class to another; None is nowhere."""
        before, after = None if old is None else old.state.core, None if state is None else state.core
        if before is not after:
            self._move(before, after)
        if old is not None:
            old.discard(name)
            if not old.members:
                del self.classes[old.state]
        if state is None:
            return None
        found = self.classes.get(state)
        if found is None:
            found = self.classes[state] = HostClass(state)
            self.log.append(found)
            if len(self.log) > _LOG_FACTOR * len(self.classes) + LOG_SPARE:
                cut = len(self.log) // 2
                del self.log[:cut]
                self.base += cut
        found.add(name)
        return found

    def _move(self, before: HostState | None, after: HostState | None) -> None:
        self.moves.append((before, after))
        if len(self.moves) > _LOG_FACTOR * len(self.classes) + LOG_SPARE:
            cut = len(self.moves) // 2
            del self.moves[:cut]
            self.moves_base += cut
        counts = self.devices
        for state, hosts in ((before, -1), (after, 1)):
            for device, places in state.kinds if state is not None else ():
                left = counts.get(device, 0) + hosts * len(places)
                if left:
                    counts[device] = left
                else:
                    del counts[device]
