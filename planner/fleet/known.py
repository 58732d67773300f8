"""All that a decision rests on, as it is kept: hosts and devices, what leases hold of them, and what is wrong."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import Any, Final

from msgspec import Struct

from ...schemas.telemetry import DeviceInfo, Inventory
from .device import Device, Fault
from .host import Host
from .index import Index
from .lru import Kept
from .reservation import Reserved
from .state import Ask, AskKey, DeviceState, HostState, Model, StateKey, model_key
from .topology import Levels, Topology

STALE_AFTER_SECONDS: Final = 10.0
ASKS_MOST: Final = 1024
MODELS_MOST: Final = 65_536
TOPOLOGIES_MOST: Final = 8192
CACHE_MOST: Final = 768
"""A ranking or a room takes up to a few hundred bytes for each class of hosts."""
STATES_SPARE: Final = 4096
"""States that nothing is in any more are kept until there are so many more than twice those in use."""


class Held(Struct):
    """What a lease holds, in whole numbers: device → (share, memory), host → (cores, RAM)."""

    lease_id: str
    devices: dict[str, tuple[int, int]]
    hosts: dict[str, tuple[int, int]]


class Claim(Struct, frozen=True):
    """Devices that a host lists while they are others'.

    Attributes:
        event: the inventory that lists them.
        owners: whose they are, by uuid.
    """

    event: Inventory
    owners: dict[str, str]


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
        shape_version: moves when hosts, devices or labels come or go, or a device is of another model.
    """

    def __init__(self, stale_after: float = STALE_AFTER_SECONDS) -> None:
        self.hosts: dict[str, Host] = {}
        self.devices: dict[str, Device] = {}
        self.leases: dict[str, Held] = {}
        self.drains: dict[str, str] = {}
        self.faults: dict[str, Fault] = {}
        """By `host:NAME` or `device:UUID`."""
        self.early: dict[tuple[str, str], Fault] = {}
        """Of devices that no inventory has named yet, by the host that said so and uuid."""
        self.gone: dict[str, Fault] = {}
        """Of devices that no host has any more, by uuid; those that kept work off."""
        self.on_device: dict[str, dict[str, tuple[int, int]]] = {}
        self.on_host: dict[str, tuple[int, int]] = {}
        self.at_host: dict[str, dict[str, None]] = {}
        """The leases that hold something of a host, by its name."""
        self.reserved: dict[str, Reserved] = {}
        """Kept for requests that wait, by uuid, and likewise the cores and RAM of hosts by name; see `reserved`."""
        self.reserved_hosts: dict[str, Reserved] = {}
        self.parents: dict[str, tuple[str, str]] = {}
        """MIG instance → its board and host; also of instances that are there no more while a lease is on them."""
        self.children: dict[tuple[str, str], dict[str, None]] = {}
        """Board and host → instances."""
        self.lost_hosts: set[str] = set()
        self.claims: dict[str, Claim] = {}
        """Of hosts that list devices of others, by the host's name."""
        self.index = Index()
        self.idle: dict[HostState, int] = {}
        """How many hosts would be in which state, idle and healthy."""
        self.idle_version = 0
        self.now = -math.inf
        self.at = -math.inf
        """When the bus stored the event that is being folded in."""
        self.stored_at: float | None = None
        """The same; None where nobody said so, and the event's own time counts."""
        self.stale_after = stale_after
        self.shape_version = 0
        self.cache: Kept[object, Any] = Kept(CACHE_MOST)
        """Of decisions: rankings, rooms, filters. May be emptied at any time."""
        self._timers: list[tuple[float, str]] = []
        # A host may say that it is another one each minute: what it was is forgotten.
        self._models: Kept[object, Model] = Kept(MODELS_MOST)
        self._topologies: Kept[Levels, Topology] = Kept(TOPOLOGIES_MOST)
        self._device_states: dict[object, DeviceState] = {}
        self._host_states: dict[object, HostState] = {}
        self._host_states_most = self._device_states_most = STATES_SPARE
        self._asks: Kept[AskKey, Ask] = Kept(ASKS_MOST)

    @property
    def largest_host(self) -> int:
        """The most devices that one host has."""
        kept = self.cache.get("largest")
        if kept is None or kept[0] != self.shape_version:
            most = max((len(host.devices) for host in self.hosts.values()), default=0)
            kept = self.cache.put("largest", (self.shape_version, most))
        return kept[1]

    @property
    def has_boards(self) -> bool:
        """Whether some device is whole: no MIG instance, and not split into them."""
        kept = self.cache.get("boards")
        if kept is None or kept[0] != self.shape_version:
            found = any(not (device.parent or device.info.mig_parent) for device in self.devices.values())
            kept = self.cache.put("boards", (self.shape_version, found))
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
            found = self._models.put(key, Model(key))
        return found

    def topology(self, levels: Levels | None) -> Topology | None:
        """The one `Topology` of this fleet for a matrix."""
        if levels is None:
            return None
        found = self._topologies.get(levels)
        if found is None:
            found = self._topologies.put(levels, Topology(levels))
        return found

    def device_state(self, key: StateKey) -> DeviceState:
        """The one `DeviceState` of this fleet for a key."""
        found = self._device_states.get(key)
        if found is None:
            model, share, memory, blocked, leased, heat, load, throttled, warned, rounded, in_use, most = key
            core = None
            if heat or load or throttled or warned:
                core = self.device_state(
                    (model, share, memory, blocked, leased, 0, 0, False, False, rounded, in_use, most)
                )
            found = self._device_states[key] = DeviceState(key, core)
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
            core = None
            cores = tuple(device.core for device in devices)
            if cores != devices:
                if topology is None:
                    cores = tuple(sorted(cores, key=lambda device: device.order))
                core = self.host_state(topology, cpus_free, memory_free, blocked, cores)
            found = self._host_states[key] = HostState(topology, cpus_free, memory_free, blocked, devices, core)
        return found

    def forget(self) -> None:
        """Drop states that nothing is in any more, once there are too many of them."""
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
        """Look at a host again at a time."""
        heappush(self._timers, (when, host))

    def move_timers(self, seconds: float) -> None:
        """Look so much later, or earlier: the clock was set."""
        self._timers = [(when + seconds, host) for when, host in self._timers]

    def due(self, now: float) -> str | None:
        """The next host to look at by now; None if there is none."""
        if self._timers and self._timers[0][0] <= now:
            return heappop(self._timers)[1]
        return None
