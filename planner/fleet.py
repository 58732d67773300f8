"""The fleet as a fold of events: `apply(fleet, event, at)` for whatever collectors, leases and operators say.

No clock and no I/O: `at` is when the bus stored the message, seconds since the epoch, and `advance` moves time on.
A fleet has one owner; `apply` changes it and returns it. The order of messages about different things does not matter:
a lease may come before its host's inventory, as it does when a planner starts.

Free memory of a device is total − reserved − granted to leases − used by processes that hold no lease on it (or more
than their lease grants). Where no process data is known, what is used beyond the granted counts as foreign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, Final, TypeVar

from msgspec import Struct

from ..schemas.requests import Drains, Grant, Lease, LeaseEvent, LeaseState
from ..schemas.telemetry import DeviceEvent, DeviceInfo, Inventory, ProcessBatch, SampleBatch, Severity
from .device import Device, Fault, last_tick
from .index import HostClass, Index
from .kept import Kept
from .state import (
    BLOCKS,
    DRAINED,
    HOST_LOST,
    MIG_PARENT,
    STALE,
    UNHEALTHY,
    UNLIMITED,
    Ask,
    AskKey,
    DeviceState,
    HostState,
    Model,
    milli,
    model_key,
)
from .topology import Levels, Topology, levels_of

STALE_AFTER_SECONDS: Final = 10.0
HOST_WITHOUT_DEVICES_STALE_SECONDS: Final = 180.0
"""Three inventories missed: a host without devices sends nothing else."""
PROCESSES_KNOWN_SECONDS: Final = 60.0
WARNING_SECONDS: Final = 3600.0
"""A health warning weighs on the rank for so long."""
ASKS_MOST: Final = 1024
CACHE_MOST: Final = 768
"""A ranking or a room takes up to a few hundred bytes for each class of hosts."""
_STATES_KEPT: Final = 20_000
T = TypeVar("T")


class HostLost(Struct, frozen=True):
    """No agent speaks for the host any more."""

    host: str


class HostSeen(Struct, frozen=True):
    """An agent speaks for the host (again)."""

    host: str


class HostForgotten(Struct, frozen=True):
    """The host is gone for good: it leaves the fleet. Leases on it stay until they are ended."""

    host: str


class LeaseEnded(Struct, frozen=True):
    """A lease holds nothing any more."""

    lease_id: str


class Held(Struct):
    """What a lease holds, in whole numbers: device → (share, memory), host → (cores, RAM)."""

    lease_id: str
    devices: dict[str, tuple[int, int]]
    hosts: dict[str, tuple[int, int]]


class Host:
    """A host as the planner knows it."""

    __slots__ = (
        "address",
        "agent",
        "batch_devices",
        "batch_order",
        "blocked",
        "cpus_held",
        "cpus_total",
        "devices",
        "group",
        "heard_at",
        "idle",
        "inventory_ns",
        "labels",
        "lag",
        "lost",
        "memory_held",
        "memory_total",
        "name",
        "order",
        "processes_at",
        "processes_ns",
        "stale",
        "timer",
        "topology",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.agent = ""
        self.labels: dict[str, str] = {}
        self.cpus_total = self.memory_total = UNLIMITED
        self.cpus_held = self.memory_held = 0
        self.devices: list[Device] = []
        self.topology: Topology | None = None
        self.order: list[Device] = []
        """Devices as they stand in the host's state."""
        self.group: HostClass | None = None
        self.idle: HostState | None = None
        """As the host would be, idle and healthy."""
        self.blocked = 0
        self.lost = False
        self.stale = True
        self.heard_at = -math.inf
        self.inventory_ns = -1
        self.processes_at = -math.inf
        self.processes_ns = -1
        self.lag = math.inf
        """The least that a message of this agent came later than its samples were read: clocks differ, buffers lag."""
        self.timer = math.inf
        self.batch_devices: list[str] | None = None
        self.batch_order: list[Device | None] = []

    @property
    def state(self) -> HostState:
        """As a decision sees it."""
        assert self.group is not None
        return self.group.state


