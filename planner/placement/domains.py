"""Domains: the hosts that share the values of labels, such as those of a rack.

A request that must stay within one (`Ask.within`) is a request for the hosts of one domain, whichever suits best.
"""

from __future__ import annotations

from typing import NamedTuple

from ...schemas.requests import Placement
from ..fleet.fleet import Fleet, Host
from ..fleet.state import Ask, HostState
from .capacity import allowed
from .feasible import candidates, capacity


class Domain(NamedTuple):
    """Hosts that a request may use together.

    Attributes:
        values: of the labels, in the order of `Ask.within`.
        ask: the request for these hosts alone.
        hosts: sorted by name.
    """

    values: tuple[str, ...]
    ask: Ask
    hosts: list[Host]


class Room(NamedTuple):
    """Capacity of a domain for a request.

    Attributes:
        domain: the domain.
        held: number of the request's devices that it could hold, counted up to one on each host for `spread`.
        needed: number of hosts that the request would need; 0 if it does not fit.
    """

    domain: Domain
    held: int
    needed: int

    @property
    def order(self) -> tuple[int, int, tuple[str, ...]]:
        """Sort key: fewer hosts first, then the domain that has the least left, then by name."""
        return self.needed, self.held, self.domain.values


def values_of(host: Host, ask: Ask) -> tuple[str, ...]:
    """Values of a host's labels that name its domain; the host has these labels."""
    return tuple(host.labels[label] for label in ask.within)


def domains(fleet: Fleet, ask: Ask) -> list[Domain]:
    """Domains of a request, sorted by the values of their labels; cached until hosts or labels change."""
    key = ("domains", ask)
    found = fleet.cache.get(key)
    if found is None or found[0] != fleet.shape_version:
        hosts: dict[tuple[str, ...], list[Host]] = {}
        for host in allowed(fleet, ask):
            hosts.setdefault(values_of(host, ask), []).append(host)
        listed = [Domain(values, _narrowed(fleet, ask, values), members) for values, members in sorted(hosts.items())]
        found = fleet.cache.put(key, (fleet.shape_version, listed))
    return found[1]


def _narrowed(fleet: Fleet, ask: Ask, values: tuple[str, ...]) -> Ask:
    labels = tuple(sorted({*ask.host_labels, *zip(ask.within, values, strict=True)}))
    return fleet.ask(ask.key._replace(within=(), host_labels=labels))


def rooms(fleet: Fleet, ask: Ask) -> list[Room]:
    """Capacity of each domain of a request, as of now."""
    known: dict[HostState, int] = {}
    found: list[Room] = []
    part = ask.part(1) if ask.placement is Placement.SPREAD else ask
    for domain in domains(fleet, ask):
        held: list[int] = []
        for host in domain.hosts:
            state = host.state
            room = known.get(state)
            if room is None:
                room = known[state] = capacity(state, part, len(candidates(state, part)))
            if room and (part is ask or room >= part.gpus):
                held.append(room)
        found.append(room_of(domain, held))
    return found


def room_of(domain: Domain, held: list[int]) -> Room:
    """Capacity of a domain whose hosts can hold so many devices of the request each."""
    ask = domain.ask
    if ask.placement is Placement.SPREAD:
        return Room(domain, len(held), ask.gpus if len(held) >= ask.gpus else 0)
    left, needed = ask.gpus, 0
    for room in sorted(held, reverse=True):
        left, needed = left - room, needed + 1
        if left <= 0:
            return Room(domain, sum(held), needed)
    return Room(domain, sum(held), 0)


def words(ask: Ask, values: tuple[str, ...]) -> str:
    """Name of a domain: `rack r1`."""
    return ", ".join(f"{label} {value}" for label, value in zip(ask.within, values, strict=True))


def nearest(fleet: Fleet, ask: Ask) -> Room | None:
    """The domain that could hold most of a request, of equal ones the first by name; None if none could hold any."""
    found = max(rooms(fleet, ask), key=lambda room: room.held, default=None)
    return found if found is not None and found.held else None
