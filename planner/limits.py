"""Quotas of one owner: requests a second, bytes a message, queued requests, leases and their bytes.

They keep one owner from starving the others.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

from ..schemas.operations import ExplainRequest
from ..schemas.requests import CheckpointAction, Error, LeaseAction, ResizeAction, WithdrawAction, WorkRequest
from ..schemas.values import units
from ..schemas.work.jobs import JobAction, JobSpec
from .durable.bucket import FULL_PART, RECORD_PART
from .fleet.lru import LRUCache
from .leases.event_rate import EventBudget
from .leases.usage import UsageByOwner

_MAX_OWNERS: Final = 10_000
"""Number of token buckets that are kept. A new one replaces the least recently used."""
MAX_LABELS_BYTES: Final = 16 * 1024
"""Limit on the labels of one request, names and values together."""


class Kind(StrEnum):
    """Kinds of messages with a rate limit each, so that a flood of one kind does not hold up the others."""

    REQUESTS = "requests"
    EXPLANATIONS = "explanations"
    LEASES = "leases"
    """Renewals, releases, checkpoints, answers to a resize, withdrawals, and commands about jobs."""


def rate_limited_owner(body: object) -> tuple[str, Kind] | None:
    """Owner that a message names and the kind that it counts as; None for a message without a rate limit."""
    if isinstance(body, WorkRequest):
        return body.owner, Kind.REQUESTS
    if isinstance(body, ExplainRequest):
        return body.request.owner, Kind.EXPLANATIONS
    if isinstance(body, JobSpec):
        return body.request.owner, Kind.REQUESTS
    if isinstance(body, JobAction):
        return (body.owner, Kind.LEASES) if body.owner is not None else None
    if isinstance(body, LeaseAction | CheckpointAction | ResizeAction | WithdrawAction):
        return body.owner, Kind.LEASES
    return None


class Limits(Struct, frozen=True, kw_only=True):
    """Quotas of one owner of a planner.

    Attributes:
        requests_per_second: mean rate of each kind of message; 0 for no limit. Operations on leases count as a kind
            apart, so that a flood of requests does not let leases expire.
        burst: messages at once, after a time without any.
        waiting: queued requests.
        request_bytes: size of one message.
        leases: active leases.
        jobs: jobs that have not ended.
        lease_bytes: size of the records in the bucket, of active leases and of those that ended recently.
    """

    requests_per_second: float = 500.0
    burst: float = 2000.0
    waiting: int = 1000
    request_bytes: int = 2**20
    leases: int = 10_000
    jobs: int = 1000
    lease_bytes: int = 64 * 2**20


class TokenBuckets:
    """Token buckets by key: each holds at most `burst` tokens, gains `rate` a second, and a message takes one.

    Args:
        rate: tokens a second; 0 lets everything through.
        burst: capacity of a bucket.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = max(1.0, burst)
        self._buckets: LRUCache[object, tuple[float, float]] = LRUCache(_MAX_OWNERS)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: object, now: float) -> float:
        """Take a token.

        Args:
            key: of the bucket.
            now: seconds, by a monotonic clock.

        Returns:
            0 if there was a token, else the seconds until there is one.
        """
        if self._rate <= 0:
            return 0.0
        held, at = self._buckets.get(key) or (self._burst, now)
        held = min(self._burst, held + max(0.0, now - at) * self._rate)
        if held < 1.0:
            self._buckets.put(key, (held, now))
            return (1.0 - held) / self._rate
        self._buckets.put(key, (held - 1.0, now))
        return 0.0