class Fleet:
    """Everything that a decision rests on.

    Attributes:
        hosts: by name.
        devices: by uuid.
        leases: what active leases hold, by id; known devices or not.
        drains: `host:NAME`, `device:UUID` or `label:K=V` → reason.
        index: hosts by state.
        now: the latest time that was told, seconds since the epoch.
        stale_after: seconds without a sample after which a device takes no work; infinite for fleets without samples.
        shape_version: moves when hosts, devices or labels come or go.
    """

    def __init__(self, stale_after: float = STALE_AFTER_SECONDS) -> None:
        self.hosts: dict[str, Host] = {}
        self.devices: dict[str, Device] = {}
        self.leases: dict[str, Held] = {}
        self.drains: dict[str, str] = {}
        self.faults: dict[str, Fault] = {}
        """By `host:NAME` or `device:UUID`."""
        self.on_device: dict[str, dict[str, tuple[int, int]]] = {}
        self.on_host: dict[str, tuple[int, int]] = {}
        self.lost_hosts: set[str] = set()
        self.index = Index()
        self.idle: dict[HostState, int] = {}
        """How many hosts would be in which state, idle and healthy."""
        self.idle_version = 0
        self.now = -math.inf
        self.stale_after = stale_after
        self.shape_version = 0
        self.cache: Kept[object, Any] = Kept(CACHE_MOST)
        """Of decisions: rankings, rooms, filters. May be emptied at any time."""
        self._timers: list[tuple[float, str]] = []
        self._models: dict[object, Model] = {}
        self._topologies: dict[Levels, Topology] = {}
        self._device_states: dict[object, DeviceState] = {}
        self._host_states: dict[object, HostState] = {}
        self._asks: Kept[AskKey, Ask] = Kept(ASKS_MOST)

    @property
    def largest_host(self) -> int:
        """The most devices that one host has."""
        kept = self.cache.get("largest")
        if kept is None or kept[0] != self.shape_version:
            most = max((len(host.devices) for host in self.hosts.values()), default=0)
            kept = self.cache.put("largest", (self.shape_version, most))
        return kept[1]

    def ask(self, key: AskKey) -> Ask:
        """The one `Ask` of this fleet for a key."""
        found = self._asks.get(key)
        if found is None:
            found = self._asks.put(key, Ask(key))
        return found

    def model(self, info: DeviceInfo) -> Model:
        """The one `Model` of this fleet for a device."""
        key = model_key(info)
        found = self._models.get(key)
        if found is None:
            found = self._models[key] = Model(key)
        return found

    def topology(self, levels: Levels | None) -> Topology | None:
        """The one `Topology` of this fleet for a matrix."""
        if levels is None:
            return None
        found = self._topologies.get(levels)
        if found is None:
            found = self._topologies[levels] = Topology(levels)
        return found

    def device_state(self, key: tuple[Model, int, int, int, bool, int, int, bool, bool, bool]) -> DeviceState:
        """The one `DeviceState` of this fleet for a key."""
        found = self._device_states.get(key)
        if found is None:
            if len(self._device_states) > 4 * len(self.devices) + _STATES_KEPT:
                self._device_states = {
                    k: v for k, v in self._device_states.items() if v in {d.state for d in self.devices.values()}
                }
            found = self._device_states[key] = DeviceState(key[0], key)
        return found

    def host_state(
        self,
        topology: Topology | None,
        cpus_free: int,
        memory_free: int,
        blocked: int,
        devices: tuple[DeviceState, ...],
    ) -> HostState:
        """The one `HostState` of this fleet for a key."""
        key = (topology, cpus_free, memory_free, blocked, devices)
        found = self._host_states.get(key)
        if found is None:
            if len(self._host_states) > 4 * len(self.hosts) + _STATES_KEPT:
                live = self.index.classes
                self._host_states = {k: v for k, v in self._host_states.items() if v in live or v in self.idle}
            found = self._host_states[key] = HostState(topology, cpus_free, memory_free, blocked, devices)
        return found

    def at_timer(self, when: float, host: str) -> None:
        """Look at a host again at a time."""
        heappush(self._timers, (when, host))

    def due(self, now: float) -> str | None:
        """The next host to look at by now; None if there is none."""
        if self._timers and self._timers[0][0] <= now:
            return heappop(self._timers)[1]
        return None


