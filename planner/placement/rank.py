"""Rankings of hosts by a policy's score, cached from one decision to the next.

A ranking belongs to one policy and one ask. It has a heap of host classes with the policy's choices, and adds the
classes that are new since its last use. So the cost of a decision depends on the changes, not on the fleet's size.
"""

from __future__ import annotations

from collections.abc import Set
from heapq import heapify, heappop, heappush
from typing import Any, Final

from ..fleet.fleet import Fleet
from ..fleet.index import HostClass
from ..fleet.state import Ask, HostState
from .feasible import candidates, excluded
from .policies import Choice, Policy

CHOICES_SPARE: Final = 1024
"""Choices of unused states are evicted once there are more choices than twice the classes plus this number."""
_UNKNOWN: Final = Choice(0.0, 0.0, (-1,))

Entry = tuple[float, float, Any, int, HostState]
"""Negative score, negative tie, order, identity, state. A state that was evicted and made again is another object of
the same order; identity decides between the two, of which one has no hosts."""


class Ranking:
    """The classes that can hold an ask on one host, best first."""

    __slots__ = ("_choices", "_cursor", "_heap", "_queued", "ask", "policy", "version")

    def __init__(self, policy: Policy, ask: Ask) -> None:
        self.policy = policy
        self.ask = ask
        self.version = policy.version
        self._choices: dict[HostState, Choice | None] = {}
        self._heap: list[Entry] = []
        self._queued: set[HostState] = set()
        self._cursor = -1

    def choice(self, state: HostState) -> Choice | None:
        """The policy's choice on a host of that state, cached; None if it can't hold the ask."""
        ask = self.ask
        if excluded(state, ask):
            return None
        choices = self._choices
        found = choices.get(state, _UNKNOWN)
        if found is not _UNKNOWN:
            return found
        usable = candidates(state, ask)
        chosen = self.policy.choose(state, ask, usable) if len(usable) >= ask.gpus else None
        choices[state] = chosen
        return chosen

    def key(self, state: HostState, choice: Choice) -> tuple[float, float, Any]:
        """Sort key of choices, best first; equal scores are sorted by the order of states."""
        return (-choice.score, -choice.tie, state.order)

    def top(self, fleet: Fleet, count: int, without: Set[str] = frozenset()) -> list[str]:
        """Names of the best hosts that can hold the ask, at most `count`, without some."""
        self._catch_up(fleet)
        heap, classes = self._heap, fleet.index.classes
        kept: list[Entry] = []
        found: list[str] = []
        while heap and len(found) < count:
            entry = heappop(heap)
            group = classes.get(entry[4])
            if group is None:
                self._queued.discard(entry[4])
                continue
            kept.append(entry)
            names = group.least(count - len(found) + len(without))
            found.extend([name for name in names if name not in without][: count - len(found)])
        for entry in kept:
            heappush(heap, entry)
        return found

    def best(self, fleet: Fleet) -> tuple[HostClass, Choice] | None:
        """The best class with its choice, of equal scores the first in the order of states; None if there is none."""
        self._catch_up(fleet)
        heap, classes = self._heap, fleet.index.classes
        while heap:
            state = heap[0][4]
            group = classes.get(state)
            if group is not None:
                choice = self._choices[state]
                assert choice is not None
                return group, choice
            heappop(heap)
            self._queued.discard(state)
        return None

    def _catch_up(self, fleet: Fleet) -> None:
        index = fleet.index
        if self.version != self.policy.version:
            self.version = self.policy.version
            self._choices = {}
            self._cursor = -1
        elif len(self._choices) > 2 * len(index.classes) + CHOICES_SPARE:
            self._choices = {state: self._choices[state] for state in index.classes if state in self._choices}
            self._cursor = -1
        behind = index.end - self._cursor
        if self._cursor < index.base or behind > len(index.classes):
            # More are new than there are classes: build a new heap, from cached choices.
            self._queued = set()
            heap: list[Entry] = []
            for state in index.classes:
                choice = self.choice(state)
                if choice is not None:
                    heap.append((*self.key(state, choice), id(state), state))
                    self._queued.add(state)
            heapify(heap)
            self._heap = heap
        else:
            queued = self._queued
            for group in index.log[self._cursor - index.base :] if behind else ():
                state = group.state
                if state in queued or not group.members:
                    continue
                choice = self.choice(state)
                if choice is not None:
                    queued.add(state)
                    heappush(self._heap, (*self.key(state, choice), id(state), state))
        self._cursor = index.end


def ranking(fleet: Fleet, policy: Policy, ask: Ask) -> Ranking:
    """The cached ranking of a policy and an ask."""
    key = (policy, ask)
    found = fleet.cache.get(key)
    if found is None:
        found = fleet.cache.put(key, Ranking(policy, ask))
    return found
