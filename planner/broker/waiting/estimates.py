"""Estimates of how long the work of a request takes: its own, or learned from leases."""

from __future__ import annotations

import math
from typing import Final

from ....schemas.requests import Lease, LeaseState, WorkRequest
from ....schemas.values.durations import DurationDigest, DurationEstimate, shape_of, shape_of_request
from ...leases.lifecycle import LeaseRecord
from ...queue.bursts import Bursts
from ...queue.durations import KNOTS, Durations, Estimate, Guesses, Kind, given

RequestKey = tuple[str, str]
"""Owner and id of a request, which its lease has, too."""
_BASIS: Final = {"given": "request", "unknown": "none"}
"""Names of the wire for what an estimate rests on, where they differ."""


class Estimator:
    """Estimates durations, and learns from leases that end and from the digest of the history."""

    def __init__(self) -> None:
        self._bursts: Bursts[RequestKey] = Bursts(KNOTS)
        self._durations = Durations(self._bursts)
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
        return self._durations.estimate(kind_of_request(request), now, limit, _key_of(request))

    def of_lease(self, record: LeaseRecord, now: float) -> Estimate:
        """Estimate for a lease that was granted."""
        lease = record.lease
        limit = math.inf if lease.ends_at is None else (lease.ends_at - lease.granted_at).total_seconds()
        if lease.expected_seconds is not None:
            return given(lease.expected_seconds, limit)
        return self._durations.estimate(kind_of(record), now, limit, _key_of(lease))

    def submitted(self, request: WorkRequest, at: float) -> None:
        """Note a request that waits: others that were submitted at about the same time are its siblings."""
        self._bursts.submitted(_key_of(request), kind_of_request(request).burst, at)

    def withdrawn(self, request: WorkRequest) -> None:
        """Note that a request has left the queue; one that was granted is not meant."""
        self._bursts.withdrawn(_key_of(request))

    def started(self, record: LeaseRecord) -> None:
        """Note a lease; if its request did not wait, it was submitted at the grant."""
        key, granted_at = _key_of(record.lease), record.lease.granted_at.timestamp()
        self._bursts.submitted(key, kind_of(record).burst, granted_at)
        self._bursts.started(key, granted_at)

    def changed(self, now: float) -> list[RequestKey]:
        """Requests, waiting or granted, whose estimates have changed with those of their siblings."""
        return self._bursts.changed(now)

    def learn(self, record: LeaseRecord) -> None:
        """Learn from a lease that has ended. Only one released without a notice says how long its work took."""
        lease = record.lease
        if lease.ended_at is not None:
            seconds = (lease.ended_at - lease.granted_at).total_seconds()
            released = lease.state is LeaseState.RELEASED and lease.preemption is None
            kind, ended_at = kind_of(record), lease.ended_at.timestamp()
            self._bursts.ended(_key_of(lease), ended_at, released)
            self._durations.learn(kind, ended_at, seconds, released)
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


def kind_of_request(request: WorkRequest) -> Kind:
    """Group of a request in the history of durations."""
    return Kind(request.owner, request.name, shape_of_request(request))


def _key_of(request: WorkRequest | Lease) -> RequestKey:
    return request.owner, request.request_id or ""


def described(estimate: Estimate) -> DurationEstimate:
    """An estimate as it is published."""
    return DurationEstimate(
        seconds=round(estimate.seconds, 3),
        low_seconds=round(estimate.quantile(0.1), 3),
        high_seconds=round(estimate.quantile(0.9), 3),
        basis=_BASIS.get(estimate.basis, estimate.basis),
        leases=float(estimate.count),
    )