Event = (
    Inventory
    | SampleBatch
    | ProcessBatch
    | DeviceEvent
    | Lease
    | LeaseEvent
    | LeaseEnded
    | Drains
    | HostLost
    | HostSeen
    | HostForgotten
)


def apply(fleet: Fleet, event: Event, at: float | None = None) -> Fleet:
    """Fold one event into the fleet.

    Args:
        fleet: changed in place.
        event: what happened. Older than what is known already, or about an unknown host, it changes nothing but what
            must be remembered: faults, drains and leases wait for their host.
        at: when the bus stored it, seconds since the epoch; None leaves time where it is.

    Returns:
        The same fleet.
    """
    if at is not None:
        advance(fleet, at)
    fold = _FOLDS.get(type(event))
    if fold is None:
        raise TypeError(f"the fleet knows no event of type {type(event).__name__}")
    fold(fleet, event)
    return fleet


def advance(fleet: Fleet, now: float) -> Fleet:
    """Move time on: devices without samples become stale, old warnings fade. Time never goes back."""
    if now > fleet.now:
        fleet.now = now
    name = fleet.due(fleet.now)
    while name is not None:
        host = fleet.hosts.get(name)
        if host is not None and host.timer <= fleet.now:
            _look(fleet, host)
        name = fleet.due(fleet.now)
    return fleet


def _look(fleet: Fleet, host: Host) -> None:
    """Look at a host at its time: most often all its devices are fresh, and only the time moves."""
    host.timer = math.inf
    again = min((device.seen_at for device in host.devices), default=-math.inf) + fleet.stale_after
    if again > fleet.now and not host.stale and not any(device.warned for device in host.devices):
        host.timer = math.nextafter(again, math.inf)
        fleet.at_timer(host.timer, host.name)
        return
    _block(fleet, host)
    refresh(fleet, host)


def hold(fleet: Fleet, lease_id: str, grants: Sequence[Grant]) -> Fleet:
    """Take what a lease was granted. The same lease again replaces what it held."""
    if lease_id in fleet.leases:
        free(fleet, lease_id)
    held = Held(lease_id, {}, {})
    for grant in grants:
        if grant.device:
            share, memory = held.devices.get(grant.device, (0, 0))
            held.devices[grant.device] = (share + milli(grant.share), memory + grant.memory_bytes)
        cpus, ram = held.hosts.get(grant.host, (0, 0))
        held.hosts[grant.host] = (cpus + milli(grant.cpus), ram + grant.host_memory_bytes)
    fleet.leases[lease_id] = held
    for uuid, amounts in held.devices.items():
        fleet.on_device.setdefault(uuid, {})[lease_id] = amounts
    for name, (cpus, ram) in held.hosts.items():
        before = fleet.on_host.get(name, (0, 0))
        fleet.on_host[name] = (before[0] + cpus, before[1] + ram)
    _touch(fleet, held)
    return fleet


def free(fleet: Fleet, lease_id: str) -> Fleet:
    """Give back what a lease held; nothing if it holds nothing."""
    held = fleet.leases.pop(lease_id, None)
    if held is None:
        return fleet
    for uuid in held.devices:
        holders = fleet.on_device[uuid]
        del holders[lease_id]
        if not holders:
            del fleet.on_device[uuid]
    for name, (cpus, ram) in held.hosts.items():
        # Several leases without cores or RAM share one entry of nothing.
        before = fleet.on_host.pop(name, (0, 0))
        after = (before[0] - cpus, before[1] - ram)
        if any(after):
            fleet.on_host[name] = after
    _touch(fleet, held)
    return fleet


