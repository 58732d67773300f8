"""Capacity of the fleet for a request, cached from one decision to the next.

A `CapacityTally` belongs to one ask. It counts each device under the reason why it can't be used, and each host by how
many of the request's devices it could hold. It is updated by the hosts that have changed state since its last use.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeVar

from ...schemas.requests import Placement
from ..fleet.fleet import Fleet, Host
from ..fleet.state import Ask, DeviceState, HostState
from .feasible import NEAR_MEMORY, candidates, capacity, host_verdict, matches_host, verdict_of

PARTS_SPARE: Final = 1024
"""Unused parts are evicted once there are more parts than twice the classes plus this number."""
MOVES_FEW: Final = 4
"""Up to so many moves are applied one by one. Beyond, counting anew is cheaper if they are more than a twelfth of the
classes, or a half if no device is requested, since then each class must be checked."""
K = TypeVar("K")


class Part(NamedTuple):
    """Contribution of one host of a state to a room.

    Attributes:
        size: number of devices of the host; 1 for a request without devices.
        room: number of the request's devices that it could hold.
        reasons: (reason, devices, nearest miss or -1) each.
    """

    size: int
    room: int
    reasons: tuple[tuple[str, int, int], ...]


class CapacityTally:
    """Devices by reason, and hosts by room, for one ask.

    Attributes:
        total: number of devices in all; of hosts for a request without devices.
        devices: reason → number of devices. Those that could be used, but do not suffice, are under `devices`.
        nearest: reason → nearest miss → number of devices.
        rooms: room → number of hosts that have it, without hosts that have none.
    """

    __slots__ = ("_cursor", "_parts", "ask", "devices", "nearest", "rooms", "total")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self._parts: dict[HostState, Part] = {}
        self._cursor = -1
        self._clear()

    def _clear(self) -> None:
        self.total = 0
        self.devices: dict[str, int] = {}
        self.nearest: dict[str, dict[int, int]] = {}
        self.rooms: dict[int, int] = {}

    @property
    def together(self) -> int:
        """Number of the request's devices that all hosts together could hold."""
        return sum(room * hosts for room, hosts in self.rooms.items())

    @property
    def hosts(self) -> int:
        """Number of hosts that could hold at least one."""
        return sum(self.rooms.values())

    def most(self, reason: str) -> int:
        """The nearest miss under a reason; 0 if there is none."""
        return max(self.nearest.get(reason, ()), default=0)

    def follow(self, fleet: Fleet) -> CapacityTally:
        """Update by the hosts that have changed state."""
        index = fleet.index
        if len(self._parts) > 2 * len(index.classes) + PARTS_SPARE:
            live = {state.core for state in index.classes}
            self._parts = {state: part for state, part in self._parts.items() if state in live}
        few = max(MOVES_FEW, len(index.classes) // (12 if self.ask.gpus else 2))
        if self._cursor < index.moves_base or index.moves_end - self._cursor > few:
            self._count_anew(fleet)
        else:
            changes: dict[HostState | None, int] = {}
            for old, new in index.moves[self._cursor - index.moves_base :]:
                changes[old] = changes.get(old, 0) - 1
                changes[new] = changes.get(new, 0) + 1
            for state, hosts in changes.items():
                if hosts and state is not None:
                    self.add(state, hosts)
        self._cursor = index.moves_end
        return self

    def _count_anew(self, fleet: Fleet) -> None:
        """Count all hosts, device state by device state: most hosts have no usable device, and are skipped."""
        self._clear()
        ask, index = self.ask, fleet.index
        if not ask.gpus:
            for state, group in index.classes.items():
                self.add(state, len(group.members))
            return
        for device, count in index.devices.items():
            self.total += count
            verdict = verdict_of(device, ask)
            if verdict:
                self._reason(verdict, count, near_device(verdict, device))
        for state, group in index.classes.items():
            if ask.plain and (not state.whole_free if ask.whole else state.share_most < ask.share):
                continue
            usable = len(candidates(state, ask))
            if usable:
                hosts = len(group.members)
                room = capacity(state, ask, usable)
                if room:
                    _count(self.rooms, room, hosts)
                reason, near = _short(state, ask, usable)
                self._reason(reason, usable * hosts, near)

    def _reason(self, reason: str, devices: int, near: int) -> None:
        counts = self.devices
        counts[reason] = after = counts.get(reason, 0) + devices
        if not after:
            del counts[reason]
        if near >= 0:
            found = self.nearest.get(reason)
            if found is None:
                found = self.nearest[reason] = {}
            found[near] = after = found.get(near, 0) + devices
            if not after:
                del found[near]
                if not found:
                    del self.nearest[reason]

    def add(self, state: HostState, hosts: int) -> None:
        """Count so many more hosts of a state; fewer by a negative number."""
        state = state.core
        part = self._parts.get(state)
        if part is None:
            part = self._parts[state] = part_of(state, self.ask)
        self.total += part.size * hosts
        if part.room:
            _count(self.rooms, part.room, hosts)
        for reason, devices, near in part.reasons:
            self._reason(reason, devices * hosts, near)

    def outside(self, size: int) -> None:
        """Count a host of so many devices that the request does not allow."""
        self.total += size
        if size:
            _count(self.devices, "host", size)


def _count(counts: dict[K, int], key: K, more: int) -> None:
    after = counts.get(key, 0) + more
    if after:
        counts[key] = after
    else:
        del counts[key]


def part_of(state: HostState, ask: Ask) -> Part:
    """Contribution of one host of a state."""
    if not ask.gpus:
        reason = host_verdict(state, ask, 0)
        return Part(1, 0, ((reason or "devices", 1, _near_host(reason, state, 0)),))
    usable = 0
    reasons: list[tuple[str, int, int]] = []
    for device, places in state.kinds:
        verdict = verdict_of(device, ask)
        if verdict:
            reasons.append((verdict, len(places), near_device(verdict, device)))
        else:
            usable += len(places)
    if usable:
        reason, near = _short(state, ask, usable)
        reasons.append((reason, usable, near))
    return Part(len(state.devices), capacity(state, ask, usable) if usable else 0, tuple(reasons))


def _short(state: HostState, ask: Ask, usable: int) -> tuple[str, int]:
    """Reason why the usable devices of a host do not suffice, and their nearest miss."""
    whole = ask if ask.placement is Placement.SAME_HOST else ask.part(1)
    reason = host_verdict(state, whole, usable) or "devices"
    return reason, _near_host(reason, state, usable)


def near_device(verdict: str, device: DeviceState) -> int:
    """Nearest miss of a device: bytes, billionths, or a version as 1000 × major + minor; -1 if it has no measure."""
    if verdict in ("memory", NEAR_MEMORY):
        return device.memory_free
    if verdict == "share":
        return device.share
    if verdict == "compute_capability":
        major, minor = device.model.compute_capability
        return major * 1000 + minor
    return -1


def _near_host(reason: str, state: HostState, usable: int) -> int:
    if reason == "cpus":
        return max(0, state.cpus_free)
    if reason == "host_memory":
        return max(0, state.memory_free)
    return usable if reason in ("host_devices", "devices") else -1


def room_for(fleet: Fleet, ask: Ask) -> CapacityTally:
    """Room of an ask, up to date; cached unless the ask names hosts or labels."""
    if ask.filtered:
        found = CapacityTally(ask)
        inside = {host.name for host in allowed(fleet, ask)}
        for host in fleet.hosts.values():
            if host.name in inside:
                found.add(host.state, 1)
            else:
                found.outside(len(host.devices) if ask.gpus else 1)
        return found
    key = ("room", ask)
    kept = fleet.cache.get(key)
    if kept is None:
        kept = fleet.cache.put(key, CapacityTally(ask))
    return kept.follow(fleet)


def allowed(fleet: Fleet, ask: Ask) -> list[Host]:
    """Hosts that a request may use by the hosts or labels that it names, sorted by name; cached until hosts change."""
    key = ("allowed", ask.hosts, ask.host_labels, ask.within)
    found = fleet.cache.get(key)
    if found is None or found[0] != fleet.shape_version:
        hosts = [
            host
            for name, host in sorted(fleet.hosts.items())
            if matches_host(name, host.labels, ask.hosts, ask.host_labels)
            and all(label in host.labels for label in ask.within)
        ]
        found = fleet.cache.put(key, (fleet.shape_version, hosts))
    return found[1]
