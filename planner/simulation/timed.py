"""Replay of jobs in virtual time: they arrive, wait in the planner's queue, run for a known time, and end.

The queue is `planner/queue/line.py`, the placement `planner/placement/`, as in a real planner. A job of more devices
than a node has runs on whole nodes, all of one size. Each start is charged a cost, in which the job makes no progress.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Final, Protocol

from msgspec import Struct

from ...schemas.requests import Grant, Placement, WorkRequest
from ..fleet.fleet import Fleet, free, hold
from ..fleet.state import Ask, ask_key
from ..placement.decide import Policies
from ..placement.exact import Pick
from ..placement.policies import Policy
from ..queue.bursts import Bursts
from ..queue.durations import KNOTS, Durations, Estimate, Guesses, Kind, given
from ..queue.line import Entry, Line
from ..queue.order import Rule
from .jobs import Job
from .simulate import SIZE_LABEL, fleet_of
from .trace import Node

START_COST_SECONDS: Final = 10.0
REPORT_EVERY: Final = 64

REVISE_GROWTH: Final = 1.1
"""Growth of the number of ended jobs after which the estimates of those that wait are revised."""


class Knowledge(Protocol):
    """Knowledge that the queue has of durations. A learner is told of the runs, too."""

    def estimate(self, job: Job, now: float) -> Estimate:
        """Estimate of a job's duration."""
        ...

    def started(self, job: Job, now: float) -> None:
        """Note the start of a job."""
        ...

    def ended(self, job: Job, now: float) -> None:
        """Note the end of a job."""
        ...

    def changed(self, now: float) -> list[int]:
        """Numbers of the jobs whose estimates have changed since the last call, but for those by `learned`."""
        ...

    @property
    def learned(self) -> int:
        """Number of ended jobs that estimates rest on; 0 if they do not change."""
        ...


class Segment(Struct, frozen=True):
    """Part of a run on one node.

    Attributes:
        node: its name.
        gpu_indices: devices there.
    """

    node: str
    gpu_indices: tuple[int, ...]


class Interval(Struct, frozen=True):
    """Time in which a job holds devices without a break.

    Attributes:
        started_at: seconds.
        ended_at: seconds.
        segments: one for each node.
    """

    started_at: float
    ended_at: float
    segments: tuple[Segment, ...]


class Run(Struct, frozen=True):
    """A job's run.

    Attributes:
        job: the job.
        intervals: one, and one more for each time that it was preempted; in order.
        expected_seconds: estimate of the duration at its arrival, the start cost included; 0 if none was made.
    """

    job: Job
    intervals: tuple[Interval, ...]
    expected_seconds: float

    @property
    def started_at(self) -> float:
        """Time of the first start, in seconds."""
        return self.intervals[0].started_at

    @property
    def ended_at(self) -> float:
        """Time of the end, in seconds."""
        return self.intervals[-1].ended_at

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Devices at its end, one segment for each node."""
        return self.intervals[-1].segments

    @property
    def held_seconds(self) -> float:
        """Time in which it held devices."""
        return sum(each.ended_at - each.started_at for each in self.intervals)


class Replay(Struct, frozen=True, kw_only=True):
    """Result of a replay.

    Attributes:
        rule: name of the order.
        runs: in the order of the trace.
        impossible: jobs that no idle fleet of these nodes could hold; they are left out.
        gpus: number of devices of the nodes.
        seconds: wall-clock time.
    """

    rule: str
    runs: list[Run]
    impossible: list[Job]
    gpus: int
    seconds: float


class Shapes:
    """Needs of jobs as the planner has them.

    Args:
        fleet: of the nodes.
        nodes: of the trace.
    """

    def __init__(self, fleet: Fleet, nodes: Sequence[Node]) -> None:
        self._fleet = fleet
        self._nodes = nodes
        self._sizes: dict[tuple[str, ...], dict[int, int]] = {}
        self._blocks: dict[tuple[object, ...], Ask] = {}

    def ask(self, job: Job, request: WorkRequest) -> Ask | None:
        """Needs of a job: on one node if its devices fit there, else on whole nodes of one size.

        None if there are not enough nodes of any size.
        """
        sizes = self._nodes_by_size(job)
        if not sizes or job.gpus <= max(sizes):
            return self._fleet.ask(ask_key(request))
        size = next((size for size, nodes in sorted(sizes.items(), reverse=True) if size * nodes >= job.gpus), 0)
        if not size:
            return None
        count = -(-job.gpus // size)
        key = (size, count, request.cpus, request.host_memory_bytes, job.models, job.within)
        found = self._blocks.get(key)
        if found is None:
            spread = WorkRequest(
                owner=request.owner,
                gpus=size * count,
                gpus_per_host=size,
                placement=Placement.SPREAD,
                cpus=request.cpus,
                host_memory_bytes=request.host_memory_bytes,
                models=request.models,
                host_labels={SIZE_LABEL: str(size)} if len(sizes) > 1 else {},
                within=job.within or None,
            )
            found = self._blocks[key] = self._fleet.ask(ask_key(spread))
        return found

    def _nodes_by_size(self, job: Job) -> dict[int, int]:
        """Number of nodes for a job by their number of devices."""
        found = self._sizes.get(job.models)
        if found is None:
            allowed = [node.gpus for node in self._nodes if node.gpus and (not job.models or node.model in job.models)]
            found = self._sizes[job.models] = dict(Counter(allowed))
        return found


class Known:
    """Durations are known: what a job says that it expects, or else what it takes."""

    learned = 0

    def estimate(self, job: Job, now: float) -> Estimate:
        """Estimate of a job's duration."""
        return given(job.duration_seconds if job.expected_seconds is None else job.expected_seconds)

    def started(self, job: Job, now: float) -> None:
        """Do nothing."""

    def ended(self, job: Job, now: float) -> None:
        """Do nothing."""

    def changed(self, now: float) -> list[int]:
        """None."""
        return []


