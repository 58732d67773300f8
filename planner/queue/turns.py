"""Turns along the line: which requests of equal needs are tried next.

Without groups of owners it is the order of the line. With them, requests whose start is within the guarantee of their
group come first, and then the others. In both rounds the group with the least use for its weight (`GroupState.share`)
is next, level by level down the tree, and within a group the order of the line counts. A start raises the use of its
group, and with it that of the groups around it, so the next turn may be another's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, Protocol, TypeVar

from ..groups.state import GroupState
from ..groups.tree import Node
from ..groups.use import Admission, Barred


class Waiting(Protocol):
    """Waiting requests of equal needs, of one group of owners."""

    @property
    def entries(self) -> Sequence[object]:
        """The requests; none if all have started."""
        ...

    @property
    def order(self) -> tuple[int, int, float, int]:
        """Place of the first in line."""
        ...

    @property
    def node(self) -> Node | None:
        """Group of their owners; None if there are no groups."""
        ...

    def bar(self, barred: Barred) -> None:
        """Bar some models, and no others, from now on."""
        ...

    refused: str
    within: bool
    limited: Node | None


T = TypeVar("T", bound=Waiting)


class Turns(Protocol[T]):
    """Turns along the line."""

    def next(self) -> T | None:
        """The next to try; None at the end."""
        ...

    def again(self, waiting: T) -> None:
        """Let the one that was given last have another turn: one of its requests has started."""
        ...


class InOrder(Generic[T]):
    """Turns in the order of the line.

    Args:
        waiting: all that wait.
    """

    def __init__(self, waiting: Iterable[T]) -> None:
        self._todo = [(each.order, id(each), each) for each in waiting]
        heapify(self._todo)

    def next(self) -> T | None:
        """The next to try; None at the end."""
        return heappop(self._todo)[2] if self._todo else None

    def again(self, waiting: T) -> None:
        """Let the one that was given last have another turn."""
        heappush(self._todo, (waiting.order, id(waiting), waiting))


_Child = tuple[float, str, Node | None]
"""Share, name and node of a group; None stands for the members of the group around it."""


class ByGroup(Generic[T]):
    """Turns by the groups of owners.

    Args:
        waiting: all that wait, by group.
        state: of the groups.
        admit: says what quotas allow them.
        now: seconds.
    """

    def __init__(
        self,
        waiting: Mapping[Node, Collection[T]],
        state: GroupState,
        admit: Callable[[T], Admission],
        now: float,
    ) -> None:
        self._waiting = waiting
        self._state = state
        self._admit = admit
        self._now = now
        self._within = True
        self._later: dict[int, T] = {}
        self._own: dict[Node, list[tuple[tuple[int, int, float, int], int, T]]] = {}
        """Those that wait in each group that had a turn, as a heap."""
        self._children: dict[Node, list[_Child]] = {}
        """The groups that wait within each that has groups within, as a heap."""
        self._path: list[Node] = []
        """Groups on the way to the one that was given last, from the root."""
        self._started = False
        """True if one of the requests that were given last has started, which changes the shares of their groups."""
        self._shares: dict[Node, float] = {}
        self._own_shares: dict[Node, float] = {}
        self._fill()

    def next(self) -> T | None:
        """The next to try; None at the end."""
        while True:
            self._settle()
            node = self._least()
            if node is None:
                if not self._within:
                    return None
                self._within = False
                self._waiting = _by_group(self._later.values())
                self._fill()
                continue
            own = self._own.get(node)
            if own is None:
                found = [(each.order, id(each), each) for each in self._waiting.get(node, ()) if each.entries]
                own = self._own[node] = found
                heapify(own)
            if not own:
                continue
            waiting = heappop(own)[2]
            admission = self._admit(waiting)
            waiting.refused = "" if admission.barred is not None else admission.reason
            waiting.limited = None
            if self._within:
                if admission.barred is not None and admission.barred != admission.within:
                    self._later[id(waiting)] = waiting
                if admission.within is not None:
                    waiting.bar(admission.within)
                elif admission.owed is not None:  # it must not start, but others may have to give back
                    waiting.bar(admission.owed)
                    waiting.limited = admission.limited
                else:
                    continue
            elif admission.barred is None:
                continue
            else:
                waiting.bar(admission.barred)
            waiting.within = self._within
            return waiting

    def again(self, waiting: T) -> None:
        """Let the one that was given last have another turn."""
        self._started = True
        self._later.pop(id(waiting), None)
        heappush(self._own[self._path[-1]], (waiting.order, id(waiting), waiting))

    def _fill(self) -> None:
        children: dict[Node, list[_Child]] = {}
        known: set[Node] = set()
        for node in self._waiting:
            if node.children:
                children.setdefault(node, []).append((self._own_share(node), "", None))
            child = node
            while child.parent is not None and child not in known:
                known.add(child)
                children.setdefault(child.parent, []).append((self._share(child), child.name, child))
                child = child.parent
        self._own = {}
        self._children = children
        for heap in children.values():
            heapify(heap)
        self._path = []

    def _share(self, node: Node) -> float:
        found = self._shares.get(node)
        if found is None:
            found = self._shares[node] = self._state.share(node, self._now)
        return found

    def _own_share(self, node: Node) -> float:
        found = self._own_shares.get(node)
        if found is None:
            found = self._own_shares[node] = self._state.own_share(node, self._now)
        return found

    def _least(self) -> Node | None:
        """The group whose turn it is; None if none waits."""
        node = self._state.tree.root
        if not self._children.get(node):
            self._path = []
            return None
        self._path = [node]
        while (heap := self._children.get(node)) is not None:
            child = heap[0][2]
            if child is None:
                break
            self._path.append(child)
            node = child
        return node

    def _settle(self) -> None:
        """Bring the shares on the last way up to date, and leave out groups whose requests have all had their turn."""
        if not self._path:
            return
        started, self._started = self._started, False
        if started:
            for node in self._path:
                self._shares.pop(node, None)
                self._own_shares.pop(node, None)
        node = self._path[-1]
        left = bool(self._own[node])
        if (heap := self._children.get(node)) is not None:
            if not left:
                heappop(heap)
            elif started:
                heapreplace(heap, (self._own_share(node), "", None))
            left = bool(heap)
        for child in reversed(self._path[1:]):
            assert child.parent is not None
            heap = self._children[child.parent]
            if not left:
                heappop(heap)
            elif started:
                heapreplace(heap, (self._share(child), child.name, child))
            else:
                break
            left = bool(heap)


def _by_group(waiting: Iterable[T]) -> Mapping[Node, list[T]]:
    """Requests that still wait, by group."""
    found: dict[Node, list[T]] = {}
    for each in waiting:
        if each.entries and each.node is not None:
            found.setdefault(each.node, []).append(each)
    return found
