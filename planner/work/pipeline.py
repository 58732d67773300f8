"""Distribution of contiguous runs of items over devices in order (pipeline stages): the exact least slowest stage.

Given a time T, each device in order takes as many items as fit in T, in its memory and under its limit. Taking fewer
never lets later devices get further, so T is feasible if and only if that reaches the end. The least feasible T is one
of the stage times, found by bisection: each success gives a stage time to go below, until the next smaller float fails.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .balance import Machine


class Staged(NamedTuple):
    """Runs of items.

    Attributes:
        ends: for each machine the index after its last item; its first is at the end of the machine before.
        slowest: time of the slowest stage.
    """

    ends: list[int]
    slowest: float


def pipeline(costs: Sequence[float], sizes: Sequence[int], machines: Sequence[Machine]) -> Staged:
    """Split items into contiguous runs, one per machine, some perhaps empty.

    If memory or limits let no split reach the end, the longest run from the start that fits is split, and the rest is
    left out: the last of `ends` is where it begins.
    """
    work = [0.0, *accumulate(costs)]
    memory = [0, *accumulate(sizes)]

    def reach(limit: float) -> Staged:
        at, slowest = 0, 0.0
        ends: list[int] = []
        for machine in machines:
            end = bisect_right(memory, memory[at] + machine.memory) - 1
            if machine.most is not None:
                end = min(end, at + machine.most)
            if not math.isinf(limit):
                end = min(end, bisect_right(work, work[at] + limit * machine.speed) - 1)
                # The sum above is rounded; the quotient below decides.
                while end < len(costs) and _time(work, at, end + 1, machine) <= limit and _fits(at, end + 1, machine):
                    end += 1
                while end > at and _time(work, at, end, machine) > limit:
                    end -= 1
            end = max(end, at)
            slowest = max(slowest, _time(work, at, end, machine))
            ends.append(end)
            at = end
        return Staged(ends, slowest)

    def _fits(start: int, end: int, machine: Machine) -> bool:
        return memory[end] - memory[start] <= machine.memory and (machine.most is None or end - start <= machine.most)

    best = reach(math.inf)
    goal = best.ends[-1] if best.ends else 0
    low, high = 0.0, best.slowest
    if goal == 0:
        return best
    while True:
        middle = (low + high) / 2
        below = math.nextafter(high, 0.0)
        if middle >= high or middle <= low:
            middle = below
        if middle < low or high == 0.0:
            return best
        found = reach(middle)
        if found.ends[-1] >= goal:
            best, high = found, found.slowest
        elif middle == below:
            return best
        else:
            low = middle


def _time(work: Sequence[float], start: int, end: int, machine: Machine) -> float:
    return (work[end] - work[start]) / machine.speed
