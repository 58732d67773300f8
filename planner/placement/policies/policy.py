"""Interface of ranking policies, which score a host for a request and pick devices on it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from random import Random
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ...fleet.state import Ask, HostState

if TYPE_CHECKING:
    from ...fleet.fleet import Fleet
    from ...fleet.index import HostClass


class Choice(NamedTuple):
    """A policy's choice on one host.

    Attributes:
        score: of the host, greater is better.
        tie: tie-breaker between equal scores, greater is better.
        devices: indexes of the chosen devices in `HostState.devices`, ascending; empty for cores and RAM alone.
    """

    score: float
    tie: float
    devices: tuple[int, ...]


class Search(Protocol):
    """Search for the best hosts of a whole fleet at once. It ignores the hosts and labels that a request names."""

    def best(self, fleet: Fleet, ask: Ask) -> tuple[HostClass, Choice] | None:
        """Find the best class that can hold the ask on one host, with the choice on it; None if there is none."""
        ...

    def top(self, fleet: Fleet, ask: Ask, count: int, without: Set[str]) -> list[tuple[str, Choice]]:
        """Find the best hosts that can hold the ask each: names and choices, at most `count`, without some."""
        ...

    def may_hold(self, fleet: Fleet, ask: Ask, most: int, without: Set[str]) -> int:
        """Upper bound on the whole devices for the ask that one host can hold, at most `most`, without some hosts."""
        ...


class Policy(Protocol):
    """Ranks hosts. It never declines: every host that it is given can hold the request.

    Hosts are given as states, shared by all hosts of that state, so it pays to cache results by state. The planner
    caches each choice until `version` changes. So a policy that learns must change it when older choices are no longer
    valid, and should not change it more often.

    Attributes:
        name: as requests name it.
        version: of the learned state.
    """

    name: str
    version: int

    @property
    def draw(self) -> Random | None:
        """Random generator; if set, the host is drawn from all feasible ones with equal probability, without scores."""
        ...

    @property
    def search(self) -> Search | None:
        """Search for the best hosts; if set, it replaces the cached ranking."""
        ...

    def observe(self, fleet: Fleet, ask: Ask) -> None:
        """Learn from a request that has arrived, or from the fleet."""
        ...

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Score a host and pick `ask.gpus` of the candidates.

        Args:
            state: of a host that can hold the request.
            ask: the request, or its part on this one host.
            candidates: indexes of the devices that could be used, at least `ask.gpus`.
        """
        ...

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """Components of a device's score, by name; the score is their sum.

        Args:
            state: as for `choose`.
            ask: as for `choose`.
            choice: result of `choose`.
            device: the device's index in the state; -1 for cores and RAM alone.
        """
        ...


def pick(state: HostState, candidates: Sequence[int], count: int) -> tuple[int, ...]:
    """Pick `count` candidates: those with the best links if links differ, else the first in their order."""
    if count <= 0:
        return ()
    if state.topology is None or count == 1:
        return tuple(sorted(candidates[:count]))
    return state.topology.best(candidates, count)
