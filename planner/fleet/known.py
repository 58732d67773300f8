"""The fleet's state for decisions: hosts and devices, what leases hold of them, drains and faults."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import Any, Final

from msgspec import Struct

from ...schemas.limits import STALE_AFTER_SECONDS
from ...schemas.telemetry import DeviceInfo, Inventory
from .bookings import NOTHING_BOOKED, Bookings
from .device import Device, Fault
from .host import Host
from .index import Index
from .lru import LRUCache
from .reservation import Reserved
from .state import Ask, AskKey, DeviceState, HostState, Model, StateKey, model_key
from .topology import Levels, Topology

MAX_ASKS: Final = 1024
MAX_MODELS: Final = 65_536
MAX_TOPOLOGIES: Final = 8192
MAX_CACHED: Final = 768
"""Limit on cached rankings and rooms, which take up to a few hundred bytes for each class of hosts."""
STATES_SPARE: Final = 4096
"""Unused states are evicted once there are more states than twice those in use plus this number."""


class Held(Struct):
    """Holdings of a lease, in whole numbers: device → (share, memory), host → (cores, RAM).

    Shares are in billionths, cores in thousandths, memory and RAM in bytes.
    """

    lease_id: str
    devices: dict[str, tuple[int, int]]
    hosts: dict[str, tuple[int, int]]


class Claim(Struct, frozen=True):
    """Devices that a host lists, but that belong to other hosts.

    Attributes:
        event: the inventory that lists them.
        owners: names of the hosts that they belong to, by uuid.
    """

    event: Inventory
    owners: dict[str, str]


class Fleet:
    """All state that decisions are based on.

    Attributes:
        hosts: by name.
        devices: by uuid.
        leases: what active leases hold, by id, also of devices that are not known.
        drains: `host:NAME`, `device:UUID` or `label:K=V` → reason.
        bookings: booked windows.
        bookings_version: changes when windows are booked or canceled, begin or end.
        index: hosts by state.
        now: time of the fleet, seconds since the epoch; `advance` moves it.
        stale_after: seconds without a sample after which a device takes no work; infinite for fleets without samples.
        shape_version: changes when hosts, devices or labels come or go, or a device gets another model.
    """

    def __init__(self, stale_after: float = STALE_AFTER_SECONDS) -> None:
        self.hosts: dict[str, Host] = {}
        self.devices: dict[str, Device] = {}
        self.leases: dict[str, Held] = {}
        self.drains: dict[str, str] = {}
        self.bookings: Bookings = NOTHING_BOOKED
        self.bookings_version = 0
        self.faults: dict[str, Fault] = {}
        """Faults by `host:NAME` or `device:UUID`."""
        self.early: dict[tuple[str, str], Fault] = {}
        """Faults of devices that no inventory has named yet, by the host that reported them and uuid."""
        self.gone: dict[str, Fault] = {}
        """Fatal faults of devices that no host has any more, by uuid."""
        self.on_device: dict[str, dict[str, tuple[int, int]]] = {}
        self.on_host: dict[str, tuple[int, int]] = {}
        self.at_host: dict[str, dict[str, None]] = {}
        """Leases that hold something of a host, by its name."""
        self.reserved: dict[str, Reserved] = {}
        """Applied reservations on devices by uuid, and in `reserved_hosts` on cores and RAM by host; see `reserved`."""
        self.reserved_hosts: dict[str, Reserved] = {}
        self.parents: dict[str, tuple[str, str]] = {}
        """MIG instance → its board and host; also of instances that no longer exist, while a lease is on them."""
        self.children: dict[tuple[str, str], dict[str, None]] = {}
        """Board and host → instances."""
        self.lost_hosts: set[str] = set()
        self.runners: set[str] = set()
        """Names of hosts with a runner that starts jobs, known or not."""
        self.unready_runners: dict[str, str] = {}
        """Why the runners of other hosts start none for now, by host."""
        self.claims: dict[str, Claim] = {}
        """Claims of hosts that list devices of other hosts, by name."""
        self.index = Index()
        self.idle: dict[HostState, int] = {}
        """Number of hosts by the state that they would have if they were idle and healthy."""
        self.idle_version = 0
        self.now = -math.inf
        self.at = -math.inf
        """Time when NATS stored the event that is being folded in."""
        self.stored_at: float | None = None
        """The same; None if not known, in which case the event's own time counts."""
        self.stale_after = stale_after
        self.shape_version = 0
        self.cache: LRUCache[object, Any] = LRUCache(MAX_CACHED)
        """Cache of decisions: rankings, rooms, filters. It may be emptied at any time."""
        self._timers: list[tuple[float, str]] = []
        # A host may report other hardware each minute: old entries are evicted.
        self._models: LRUCache[object, Model] = LRUCache(MAX_MODELS)
        self._topologies: LRUCache[Levels, Topology] = LRUCache(MAX_TOPOLOGIES)
        self._device_states: dict[object, DeviceState] = {}
        self._host_states: dict[object, HostState] = {}
        self._host_states_most = self._device_states_most = STATES_SPARE
        self._asks: LRUCache[AskKey, Ask] = LRUCache(MAX_ASKS)

    @property
    def largest_host(self) -> int:
        """Number of devices of the largest host."""
        kept = self.cache.get("largest")
        if kept is None or kept[0] != self.shape_version:
            most = max((len(host.devices) for host in self.hosts.values()), default=0)
            kept = self.cache.put("largest", (self.shape_version, most))
        return kept[1]

    @property
    def has_boards(self) -> bool:
        """True if there is a device that is neither a MIG instance nor split into them."""
        kept = self.cache.get("boards")
        if kept is None or kept[0] != self.shape_version:
            found = any(not (device.parent or device.info.mig_parent) for device in self.devices.values())
            kept = self.cache.put("boards", (self.shape_version, found))
        return kept[1]

    def ask(self, key: AskKey) -> Ask:
        """Intern an `Ask`: the one object of this fleet for a key."""
        found = self._asks.get(key)
        if found is None:
            found = self._asks.put(key, Ask(key))
        return found

    def model(self, info: DeviceInfo) -> Model:
        """Intern a `Model`: the one object of this fleet for a device's model."""
        key = model_key(info)
        found = self._models.get(key)
        if found is None:
            found = self._models.put(key, Model(key))
        return found

    def topology(self, levels: Levels | None) -> Topology | None:
        """Intern a `Topology`: the one object of this fleet for a matrix; None for None."""
        if levels is None:
            return None
        found = self._topologies.get(levels)
        if found is None:
            found = self._topologies.put(levels, Topology(levels))
        return found

    def device_state(self, key: StateKey) -> DeviceState:
        """Intern a `DeviceState`: the one object of this fleet for a key."""
        found = self._device_states.get(key)
        if found is None:
            core = key.core
            found = self._device_states[key] = DeviceState(key, None if core == key else self.device_state(core))
        return found

    def host_state(
        self,
        topology: Topology | None,
        cpus_free: int,
        memory_free: int,
        blocked: int,
        devices: tuple[DeviceState, ...],
        booked_from: float = math.inf,
    ) -> HostState:
        """Intern a `HostState`: the one object of this fleet for these values."""
        key = (topology, cpus_free, memory_free, blocked, devices, booked_from)
        found = self._host_states.get(key)
        if found is None:
            core = None
            cores = tuple(device.core for device in devices)
            if cores != devices:
                if topology is None:
                    cores = tuple(sorted(cores, key=lambda device: device.order))
                core = self.host_state(topology, cpus_free, memory_free, blocked, cores, booked_from)
            found = HostState(topology, cpus_free, memory_free, blocked, devices, core, booked_from)
            self._host_states[key] = found
        return found

    def forget(self) -> None:
        """Evict states that no host or device has, once there are too many."""
        if len(self._host_states) <= self._host_states_most and len(self._device_states) <= self._device_states_most:
            return
        hosts = {*self.index.classes, *self.idle}
        hosts |= {state.core for state in hosts}
        devices = {device for state in hosts for device in state.devices}
        devices |= {device.core for device in devices}
        self._host_states = {key: state for key, state in self._host_states.items() if state in hosts}
        self._device_states = {key: state for key, state in self._device_states.items() if state in devices}
        self._host_states_most = 2 * len(self._host_states) + STATES_SPARE
        self._device_states_most = 2 * len(self._device_states) + STATES_SPARE

    def at_timer(self, when: float, host: str) -> None:
        """Set a timer for a host."""
        heappush(self._timers, (when, host))

    def move_timers(self, seconds: float) -> None:
        """Shift all timers by so many seconds: the clock was set."""
        self._timers = [(when + seconds, host) for when, host in self._timers]

    def due(self, now: float) -> str | None:
        """Remove the next timer that is due and return its host; None if none is."""
        if self._timers and self._timers[0][0] <= now:
            return heappop(self._timers)[1]
        return None
