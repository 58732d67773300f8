"""Index of hosts by state. A class is all hosts of equal state; decisions compare classes instead of single hosts."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final

from .state import DeviceState, HostState

_LOG_FACTOR: Final = 4
LOG_SPARE: Final = 4096


class HostClass:
    """The hosts in one state.

    Attributes:
        state: of the hosts.
        members: names of the hosts → index in `pool`.
        pool: the names in arbitrary order, to draw one at random.
    """

    __slots__ = ("_names", "members", "pool", "state")

    def __init__(self, state: HostState) -> None:
        self.state = state
        self.members: dict[str, int] = {}
        self.pool: list[str] = []
        self._names: list[str] = []

    def add(self, name: str) -> None:
        """Add a host that has come into this state."""
        self.members[name] = len(self.pool)
        self.pool.append(name)
        heappush(self._names, name)
        if len(self._names) > 2 * len(self.members) + 16:
            self._names = list(self.members)
            heapify(self._names)

    def discard(self, name: str) -> None:
        """Remove a host that has left this state."""
        place = self.members.pop(name)
        last = self.pool.pop()
        if last != name:
            self.pool[place] = last
            self.members[last] = place

    def least(self, count: int) -> list[str]:
        """The first names of the members in alphabetical order, at most `count`."""
        names, members = self._names, self.members
        found: list[str] = []
        while names and len(found) < count:
            name = heappop(names)
            # A member that left and came back is there twice.
            if name in members and (not found or found[-1] != name):
                found.append(name)
        for name in found:
            heappush(names, name)
        return found

    def first(self) -> str:
        """The first name of the members in alphabetical order, so that the choice does not depend on history."""
        names = self._names
        while names[0] not in self.members:
            heappop(names)
        return names[0]


class Index:
    """All classes, with a log of new ones, from which a ranking catches up.

    Attributes:
        classes: by state, those with members only.
        log: classes in the order in which they got their first member (again).
        base: number of entries that were cut off the front of the log.
        moves: (core before, core after) of every host whose state's `core` changed, in order.
        moves_base: number of entries that were cut off the front of the moves.
        moved: names of the hosts whose `core` changed, in order, but for what happens while `quiet`.
        moved_base: number of entries that were cut off the front of these.
        quiet: true while reservations are applied, or removed, which will be undone.
        devices: number of devices in each state, by `core`.
    """

    __slots__ = ("base", "classes", "devices", "log", "moved", "moved_base", "moves", "moves_base", "quiet")

    def __init__(self) -> None:
        self.classes: dict[HostState, HostClass] = {}
        self.log: list[HostClass] = []
        self.base = 0
        self.moves: list[tuple[HostState | None, HostState | None]] = []
        self.moves_base = 0
        self.moved: list[str] = []
        self.moved_base = 0
        self.quiet = False
        self.devices: dict[DeviceState, int] = {}

    @property
    def moves_end(self) -> int:
        """Position of the next move, counted from the first ever."""
        return self.moves_base + len(self.moves)

    @property
    def moved_end(self) -> int:
        """Position of the next name in `moved`, counted from the first ever."""
        return self.moved_base + len(self.moved)

    @property
    def end(self) -> int:
        """Position in the log of the next class, counted from the first ever."""
        return self.base + len(self.log)

    def move(self, name: str, old: HostClass | None, state: HostState | None) -> HostClass | None:
        """Move a host from its class to that of a state, and return that; None for a host that comes or goes."""
        before, after = None if old is None else old.state.core, None if state is None else state.core
        if before is not after:
            self._move(name, before, after)
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

    def _move(self, name: str, before: HostState | None, after: HostState | None) -> None:
        self.moves.append((before, after))
        if not self.quiet:
            self.moved.append(name)
            if len(self.moved) > 2 * LOG_SPARE:
                del self.moved[:LOG_SPARE]
                self.moved_base += LOG_SPARE
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
