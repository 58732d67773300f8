"""Distribution of independent items with a cost and a size over devices of unequal speed and memory: least makespan.

Scheduling on uniform machines (Q||Cmax) with memory as a second, hard constraint. Equal items are solved exactly, and a
few others by branch and bound. Many are assigned by LPT (longest first, to the device that would finish it first; at
most (2m)/(m+1) times the optimum without memory limits, Gonzalez, Ibarra and Sahni 1977), and then by moves and
exchanges out of the slowest device until none helps. The result has a lower bound, which limits its distance from the
optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import Final, NamedTuple

EXACT_ITEMS: Final = 12
"""Number of items up to which the search is exact, within `EXACT_NODES`."""
EXACT_NODES: Final = 10_000
"""Limit on the steps of the exact search."""
IMPROVE_ITEMS: Final = 5_000
"""Number of items up to which the result of LPT is improved by moves and exchanges."""
CLOSE_ENOUGH: Final = 1e-4
"""Relative distance to the bound at which improvement stops: the planner has other requests to answer."""
_IMPROVE_STEPS: Final = 2_000


class Machine(NamedTuple):
    """A device to balance over.

    Attributes:
        speed: cost per unit of time.
        memory: bytes for the items' sizes in all.
        most: items at most; None for no limit.
    """

    speed: float
    memory: int
    most: int | None = None


class Balanced(NamedTuple):
    """An assignment of items to machines.

    Attributes:
        place: for each item the machine, or -1 if none could take it.
        makespan: time until the last machine is done.
        bound: lower bound on the makespan of the placed items.
        optimal: true if the makespan is proven to be the least.
    """

    place: list[int]
    makespan: float
    bound: float
    optimal: bool


def balance(costs: Sequence[float], sizes: Sequence[int], machines: Sequence[Machine]) -> Balanced:
    """Assign items with the least makespan; assigning as many items as memory and limits allow takes precedence."""
    if not machines or not costs:
        return Balanced([-1] * len(costs), 0.0, 0.0, True)
    if min(costs) == max(costs) and min(sizes) == max(sizes):
        return _equal(len(costs), costs[0], sizes[0], machines)
    place = _longest_first(costs, sizes, machines, sorted(range(len(costs)), key=lambda at: (-costs[at], -sizes[at])))
    if -1 in place:
        # If memory is tight, large items must come first, or there is no room left for them.
        other = _longest_first(
            costs, sizes, machines, sorted(range(len(costs)), key=lambda at: (-sizes[at], -costs[at]))
        )
        if other.count(-1) < place.count(-1):
            place = other
    proven = False
    if len(costs) <= EXACT_ITEMS:
        place, proven = _branch(costs, sizes, machines, place)
    if proven:
        makespan = span(costs, machines, place)
        return Balanced(place, makespan, makespan, True)
    bound = lower_bound(costs, sizes, machines, [at for at, machine in enumerate(place) if machine >= 0])
    if len(costs) <= IMPROVE_ITEMS:
        place = _improve(costs, sizes, machines, place, bound * (1 + CLOSE_ENOUGH))
    if -1 in place:
        place = _fill(costs, sizes, machines, place)
        bound = lower_bound(costs, sizes, machines, [at for at, machine in enumerate(place) if machine >= 0])
    makespan = span(costs, machines, place)
    return Balanced(place, makespan, min(bound, makespan), makespan <= bound * (1 + 1e-12))


def _fill(costs: Sequence[float], sizes: Sequence[int], machines: Sequence[Machine], place: Sequence[int]) -> list[int]:
    """Assign items that were left out to room that moves have made since, the smallest first."""
    place = list(place)
    loads, used, held = [0.0] * len(machines), [0] * len(machines), [0] * len(machines)
    for at, number in enumerate(place):
        if number >= 0:
            loads[number] += costs[at]
            used[number] += sizes[at]
            held[number] += 1
    for at in sorted((at for at, number in enumerate(place) if number < 0), key=lambda at: sizes[at]):
        fitting = [
            number
            for number, machine in enumerate(machines)
            if used[number] + sizes[at] <= machine.memory and (machine.most is None or held[number] < machine.most)
        ]
        if fitting:
            best = min(fitting, key=lambda number: (loads[number] + costs[at]) / machines[number].speed)
            place[at] = best
            loads[best] += costs[at]
            used[best] += sizes[at]
            held[best] += 1
    return place


def span(costs: Sequence[float], machines: Sequence[Machine], place: Sequence[int]) -> float:
    """Time until the last machine is done."""
    loads = [0.0] * len(machines)
    for at, machine in enumerate(place):
        if machine >= 0:
            loads[machine] += costs[at]
    return max(load / machine.speed for load, machine in zip(loads, machines, strict=True))


def lower_bound(
    costs: Sequence[float], sizes: Sequence[int], machines: Sequence[Machine], placed: Sequence[int]
) -> float:
    """Lower bound on the makespan: the greatest of these.

    For each k, the time of the k costliest items when shared perfectly by the k fastest machines; of all items when
    shared by all machines; and of each item alone on the fastest machine that is large enough for it.
    """
    if not placed:
        return 0.0
    speeds = sorted((machine.speed for machine in machines), reverse=True)
    ordered = sorted((costs[at] for at in placed), reverse=True)
    total = math.fsum(ordered) / math.fsum(speeds)
    sums = zip(accumulate(ordered), accumulate(speeds), strict=False)
    few = max(cost / speed for cost, speed in list(sums)[: len(speeds)])
    by_memory = sorted(machines, key=lambda machine: machine.memory)
    fastest = list(accumulate((machine.speed for machine in reversed(by_memory)), max))[::-1]
    single = 0.0
    at = 0
    for item in sorted(placed, key=lambda item: sizes[item]):
        while at < len(by_memory) - 1 and by_memory[at].memory < sizes[item]:
            at += 1
        single = max(single, costs[item] / fastest[at])
    return max(total, few, single)


def _equal(count: int, cost: float, size: int, machines: Sequence[Machine]) -> Balanced:
    """Assign equal items: start below the ideal share, then each further one to the machine that finishes it first."""
    most = [_room(machine, size, count) for machine in machines]
    whole = math.fsum(machine.speed for machine in machines)
    counts = [
        min(limit, max(0, math.floor(count * machine.speed / whole) - 1))
        for limit, machine in zip(most, machines, strict=True)
    ]
    heap = [((counts[at] + 1) / machine.speed, at) for at, machine in enumerate(machines) if counts[at] < most[at]]
    heapify(heap)
    left = count - sum(counts)
    while left > 0 and heap:
        at = heap[0][1]
        counts[at] += 1
        left -= 1
        after = (counts[at] + 1) / machines[at].speed if counts[at] < most[at] else math.inf
        if math.isinf(after):
            heap[0] = heap[-1]
            heap.pop()
            heapify(heap)
        else:
            heapreplace(heap, (after, at))
    place = [at for at, held in enumerate(counts) for _ in range(held)]
    makespan = max(held * cost / machine.speed for held, machine in zip(counts, machines, strict=True))
    return Balanced(place + [-1] * (count - len(place)), makespan, makespan, True)


def _room(machine: Machine, size: int, count: int) -> int:
    fit = machine.memory // size if size else count
    return min(fit, count) if machine.most is None else min(fit, machine.most, count)


class _Load:
    """Items of one machine so far."""

    __slots__ = ("cost", "items", "left", "machine", "slots")

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.cost = 0.0
        self.left = machine.memory
        self.slots = math.inf if machine.most is None else machine.most
        self.items: set[int] = set()

    def add(self, at: int, cost: float, size: int) -> None:
        self.items.add(at)
        self.cost += cost
        self.left -= size
        self.slots -= 1

    def drop(self, at: int, cost: float, size: int) -> None:
        self.items.discard(at)
        self.cost = self.cost - cost if self.items else 0.0
        self.left += size
        self.slots += 1

    @property
    def time(self) -> float:
        return self.cost / self.machine.speed


def _longest_first(
    costs: Sequence[float], sizes: Sequence[int], machines: Sequence[Machine], order: Sequence[int]
) -> list[int]:
    """Assign each item in turn to the machine that would finish it first.

    Machines of one speed share a heap, so that the work per item depends on the number of speeds, not of machines.
    """
    loads = [_Load(machine) for machine in machines]
    groups: dict[float, list[tuple[float, int]]] = {}
    for at, machine in enumerate(machines):
        groups.setdefault(machine.speed, []).append((0.0, at))
    heaps = list(groups.items())
    place = [-1] * len(costs)
    for item in order:
        cost, size = costs[item], sizes[item]
        best: tuple[float, int] | None = None
        blocked = False
        for speed, heap in heaps:
            load, at = heap[0]
            if loads[at].left < size or loads[at].slots < 1:
                blocked = True
                continue
            key = ((load + cost) / speed, at)
            if best is None or key < best:
                best = key
        if blocked:
            # The least loaded machine of a group is full: compare all.
            best = min(
                (
                    ((load.cost + cost) / load.machine.speed, at)
                    for at, load in enumerate(loads)
                    if load.left >= size and load.slots >= 1
                ),
                default=None,
            )
        if best is None:
            continue
        at = best[1]
        place[item] = at
        loads[at].add(item, cost, size)
        heap = groups[machines[at].speed]
        if heap[0][1] == at:
            heapreplace(heap, (loads[at].cost, at))
        else:
            place_in_heap = next(i for i, entry in enumerate(heap) if entry[1] == at)
            heap[place_in_heap] = (loads[at].cost, at)
            heapify(heap)
    return place


def _branch(
    costs: Sequence[float], sizes: Sequence[int], machines: Sequence[Machine], start: list[int]
) -> tuple[list[int], bool]:
    """Find the optimum by depth-first search from a first solution; the flag is False if the steps ran out."""
    order = sorted(range(len(costs)), key=lambda at: (-costs[at], -sizes[at]))
    # First as many items as can be placed, then the smallest makespan.
    best, best_key = start, (start.count(-1), span(costs, machines, start))
    loads = [0.0] * len(machines)
    left = [machine.memory for machine in machines]
    slots = [len(costs) if machine.most is None else machine.most for machine in machines]
    place = [-1] * len(costs)
    speed = math.fsum(machine.speed for machine in machines)
    rest = [0.0, *accumulate(costs[at] for at in reversed(order))][::-1]
    steps = 0

    def visit(depth: int, missing: int, worst: float) -> bool:
        nonlocal best, best_key, steps
        steps += 1
        if steps > EXACT_NODES:
            return False
        if depth == len(order):
            if (missing, worst) < best_key:
                best, best_key = place.copy(), (missing, worst)
            return True
        floor = worst if best_key[0] < missing + 1 else 0.0
        if missing == best_key[0] and max(floor, (math.fsum(loads) + rest[depth]) / speed) >= best_key[1]:
            # Leaving out items would only be worse, so all the rest must be assigned.
            return True
        item = order[depth]
        seen: set[tuple[float, float, int, int]] = set()
        choices = sorted(range(len(machines)), key=lambda at: ((loads[at] + costs[item]) / machines[at].speed, at))
        for at in choices:
            alike = (machines[at].speed, loads[at], left[at], slots[at])
            if left[at] < sizes[item] or slots[at] < 1 or alike in seen:
                continue
            seen.add(alike)
            before = loads[at]
            after = max(worst, (before + costs[item]) / machines[at].speed)
            if (missing, after) >= best_key:
                continue
            loads[at] = before + costs[item]
            left[at] -= sizes[item]
            slots[at] -= 1
            place[item] = at
            done = visit(depth + 1, missing, after)
            place[item] = -1
            loads[at] = before
            left[at] += sizes[item]
            slots[at] += 1
            if not done:
                return False
        if missing + 1 <= best_key[0]:
            return visit(depth + 1, missing + 1, worst)
        return True

    complete = visit(0, 0, 0.0)
    return best, complete


def _improve(
    costs: Sequence[float], sizes: Sequence[int], machines: Sequence[Machine], place: list[int], enough: float
) -> list[int]:
    """Move an item off the slowest machine, or exchange it for a cheaper one, while the slowest time falls."""
    place = place.copy()
    loads = [_Load(machine) for machine in machines]
    for item, at in enumerate(place):
        if at >= 0:
            loads[at].add(item, costs[item], sizes[item])
    for _ in range(_IMPROVE_STEPS):
        slow = max(range(len(loads)), key=lambda at: loads[at].time)
        step = None if loads[slow].time <= enough else _better(costs, sizes, loads, slow)
        if step is None:
            break
        item, other, at = step
        loads[slow].drop(item, costs[item], sizes[item])
        if other is not None:
            loads[at].drop(other, costs[other], sizes[other])
            loads[slow].add(other, costs[other], sizes[other])
            place[other] = slow
        loads[at].add(item, costs[item], sizes[item])
        place[item] = at
    return place


def _better(
    costs: Sequence[float], sizes: Sequence[int], loads: Sequence[_Load], slow: int
) -> tuple[int, int | None, int] | None:
    """Find the move (item, None, machine) or exchange (item, other, machine) that gives the two the least makespan."""
    source = loads[slow]
    best_time = source.time * (1 - 1e-12)
    best: tuple[int, int | None, int] | None = None
    # One item of each cost and size represents all equal ones.
    mine = {(costs[item], sizes[item]): item for item in sorted(source.items, reverse=True)}
    for at, load in enumerate(loads):
        if at == slow:
            continue
        theirs = {(costs[item], sizes[item]): item for item in sorted(load.items, reverse=True)}
        for (cost, size), item in mine.items():
            if load.left >= size and load.slots >= 1:
                time = max((source.cost - cost) / source.machine.speed, (load.cost + cost) / load.machine.speed)
                if time < best_time:
                    best_time, best = time, (item, None, at)
            if len(mine) * len(theirs) > 10_000:
                continue
            for (other_cost, other_size), other in theirs.items():
                if other_cost >= cost or load.left + other_size < size or source.left + size < other_size:
                    continue
                gain = cost - other_cost
                time = max((source.cost - gain) / source.machine.speed, (load.cost + gain) / load.machine.speed)
                if time < best_time:
                    best_time, best = time, (item, other, at)
    return best
