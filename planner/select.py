"""All or nothing: the hosts and devices for a request, on one host, on the fewest, or each on another."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from ..schemas.requests import Placement
from .device import Device
from .feasible import NEAR_MEMORY, candidates, capacity, host_verdict, matches_host
from .fleet import Fleet, Host
from .policies import Choice, Policy
from .rank import Ranking, ranking
from .state import Ask, DeviceState, HostState


class Pick(NamedTuple):
    """The devices of one host.

    Attributes:
        host: the host.
        devices: the devices, by index.
        places: their places in the state.
        state: of the host when it was picked.
        ask: the part of the request that lies here.
        choice: the policy's.
    """

    host: Host
    devices: tuple[Device, ...]
    places: tuple[int, ...]
    state: HostState
    ask: Ask
    choice: Choice


def select(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """The best placement by the policy; None where the request does not fit now."""
    if ask.placement is Placement.SPREAD:
        return _spread(fleet, policy, ask)
    one = _one_host(fleet, policy, ask)
    if one is not None:
        return [one]
    if ask.placement is Placement.FEWEST_HOSTS:
        return _fewest(fleet, policy, ask)
    return None


def allowed(fleet: Fleet, ask: Ask) -> list[Host]:
    """The hosts that a request that names hosts or labels may use, by name; worked out once until hosts change."""
    key = ("allowed", ask.hosts, ask.host_labels)
    found = fleet.cache.get(key)
    if found is None or found[0] != fleet.shape_version:
        hosts = [
            host
            for name, host in sorted(fleet.hosts.items())
            if matches_host(name, host.labels, ask.hosts, ask.host_labels)
        ]
        found = fleet.cache[key] = (fleet.shape_version, hosts)
    return found[1]


def _picked(host: Host, state: HostState, order: list[Device], ask: Ask, choice: Choice) -> Pick:
    pairs = sorted(((order[at], at) for at in choice.devices), key=lambda pair: pair[0].index)
    return Pick(host, tuple(device for device, _ in pairs), tuple(at for _, at in pairs), state, ask, choice)


def _one_host(fleet: Fleet, policy: Policy, ask: Ask) -> Pick | None:
    ranked = ranking(fleet, policy, ask)
    if policy.draw is not None:
        found = _sampled(fleet, policy, ask, ranked, policy.draw)
    elif ask.filtered:
        found = _best_of(allowed(fleet, ask), ranked)
    else:
        best = ranked.best(fleet)
        found = None if best is None else (fleet.hosts[best[0].first()], best[1])
    if found is not None:
        host, choice = found
        return _picked(host, _state(host), host.order, ask, choice)
    return _exact(fleet, policy, ask)


def _state(host: Host) -> HostState:
    assert host.group is not None
    return host.group.state


def _best_of(hosts: list[Host], ranked: Ranking) -> tuple[Host, Choice] | None:
    """The best among given hosts, one look a class; the first by name of those in the best class."""
    best: tuple[Host, Choice] | None = None
    key = None
    seen: set[HostState] = set()
    for host in hosts:
        state = _state(host)
        if state in seen:
            continue
        seen.add(state)
        choice = ranked.choice(state)
        if choice is None:
            continue
        this = (-choice.score, -choice.tie, state.order)
        if key is None or this < key:
            best, key = (host, choice), this
    return best


def _sampled(fleet: Fleet, policy: Policy, ask: Ask, ranked: Ranking, draw: Random) -> tuple[Host, Choice] | None:
    """A feasible host with equal chances."""
    if ask.filtered:
        hosts = [host for host in allowed(fleet, ask) if ranked.choice(_state(host)) is not None]
        if not hosts:
            return None
        host = draw.choice(hosts)
    else:
        groups = [group for state, group in fleet.index.classes.items() if ranked.choice(state) is not None]
        if not groups:
            return None
        group = draw.choices(groups, [len(group.members) for group in groups])[0]
        host = fleet.hosts[draw.choice(sorted(group.members))]
    state = _state(host)
    return host, policy.choose(state, ask, candidates(state, ask))


def _exact(fleet: Fleet, policy: Policy, ask: Ask) -> Pick | None:
    """A last look at hosts whose devices miss the request by less than what rounding took off their free memory."""
    if not ask.gpu_memory_bytes or not ask.gpus or not near(fleet, ask):
        return None
    hosts = allowed(fleet, ask) if ask.filtered else [fleet.hosts[name] for name in sorted(fleet.hosts)]
    best: Pick | None = None
    key = None
    for host in hosts:
        state = _state(host)
        if not any(ask.verdicts.get(device) == NEAR_MEMORY for device in state.devices):
            continue
        exact = exact_state(host)
        usable = candidates(exact, ask)
        if host_verdict(exact, ask, len(usable)):
            continue
        choice = policy.choose(exact, ask, usable)
        this = (-choice.score, -choice.tie, exact.order)
        if key is None or this < key:
            best, key = _picked(host, exact, host.order, ask, choice), this
    return best


def near(fleet: Fleet, ask: Ask) -> bool:
    """Whether some device misses the request by rounding alone, as far as verdicts go."""
    return any(ask.verdicts.get(device) == NEAR_MEMORY for state in fleet.index.classes for device in state.devices)


def exact_state(host: Host) -> HostState:
    """A host's state with the memory that its devices really have."""
    state = _state(host)
    devices: list[DeviceState] = []
    for device, seen in zip(host.order, state.devices, strict=True):
        if seen.rounded:
            seen = DeviceState(
                seen.model,
                (
                    seen.model,
                    seen.share_free,
                    device.memory_free,
                    seen.blocked,
                    seen.leased,
                    seen.heat,
                    seen.load,
                    seen.throttled,
                    seen.warned,
                    False,
                ),
            )
        devices.append(seen)
    return HostState(state.topology, state.cpus_free, state.memory_free, state.blocked, tuple(devices))