class Guessed:
    """Durations are guessed, with a lognormal error, the same for each job and seed; guesses are corrected.

    Args:
        sigma: standard deviation of the error's logarithm.
        seed: of the errors.
    """

    def __init__(self, sigma: float, seed: int = 0) -> None:
        self.learned = 0
        self._sigma = sigma
        self._seed = seed
        self._guesses = Guesses()

    def estimate(self, job: Job, now: float) -> Estimate:
        """Estimate of a job's duration."""
        return self._guesses.estimate(job.gpus, self.guess(job))

    def guess(self, job: Job) -> float:
        """Duration that a job's owner expects."""
        if job.expected_seconds is not None:
            return job.expected_seconds
        draw = random.Random(f"{self._seed}/{job.number}")
        return job.duration_seconds * math.exp(self._sigma * draw.gauss(0.0, 1.0))

    def started(self, job: Job, now: float) -> None:
        """Do nothing."""

    def ended(self, job: Job, now: float) -> None:
        """Learn how right the guess was."""
        self.learned += 1
        self._guesses.ended(job.gpus, self.guess(job), job.duration_seconds)

    def changed(self, now: float) -> list[int]:
        """None."""
        return []


class Learned:
    """Durations are learned from the jobs that ended before; what a job says that it expects comes first."""

    def __init__(self) -> None:
        self.learned = 0
        self._bursts: Bursts[int] = Bursts(KNOTS)
        self._durations = Durations(self._bursts)

    def estimate(self, job: Job, now: float) -> Estimate:
        """Estimate of a job's duration."""
        if job.expected_seconds is not None:
            return given(job.expected_seconds)
        self._bursts.submitted(job.number, kind_of(job).burst, job.submit_seconds)
        return self._durations.estimate(kind_of(job), now, lease=job.number)

    def started(self, job: Job, now: float) -> None:
        """Note the start of a job."""
        self._durations.started(job.number, kind_of(job), now)

    def ended(self, job: Job, now: float) -> None:
        """Note the end of a job."""
        self.learned += 1
        self._durations.ended(job.number, kind_of(job), now)

    def changed(self, now: float) -> list[int]:
        """Siblings of those that have ended or grown older."""
        return self._bursts.changed(now)


def kind_of(job: Job) -> Kind:
    """Kind of a job, by which durations are learned."""
    return Kind(job.owner, job.name, (job.gpus, job.share_milli, job.models))


