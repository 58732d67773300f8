"""Live state of a host."""

from __future__ import annotations

import math

from .bookings import Booking
from .device import Device
from .index import HostClass
from .state import UNLIMITED, HostState
from .topology import Topology


class Host:
    """Live state of a host, from its inventory, samples and process lists."""

    __slots__ = (
        "address",
        "agent",
        "batch_devices",
        "batch_order",
        "blocked",
        "booked_from",
        "bookings",
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
        """The agent that has shut down in order and given up the devices; empty if none has."""
        self.machine_ids: frozenset[str] = frozenset()
        self.labels: dict[str, str] = {}
        self.cpus_total = self.memory_total = UNLIMITED
        self.cpus_held = self.memory_held = 0
        self.devices: list[Device] = []
        self.topology: Topology | None = None
        self.order: list[Device] = []
        """Devices in the order of the host's state."""
        self.group: HostClass | None = None
        self.idle: HostState | None = None
        """State that the host would have if it were idle and healthy."""
        self.blocked = 0
        self.bookings: tuple[Booking, ...] = ()
        """Maintenance of the host, now and later."""
        self.booked_from = math.inf
        self.lost = False
        self.stale = True
        self.heard_at = -math.inf
        self.inventory_ns = -1
        """Time when NATS stored the last inventory, in nanoseconds; -1 before one. Likewise `processes_ns`."""
        self.processes_at = -math.inf
        self.processes_ns = -1
        self.lag = math.inf
        """Least delay of a message of this agent after its samples were read, in seconds.

        It has the difference of the clocks in it. It rises slowly, to adapt.
        """
        self.sampled_at = -math.inf
        """Time when NATS stored the last samples, seconds since the epoch; a little older ones are repetitions."""
        self.newest_ns = -1
        """Time of the last reading in nanoseconds, by the host's clock."""
        self.timer = math.inf
        self.batch_devices: list[str] | None = None
        self.batch_order: list[Device | None] = []

    @property
    def unheld(self) -> tuple[int, int]:
        """Thousandths of cores and bytes of RAM that no lease holds; `UNLIMITED` for what the host does not report."""
        return (
            self.cpus_total - self.cpus_held if self.cpus_total < UNLIMITED else UNLIMITED,
            self.memory_total - self.memory_held if self.memory_total < UNLIMITED else UNLIMITED,
        )

    @property
    def state(self) -> HostState:
        """State of the host, as decisions see it."""
        assert self.group is not None
        return self.group.state
