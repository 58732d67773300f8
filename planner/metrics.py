"""Metrics of a planner, and its health check."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from typing import Final

from ..bus.elapsed import steady_time
from ..bus.tasks import heed_cancellation
from ..schemas.health import HealthStatus
from ..schemas.instruments import INSTRUMENTS, Histogram, ServiceKind
from ..schemas.requests import Assignment, Error, Rejection
from .broker.broker import RequestBroker
from .broker.waiting.fork_pool import ForkPool
from .durable.election import LeaderElection
from .durable.store import Store
from .fleet.fleet import Fleet
from .jobs.table import JobTable
from .leases.event_rate import EventCounts
from .telemetry import Telemetry

_BOUNDS: Final = {name: instrument.bounds for name, instrument in INSTRUMENTS[ServiceKind.PLANNER].items()}
_WATCH_SECONDS: Final = 0.05
WRITE_SECONDS: Final = 5.0
"""The planner is not ready if a write has gone unacknowledged for longer."""
FOLD_SECONDS: Final = 5.0
"""The planner is not ready if telemetry has been waiting to be folded in for longer."""


class PlannerMetrics:
    """Metrics of one planner, over all of its terms.

    Attributes:
        requests: number by outcome.
        lease_changes: number by kind of event.
        event_counts: counts of published lease events.
        grant_seconds: see the catalogue (`schemas.instruments`).
        decision_seconds: likewise.
        loop_lag_seconds: likewise.

    Args:
        query_pool: answers expensive queries.
        request_pool: reads large requests, and distributes their work items.
    """

    def __init__(self, query_pool: ForkPool, request_pool: ForkPool) -> None:
        self._query_pool = query_pool
        self._request_pool = request_pool
        # A fork of either stops the event loop: both are measured as one.
        request_pool.fork_seconds = query_pool.fork_seconds
        self.event_counts = EventCounts()
        self.requests: Counter[str] = Counter()
        self.lease_changes: Counter[str] = Counter()
        self.grant_seconds = Histogram(_BOUNDS["grant_seconds"])
        self.decision_seconds = Histogram(_BOUNDS["decision_seconds"])
        self.loop_lag_seconds = Histogram(_BOUNDS["loop_lag_seconds"])

    async def watch_loop(self) -> None:
        """Measure the lag of the event loop, until cancelled."""
        while True:
            heed_cancellation()
            began = time.perf_counter()
            await asyncio.sleep(_WATCH_SECONDS)
            self.loop_lag_seconds.observe(max(0.0, time.perf_counter() - began - _WATCH_SECONDS))

    def count_answer(self, reply: object, seconds: float, waited: bool) -> None:
        """Count the answer to a work request.

        Args:
            reply: the answer.
            seconds: since the request came.
            waited: true if the request allowed queueing; then its time does not count as time to grant.
        """
        if isinstance(reply, Assignment):
            self.requests["granted"] += 1
            if not waited:
                self.grant_seconds.observe(seconds)
        elif isinstance(reply, Rejection):
            self.requests[reply.code.value] += 1
        elif isinstance(reply, Error):
            self.requests[f"error_{reply.code}"] += 1

    def without_reply(self) -> None:
        """Count a message without a reply subject that needs one."""
        self.requests["without_reply"] += 1

    def health_status(
        self,
        election: LeaderElection,
        store: Store,
        telemetry: Telemetry,
        fleet: Fleet,
        broker: RequestBroker | None,
        jobs: JobTable | None,
        *,
        hears: bool,
        dead: Iterable[str] = (),
    ) -> HealthStatus:
        """Health check: the reasons why the planner is not ready, its metrics and its role.

        Args:
            election: of the leader election.
            store: the bucket.
            telemetry: ingestion of telemetry.
            fleet: live state.
            broker: the broker of the term; None before it is open, and for a standby.
            jobs: of the term; None with it.
            hears: true if the connection for telemetry is up.
            dead: names of tasks that have ended and should run.
        """
        reasons = [f"{name} has ended" for name in dead]
        if election.term and broker is None:
            reasons.append("it is taking over")
        elif election.term and not election.holds_leadership:
            reasons.append("its heartbeat is not acknowledged: it does not know whether it still leads")
        if not hears:
            reasons.append("the connection for telemetry is lost")
        if telemetry.reading:
            reasons.append("it reads what collectors said before")
        elif (behind := telemetry.waiting_seconds) > FOLD_SECONDS:
            reasons.append(f"telemetry waits for {behind:.0f} s to be taken in")
        if (unanswered := store.unanswered_seconds) > WRITE_SECONDS:
            reasons.append(f"the bucket has not answered a write for {unanswered:.0f} s")
        if broker is not None and not store.has_room:
            reasons.append("its bucket is nearly full: nothing is granted until leases end")
        now = steady_time()
        queue = None if broker is None else broker.queue
        return HealthStatus(
            reasons,
            {
                "leading": float(broker is not None),
                "term": float(election.term),
                "requests": self.requests,
                "grant_seconds": self.grant_seconds,
                "decision_seconds": self.decision_seconds,
                "loop_lag_seconds": self.loop_lag_seconds,
                "dear_questions": self._query_pool.outcomes,
                "dear_questions_running": float(self._query_pool.running),
                "dear_questions_waiting": float(self._query_pool.waiting),
                "large_requests": self._request_pool.outcomes,
                "fork_seconds": self._query_pool.fork_seconds,
                "queue_length": float(len(queue) if queue is not None else 0),
                "queue_longest_wait_seconds": max((now - entry.since for entry in queue or ()), default=0.0),
                "active_leases": float(broker.ledger.table.active if broker is not None else 0),
                "lease_changes": self.lease_changes,
                "jobs": jobs.states() if jobs is not None else {},
                "tasks": jobs.task_states() if jobs is not None else {},
                "runners": float(len(fleet.runners) if broker is not None else 0),
                "event_bytes": float(self.event_counts.sent_bytes),
                "renewals_merged": float(self.event_counts.merged),
                "write_seconds": store.write_seconds,
                "write_group": store.write_group,
                "writes_in_flight": float(store.in_flight),
                "bucket_bytes": float(store.used_bytes),
                "bucket_max_bytes": float(max(0, store.max_bytes)),
                "write_failures": float(store.write_failures),
                "hosts": float(len(fleet.hosts)),
                "devices": float(len(fleet.devices)),
                "telemetry_ignored": float(telemetry.ignored),
                "telemetry_waiting": float(telemetry.waiting),
                "telemetry_age_seconds": telemetry.age_seconds,
            },
            "leader" if broker is not None else "standby",
        )
