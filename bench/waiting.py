"""The queue at its fullest: 10,000 requests wait on 10,000 devices, and another arrives, or a lease ends.

`planner/queue/line.py` and, as its peer, a list in which each request is decided in turn, without reservations: in the
same process, on the same fleet, for the same events.

    python bench/waiting.py [--waiting 10000] [--hosts 1250] [--events 400] [--plain 3]
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import resource
import time
from collections.abc import Callable

from corral.planner.fleet.fleet import Fleet, free, hold
from corral.planner.placement.decide import Placed, Policies, ask_of, decide
from corral.planner.queue.durations import given
from corral.planner.queue.line import Line
from corral.planner.simulation.simulate import fleet_of
from corral.planner.simulation.timed import grants_of
from corral.planner.simulation.trace import Node
from corral.schemas.requests import Placement, WorkRequest

MODELS = ("H100", "A100", "L40S", "T4")
SIZES = (1, 1, 1, 1, 2, 4, 8, 8, 16, 32)


def request_of(draw: random.Random, number: int) -> WorkRequest:
    """One request of a mix of some 150 different needs."""
    gpus = draw.choice(SIZES)
    return WorkRequest(
        owner=f"owner{draw.randrange(20)}",
        gpus=gpus,
        models=[] if draw.random() < 0.5 else [draw.choice(MODELS)],
        cpus=float(gpus * draw.choice((0, 4, 8))),
        placement=Placement.FEWEST_HOSTS if gpus > 8 else Placement.SAME_HOST,
        request_id=f"r{number}",
        wait_seconds=3600,
    )


def full_fleet(hosts: int, draw: random.Random) -> tuple[Fleet, list[tuple[str, float]]]:
    """A fleet on which no device is free, and its leases with the times that they take."""
    nodes = [Node(f"h{at:05d}", 96_000, 10**6, 8, MODELS[at % len(MODELS)]) for at in range(hosts)]
    fleet = fleet_of(nodes)
    policies = Policies("best-fit")
    leases: list[tuple[str, float]] = []
    small = 0
    while small < 20:
        gpus = draw.choice((1, 2, 4, 8))
        decision = decide(fleet, WorkRequest(owner="busy", gpus=gpus, cpus=float(gpus)), 0.0, policies)
        if not isinstance(decision, Placed):
            small += 1
            continue
        leases.append((f"l{len(leases)}", math.exp(draw.gauss(8, 1.5))))
        hold(fleet, leases[-1][0], decision.grants)
    while isinstance(decision := decide(fleet, WorkRequest(owner="busy"), 0.0, policies), Placed):
        leases.append((f"l{len(leases)}", math.exp(draw.gauss(8, 1.5))))
        hold(fleet, leases[-1][0], decision.grants)
    return fleet, leases


class Queue:
    """The queue as it is."""

    def __init__(self, fleet: Fleet, leases: list[tuple[str, float]], policy: str) -> None:
        self.fleet = fleet
        self.line = Line(fleet, Policies(policy))
        self.started = 0
        for lease, seconds in leases:
            self.line.adopt(lease, "busy", 1.0, given(seconds), 0.0)

    def put(self, request: WorkRequest, seconds: float, now: float) -> None:
        self.line.arrive(request, given(seconds), now)

    def serve(self, now: float) -> None:
        for start in self.line.serve(now):
            self.started += 1
            lease = f"n{self.started}"
            hold(self.fleet, lease, grants_of(start.picks))
            self.line.started(lease, start.entry, now)

    def end(self, lease: str, now: float) -> None:
        self.line.ended(lease, now)
        free(self.fleet, lease)


class Plain:
    """The peer: a list by arrival, in which each request is decided in turn, and equal ones once."""

    def __init__(self, fleet: Fleet, leases: list[tuple[str, float]], policy: str) -> None:
        self.fleet = fleet
        self.policies = Policies(policy)
        self.waiting: list[WorkRequest] = []
        self.started = 0

    def put(self, request: WorkRequest, seconds: float, now: float) -> None:
        self.waiting.append(request)

    def serve(self, now: float) -> None:
        refused: set[object] = set()
        left: list[WorkRequest] = []
        for request in self.waiting:
            key = (ask_of(self.fleet, request), request.policy)
            decision = None if key in refused else decide(self.fleet, request, now, self.policies, learn=False)
            if isinstance(decision, Placed):
                self.started += 1
                hold(self.fleet, f"n{self.started}", decision.grants)
            else:
                refused.add(key)
                left.append(request)
        self.waiting = left

    def end(self, lease: str, now: float) -> None:
        free(self.fleet, lease)


def timed(work: Callable[[], None]) -> float:
    """Time on the processor: what others do on the machine meanwhile is not the queue's."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def words(name: str, seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"{name:24} p50 {1e3 * p50:10.3f} ms   p99 {1e3 * p99:10.3f} ms   most {1e3 * ordered[-1]:10.3f} ms"


def run(kind: type[Queue] | type[Plain], events: int, waiting: int, hosts: int, policy: str) -> list[float]:
    """Fill, then time the events; returns the median of arrivals and of ends."""
    draw = random.Random(1)
    fleet, leases = full_fleet(hosts, draw)
    queue = kind(fleet, leases, policy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(waiting):
        queue.put(request_of(draw, number), math.exp(draw.gauss(8, 1.5)), 1.0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    now = 100.0
    first = timed(lambda: queue.serve(now))
    gc.collect()
    gc.freeze()
    arrivals: list[float] = []
    ends: list[float] = []
    order = [lease for lease, _ in leases]
    draw.shuffle(order)
    for number in range(events):
        now += 0.1
        request, seconds = request_of(draw, waiting + number), math.exp(draw.gauss(8, 1.5))

        def arrive(request: WorkRequest = request, seconds: float = seconds, now: float = now) -> None:
            queue.put(request, seconds, now)
            queue.serve(now)

        def end(lease: str = order[number], now: float = now) -> None:
            queue.end(lease, now)
            queue.serve(now)

        arrivals.append(timed(arrive))
        ends.append(timed(end))
    name = kind.__name__.lower()
    print(
        f"{name}: {waiting:,} waiting on {8 * hosts:,} devices; first served in {first:.3f} s, {queue.started} started;"
    )
    print(f"  {memory / 1024:.0f} MiB more at its peak for those that wait")
    print("  " + words("an arrival", arrivals))
    print("  " + words("the end of a lease", ends))
    return [sorted(each)[len(each) // 2] for each in (arrivals, ends)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--hosts", type=int, default=1250)
    parser.add_argument("--events", type=int, default=400)
    parser.add_argument("--plain", type=int, default=3, help="events for the peer, which takes long")
    parser.add_argument("--policy", default="opportunity")
    asked = parser.parse_args()
    found = run(Queue, asked.events, asked.waiting, asked.hosts, asked.policy)
    if asked.plain:
        peer = run(Plain, asked.plain, asked.waiting, asked.hosts, asked.policy)
        print(f"medians: {peer[0] / found[0]:,.0f} and {peer[1] / found[1]:,.0f} times as fast as the list")
