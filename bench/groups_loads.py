"""Loads of Kueue's performance tests, and when they would end under a scheduler that takes no time.

kubernetes-sigs/kueue, `test/performance/scheduler/configs`, August 2026: cohorts of queues with a quota of 20 units
each that may borrow 100 from the cohort, and workloads of three classes that arrive on a schedule, run for a time, and
have a priority. A unit is a GPU, a cohort is a group, and a queue is a group within it.
"""

from __future__ import annotations

import heapq
import math
from typing import Any, NamedTuple

QUOTA = 20
BORROWS = 100


class Kind(NamedTuple):
    """A class of workloads, as each queue submits it."""

    name: str
    copies: int
    units: int
    seconds: float
    every_seconds: float
    priority: int


class Load(NamedTuple):
    """A load, with the figures that Kueue publishes for it."""

    cohorts: int
    queues: int
    kinds: tuple[Kind, ...]
    kueue: str


LOADS = {
    "baseline": Load(
        5,
        6,
        (
            Kind("large", 50, 20, 1.0, 1.2, 200),
            Kind("medium", 100, 5, 0.5, 0.5, 100),
            Kind("small", 350, 1, 0.2, 0.1, 50),
        ),
        "351 s; 16.5 / 76.8 / 215.5 s",
    ),
    "large-scale": Load(
        10,
        100,
        (
            Kind("large", 4, 20, 0.7, 0.7, 200),
            Kind("medium", 11, 5, 0.35, 0.3, 100),
            Kind("small", 35, 1, 0.15, 0.06, 50),
        ),
        "1,179 s; 105.6 / 256.4 / 700.4 s",
    ),
}


def without_priorities(load: Load) -> Load:
    """The same load, where no workload goes before others by its priority."""
    return load._replace(kinds=tuple(kind._replace(priority=0) for kind in load.kinds))


class Work(NamedTuple):
    """A workload."""

    at: float
    cohort: int
    queue: int
    kind: Kind
    number: int

    @property
    def owner(self) -> str:
        return f"c{self.cohort}q{self.queue}"

    @property
    def request_id(self) -> str:
        return f"{self.owner}-{self.kind.name}-{self.number}"


def workloads(load: Load) -> list[Work]:
    found = [
        Work(kind.every_seconds * (number + 1), cohort, queue, kind, number)
        for cohort in range(load.cohorts)
        for queue in range(load.queues)
        for kind in load.kinds
        for number in range(kind.copies)
    ]
    return sorted(found)


def floor(load: Load) -> tuple[float, dict[str, list[float]]]:
    """The load under a scheduler that takes no time: in each cohort by priority and age, whatever fits."""
    end = 0.0
    waits: dict[str, list[float]] = {kind.name: [] for kind in load.kinds}
    works = [work for work in workloads(load) if work.cohort == 0]
    free, now = load.queues * QUOTA, 0.0
    running: list[tuple[float, int]] = []
    waiting: list[Work] = []
    todo = works[::-1]
    while todo or waiting or running:
        now = min(todo[-1].at if todo else math.inf, running[0][0] if running else math.inf)
        while running and running[0][0] <= now:
            free += heapq.heappop(running)[1]
        while todo and todo[-1].at <= now:
            waiting.append(todo.pop())
        waiting.sort(key=lambda work: (-work.kind.priority, work.at))
        for work in list(waiting):
            if work.kind.units <= free:
                free -= work.kind.units
                waits[work.kind.name].append(now - work.at)
                heapq.heappush(running, (now + work.kind.seconds, work.kind.units))
                waiting.remove(work)
        end = max(end, now)
    return end, waits


def groups(load: Load) -> dict[str, Any]:
    """The groups of a load, as a change."""
    found: list[dict[str, Any]] = []
    for cohort in range(load.cohorts):
        found.append({"name": f"c{cohort}", "limit": {"gpus": {"*": load.queues * QUOTA}}})
        found += [
            {
                "name": f"c{cohort}/q{queue}",
                "guarantee": {"gpus": {"*": QUOTA}},
                "borrowing_limit": {"gpus": {"*": BORROWS}},
                "members": [f"c{cohort}q{queue}"],
            }
            for queue in range(load.queues)
        ]
    return {"replace": {"groups": found}, "operator": "bench"}
