"""Selection of hosts and devices for a request, all or nothing: one host, the fewest hosts, or as many on each."""

from __future__ import annotations

from collections.abc import Set
from random import Random
from typing import Final

from ...schemas.requests import Placement
from ..fleet.fleet import Fleet, Host
from ..fleet.state import Ask, HostState
from .capacity import allowed, room_for
from .domains import rooms
from .exact import Pick, exact, picked
from .feasible import NEAR_MEMORY, candidates
from .policies import Choice, Policy
from .rank import Ranking, ranking

DRAWS: Final = 16
"""Number of hosts to draw at random before all are checked."""


def select(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """Select the best placement by the policy; None if the request does not fit now.

    Whoever may use booked devices gets these first, or last if the work outlasts the window.
    """
    if ask.prefer_within:
        free = ask.key._replace(prefer_within="")
        near = free._replace(within=(*ask.within, ask.prefer_within))
        found = select(fleet, policy, fleet.ask(near))
        return found if found is not None else select(fleet, policy, fleet.ask(free))
    if ask.windows and not ask.inside:
        first = ask.key._replace(windows=()) if ask.outlasts else ask.key._replace(inside=True)
        found = select(fleet, policy, fleet.ask(first))
        if found is not None:
            return found
    if ask.within:
        return _within(fleet, policy, ask)
    if ask.placement is Placement.SPREAD:
        found = _spread(fleet, policy, ask)
    else:
        one = _one_host(fleet, policy, ask)
        found = [one] if one is not None else None
        if found is None and ask.placement is Placement.FEWEST_HOSTS:
            found = _fewest(fleet, policy, ask)
    return found if found is not None else exact(fleet, policy, ask)


def _within(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """Select the domain that needs the fewest hosts, of equal ones that with the least left; then the best in it."""
    found = rooms(fleet, ask)
    for room in sorted((room for room in found if room.needed), key=lambda room: room.order):
        picks = select(fleet, policy, room.domain.ask)
        if picks is not None:
            return picks
    # Memory was rounded: what does not suffice may do by exact amounts.
    if ask.gpu_memory_bytes and NEAR_MEMORY in room_for(fleet, ask).devices:
        for room in found:
            picks = None if room.needed else select(fleet, policy, room.domain.ask)
            if picks is not None:
                return picks
    return None


def _one_host(fleet: Fleet, policy: Policy, ask: Ask) -> Pick | None:
    if policy.search is not None and ask.plain and not ask.filtered:
        best = None if ask.gpus > fleet.largest_host else policy.search.best(fleet, ask)
        if best is None:
            return None
        host = fleet.hosts[best[0].first()]
        return picked(host, host.state, ask, best[1])
    ranked = ranking(fleet, policy, ask)
    if policy.draw is not None:
        found = _sampled(fleet, policy, ask, ranked, policy.draw)
    elif ask.filtered:
        found = _best_of(allowed(fleet, ask), ranked)
    else:
        best = ranked.best(fleet)
        found = None if best is None else (fleet.hosts[best[0].first()], best[1])
    if found is None:
        return None
    host, choice = found
    return picked(host, host.state, ask, choice)


def _best_of(hosts: list[Host], ranked: Ranking) -> tuple[Host, Choice] | None:
    """The best of some hosts, one comparison per class; the first host given of the best class."""
    best: tuple[Host, Choice] | None = None
    key = None
    seen: set[HostState] = set()
    for host in hosts:
        state = host.state
        if state in seen:
            continue
        seen.add(state)
        choice = ranked.choice(state)
        if choice is None:
            continue
        this = ranked.key(state, choice)
        if key is None or this < key:
            best, key = (host, choice), this
    return best


def _sampled(fleet: Fleet, policy: Policy, ask: Ask, ranked: Ranking, draw: Random) -> tuple[Host, Choice] | None:
    """Draw a feasible host with equal probability."""
    hosts = allowed(fleet, ask)
    found: Host | None = None
    # Rejection sampling: of hosts drawn from all, the first that can hold the request is as likely as any other.
    for _ in range(DRAWS if hosts else 0):
        host = draw.choice(hosts)
        if ranked.choice(host.state) is not None:
            found = host
            break
    if found is None:
        able = [host for host in hosts if ranked.choice(host.state) is not None]
        if not able:
            return None
        found = draw.choice(able)
    return found, policy.choose(found.state, ask, candidates(found.state, ask))


def _take(policy: Policy, ask: Ask, host: Host, ranked: Ranking) -> Pick:
    choice = ranked.choice(host.state)
    assert choice is not None
    return picked(host, host.state, ask, choice)


def _top(fleet: Fleet, policy: Policy, ask: Ask, count: int, without: Set[str]) -> list[Pick]:
    """The best hosts for an ask, each with its devices; at most `count`, without some."""
    if policy.search is not None and ask.plain and not ask.filtered:
        found = policy.search.top(fleet, ask, count, without)
        return [picked(fleet.hosts[name], fleet.hosts[name].state, ask, choice) for name, choice in found]
    ranked = ranking(fleet, policy, ask)
    if not ask.filtered:
        names = ranked.top(fleet, count, without)
        return [_take(policy, ask, fleet.hosts[name], ranked) for name in names]
    able: list[tuple[tuple[float, float, object], str]] = []
    for host in allowed(fleet, ask):
        choice = ranked.choice(host.state)
        if choice is not None and host.name not in without:
            able.append((ranked.key(host.state, choice), host.name))
    able.sort()
    return [_take(policy, ask, fleet.hosts[name], ranked) for _, name in able[:count]]


def _fewest(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """Select the fewest hosts: those that hold most first, then the best one that holds the rest."""
    picks: list[Pick] = []
    taken: set[str] = set()
    left = ask.gpus
    search = None if ask.filtered or not ask.plain else policy.search
    held = min(ask.gpus, fleet.largest_host)
    while held > 0:
        if search is not None:
            held = search.may_hold(fleet, ask, held, taken)
        # Hosts with more room are all taken already: those that hold so many have exactly this room.
        if left >= held > 0:
            for pick in _top(fleet, policy, ask.part(held), left // held, taken):
                picks.append(pick)
                taken.add(pick.host.name)
                left -= held
        if not left:
            return picks
        if left < held:
            last = _top(fleet, policy, ask.part(left), 1, taken)
            if last:
                return picks + last
        held -= 1
    return None


def _spread(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """Select the best hosts, each with one device or as many as the request wants on each."""
    picks = _top(fleet, policy, ask.part(1), ask.gpus, frozenset())
    return picks if len(picks) == ask.gpus else None


__all__ = ["Pick", "select"]