def _touch(fleet: Fleet, held: Held) -> None:
    names = set(held.hosts)
    for uuid in held.devices:
        device = fleet.devices.get(uuid)
        if device is not None:
            device.hold(fleet.on_device.get(uuid))
            names.add(device.host)
    for name in names:
        host = fleet.hosts.get(name)
        if host is not None:
            host.cpus_held, host.memory_held = fleet.on_host.get(name, (0, 0))
            refresh(fleet, host)


def renew(fleet: Fleet, name: str) -> None:
    """Look at a host anew, now."""
    host = fleet.hosts[name]
    _block(fleet, host)
    refresh(fleet, host)


def refresh(fleet: Fleet, host: Host) -> None:
    """Bring a host's place in the index up to date with what is known of it."""
    states = [device.see(fleet.device_state) for device in host.devices]
    if host.topology is None:
        order = sorted(host.devices, key=_device_order)
        states = [device.state for device in order]
    else:
        order = host.devices
    host.order = order
    state = fleet.host_state(
        host.topology,
        host.cpus_total - host.cpus_held if host.cpus_total < UNLIMITED else UNLIMITED,
        host.memory_total - host.memory_held if host.memory_total < UNLIMITED else UNLIMITED,
        host.blocked,
        tuple(states),
    )
    if host.group is None or host.group.state is not state:
        host.group = fleet.index.move(host.name, host.group, state)


def _device_order(device: Device) -> Any:
    return device.state.order, device.index


def _block(fleet: Fleet, host: Host) -> None:
    """Work out why the host and its devices take no work, and when to look again."""
    now, limit = fleet.now, fleet.stale_after
    mask = 0
    if host.lost:
        mask |= HOST_LOST
    fault = fleet.faults.get(f"host:{host.name}")
    if fault is not None and fault.fatal:
        mask |= UNHEALTHY
    if _host_drain(fleet, host):
        mask |= DRAINED
    again = math.inf
    newest = -math.inf
    for device in host.devices:
        blocked = mask
        if now - device.seen_at > limit:
            blocked |= STALE
        else:
            again = min(again, device.seen_at + limit)
        newest = max(newest, device.seen_at)
        own = fleet.faults.get(f"device:{device.uuid}")
        device.fault = own
        if own is not None and own.fatal:
            blocked |= UNHEALTHY
        device.warned = own is not None and now < own.warned_at + WARNING_SECONDS
        if device.warned and own is not None:
            again = min(again, own.warned_at + WARNING_SECONDS)
        if f"device:{device.uuid}" in fleet.drains:
            blocked |= DRAINED
        if device.parent:
            blocked |= MIG_PARENT
        device.blocked = blocked
    if host.devices:
        host.stale = now - newest > limit
    else:
        limit = max(limit, HOST_WITHOUT_DEVICES_STALE_SECONDS)
        host.stale = now - host.heard_at > limit
        if not host.stale:
            again = host.heard_at + limit
    host.blocked = mask | STALE if host.stale and not math.isinf(limit) else mask
    if again < host.timer:
        # Just after the limit, so that the comparison above holds by then.
        host.timer = math.nextafter(again, math.inf)
        fleet.at_timer(host.timer, host.name)


def _host_drain(fleet: Fleet, host: Host) -> str | None:
    if not fleet.drains:
        return None
    found = fleet.drains.get(f"host:{host.name}")
    if found is not None:
        return found
    for key, value in host.labels.items():
        found = fleet.drains.get(f"label:{key}={value}")
        if found is not None:
            return found
    return None


def drain_reason(fleet: Fleet, host: Host, device: Device | None = None) -> str:
    """Why an operator keeps work off it; empty if none does."""
    own = fleet.drains.get(f"device:{device.uuid}") if device is not None else None
    return own if own is not None else _host_drain(fleet, host) or ""


def why_blocked(mask: int) -> list[str]:
    """The reasons in a mask, the one that counts first."""
    return [name for bit, name in BLOCKS.items() if mask & bit]


