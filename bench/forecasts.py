"""How good is the expected start of a waiting request? On a fleet in virtual time, with workloads that repeat.

    python bench/forecasts.py [--seeds 1,2,3] [--jobs 3000] [--spread 0.3] [--load 1.0] [--rule shortest]

Each workload has a name, an owner, a size and a median duration; its runs spread around that (lognormal). Nobody says
how long work takes: the queue learns it from what has ended. Each request is forecast soon after its arrival, and that
first forecast is compared with its start. As peers: the same without the correction by past forecasts, and the mean
wait of the last 50 that started.

Printed are the median error in parts of the wait, and the part of starts inside the 80 % interval, each over requests
that waited for at least a minute, after the first fifth.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from corral.planner.placement.decide import ask_of
from corral.planner.placement.policies import make
from corral.planner.queue.backfill import stay_of
from corral.planner.queue.forecast import Arrival, Arrivals, Calibration, Forecast, forecast
from corral.planner.queue.line import Line, size_of
from corral.planner.queue.order import rule_of
from corral.planner.simulation.jobs import Job
from corral.planner.simulation.timed import Learned, replay
from corral.planner.simulation.trace import Node

NODES = 8
GPUS = 8
EVERY_SECONDS = 60.0
LEAST_WAIT_SECONDS = 60.0
SIZES = (1, 1, 1, 2, 2, 4, 8)


class Workload(NamedTuple):
    """Work that comes again and again."""

    name: str
    owner: str
    gpus: int
    median_seconds: float


class Told(NamedTuple):
    """First forecast of a request, as computed and as published, and the mean of recent waits."""

    made_at: float
    computed: Forecast
    published: Forecast
    recent: float


class Outcome(NamedTuple):
    """A request that waited and started."""

    asked_at: float
    started_at: float
    told: Told


def workloads(draw: random.Random, count: int) -> list[Workload]:
    """Workloads of a few owners, whose durations differ by orders of magnitude."""
    return [
        Workload(f"work{at}", f"owner{draw.randrange(8)}", draw.choice(SIZES), math.exp(draw.gauss(7.5, 1.0)))
        for at in range(count)
    ]


def jobs_of(seed: int, count: int, spread: float, load: float, swing: float) -> list[Job]:
    """Jobs of random workloads, at a load that goes up and down by a part within twelve hours."""
    draw = random.Random(seed)
    kinds = workloads(draw, 40)
    work = statistics.fmean(kind.gpus * kind.median_seconds for kind in kinds) * math.exp(spread**2 / 2)
    mean_gap = work / (NODES * GPUS * load)
    now, found = 0.0, []
    for number in range(count):
        now += draw.expovariate((1 + swing * math.sin(now / 43_200 * math.tau)) / mean_gap)
        kind = draw.choice(kinds)
        found.append(
            Job(
                number=number,
                name=kind.name,
                owner=kind.owner,
                submit_seconds=now,
                duration_seconds=kind.median_seconds * math.exp(spread * draw.gauss(0.0, 1.0)),
                gpus=kind.gpus,
            )
        )
    return found


class Observer:
    """Forecasts the line as the planner does, in virtual time."""

    def __init__(self, jobs: Sequence[Job], knowledge: Learned) -> None:
        self.outcomes: list[Outcome] = []
        self._jobs = deque(jobs)
        self._knowledge = knowledge
        self._arrivals = Arrivals()
        self._calibration = Calibration()
        self._told: dict[int, tuple[float, Told]] = {}
        self._waits: deque[float] = deque(maxlen=50)
        self._next = -math.inf
        self._rounds = 0

    def turn(self, line: Line, now: float) -> None:
        """Note who has started, and forecast those who wait."""
        while self._jobs and self._jobs[0].submit_seconds <= now:
            job = self._jobs.popleft()
            ask, estimate = ask_of(line.fleet, job.request()), self._knowledge.estimate(job, now)
            stay = stay_of(line.fleet, job.request())
            self._arrivals.add(Arrival(job.submit_seconds, ask, job.priority, size_of(line.fleet, ask), estimate, stay))
        waiting = {entry.number for entry in line}
        for number in [number for number in self._told if number not in waiting]:
            asked_at, told = self._told.pop(number)
            self._calibration.started(told.made_at, told.computed, now)
            self._waits.append(now - asked_at)
            self.outcomes.append(Outcome(asked_at, now, told))
        if now < self._next or not waiting:
            return
        self._next = now + EVERY_SECONDS
        if waiting.issubset(self._told):
            return
        self._rounds += 1
        found = forecast(line, now, seed=self._rounds, arrivals=self._arrivals)
        recent = statistics.fmean(self._waits) if self._waits else 0.0
        for entry in line:
            if entry.number not in self._told:
                computed = found[entry.number]
                told = Told(now, computed, self._calibration.corrected(now, computed), entry.arrived_at + recent)
                self._told[entry.number] = entry.arrived_at, told


def observe(seed: int, count: int, spread: float, load: float, rule: str, swing: float = 0.0) -> list[Outcome]:
    """Replay jobs with forecasts."""
    nodes = [Node(f"n{at}", 10**6, 10**6, GPUS, "H100") for at in range(NODES)]
    jobs = jobs_of(seed, count, spread, load, swing)
    knowledge = Learned()
    observer = Observer(jobs, knowledge)
    replay(nodes, jobs, rule_of(rule), make("opportunity"), knowledge=knowledge, on_turn=observer.turn)
    return observer.outcomes


def words(outcomes: Sequence[Outcome], least_seconds: float) -> str:
    """Measures of all outcomes, as a line."""
    counted = [one for one in outcomes[len(outcomes) // 5 :] if one.started_at - one.asked_at >= least_seconds]
    if not counted:
        return "nobody waited"
    waits = [one.started_at - one.asked_at for one in counted]

    def error(expected: Sequence[float]) -> float:
        gaps = zip(expected, counted, waits, strict=True)
        return statistics.median(abs(at - one.started_at) / wait for at, one, wait in gaps)

    def inside(forecasts: Sequence[Forecast]) -> float:
        pairs = zip(forecasts, counted, strict=True)
        return statistics.fmean(shown.low <= one.started_at <= shown.high for shown, one in pairs)

    published, computed = [one.told.published for one in counted], [one.told.computed for one in counted]
    return (
        f"{len(counted):5} waited, median {statistics.median(waits):7.0f} s | "
        f"error {error([one.expected for one in published]):5.1%}, inside {inside(published):5.1%} | uncorrected "
        f"{error([one.expected for one in computed]):5.1%}, {inside(computed):5.1%} | "
        f"mean of recent waits {error([one.told.recent for one in counted]):5.1%}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--jobs", type=int, default=3000)
    parser.add_argument("--spread", type=float, default=0.3)
    parser.add_argument("--load", type=float, default=0.95)
    parser.add_argument("--swing", type=float, default=0.0, help="part by which the load goes up and down")
    parser.add_argument("--rule", default="shortest")
    asked = parser.parse_args()
    for seed in asked.seeds.split(","):
        found = observe(int(seed), asked.jobs, asked.spread, asked.load, asked.rule, asked.swing)
        print(f"{asked.rule}, seed {seed}: {words(found, LEAST_WAIT_SECONDS)}", flush=True)
