"""Prices of free capacity, from the expected mix of requests. Pure functions.

Units are thousandths of a device (milli) throughout; cores and RAM are measured by the milli of a device that need
them.

1. Credits. The worth of a share of size g is what it saves: pack the expected shares on the fewest devices (the
   cutting-stock LP of Gilmore and Gomory, 1961) and take 1000 × the dual price of each size. A size with more gaps than
   requests to fill them is worth nothing; one that needs a device nearly alone is worth all of it.
2. The worth of a gap of h milli is the expected sum of credits when `CHANCES` random requests for shares arrive, and
   those are placed in it that raise that sum:  U₀ = 0,  Uⱼ₊₁(h) = Uⱼ(h) + Σ pᵍ · max(0, creditᵍ + Uⱼ(h − g) − Uⱼ(h)).
   A whole device is worth 1000.
3. A device needs cores to be usable: `CPU_MARGIN` of the mean cores per milli, smoothed by `SPREAD` of their spread.
4. Whole devices of one host are worth more together, as far as requests ask for several (`GROUP`) and the host has the
   cores that those requests ask for: T = Σ w · n · ⌊min(k / n, cores / c)⌋ over requests for n devices and c cores of
   weight w, for k whole devices. So hosts stay whole for large requests that fit nowhere else.

The constants are in the middle of wide plateaus: halving or doubling one changes the allocated share of a full fleet by
less than 0.1 points on each of twenty traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Final, NamedTuple

import numpy as np

from ....fleet.state import WHOLE_MILLI, Ask, Model
from ...feasible import model_allowed

GRAIN_MILLI: Final = 10
"""Sizes of shares are rounded up to multiples of this: the tables have 100 steps."""
STEPS: Final = WHOLE_MILLI // GRAIN_MILLI
SIZES_MOST: Final = 48
"""Number of sizes of shares that are distinguished, the most frequent ones; others count as the next larger one."""
CHANCES: Final = 100
CPU_MARGIN: Final = 0.9
SPREAD: Final = 0.3
GROUP: Final = 0.05
DEVICES_MOST: Final = 64
"""Largest number of whole devices on one host that the worth of groups distinguishes."""
CORES_STEP_MILLI: Final = 4000
"""Step in which free cores of a host count for the worth of groups."""
CORES_STEPS: Final = 64
"""Number of steps, 0 to 63; the last one means enough, however many a request asks for."""
COMPARED: Final = 9 * CORES_STEPS
"""Entries of the worth of groups that are compared when the mix has changed: up to eight devices."""


class Worth(NamedTuple):
    """Worth of free devices of one model.

    Attributes:
        gaps: worth of 0, 1, … 1000 free milli on one device, in milli.
        groups: extra worth in milli of k whole free devices on one host, with c steps of free cores, at index
            k · `CORES_STEPS` + c; see `group`.
    """

    gaps: tuple[float, ...]
    groups: tuple[float, ...]

    def group(self, devices: int, cpus_milli: int) -> float:
        """Extra worth in milli of whole devices together, on a host with so many free cores."""
        return self.groups[
            min(devices, DEVICES_MOST) * CORES_STEPS + min(max(cpus_milli, 0) // CORES_STEP_MILLI, CORES_STEPS - 1)
        ]


class Prices:
    """Prices for a mix of requests; a model's worth is computed on first use.

    Args:
        mix: request → weight.

    Attributes:
        cpus_per_milli: thousandths of cores that one usable milli needs; 0 if unknown.
        memory_per_milli: bytes of RAM, likewise.
        cpus_variance: variance of the need for cores per milli, scaled by the square of `SPREAD`.
    """

    def __init__(self, mix: Mapping[Ask, float]) -> None:
        self._mix = [
            (ask, weight, ask.gpus * ask.share_milli) for ask, weight in mix.items() if ask.gpus and weight > 0
        ]
        volume = sum(weight * milli for _, weight, milli in self._mix)
        self._volume = volume
        cpus = sum(weight * ask.cpus_milli for ask, weight, _ in self._mix) / volume if volume else 0.0
        memory = sum(weight * ask.host_memory_bytes for ask, weight, _ in self._mix) / volume if volume else 0.0
        spread = sum(weight * (ask.cpus_milli - cpus * milli) ** 2 for ask, weight, milli in self._mix)
        self.cpus_per_milli = CPU_MARGIN * cpus
        self.memory_per_milli = memory
        self.cpus_variance = SPREAD**2 * spread / volume if volume else 0.0
        self._sizes = _merge({_steps(ask): 0.0 for ask, _, _ in self._mix if _shared(ask)}, self._demand(None))
        demand: dict[int, float] = {}
        for size, weight in self._demand(None).items():
            demand[self._sizes[size]] = demand.get(self._sizes[size], 0.0) + weight
        self._credits = share_credits(demand)
        self._worths: dict[Model, Worth] = {}
        self._gaps: dict[tuple[tuple[int, float], ...], tuple[float, ...]] = {}
        self._groups: dict[object, tuple[float, ...]] = {}

    def _demand(self, model: Model | None) -> dict[int, float]:
        """Weight of shares by size in steps, of those that may use a model; of all for None."""
        found: dict[int, float] = {}
        for ask, weight, _ in self._mix:
            if _shared(ask) and (model is None or model_allowed(model, ask)):
                size = _steps(ask)
                found[size] = found.get(size, 0.0) + weight
        return found

    def worth(self, model: Model) -> Worth:
        """Worth of free devices of a model; cached."""
        found = self._worths.get(model)
        if found is None:
            found = self._worths[model] = Worth(self._gaps_of(model), self._groups_of(model))
        return found

    def _gaps_of(self, model: Model) -> tuple[float, ...]:
        demand: dict[int, float] = {}
        for size, weight in self._demand(model).items():
            demand[self._sizes[size]] = demand.get(self._sizes[size], 0.0) + weight
        key = tuple(sorted(demand.items()))
        found = self._gaps.get(key)
        if found is None:
            steps = gap_worths(demand, self._credits)
            found = self._gaps[key] = tuple(steps[milli // GRAIN_MILLI] for milli in range(WHOLE_MILLI + 1))
        return found

    def _groups_of(self, model: Model) -> tuple[float, ...]:
        reach = 0.0
        several: dict[tuple[int, int], float] = {}
        for ask, weight, milli in self._mix:
            if model_allowed(model, ask):
                reach += weight * milli
                if ask.gpus > 1:
                    kind = (ask.gpus, -(-ask.cpus_milli // CORES_STEP_MILLI))
                    several[kind] = several.get(kind, 0.0) + weight * milli
        key = (reach, *sorted(several.items()))
        found = self._groups.get(key)
        if found is None:
            worth = np.zeros((DEVICES_MOST + 1, CORES_STEPS))
            devices = np.arange(DEVICES_MOST + 1)[:, None]
            steps = np.append(np.arange(CORES_STEPS - 1), 2**40)[None, :]
            for (gpus, cores), weight in several.items():
                together = np.minimum(devices // gpus, steps // cores) if cores else devices // gpus
                worth += GROUP * WHOLE_MILLI * weight / reach * gpus * together
            found = self._groups[key] = tuple(worth.ravel().tolist())
        return found

    def close_to(self, other: Prices, models: Iterable[Model]) -> bool:
        """True if decisions by either would hardly differ: within 2 % of a device and of the need for cores and RAM."""
        for mine, its in (
            (self.cpus_per_milli, other.cpus_per_milli),
            (self.memory_per_milli, other.memory_per_milli),
            (sqrt(self.cpus_variance), sqrt(other.cpus_variance)),
        ):
            if abs(mine - its) > 0.02 * max(mine, its):
                return False
        limit = 0.02 * WHOLE_MILLI
        for model in models:
            mine, its = self.worth(model), other.worth(model)
            if any(abs(a - b) > limit for a, b in zip(mine.gaps[::GRAIN_MILLI], its.gaps[::GRAIN_MILLI], strict=True)):
                return False
            if any(abs(a - b) > limit for a, b in zip(mine.groups[:COMPARED], its.groups[:COMPARED], strict=True)):
                return False
        return True


def _shared(ask: Ask) -> bool:
    return ask.gpus == 1 and ask.share_milli < WHOLE_MILLI


def _steps(ask: Ask) -> int:
    return min(STEPS - 1, -(-ask.share_milli // GRAIN_MILLI))


def _merge(sizes: Iterable[int], demand: Mapping[int, float]) -> dict[int, int]:
    """Map each size to the one that it counts as: the same, or the next larger of the most frequent."""
    kept = sorted(sorted(sizes, key=lambda size: -demand[size])[:SIZES_MOST])
    largest = max(demand, default=0)
    if kept and kept[-1] != largest:
        kept.append(largest)
    return {size: next(other for other in kept if other >= size) for size in demand}


def share_credits(demand: Mapping[int, float]) -> dict[int, float]:
    """Worth in milli of a share of each size: dual prices of the cutting-stock LP.

    Column generation with a bounded knapsack over the steps; the basis has one pattern for each size.

    Args:
        demand: size in steps → weight.
    """
    sizes = sorted((size for size, weight in demand.items() if weight > 0), reverse=True)
    count = len(sizes)
    if not count:
        return {}
    total = sum(demand[size] for size in sizes)
    # A tiny perturbation that differs by size keeps the simplex from cycling.
    need = [demand[size] / total + 1e-9 * (at + 1) for at, size in enumerate(sizes)]
    inverse = [[0.0] * count for _ in range(count)]
    for at, size in enumerate(sizes):
        inverse[at][at] = 1.0 / (STEPS // size)
    level = [need[at] * inverse[at][at] for at in range(count)]
    dual = [inverse[at][at] for at in range(count)]
    for _ in range(200 * count):
        best, pattern = _knapsack(sizes, dual)
        if best <= 1 + 1e-9:
            break
        column = [sum(row[at] * pattern[at] for at in range(count) if pattern[at]) for row in inverse]
        leaving, ratio = -1, float("inf")
        for at in range(count):
            if column[at] > 1e-12 and level[at] / column[at] < ratio:
                leaving, ratio = at, level[at] / column[at]
        if leaving < 0:
            break
        pivot = [value / column[leaving] for value in inverse[leaving]]
        for at in range(count):
            if at != leaving and column[at]:
                factor = column[at]
                inverse[at] = [a - factor * b for a, b in zip(inverse[at], pivot, strict=True)]
                level[at] -= factor * ratio
        inverse[leaving], level[leaving] = pivot, ratio
        dual = [max(0.0, sum(row[at] for row in inverse)) for at in range(count)]
    return {size: WHOLE_MILLI * dual[at] for at, size in enumerate(sizes)}


def _knapsack(sizes: Sequence[int], worth: Sequence[float]) -> tuple[float, list[int]]:
    """Most valuable multiset of sizes on one device: its worth, and the number of each size in it."""
    best = [0.0] * (STEPS + 1)
    pick = [-1] * (STEPS + 1)
    useful = [(size, value, at) for at, (size, value) in enumerate(zip(sizes, worth, strict=True)) if value > 0]
    for room in range(1, STEPS + 1):
        most, which = best[room - 1], -1
        for size, value, at in useful:
            if size <= room and best[room - size] + value > most + 1e-12:
                most, which = best[room - size] + value, at
        best[room], pick[room] = most, which
    pattern = [0] * len(sizes)
    room = STEPS
    while room > 0:
        which = pick[room]
        if which < 0:
            room -= 1
        else:
            pattern[which] += 1
            room -= sizes[which]
    return best[STEPS], pattern


def gap_worths(demand: Mapping[int, float], credit: Mapping[int, float]) -> list[float]:
    """Worth in milli of a gap of 0, 1, … `STEPS` steps.

    Args:
        demand: size in steps → weight, of the shares that may fill the gap.
        credit: size in steps → milli, from `share_credits`.
    """
    total = sum(demand.values())
    worth = [0.0] * (STEPS + 1)
    if total > 0:
        moves = [
            [(weight / total, credit.get(size, 0.0), room - size) for size, weight in demand.items() if size <= room]
            for room in range(STEPS + 1)
        ]
        for _ in range(CHANCES):
            worth = [
                value + sum([chance * gain for chance, paid, left in ways if (gain := paid + worth[left] - value) > 0])
                for value, ways in zip(worth, moves, strict=True)
            ]
    worth[STEPS] = float(WHOLE_MILLI)
    return worth