def replay(
    nodes: Sequence[Node],
    jobs: Sequence[Job],
    rule: Rule,
    policy: Policy,
    *,
    name: str = "",
    start_cost_seconds: float = START_COST_SECONDS,
    knowledge: Knowledge | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_turn: Callable[[Line, float], None] | None = None,
) -> Replay:
    """Replay jobs on nodes.

    Args:
        nodes: all hosts.
        jobs: in any order; they arrive by `submit_seconds`.
        rule: order of the queue.
        policy: ranks hosts.
        name: of the rule.
        start_cost_seconds: charged to each start.
        knowledge: what the queue knows of durations; by default all.
        on_progress: called now and then with the number of jobs that have ended.
        on_turn: called with the line each time that it was served, and the time.
    """
    began = time.perf_counter()
    fleet = fleet_of(nodes)
    policies = Policies(policy.name)
    policies.use(policy)
    world = _World(fleet, nodes, Line(fleet, policies, rule), policy, start_cost_seconds, knowledge or Known())
    world.on_turn = on_turn
    return run_through(world, nodes, jobs, name, began, on_progress)


class World(Protocol):
    """State of a replay, in which jobs arrive and time passes.

    Attributes:
        runs: of jobs, by their numbers.
        impossible: jobs that no idle fleet of its nodes could hold.
    """

    runs: dict[int, Run]
    impossible: list[Job]

    def arrive(self, job: Job) -> None:
        """Take in a job at its time."""
        ...

    def until(self, when: float) -> None:
        """Let time pass up to the next arrival."""
        ...


def run_through(
    world: World,
    nodes: Sequence[Node],
    jobs: Sequence[Job],
    name: str,
    began: float,
    on_progress: Callable[[int], None] | None,
) -> Replay:
    """Let all jobs arrive in a world, and time pass until the last has ended.

    Args:
        world: of the replay.
        nodes: all hosts.
        jobs: in any order; they arrive by `submit_seconds`.
        name: of the rule.
        began: begin of the replay, by `time.perf_counter`.
        on_progress: called now and then with the number of jobs that have ended.
    """
    for job in sorted(jobs, key=lambda job: (job.submit_seconds, job.number)):
        world.until(job.submit_seconds)
        world.arrive(job)
        if on_progress is not None and job.number % REPORT_EVERY == 0:
            on_progress(len(world.runs))
    world.until(math.inf)
    if on_progress is not None:
        on_progress(len(jobs))
    return Replay(
        rule=name,
        runs=[world.runs[job.number] for job in jobs if job.number in world.runs],
        impossible=world.impossible,
        gpus=sum(node.gpus for node in nodes),
        seconds=time.perf_counter() - began,
    )