class Limiter:
    """Checks each message against the quotas of its owner, before any work is done for it.

    Args:
        limits: see `Limits`.

    Attributes:
        events: bytes of the event stream that each owner has used.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.events = EventBudget()
        self._buckets = TokenBuckets(limits.requests_per_second, limits.burst)

    def size(self, data: bytes) -> Error | None:
        """Error for a message that is too large; None if it may pass."""
        most = self.limits.request_bytes
        if len(data) <= most:
            return None
        message = f"The message has {len(data)} bytes, {most} are the most here: give items as a count"
        return Error(code="too_large", message=message)

    def rate(self, owner: str, kind: Kind, now: float) -> Error | None:
        """Error for an owner above the rate limit; None if the message may pass.

        Args:
            owner: sender of the message.
            kind: of the message; each kind has a rate limit of its own.
            now: seconds, by a monotonic clock.
        """
        after = self._buckets.take((owner, kind), now)
        if not after:
            return None
        # In milliseconds, rounded up, so that a client that waits for so long is not too early.
        after = -(-after * 1000 // 1) / 1000
        return Error(
            code="too_many_requests",
            message=(
                f"{owner!r} asks more than {self.limits.requests_per_second:g} times a second: "
                f"ask again in {after:.3f} s"
            ),
            retry_after_seconds=after,
        )

    def event_quota(self, owner: str, now: float) -> Error | None:
        """Error for an owner whose lease events take too much of the event stream; None if a lease may be granted.

        The stream drops its oldest events once it is full, so these would push out those of other owners. A rate limit
        of 0 switches this check off, too.

        Args:
            owner: requester of the lease.
            now: seconds, by a monotonic clock.
        """
        after = self.events.wait_seconds(owner, now) if self.limits.requests_per_second else 0.0
        if not after:
            return None
        return Error(
            code="too_many_requests",
            message=(
                f"Events of the leases of {owner!r} take a quarter of the stream that keeps everybody's: ask again in "
                f"{after:.0f} s, for fewer leases that last longer and have fewer labels"
            ),
            retry_after_seconds=after,
        )

    def queue_quota(self, owner: str, queued: int) -> Error | None:
        """Error for an owner with too many queued requests (`queued`); None if one more may be queued."""
        if queued < self.limits.waiting:
            return None
        return Error(
            code="too_many_requests",
            message=(
                f"{owner!r} has {queued} requests in line, {self.limits.waiting} are the most: withdraw some, or wait "
                "until some are granted"
            ),
        )

    def job_quota(self, owner: str, jobs: int, used_bytes: int, max_bytes: int) -> Error | None:
        """Error for one more job; None if it may be queued.

        Args:
            owner: of the job.
            jobs: jobs of the owner that have not ended.
            used_bytes: size of all jobs as stored, with the new one.
            max_bytes: size that they may have.
        """
        if jobs >= self.limits.jobs:
            return Error(
                code="too_many_requests",
                message=(
                    f"{owner!r} has {jobs} jobs that have not ended, {self.limits.jobs} are the most: cancel some, or "
                    "submit tasks as an array"
                ),
            )
        if used_bytes > max_bytes:
            return Error(
                code="too_many_requests",
                message=(
                    f"All jobs take {units.format_bytes(used_bytes)}, {units.format_bytes(max_bytes)} are the most: "
                    "submit shorter scripts, or later"
                ),
            )
        return None

    def lease_quota(
        self, owner: str, owners: UsageByOwner, size: int, max_bytes: int, used_bytes: int = 0
    ) -> Error | None:
        """Error for one more lease; None if it may be granted. Renewals and releases are not checked.

        Args:
            owner: requester of the lease.
            owners: usage of all owners.
            size: bytes of the new lease.
            max_bytes: capacity of the bucket; 0 or less for no limit.
            used_bytes: size of the bucket, as measured last.
        """
        owned, limits = owners.of(owner), self.limits
        if owned.leases >= limits.leases:
            return Error(
                code="too_many_requests",
                message=f"{owner!r} holds {owned.leases} leases, {limits.leases} are the most: release some",
            )
        if owned.bytes + size > limits.lease_bytes:
            return Error(
                code="too_many_requests",
                message=(
                    f"The leases of {owner!r} take {units.format_bytes(owned.bytes)}, "
                    f"{units.format_bytes(limits.lease_bytes)} are the most: give fewer labels and work items, or give "
                    "items as a count; those that ended count for up to an hour"
                ),
            )
        if 0 < max_bytes * RECORD_PART < size:
            most = units.format_bytes(int(max_bytes * RECORD_PART))
            return Error(
                code="too_large",
                message=(
                    f"The lease would take {units.format_bytes(size)}, {most} are the most in a bucket of "
                    f"{units.format_bytes(max_bytes)}: give fewer work items, or give them as a count"
                ),
                field="$.distribution",
            )
        if 0 < max_bytes * FULL_PART < max(owners.bytes, used_bytes) + size:
            return Error(
                code="unavailable",
                message=(
                    "The planner's bucket is nearly full: nothing is granted until leases end; those that are there "
                    "are renewed and released as ever"
                ),
            )
        return None