def _inventory(fleet: Fleet, event: Inventory) -> None:
    name = event.host.name
    host = fleet.hosts.get(name)
    if host is None:
        host = fleet.hosts[name] = Host(name)
    elif event.time_ns < host.inventory_ns:
        return
    if event.agent != host.agent:
        host.agent, host.lag = event.agent, math.inf
        host.processes_ns = -1
    host.inventory_ns = event.time_ns
    host.heard_at = max(host.heard_at, fleet.now)
    host.address = event.host.address
    host.labels = dict(event.host.labels)
    host.cpus_total = event.host.cpus * 1000 or UNLIMITED
    host.memory_total = event.host.memory_bytes or UNLIMITED
    host.cpus_held, host.memory_held = fleet.on_host.get(name, (0, 0))
    host.lost = name in fleet.lost_hosts
    parents = {info.mig_parent for info in event.devices if info.mig_parent}
    old = {device.uuid: device for device in host.devices}
    devices: list[Device] = []
    for info in event.devices:
        device = old.pop(info.uuid, None)
        if device is None:
            elsewhere = fleet.devices.get(info.uuid)
            if elsewhere is not None and elsewhere.host != name:
                _remove_device(fleet, elsewhere)
            device = fleet.devices[info.uuid] = Device(info.uuid, name)
            device.hold(fleet.on_device.get(info.uuid))
        device.describe(info, fleet.model(info), info.mig_enabled or info.uuid in parents)
        devices.append(device)
    for gone in old.values():
        if fleet.devices.get(gone.uuid) is gone:
            del fleet.devices[gone.uuid]
    host.devices = devices
    host.topology = fleet.topology(levels_of(event))
    host.batch_devices = None
    fleet.shape_version += 1
    _idle(fleet, host)
    _block(fleet, host)
    refresh(fleet, host)


def _remove_device(fleet: Fleet, device: Device) -> None:
    """A board was moved to another host: its old host no longer has it."""
    host = fleet.hosts.get(device.host)
    if host is not None:
        host.devices = [other for other in host.devices if other is not device]
        host.topology = None
        host.batch_devices = None
        _idle(fleet, host)
        _block(fleet, host)
        refresh(fleet, host)


def _idle(fleet: Fleet, host: Host) -> None:
    """Count the host's state as it would be without leases, foreign processes, faults and drains."""
    states = [
        fleet.device_state((d.model, 1000, d.memory_total - d.reserved, 0, False, 0, 0, False, False, False))
        if not d.parent
        else fleet.device_state((d.model, 0, 0, MIG_PARENT, False, 0, 0, False, False, False))
        for d in host.devices
    ]
    if host.topology is None:
        states.sort(key=lambda state: state.order)
    _uncount_idle(fleet, host)
    host.idle = fleet.host_state(host.topology, host.cpus_total, host.memory_total, 0, tuple(states))
    fleet.idle[host.idle] = fleet.idle.get(host.idle, 0) + 1


def _uncount_idle(fleet: Fleet, host: Host) -> None:
    fleet.idle_version += 1
    if host.idle is not None:
        left = fleet.idle[host.idle] - 1
        if left:
            fleet.idle[host.idle] = left
        else:
            del fleet.idle[host.idle]
        host.idle = None


def _samples(fleet: Fleet, event: SampleBatch) -> None:
    host = fleet.hosts.get(event.host)
    if host is None:
        return
    tick = last_tick(event)
    if tick is None:
        return
    if host.batch_devices != event.devices:
        host.batch_devices = list(event.devices)
        mine = {device.uuid: device for device in host.devices}
        host.batch_order = [mine.get(uuid) for uuid in event.devices]
    if event.agent != host.agent:
        host.agent, host.lag = event.agent, math.inf
        host.processes_ns = -1
    now = fleet.now
    gap = now - max(tick.times_ns) * 1e-9
    # A host's clock may differ from the bus's: what counts is how much later than at its fastest a message came. The
    # slow rise lets a clock that was set back be believed again after a while.
    host.lag = gap if gap < host.lag else host.lag + (gap - host.lag) * 0.02
    host.heard_at = now
    known = now - host.processes_at <= PROCESSES_KNOWN_SECONDS
    dirty = unblock = resized = False
    for at, device in enumerate(host.batch_order):
        if device is None:
            continue
        changed, sized = device.sample(tick, at, host.lag, now, known)
        dirty = dirty or changed
        resized = resized or sized
        unblock = unblock or device.blocked & STALE != 0
    if resized:
        _idle(fleet, host)
        dirty = True
    if unblock:
        _block(fleet, host)
        dirty = True
    if dirty:
        refresh(fleet, host)