def _hosts_by_state(fleet: Fleet, ask: Ask) -> dict[HostState, list[str]]:
    if not ask.filtered:
        return {state: sorted(group.members) for state, group in fleet.index.classes.items()}
    found: dict[HostState, list[str]] = {}
    for host in allowed(fleet, ask):
        found.setdefault(_state(host), []).append(host.name)
    return found


def _take(fleet: Fleet, policy: Policy, ask: Ask, name: str, count: int) -> Pick:
    host = fleet.hosts[name]
    state = _state(host)
    part = ask.part(count)
    choice = ranking(fleet, policy, part).choice(state)
    assert choice is not None
    return _picked(host, state, host.order, part, choice)


def _fewest(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """The hosts that hold most first; the last of them is the best one that holds the rest."""
    rooms: list[tuple[int, HostState, list[str]]] = []
    for state, names in _hosts_by_state(fleet, ask).items():
        room = capacity(state, ask, len(candidates(state, ask)))
        if room > 0:
            rooms.append((room, state, names))
    if sum(room * len(names) for room, _, names in rooms) < ask.gpus:
        return None
    rooms.sort(key=lambda entry: (-entry[0], entry[1].order))
    picks: list[Pick] = []
    taken: set[str] = set()
    left = ask.gpus
    for room, _, names in rooms:
        for name in names:
            if left <= room:
                break
            picks.append(_take(fleet, policy, ask, name, room))
            taken.add(name)
            left -= room
        if left <= room:
            break
    part = ask.part(left)
    ranked = ranking(fleet, policy, part)
    best: tuple[tuple[float, float, object], str] | None = None
    for room, state, names in rooms:
        if room < left:
            break
        name = next((name for name in names if name not in taken), None)
        choice = ranked.choice(state) if name is not None else None
        if name is None or choice is None:
            continue
        key = (-choice.score, -choice.tie, state.order)
        if best is None or key < best[0]:
            best = (key, name)
    if best is None:
        return None
    picks.append(_take(fleet, policy, ask, best[1], left))
    return picks


def _spread(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """One device on each of the best hosts."""
    part = ask.part(1)
    ranked = ranking(fleet, policy, part)
    found: list[tuple[float, float, object, list[str]]] = []
    for state, names in _hosts_by_state(fleet, ask).items():
        choice = ranked.choice(state)
        if choice is not None:
            found.append((-choice.score, -choice.tie, state.order, names))
    found.sort(key=lambda entry: entry[:3])
    chosen: list[str] = []
    for *_, names in found:
        chosen.extend(names[: ask.gpus - len(chosen)])
        if len(chosen) == ask.gpus:
            return [_take(fleet, policy, ask, name, 1) for name in chosen]
    return None
