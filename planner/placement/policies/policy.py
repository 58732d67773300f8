"""What a ranking policy is: it scores a host for a request, and picks the devices on it."""

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
        tie: decides between equal scores, greater is better.
        devices: places of the chosen devices in `HostState.devices`, ascending; empty for cores and RAM alone.
    """

    score: float
    tie: float
    devices: tuple[int, ...]


class Search(Protocol):
    """Finds the best hosts of a whole fleet at once. It does not look at the hosts and labels that a request names."""

    def best(self, fleet: Fleet, ask: Ask) -> tuple[HostClass, Choice] | None:
        """The best class that can hold the ask on one host, with the choice on it; None if there is none."""
        ...

    def top(self, fleet: Fleet, ask: Ask, count: int, without: Set[str]) -> list[tuple[str, Choice]]:
        """The best hosts that can hold the ask each, by name, at most so many, with the choice on each."""
        ...

    def may_hold(self, fleet: Fleet, ask: Ask, most: int, without: Set[str]) -> int:
        """How many whole devices for the ask one host holds at most, as a bound from above, and no more than `most`."""
        ...


class Policy(Protocol):
    """Ranks hosts. Declining is not its business: every host that it is given can hold the request.

    Hosts come as states, shared by all hosts of that state; what is worked out for a state is worth keeping. The
    planner keeps each choice until `version` moves, so a policy that learns moves it when older choices no longer
    hold, and not more often than that.

    Attributes:
        name: as requests name it.
        version: of what it has learned.
    """

    name: str
    version: int

    @property
    def draw(self) -> Random | None:
        """Where it is set, the host is drawn from all feasible ones with equal chances; scores do not count."""
        ...

    @property
    def search(self) -> Search | None:
        """Where it is set, it finds the best hosts, in place of a ranking that is kept."""
        ...

    def observe(self, fleet: Fleet, ask: Ask) -> None:
        """A request has come in: the place to learn what requests are like, or to look over the fleet."""
        ...

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Score a host and pick `ask.gpus` of the candidates.

        Args:
            state: of a host that can hold the request.
            ask: what is asked for on this one host.
            candidates: places of the devices that could be used, at least `ask.gpus`.
        """
        ...

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """What the score of a device is made of, by name; the score is their sum.

        Args:
            state: as for `choose`.
            ask: as for `choose`.
            choice: what `choose` gave.
            device: the device's place in the state; -1 for cores and RAM alone.
        """
        ...


def pick(state: HostState, candidates: Sequence[int], count: int) -> tuple[int, ...]:
    """So many of the candidates: the best joined where links differ, else the first in their order."""
    if count <= 0:
        return ()
    if state.topology is None or count == 1:
        return tuple(sorted(candidates[:count]))
    return state.topology.best(candidates, count)
