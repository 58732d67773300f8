"""Past use of owners and groups, for fair share: it halves every half-life, and counts by the dominant resource.

Three resources are counted: devices by their relative price, cores, and RAM. A group's usage is the greatest of its
three parts of the fleet (dominant resource fairness [1]), in seconds of the whole fleet.

[1] A. Ghodsi et al.: Dominant Resource Fairness: Fair Allocation of Multiple Resource Types. NSDI 2011.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from ..fleet.state import WHOLE_SHARE
from .tree import Node, Tree
from .use import Amounts

AHEAD_SECONDS: Final = 3600.0
"""Time for which present holdings count as held already, so that a burst is shared while it starts."""

_LOG_2: Final = math.log(2)
Vector = tuple[float, float, float]
"""Priced devices, cores, and bytes of RAM; or these times seconds."""
_ZERO: Final[Vector] = (0.0, 0.0, 0.0)


class Total(NamedTuple):
    """Capacity of the fleet.

    Attributes:
        devices: devices, each counted by its price.
        cpus: cores.
        memory_bytes: host RAM.
    """

    devices: float
    cpus: float
    memory_bytes: float


def decay(passed: float, half_life: float) -> tuple[float, float]:
    """The part of past use that is left after some seconds, and what use of one unit a second adds meanwhile.

    Use at a constant rate fades while it accrues: the second is the integral of the decay.
    """
    left = 0.5 ** (passed / half_life)
    return left, half_life / _LOG_2 * (1 - left)


class PastUse:
    """Use that decays, of one owner or group."""

    __slots__ = ("at", "done", "rate")

    def __init__(self, at: float = 0.0, done: Vector = _ZERO, rate: Vector = _ZERO) -> None:
        self.at = at
        self.done = done
        self.rate = rate

    def settle(self, now: float, half_life: float) -> None:
        """Let past use decay, and add what is held, up to a time."""
        passed = now - self.at
        if passed <= 0:
            return
        left, gained = decay(passed, half_life)
        (devices, cpus, memory), (per_device, per_cpu, per_memory) = self.done, self.rate
        self.done = (
            devices * left + per_device * gained,
            cpus * left + per_cpu * gained,
            memory * left + per_memory * gained,
        )
        self.at = now

    def add(self, now: float, rate: Vector, half_life: float) -> None:
        """Change what is held from a time on, which may be past."""
        self.settle(now, half_life)
        late = self.at - now
        if late > 0:
            self.done = _mix(self.done, 1.0, rate, decay(late, half_life)[1])
        before = self.rate
        self.rate = (before[0] + rate[0], before[1] + rate[1], before[2] + rate[2])


class Running(NamedTuple):
    """A lease that accrues."""

    owner: str
    rate: Vector


class Usage:
    """Past use of all owners and groups.

    Args:
        tree: the groups.

    Attributes:
        total: what the fleet has in all.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.total = Total(0.0, 0.0, 0.0)
        self._owners: dict[str, PastUse] = {}
        self._nodes: dict[Node, PastUse] = {}
        self._running: dict[str, Running] = {}

    @property
    def half_life(self) -> float:
        """Seconds after which past use counts half as much."""
        return self.tree.config.half_life_seconds

    def change(self, tree: Tree, now: float) -> None:
        """Take other groups: the past use of an owner goes with it."""
        for past in self._owners.values():
            past.settle(now, self.half_life)
        self.tree = tree
        self._nodes = {}
        for owner, past in self._owners.items():
            past.settle(now, self.half_life)
            for each in self._path(owner):
                node = self._nodes.setdefault(each, PastUse(now))
                node.settle(now, self.half_life)
                node.done = _mix(node.done, 1.0, past.done, 1.0)
                node.rate = _mix(node.rate, 1.0, past.rate, 1.0)

    def starts(self, lease_id: str, owner: str, amounts: Amounts, now: float) -> None:
        """Count a lease from a time on."""
        if lease_id in self._running:
            return
        devices = sum(self.tree.price(model) * share for model, share in amounts.devices.items()) / WHOLE_SHARE
        rate = (devices, amounts.cpus_milli / 1000, float(amounts.memory_bytes))
        self._running[lease_id] = Running(owner, rate)
        self._add(owner, now, rate)

    def ends(self, lease_id: str, now: float) -> None:
        """Count a lease up to a time."""
        running = self._running.pop(lease_id, None)
        if running is not None:
            self._add(running.owner, now, _mix(_ZERO, 0.0, running.rate, -1.0))

    def _add(self, owner: str, now: float, rate: Vector) -> None:
        half_life = self.half_life
        own = self._owners.get(owner)
        if own is None:
            own = self._owners[owner] = PastUse(now)
        own.add(now, rate, half_life)
        for each in self._path(owner):
            past = self._nodes.get(each)
            if past is None:
                past = self._nodes[each] = PastUse(now)
            past.add(now, rate, half_life)

    def _path(self, owner: str) -> Iterable[Node]:
        return (self.tree.root, *self.tree.node_of(owner).path)

    def of(self, node: Node, now: float) -> float:
        """Past use of a group, with those within: seconds of the whole fleet."""
        past = self._nodes.get(node)
        if past is None:
            return 0.0
        past.settle(now, self.half_life)
        return self.dominant(past.done)

    def dominant(self, amounts: Vector) -> float:
        """The greatest of the parts of the fleet that amounts are."""
        devices, cpus, memory_bytes = self.total
        most = amounts[0] / devices if devices else 0.0
        if cpus and amounts[1] / cpus > most:
            most = amounts[1] / cpus
        if memory_bytes and amounts[2] / memory_bytes > most:
            most = amounts[2] / memory_bytes
        return most

    # Kept over restarts

    def saved(self, now: float) -> dict[str, Vector]:
        """Past use of each owner up to a time."""
        for past in self._owners.values():
            past.settle(now, self.half_life)
        return {owner: past.done for owner, past in self._owners.items() if max(past.done) > 1e-9}

    def load(self, saved: Mapping[str, Vector], at: float) -> None:
        """Take the past use of owners as it was saved at a time; before any lease starts."""
        self._owners = {owner: PastUse(at, (done[0], done[1], done[2])) for owner, done in saved.items()}
        self.change(self.tree, at)


def _mix(first: Vector, by: float, second: Vector, times: float) -> Vector:
    return (
        first[0] * by + second[0] * times,
        first[1] * by + second[1] * times,
        first[2] * by + second[2] * times,
    )