class _World:
    """State of a replay: the fleet, the line, and the runs so far."""

    def __init__(
        self,
        fleet: Fleet,
        nodes: Sequence[Node],
        line: Line,
        policy: Policy,
        start_cost_seconds: float,
        knowledge: Knowledge,
    ) -> None:
        self.fleet = fleet
        self.line = line
        self.runs: dict[int, Run] = {}
        self.impossible: list[Job] = []
        self._shapes = Shapes(fleet, nodes)
        self._policy = policy
        self._cost = start_cost_seconds
        self._knowledge = knowledge
        self._revised = 0
        self._waiting: dict[int, Entry] = {}
        self._ends: list[tuple[float, int, Job]] = []
        self._now = -math.inf
        self._dirty = False
        self._requests: dict[tuple[object, ...], WorkRequest] = {}
        self._able: dict[Ask, bool] = {}
        self.on_turn: Callable[[Line, float], None] | None = None
        self._first = nodes[0].name if nodes else ""

    def arrive(self, job: Job) -> None:
        """Take in a job at its time."""
        self._now = now = job.submit_seconds
        if job.empty:  # the planner refuses such a request: there is nothing to decide
            self._run(job, now, (Segment(self._first, ()),), self._cost)
            return
        request = self._request(job)
        ask = self._shapes.ask(job, request)
        if ask is None or not self._possible(ask):
            self.impossible.append(job)
            return
        self._policy.observe(self.fleet, ask.part(1) if ask.placement is Placement.SPREAD else ask)
        self._waiting[job.number] = self.line.arrive(request, self._estimate(job, now), now, ask=ask, payload=job)
        self._dirty = True

    def until(self, when: float) -> None:
        """Let time pass up to the next arrival."""
        if self._dirty and when > self._now:
            self._serve()
        while self._ends and self._ends[0][0] <= when:
            self._now = self._ends[0][0]
            while self._ends and self._ends[0][0] == self._now:
                self._end(heappop(self._ends)[2])
            if self._now < when:
                self._serve()
            else:
                self._dirty = True

    def _serve(self) -> None:
        self._dirty = False
        if self._knowledge.learned > REVISE_GROWTH * self._revised:
            self._revised = self._knowledge.learned
            for entry in self.line:
                self.line.revise(entry, self._estimate(entry.payload, self._now))
        self._revise_changed()
        for start in self.line.serve(self._now):
            job: Job = start.entry.payload
            del self._waiting[job.number]
            lease = str(job.number)
            hold(self.fleet, lease, grants_of(start.picks))
            self.line.started(lease, start.entry, self._now)
            self._knowledge.started(job, self._now)
            self._run(job, self._now, segments_of(job, start.picks), start.entry.estimate.seconds)
        if self.on_turn is not None:
            self.on_turn(self.line, self._now)

    def _revise_changed(self) -> None:
        for number in self._knowledge.changed(self._now):
            entry, run = self._waiting.get(number), self.runs.get(number)
            if entry is not None:
                self.line.revise(entry, self._estimate(entry.payload, self._now))
            elif run is not None:
                self.line.revise_lease(str(number), self._estimate(run.job, self._now), self._now)

    def _run(self, job: Job, now: float, segments: tuple[Segment, ...], expected: float) -> None:
        end = now + self._cost + job.duration_seconds
        self.runs[job.number] = Run(job, (Interval(now, end, segments),), expected)
        heappush(self._ends, (end, job.number, job))

    def _end(self, job: Job) -> None:
        if job.empty:
            return
        lease = str(job.number)
        self.line.ended(lease, self._now)
        free(self.fleet, lease)
        self._knowledge.ended(job, self._now)

    def _estimate(self, job: Job, now: float) -> Estimate:
        found = self._knowledge.estimate(job, now)
        return Estimate(tuple(q + self._cost for q in found.quantiles), found.basis, found.count, found.limit)

    def _possible(self, ask: Ask) -> bool:
        found = self._able.get(ask)
        if found is None:
            found = self._able[ask] = self.line.possible(ask)
        return found

    def _request(self, job: Job) -> WorkRequest:
        key = (job.owner, job.gpus, job.share_milli, job.cpus_milli, job.memory_mib, job.models, job.priority)
        found = self._requests.get(key)
        if found is None:
            found = self._requests[key] = job.request()
        return found


def segments_of(job: Job, picks: Sequence[Pick]) -> tuple[Segment, ...]:
    """Devices that a job uses of those that were picked for it."""
    picked = tuple(Segment(pick.host.name, tuple(device.index for device in pick.devices)) for pick in picks)
    return _used(job, picked)


def _used(job: Job, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Devices that a job uses: on whole nodes it may have more."""
    found: list[Segment] = []
    left = job.gpus
    for segment in segments:
        found.append(Segment(segment.node, segment.gpu_indices[:left] if job.gpus else ()))
        left -= len(found[-1].gpu_indices)
    return tuple(found)


def grants_of(picks: Sequence[Pick]) -> list[Grant]:
    """Grants of a placement, as far as the fleet's accounts need them."""
    found: list[Grant] = []
    for pick in picks:
        ask = pick.ask
        cpus, ram = ask.cpus_milli / 1000, ask.host_memory_bytes
        if not pick.devices:
            found.append(Grant(host=pick.host.name, share=0.0, cpus=cpus, host_memory_bytes=ram))
        for device in pick.devices:
            share = ask.share / 10**9
            memory = device.memory_free if ask.whole else ask.gpu_memory_bytes or device.part(ask.share)
            found.append(
                Grant(
                    host=pick.host.name,
                    device=device.uuid,
                    memory_bytes=memory,
                    share=share,
                    cpus=cpus,
                    host_memory_bytes=ram,
                )
            )
            cpus, ram = 0.0, 0
    return found


__all__ = [
    "Guessed",
    "Interval",
    "Knowledge",
    "Known",
    "Learned",
    "Replay",
    "Run",
    "Segment",
    "Shapes",
    "grants_of",
    "replay",
    "segments_of",
]
