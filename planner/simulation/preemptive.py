"""Replay of jobs in virtual time that may be preempted at any instant, by the attained service of each.

Durations are unknown. A preempted job keeps its progress, as one that saves its work when it gets the signal to stop;
each further start is charged the cost of a start again. The order is that of `planner/queue/attained.py`, the placement
that of a real planner.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Final

from msgspec import Struct

from ..fleet.fleet import Fleet
from ..fleet.state import Ask
from ..placement.policies import Policy
from ..queue.attained import LEVELS, AttainedLine, Entry, Levels, level_of, next_level
from .jobs import Job
from .simulate import fleet_of
from .timed import START_COST_SECONDS, Interval, Replay, Run, Segment, Shapes, grants_of, run_through, segments_of
from .trace import Node

NAME: Final = "attained"
"""Name of the order on the command line."""
_CLOSE_SECONDS: Final = 0.01
"""Time before its end from which on a job is not stopped."""

_ROUNDING: Final = 1e-3
"""Allowance for rounding, in device seconds."""


class _State(Struct, eq=False):
    """A job on its way.

    Attributes:
        job: the job.
        entry: in the line.
        done_seconds: progress before the present interval.
        started_at: of the present interval, in seconds; infinite while it waits.
        segments: of the present interval.
        intervals: those that are over.
        starts: number of starts.
    """

    job: Job
    entry: Entry
    done_seconds: float = 0.0
    started_at: float = math.inf
    segments: tuple[Segment, ...] = ()
    intervals: tuple[Interval, ...] = ()
    starts: int = 0


def replay_preemptive(
    nodes: Sequence[Node],
    jobs: Sequence[Job],
    policy: Policy,
    *,
    levels: Levels = LEVELS,
    start_cost_seconds: float = START_COST_SECONDS,
    on_progress: Callable[[int], None] | None = None,
) -> Replay:
    """Replay jobs on nodes, all of which may be preempted.

    Args:
        nodes: all hosts.
        jobs: in any order; they arrive by `submit_seconds`.
        policy: ranks hosts.
        levels: of attained service.
        start_cost_seconds: charged to each start.
        on_progress: called now and then with the number of jobs that have ended.
    """
    began = time.perf_counter()
    world = _World(fleet_of(nodes), nodes, policy, levels, start_cost_seconds)
    return run_through(world, nodes, jobs, NAME, began, on_progress)


class _World:
    """State of a replay: the fleet, the jobs on their way, and the runs so far."""

    def __init__(self, fleet: Fleet, nodes: Sequence[Node], policy: Policy, levels: Levels, cost: float) -> None:
        self.runs: dict[int, Run] = {}
        self.impossible: list[Job] = []
        self._fleet = fleet
        self._policy = policy
        self._levels = levels
        self._cost = cost
        self._shapes = Shapes(fleet, nodes)
        self._line = AttainedLine(fleet, policy, grants_of)
        self._running: dict[str, _State] = {}
        self._events: list[tuple[float, int, int, _State]] = []
        """(time, number of the job, number of its start, job): an end, or the begin of its next level"""
        self._able: dict[Ask, bool] = {}
        self._now = -math.inf
        self._dirty = False
        self._first = nodes[0].name if nodes else ""

    def arrive(self, job: Job) -> None:
        """Take in a job at its time."""
        self._now = now = job.submit_seconds
        if job.empty:  # the planner refuses such a request: there is nothing to decide
            end = now + self._cost + job.duration_seconds
            self.runs[job.number] = Run(job, (Interval(now, end, (Segment(self._first, ()),)),), 0.0)
            return
        ask = self._shapes.ask(job, job.request())
        if ask is None or not self._possible(ask):
            self.impossible.append(job)
            return
        entry = Entry(str(job.number), ask, job.priority, now, job.number, _size(job))
        entry.payload = _State(job, entry)
        self._line.arrive(entry)
        self._dirty = True

    def until(self, when: float) -> None:
        """Let time pass up to the next arrival."""
        if self._dirty and when > self._now:
            self._turn()
        while self._events and self._events[0][0] <= when:
            self._now = self._events[0][0]
            while self._events and self._events[0][0] == self._now:
                self._event(*heappop(self._events)[2:])
            if self._dirty and self._now < when:
                self._turn()

    def _possible(self, ask: Ask) -> bool:
        """True if the idle nodes could hold it."""
        found = self._able.get(ask)
        if found is None:
            found = self._able[ask] = self._line.possible(ask)
        return found

    def _turn(self) -> None:
        self._dirty = False
        for state in self._running.values():
            state.entry.level = level_of(self._served(state), self._levels)
            state.entry.firm = self._ends_at(state) - self._now < _CLOSE_SECONDS
        turn = self._line.turn(self._now)
        for entry in turn.stops:
            state: _State = entry.payload
            state.done_seconds = self._progress(state)
            state.intervals = (*state.intervals, Interval(state.started_at, self._now, state.segments))
            state.started_at = math.inf
            del self._running[entry.name]
        for entry in turn.starts:
            state = entry.payload
            assert entry.picks is not None
            state.started_at, state.segments = self._now, segments_of(state.job, entry.picks)
            state.starts += 1
            self._running[entry.name] = state
            self._expect(state)

    def _event(self, start: int, state: _State) -> None:
        """Let a job end, or its next level begin."""
        if start != state.starts or state.started_at == math.inf:
            return
        self._dirty = True
        if self._ends_at(state) > self._now:
            self._expect(state)
            return
        del self._running[state.entry.name]
        self._line.end(state.entry)
        last = Interval(state.started_at, self._now, state.segments)
        self.runs[state.job.number] = Run(state.job, (*state.intervals, last), 0.0)

    def _expect(self, state: _State) -> None:
        """Note the time of its end, or of the begin of its next level, whichever comes first."""
        size = state.entry.size
        at = self._ends_at(state)
        needed = next_level(self._served(state), self._levels) / size if size else math.inf
        begins = state.started_at + self._cost + needed - state.done_seconds
        if self._now < begins < at:
            at = begins
        heappush(self._events, (at, state.job.number, state.starts, state))

    def _ends_at(self, state: _State) -> float:
        return state.started_at + self._cost + state.job.duration_seconds - state.done_seconds

    def _progress(self, state: _State) -> float:
        """Seconds of its duration that are done."""
        return state.done_seconds + max(0.0, self._now - state.started_at - self._cost)

    def _served(self, state: _State) -> float:
        """Device seconds that it has had, a little more than that so that no rounding delays a level."""
        return self._progress(state) * state.entry.size + _ROUNDING


def _size(job: Job) -> float:
    """Devices that count for its attained service."""
    return job.gpus * job.share_milli / 1000
