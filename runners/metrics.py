"""Health of a runner: the values of its instruments, and whether it is ready."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from ..schemas.health import HealthStatus
from ..schemas.instruments import Histogram
from .executors import Executors
from .host import Host
from .reports import LogPublisher, Reporter
from .state import part_of

MOST_SILENCE_SECONDS: Final = 15.0
"""Time without an answer of a planner after which a runner is not ready: three reports."""


def health_status(
    hosts: Sequence[Host],
    reporters: Sequence[Reporter],
    publishers: Sequence[LogPublisher],
    starts: Histogram,
    executors: Executors,
) -> HealthStatus:
    """Health of a runner: it is ready if all its hosts can start jobs, and a planner has answered their reports."""
    silent = max((reporter.answered.seconds for reporter in reporters), default=0.0)
    reasons: list[str] = []
    if not reporters or not all(reporter.sent for reporter in reporters):
        reasons.append("no planner has answered its report yet")
    elif silent > MOST_SILENCE_SECONDS:
        reasons.append(f"no planner has answered its reports for {silent:.0f} s")
    reasons += [
        f"no jobs are started on {host.name}: {host.readiness.reason}" for host in hosts if host.readiness.reason
    ]
    states = Counter(part_of(host.name, known).state for host in hosts for known in host.runs.runs.values())
    return HealthStatus(
        reasons,
        {
            "runs": {state.value: float(number) for state, number in states.items()},
            "start_seconds": starts,
            "answered_seconds": silent,
            "unconfined": float(executors.unconfined != ""),
            "log_bytes": float(sum(publisher.published_bytes for publisher in publishers)),
        },
    )
