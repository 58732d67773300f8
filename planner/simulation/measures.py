"""Measures of a replay with time, as the papers on cluster scheduling have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from .timed import Replay, Run

BOUND_SECONDS: Final = 10.0
"""Least run time in a slowdown, so that the shortest jobs do not rule the mean [1].

[1] D. Feitelson, L. Rudolph: Metrics and Benchmarking for Parallel Job Scheduling. JSSPP 1998.
"""


class Measures(Struct, frozen=True, kw_only=True):
    """Measures of a replay; times in seconds. JCT is the time from submission to the end.

    Attributes:
        rule: name of the order.
        jobs: number of jobs that ran.
        impossible: jobs that the nodes could not hold even when idle.
        jct_mean: mean JCT.
        jct_p99: 99th percentile, `sorted[int(0.99 * n)]`.
        wait_mean: mean wait: until the start and, for a job that was preempted, until each further one.
        wait_p95: 95th percentile of the wait.
        makespan: end of the last job.
        utilization: device seconds that jobs held, over those of all devices until the last end.
        slowdown_mean: mean bounded slowdown, JCT / max(run time, 10 s), at least 1.
        jain: Jain's index over owners of 1 / mean bounded slowdown; 1 with fewer than two owners.
        owners: number of owners.
        preemptions: number of times that a job lost its devices before its end.
        seconds: wall-clock time of the replay.
    """

    rule: str
    jobs: int
    impossible: int
    jct_mean: float
    jct_p99: float
    wait_mean: float
    wait_p95: float
    makespan: float
    utilization: float
    slowdown_mean: float
    jain: float
    owners: int
    preemptions: int
    seconds: float


def measure(replay: Replay) -> Measures:
    """Compute the measures of a replay."""
    runs = replay.runs
    jcts = sorted(run.ended_at - run.job.submit_seconds for run in runs)
    waits = sorted(wait(run) for run in runs)
    makespan = max((run.ended_at for run in runs), default=0.0)
    used = sum(run.job.gpus * run.job.share_milli / 1000 * run.held_seconds for run in runs)
    by_owner: dict[str, list[float]] = {}
    for run in runs:
        by_owner.setdefault(run.job.owner, []).append(slowdown(run))
    return Measures(
        rule=replay.rule,
        jobs=len(runs),
        impossible=len(replay.impossible),
        jct_mean=_mean(jcts),
        jct_p99=_at(jcts, 0.99),
        wait_mean=_mean(waits),
        wait_p95=_at(waits, 0.95),
        makespan=makespan,
        utilization=used / (replay.gpus * makespan) if replay.gpus and makespan else 0.0,
        slowdown_mean=_mean([slowdown(run) for run in runs]),
        jain=jain([1 / _mean(found) for found in by_owner.values()]),
        owners=len(by_owner),
        preemptions=sum(len(run.intervals) - 1 for run in runs),
        seconds=replay.seconds,
    )


def wait(run: Run) -> float:
    """Time that a job had no devices, in seconds."""
    if len(run.intervals) == 1:
        return run.started_at - run.job.submit_seconds
    return run.ended_at - run.job.submit_seconds - run.held_seconds


def slowdown(run: Run) -> float:
    """Bounded slowdown of a run."""
    return max(1.0, (run.ended_at - run.job.submit_seconds) / max(run.job.duration_seconds, BOUND_SECONDS))


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness, (Σx)² / (n · Σx²): 1 if all are equal, 1 / n if one has all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _at(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
