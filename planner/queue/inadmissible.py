"""Waiting requests that need not be tried, since quotas would let none of them start: inadmissible, as Kueue says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from ..fleet.fleet import Fleet
from ..fleet.state import Ask
from ..groups.state import GroupState
from ..groups.tree import Node
from ..groups.use import GroupUse, Wanted


class Waiting(Protocol):
    """Waiting requests of equal needs, of one group of owners."""

    @property
    def wanted(self) -> Ask:
        """Resources that each asks for."""
        ...

    node: Node | None


T = TypeVar("T", bound=Waiting)


class ActiveRequests(Generic[T]):
    """Requests that the next walk along the line is to try, apart from those that quotas let nothing start.

    These are inadmissible until something changes that could let them start, or be owed something: the use of their
    group or of one around it, or the fleet's hosts. Where the outermost group is at its limit, its use counts once it
    has room for what they ask for.

    Args:
        fleet: live state.
        state: of the groups.
    """

    def __init__(self, fleet: Fleet, state: GroupState) -> None:
        self._fleet = fleet
        self._state = state
        self._active: dict[Node, dict[T, None]] = {}
        self._refused: dict[T, None] = {}
        """Those that quotas let nothing start when they were tried last."""
        self._inadmissible: dict[Node, _Inadmissible[T]] = {}
        """The others by the outermost group around them."""

    def add(self, waiting: T, node: Node) -> None:
        """Have requests tried from now on."""
        self._active.setdefault(node, {})[waiting] = None

    def forget(self, waiting: T, node: Node) -> None:
        """Forget requests that have all left."""
        self._refused.pop(waiting, None)
        if (active := self._active.get(node)) is not None:
            active.pop(waiting, None)
            if not active:
                del self._active[node]
        if (inside := self._inadmissible.get(node.path[0])) is not None:
            inside.forget(waiting)

    def refuse(self, waiting: T) -> None:
        """Note that quotas let none of some requests start, nor owe them anything."""
        self._refused[waiting] = None

    def active(self, exhausted: Callable[[T], bool]) -> Mapping[Node, Mapping[T, None]]:
        """The requests that are to be tried, by group; kept up to date.

        Args:
            exhausted: true if quotas let none of some refused requests start still.
        """
        use, shape = self._state.use, self._fleet.shape_version
        for outermost, inside in list(self._inadmissible.items()):
            if inside.mark != (use.of(outermost).version, shape):
                for waiting in inside.take_changed(outermost, use, shape):
                    if waiting.node is not None:
                        self.add(waiting, waiting.node)
                if not inside.groups:
                    del self._inadmissible[outermost]
        over: dict[tuple[Node, Wanted], bool] = {}
        """Whether the outermost groups are at their limit, by what is asked for."""
        refused, self._refused = self._refused, {}
        for waiting in refused:
            node = waiting.node
            if node is None or waiting not in self._active.get(node, ()) or not exhausted(waiting):
                continue
            self.forget(waiting, node)
            outermost = node.path[0]
            inside = self._inadmissible.get(outermost)
            if inside is None:
                inside = self._inadmissible[outermost] = _Inadmissible[T]((use.of(outermost).version, shape))
            wanted = self._state.wanted(self._fleet, waiting.wanted)
            known = over.get((outermost, wanted))
            if known is None:
                known = over[outermost, wanted] = use.is_over_limit(outermost, wanted)
            inside.groups.setdefault(wanted if known else None, {})[waiting] = use.inner_version(node)
        return self._active


class _Inadmissible(Generic[T]):
    """Inadmissible requests in one outermost group.

    Args:
        mark: version of the use of that group, and shape of the fleet.

    Attributes:
        mark: those for which they are inadmissible.
        groups: by what they ask for, where the outermost group has no room for that, else under None; each with the
            version of the use within that group.
    """

    def __init__(self, mark: tuple[int, int]) -> None:
        self.mark = mark
        self.groups: dict[Wanted | None, dict[T, int]] = {}

    def forget(self, waiting: T) -> None:
        """Forget requests that have all left."""
        for parked in self.groups.values():
            parked.pop(waiting, None)

    def take_changed(self, outermost: Node, use: GroupUse, shape: int) -> list[T]:
        """Take out those for which something has changed, after a change of the use of that group or of the fleet."""
        (_, shape_before), self.mark = self.mark, (use.of(outermost).version, shape)
        found: list[T] = []
        for wanted, parked in list(self.groups.items()):
            if wanted is None or shape_before != shape or not use.is_over_limit(outermost, wanted):
                changed = list(parked)
            else:
                changed = [
                    waiting
                    for waiting, version in parked.items()
                    if waiting.node is None or use.inner_version(waiting.node) != version
                ]
            found += changed
            for waiting in changed:
                del parked[waiting]
            if not parked:
                del self.groups[wanted]
        return found
