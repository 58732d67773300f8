"""Links between the devices of a host, and the search for the set of N devices with the best links.

A collective such as all-reduce is as fast as its slowest link. So the best set has the fastest slowest pair; of those,
the most bandwidth over all pairs; of those, it leaves the best links among the remaining devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...schemas.telemetry import Inventory, Link

EXACT_DEVICES: Final = 16
"""Number of candidates up to which all sets are compared; beyond, the search is greedy with exchanges."""

NVLINK_GIGABYTES_PER_SECOND: Final = 25
"""One direction of one NVLink, second generation (Volta) to fourth (Hopper)."""
LINK_GIGABYTES_PER_SECOND: Final[dict[Link, int]] = {
    Link.SAME: 0,
    Link.NVLINK: NVLINK_GIGABYTES_PER_SECOND,
    Link.PCIE_SWITCH: 22,
    Link.PCIE_BRIDGES: 20,
    Link.HOST_BRIDGE: 16,
    Link.NUMA: 12,
    Link.SYSTEM: 8,
    Link.UNKNOWN: 8,
}
"""Assumed bandwidth between two devices: the order is the driver's (`nvidia-smi topo -m`), the numbers are those
of PCIe 4.0 ×16 (31.5 GB/s in theory), less for each hop."""

Levels = tuple[tuple[int, ...], ...]


class Topology:
    """The links of hosts with equal wiring.

    Attributes:
        levels: D×D, bandwidth of each pair in GB/s, 0 on the diagonal.
    """

    __slots__ = ("_memo", "levels")

    def __init__(self, levels: Levels) -> None:
        self.levels = levels
        self._memo: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}

    def best(self, candidates: Sequence[int], count: int) -> tuple[int, ...]:
        """The `count` candidates with the best links, ascending; of equal sets the first in the candidates' order."""
        key = (count, tuple(candidates))
        found = self._memo.get(key)
        if found is None:
            if len(self._memo) > 65_536:
                self._memo.clear()
            search = best_exact if len(key[1]) <= EXACT_DEVICES else best_greedy
            found = self._memo[key] = search(self.levels, key[1], count)
        return found

    def connectivity(self, devices: Sequence[int]) -> tuple[int, int]:
        """Bandwidth of the slowest pair, and sum over all pairs, in GB/s; (0, 0) below two devices."""
        return connectivity(self.levels, devices)


MAX_LINKED: Final = 64
"""Limit on the devices of a host whose links are compared: eight boards and seven instances on each. With more, a
search takes seconds."""


def levels_of(inventory: Inventory) -> Levels | None:
    """Bandwidth of each pair in GB/s; None if all pairs are equal, nothing is known of them, or there are too many."""
    count = len(inventory.devices)
    if (
        not 3 <= count <= MAX_LINKED
        or len(inventory.links) != count
        or any(len(row) != count for row in inventory.links)
    ):
        return None
    counts = inventory.nvlink_counts
    counted = len(counts) == count and all(len(row) == count for row in counts)
    rows: list[tuple[int, ...]] = []
    for i, row in enumerate(inventory.links):
        levels = [LINK_GIGABYTES_PER_SECOND[link] for link in row]
        if counted:
            for j, links in enumerate(counts[i]):
                if links > 0 and i != j:
                    levels[j] = NVLINK_GIGABYTES_PER_SECOND * links
        levels[i] = 0
        rows.append(tuple(levels))
    pairs = {rows[i][j] for i in range(count) for j in range(count) if i != j}
    return None if len(pairs) == 1 else tuple(rows)


def connectivity(levels: Levels, devices: Sequence[int]) -> tuple[int, int]:
    """Bandwidth of the slowest pair, and sum over all pairs; (0, 0) below two devices."""
    pairs = [levels[a][b] for at, a in enumerate(devices) for b in devices[at + 1 :]]
    return (min(pairs), sum(pairs)) if pairs else (0, 0)


def best_exact(levels: Levels, candidates: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Depth-first search over all sets, pruned where the slowest pair is already slower than the best set's."""
    total = len(candidates)
    if count >= total or count <= 0:
        return tuple(sorted(candidates[: max(count, 0)]))
    best_key: tuple[int, int, int] | None = None
    best: tuple[int, ...] = ()
    everything = [sum(levels[a][b] for b in candidates) for a in range(len(levels))]
    chosen: list[int] = []

    def extend(start: int, worst: int, inside: int) -> None:
        nonlocal best_key, best
        if len(chosen) == count:
            # Bandwidth between the chosen devices and the remaining ones is lost to both.
            lost = sum(everything[a] for a in chosen) - 2 * inside
            key = (worst, inside, -lost)
            if best_key is None or key > best_key:
                best_key, best = key, tuple(sorted(chosen))
            return
        for at in range(start, total - (count - len(chosen)) + 1):
            row = levels[candidates[at]]
            below, more = worst, 0
            for other in chosen:
                level = row[other]
                more += level
                below = min(below, level)
            if best_key is not None and below < best_key[0]:
                continue
            chosen.append(candidates[at])
            extend(at + 1, below, inside + more)
            chosen.pop()

    extend(0, 2**31, 0)
    return best


def best_greedy(levels: Levels, candidates: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Grow a set from each candidate by the neighbor with the best links, then exchange members while that helps."""
    if count >= len(candidates) or count <= 0:
        return tuple(sorted(candidates[: max(count, 0)]))
    best: list[int] = []
    for first in candidates:
        grown = [first]
        rest = [device for device in candidates if device != first]
        while len(grown) < count:
            joined = max(
                rest, key=lambda device: (min(levels[device][a] for a in grown), sum(levels[device][a] for a in grown))
            )
            grown.append(joined)
            rest.remove(joined)
        if not best or connectivity(levels, grown) > connectivity(levels, best):
            best = grown
    improved = True
    while improved:
        improved = False
        for at in range(count):
            for device in candidates:
                if device in best:
                    continue
                exchanged = [*best[:at], device, *best[at + 1 :]]
                if connectivity(levels, exchanged) > connectivity(levels, best):
                    best, improved = exchanged, True
    return tuple(sorted(best))