def _processes(fleet: Fleet, event: ProcessBatch) -> None:
    host = fleet.hosts.get(event.host)
    if host is None or event.time_ns < host.processes_ns:
        return
    host.processes_ns = event.time_ns
    host.processes_at = host.heard_at = fleet.now
    by_device: dict[str, list[tuple[str, int | None]]] = {}
    for process in event.processes:
        by_device.setdefault(process.device, []).append((process.lease, process.memory_used_bytes))
    dirty = False
    for device in host.devices:
        if device.processes(by_device.get(device.uuid, [])):
            dirty = True
    if dirty:
        refresh(fleet, host)


def _device_event(fleet: Fleet, event: DeviceEvent) -> None:
    if event.severity in (Severity.INFO, Severity.APPLICATION):
        return
    key = f"host:{event.host}" if event.device is None else f"device:{event.device}"
    fault = fleet.faults.get(key) or Fault()
    changed = fault.after(event)
    if changed == fault:
        return
    fleet.faults[key] = changed
    device = fleet.devices.get(event.device) if event.device is not None else None
    host = fleet.hosts.get(device.host if device is not None else event.host)
    if host is not None:
        _block(fleet, host)
        refresh(fleet, host)


def _lease(fleet: Fleet, event: Lease) -> None:
    if event.state is LeaseState.ACTIVE:
        held = fleet.leases.get(event.lease_id)
        if held is None:  # a renewal moves nothing but the time
            hold(fleet, event.lease_id, event.grants)
    else:
        free(fleet, event.lease_id)


def _lease_event(fleet: Fleet, event: LeaseEvent) -> None:
    _lease(fleet, event.lease)


def _lease_ended(fleet: Fleet, event: LeaseEnded) -> None:
    free(fleet, event.lease_id)


def _drains(fleet: Fleet, event: Drains) -> None:
    fleet.drains = dict(event.drains)
    for host in fleet.hosts.values():
        before = (host.blocked, [device.blocked for device in host.devices])
        _block(fleet, host)
        if before != (host.blocked, [device.blocked for device in host.devices]):
            refresh(fleet, host)


def _host_lost(fleet: Fleet, event: HostLost) -> None:
    fleet.lost_hosts.add(event.host)
    _set_lost(fleet, event.host, True)


def _host_seen(fleet: Fleet, event: HostSeen) -> None:
    fleet.lost_hosts.discard(event.host)
    _set_lost(fleet, event.host, False)


def _set_lost(fleet: Fleet, name: str, lost: bool) -> None:
    host = fleet.hosts.get(name)
    if host is not None and host.lost != lost:
        host.lost = lost
        _block(fleet, host)
        refresh(fleet, host)


def _host_forgotten(fleet: Fleet, event: HostForgotten) -> None:
    host = fleet.hosts.pop(event.host, None)
    fleet.lost_hosts.discard(event.host)
    fleet.faults.pop(f"host:{event.host}", None)
    if host is None:
        return
    for device in host.devices:
        if fleet.devices.get(device.uuid) is device:
            del fleet.devices[device.uuid]
        fleet.faults.pop(f"device:{device.uuid}", None)
    _uncount_idle(fleet, host)
    fleet.index.move(host.name, host.group, None)
    fleet.shape_version += 1


_FOLDS: Final[dict[type, Callable[[Fleet, Any], None]]] = {
    Inventory: _inventory,
    SampleBatch: _samples,
    ProcessBatch: _processes,
    DeviceEvent: _device_event,
    Lease: _lease,
    LeaseEvent: _lease_event,
    LeaseEnded: _lease_ended,
    Drains: _drains,
    HostLost: _host_lost,
    HostSeen: _host_seen,
    HostForgotten: _host_forgotten,
}
