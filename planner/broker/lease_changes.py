"""Changes of leases, as the line and the estimates of durations follow them.

The line needs the running leases only once a request waits: until then their grants and ends cost it nothing.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import Final

from ...schemas.requests import Lease, LeaseState
from ..leases.ledger import Ledger
from ..leases.lifecycle import LeaseRecord
from ..queue.durations import Estimate
from ..queue.line import Line
from .waiting.estimates import Estimator, RequestKey
from .waiting.queue import Kind, WaitingQueue, kind_of

_REVISE_SECONDS: Final = 0.25
_REVISED_AT_ONCE: Final = 256


class LeaseChanges:
    """Passes the changes of the leases of one term on to the estimates and the line.

    Args:
        ledger: leases of the term.
        estimator: estimates durations.
        line: the waiting requests.
        queue: their clients.
    """

    def __init__(self, ledger: Ledger, estimator: Estimator, line: Line, queue: WaitingQueue) -> None:
        self._ledger = ledger
        self._estimator = estimator
        self._line = line
        self._queue = queue
        self._follows = False
        self._revised_at = 0.0
        self._to_revise: dict[RequestKey, None] = {}
        """Requests of leases whose estimates are to be revised."""

    def follow(self) -> None:
        """Let the line have all active leases; to be called before a request is put in it."""
        if self._follows:
            return
        self._follows = True
        now = time.time()
        active = [record for record in self._ledger.table if record.lease.state is LeaseState.ACTIVE]
        for record in sorted(active, key=lambda record: record.lease.granted_at):
            self._adopt(record, now)

    def granted(self, record: LeaseRecord) -> None:
        """Note a new lease."""
        if self._follows:
            self._adopt(record, record.lease.granted_at.timestamp())

    def noticed(self, lease: Lease) -> None:
        """Expect the end of a lease at the deadline of its preemption; by its estimate once the notice is withdrawn."""
        if not self._follows:
            return
        if lease.preemption is None:
            self._line.ends.expect_by_estimate(lease.lease_id)
        else:
            self._line.ends.expect(lease.lease_id, lease.preemption.ends_at.timestamp())

    def resized(self, record: LeaseRecord) -> None:
        """Note that an elastic lease has other devices."""
        if self._follows:
            lease = record.lease
            self._line.resized(lease.lease_id, lease.owner, _gpus(lease), record.changed_at.timestamp())

    def ended(self, record: LeaseRecord) -> None:
        """Learn from a lease that has ended."""
        self._estimator.learn(record)
        if self._follows:
            self._line.ended(record.lease.lease_id, time.time())

    def revise(self) -> None:
        """Revise the estimates that have changed with those of requests submitted at about the same time.

        Equal requests that wait are revised together, since they share an estimate; leases a few at a time, since a
        burst may have thousands.
        """
        now = time.time()
        if now < self._revised_at + _REVISE_SECONDS:
            return
        self._revised_at = now
        revised: dict[Kind, Estimate] = {}
        for owner, request_id in self._estimator.changed(now):
            queued = self._queue.find(owner, request_id)
            if queued is None:
                self._to_revise[owner, request_id] = None
            elif (kind := kind_of(queued.request)) not in revised:
                revised[kind] = self._estimator.of_request(queued.request, now)
        self._queue.revise(revised, now)
        for key in list(islice(self._to_revise, _REVISED_AT_ONCE)):
            del self._to_revise[key]
            record = self._ledger.table.of_request(*key)
            if record is not None:
                self._line.revise_lease(record.lease.lease_id, self._estimator.of_lease(record, now), now)

    def _adopt(self, record: LeaseRecord, now: float) -> None:
        lease = record.lease
        self._estimator.started(record)
        estimate = self._estimator.of_lease(record, now)
        self._line.adopt(lease.lease_id, lease.owner, _gpus(lease), estimate, lease.granted_at.timestamp())
        if lease.preemption is not None:
            self.noticed(lease)


def _gpus(lease: Lease) -> float:
    """Devices that a lease holds, each counted by its share."""
    return sum(grant.share for grant in lease.grants if grant.device)
