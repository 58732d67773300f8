"""A host as the planner knows it."""

from __future__ import annotations

import math

from .device import Device
from .index import HostClass
from .state import UNLIMITED, HostState
from .topology import Topology


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
        "left",
        "lost",
        "machine_ids",
        "memory_held",
        "memory_total",
        "name",
        "newest_ns",
        "order",
        "processes_at",
        "processes_ns",
        "sampled_at",
        "stale",
        "timer",
        "topology",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.agent = ""
        self.left = ""
        """The agent that has ended in order and given the devices free; empty if none has."""
        self.machine_ids: frozenset[str] = frozenset()
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
        """When the bus stored the last inventory; likewise of processes."""
        self.processes_at = -math.inf
        self.processes_ns = -1
        self.lag = math.inf
        """The least that a message of this agent came later than its samples were read: clocks differ, buffers lag."""
        self.sampled_at = -math.inf
        """When the bus stored the last samples: what it stored earlier is old."""
        self.newest_ns = -1
        """The last time of reading, by the host's clock."""
        self.timer = math.inf
        self.batch_devices: list[str] | None = None
        self.batch_order: list[Device | None] = []

    @property
    def state(self) -> HostState:
        """As a decision sees it."""
        assert self.group is not None
        return self.group.state
