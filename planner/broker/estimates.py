"""Estimates of how long the work of a request takes: its own, or learned from leases."""

from __future__ import annotations

import math
from typing import Final

from ...schemas.durations import DurationDigest, DurationEstimate, shape_of, shape_of_request
from ...schemas.requests import LeaseState, WorkRequest
from ..leases.lifecycle import LeaseRecord
from ..queue.durations import Durations, Estimate, Guesses, Kind, given

_BASIS: Final = {"given": "request", "unknown": "none"}
"""Names of the wire for what an estimate rests on, where they differ."""


class Estimator:
    """Estimates durations, and learns from leases that end and from the digest of the history."""

    def __init__(self) -> None:
        self._durations = Durations()
        self._guesses = Guesses()

    def of_request(self, request: WorkRequest, now: float) -> Estimate:
        """Estimate for a request.

        Args:
            request: its `expected_seconds` counts, at most its `max_seconds`.
            now: seconds since the epoch.
        """
        limit = math.inf if request.max_seconds is None else request.max_seconds
        if request.expected_seconds is not None:
            return self._guesses.estimate(shape_of_request(request), request.expected_seconds, limit)
        return self._durations.estimate(Kind(request.owner, request.name, shape_of_request(request)), now, limit)

    def of_lease(self, record: LeaseRecord, now: float) -> Estimate:
        """Estimate for a lease that was granted."""
        lease = record.lease
        limit = math.inf if lease.ends_at is None else (lease.ends_at - lease.granted_at).total_seconds()
        if lease.expected_seconds is not None:
            return given(lease.expected_seconds, limit)
        return self._durations.estimate(kind_of(record), now, limit)

    def learn(self, record: LeaseRecord) -> None:
        """Learn from a lease that has ended. Only one released without a notice says how long its work took."""
        lease = record.lease
        if lease.ended_at is not None:
            seconds = (lease.ended_at - lease.granted_at).total_seconds()
            released = lease.state is LeaseState.RELEASED and lease.preemption is None
            kind = kind_of(record)
            self._durations.learn(kind, lease.ended_at.timestamp(), seconds, released)
            if released and lease.expected_seconds is not None:
                self._guesses.ended(kind.shape, lease.expected_seconds, seconds)

    def take_digest(self, digest: DurationDigest) -> None:
        """Take the digest of the history, in place of an earlier one and of the leases that it counts."""
        self._durations.take_digest(digest)


def kind_of(record: LeaseRecord) -> Kind:
    """Group of a lease in the history of durations."""
    lease = record.lease
    shape = record.shape
    if not shape:  # of an earlier version
        devices = [grant for grant in lease.grants if grant.device]
        share = devices[0].share if len(devices) == 1 and devices[0].share < 1 else None
        shape = shape_of(len(devices), share)
    return Kind(lease.owner, lease.name, shape)


def described(estimate: Estimate) -> DurationEstimate:
    """An estimate as it is published."""
    return DurationEstimate(
        seconds=round(estimate.median, 3),
        low_seconds=round(estimate.quantile(0.1), 3),
        high_seconds=round(estimate.quantile(0.9), 3),
        basis=_BASIS.get(estimate.basis, estimate.basis),
        leases=float(estimate.count),
    )
