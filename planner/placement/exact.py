"""Fallback selection by exact amounts of memory, before a request is refused because of rounding.

A host state has free memory rounded down (`MEMORY_GRAIN_BYTES`). If a request might fit within the remainder, hosts are
compared one by one. That is slow, but rare: few requests are within a grain of what a device has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...schemas.requests import Placement
from ..fleet.device import Device
from ..fleet.fleet import Fleet, Host
from ..fleet.state import ROUNDED_OFF_BYTES, Ask, DeviceState, HostState
from .capacity import allowed, room_for
from .feasible import NEAR_MEMORY, candidates, capacity, host_verdict, verdict_of
from .policies import Choice, Policy


class Pick(NamedTuple):
    """The devices of one host.

    Attributes:
        host: the host.
        devices: the devices, by index.
        places: their indexes in the state.
        state: of the host when it was picked.
        ask: the part of the request that is placed here.
        choice: of the policy.
    """

    host: Host
    devices: tuple[Device, ...]
    places: tuple[int, ...]
    state: HostState
    ask: Ask
    choice: Choice


def picked(host: Host, state: HostState, ask: Ask, choice: Choice) -> Pick:
    """Map a policy's choice to the devices of a host, by index."""
    order = host.order
    if len(choice.devices) == 1:
        return Pick(host, (order[choice.devices[0]],), choice.devices, state, ask, choice)
    pairs = sorted(((order[at], at) for at in choice.devices), key=lambda pair: pair[0].index)
    return Pick(host, tuple(device for device, _ in pairs), tuple(at for _, at in pairs), state, ask, choice)


def exact(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """Select by exact amounts; None if there is no placement, or rounding makes no difference."""
    if not ask.gpu_memory_bytes or NEAR_MEMORY not in room_for(fleet, ask).devices:
        return None
    if ask.placement is not Placement.SPREAD:
        one = _one_host(fleet, policy, ask)
        if one is not None:
            return [one]
    return None if ask.placement is Placement.SAME_HOST else _hosts(fleet, policy, ask)


def _one_host(fleet: Fleet, policy: Policy, ask: Ask) -> Pick | None:
    """Select one host by exact amounts.

    Classes are ranked as if they had all the memory that rounding may have taken off; the first host that really has
    enough is picked.
    """
    groups: dict[HostState, list[Host]] = {}
    for host in allowed(fleet, ask):
        groups.setdefault(host.state, []).append(host)
    ordered: list[tuple[tuple[float, float, object], HostState]] = []
    for state in groups:
        if _is_near(state, ask):
            hopeful = _with_memory(state, [seen.memory_free + ROUNDED_OFF_BYTES for seen in state.devices])
            usable = candidates(hopeful, ask)
            if not host_verdict(hopeful, ask, len(usable)):
                choice = policy.choose(hopeful, ask, usable)
                ordered.append(((-choice.score, -choice.tie, state.order), state))
    ordered.sort(key=lambda entry: entry[0])
    for _, state in ordered:
        for host in groups[state]:
            if sum(device.memory_free >= ask.gpu_memory_bytes for device in host.devices) < ask.gpus:
                continue
            true = exact_state(fleet, host)
            usable = candidates(true, ask)
            if len(usable) >= ask.gpus:
                return picked(host, true, ask, policy.choose(true, ask, usable))
    return None


def _hosts(fleet: Fleet, policy: Policy, ask: Ask) -> list[Pick] | None:
    """Select several hosts: those that hold most first, or any that hold one part; the policy picks their devices."""
    rooms: list[tuple[int, Host, HostState]] = []
    for host in allowed(fleet, ask):
        state = exact_state(fleet, host) if _is_near(host.state, ask) else host.state
        room = capacity(state, ask, len(candidates(state, ask)))
        if room:
            rooms.append((1 if ask.placement is Placement.SPREAD else room, host, state))
    rooms.sort(key=lambda entry: -entry[0])
    picks: list[Pick] = []
    left = ask.gpus
    for at, (room, host, state) in enumerate(rooms):
        if room >= left:
            # The last host: the smallest that holds the rest.
            room, host, state = next(entry for entry in reversed(rooms[at:]) if entry[0] >= left)
        units = min(room, left)
        part = ask.part(units)
        choice = policy.choose(state, part, candidates(state, part))
        picks.append(picked(host, state, part, choice))
        left -= units
        if not left:
            return picks
    return None


def _is_near(state: HostState, ask: Ask) -> bool:
    return any(verdict_of(device, ask) == NEAR_MEMORY for device, _ in state.core.kinds)


def exact_state(fleet: Fleet, host: Host) -> HostState:
    """State of a host with the exact free memory of its devices."""
    return _with_memory(host.state, [_memory_free(fleet, device) for device in host.order])


def _memory_free(fleet: Fleet, device: Device) -> int:
    kept = fleet.reserved.get(device.uuid) if fleet.reserved else None
    return device.memory_free if kept is None else max(0, device.memory_free - kept.memory)


def _with_memory(state: HostState, memory: Sequence[int]) -> HostState:
    devices = [
        DeviceState(seen.key._replace(memory_free=amount, rounded=False)) if seen.rounded else seen
        for seen, amount in zip(state.devices, memory, strict=True)
    ]
    return HostState(state.topology, state.cpus_free, state.memory_free, state.blocked, tuple(devices))
