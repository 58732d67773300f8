"""Hosts by a policy's score, kept from one decision to the next.

A ranking is of one policy and one ask. It holds a heap of host classes with the policy's choice, and catches up with
the classes that are new since it was last asked, so that a decision costs what has changed and not what there is.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any, Final

from .feasible import candidates, host_verdict
from .fleet import Fleet
from .index import HostClass
from .policies import Choice, Policy
from .state import Ask, HostState

RANKINGS_KEPT: Final = 1024
_CHOICES_KEPT: Final = 50_000

Entry = tuple[float, float, Any, HostState]


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
        """The policy's choice on a host of that state; None where it can not hold the ask."""
        choices = self._choices
        try:
            return choices[state]
        except KeyError:
            pass
        usable = candidates(state, self.ask)
        found = None
        if not host_verdict(state, self.ask, len(usable)):
            found = self.policy.choose(state, self.ask, usable)
        choices[state] = found
        return found

    def best(self, fleet: Fleet) -> tuple[HostClass, Choice] | None:
        """The best class with its choice; of equal scores the one that comes first in the order of states."""
        self._catch_up(fleet)
        heap, classes = self._heap, fleet.index.classes
        while heap:
            state = heap[0][3]
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
        if self.version != self.policy.version or len(self._choices) > _CHOICES_KEPT:
            self.version = self.policy.version
            self._choices = {}
            self._cursor = -1
        behind = index.end - self._cursor
        if self._cursor < index.base or behind > len(index.classes):
            # As many are new as there are: begin anew, with the choices that still hold.
            self._queued = set()
            heap: list[Entry] = []
            for state in index.classes:
                choice = self.choice(state)
                if choice is not None:
                    heap.append((-choice.score, -choice.tie, state.order, state))
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
                    heappush(self._heap, (-choice.score, -choice.tie, state.order, state))
        self._cursor = index.end


def ranking(fleet: Fleet, policy: Policy, ask: Ask) -> Ranking:
    """The ranking that is kept for a policy and an ask."""
    key = (policy, ask)
    found = fleet.cache.get(key)
    if found is None:
        if len(fleet.cache) >= RANKINGS_KEPT:
            fleet.cache.clear()
        found = fleet.cache[key] = Ranking(policy, ask)
    return found
