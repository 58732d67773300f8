"""How much one owner may ask: requests a second, bytes a message, requests in line. One must not starve the others."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

from ..schemas import units
from ..schemas.operations import ExplainRequest
from ..schemas.requests import Error, LeaseAction, WithdrawAction, WorkRequest
from .durable.bucket import FULL_PART, RECORD_PART
from .fleet.lru import Kept
from .leases.telling import EventBudget
from .leases.usage import Owners

_MOST_OWNERS: Final = 10_000
"""Buckets that are kept: that of the owner who asked longest ago is dropped for a new one."""
MOST_LABELS_BYTES: Final = 16 * 1024
"""Of one request, names and values together."""


class Kind(StrEnum):
    """What is counted by itself: a flood of one stands in the way of none of the others."""

    REQUESTS = "requests"
    EXPLANATIONS = "explanations"
    LEASES = "leases"
    """Renewals, releases and withdrawals."""


def asks(body: object) -> tuple[str, Kind] | None:
    """Who asks by what a message says, and for what; None for what is not limited."""
    if isinstance(body, WorkRequest):
        return body.owner, Kind.REQUESTS
    if isinstance(body, ExplainRequest):
        return body.request.owner, Kind.EXPLANATIONS
    if isinstance(body, LeaseAction | WithdrawAction):
        return body.owner, Kind.LEASES
    return None


class Limits(Struct, frozen=True, kw_only=True):
    """What one owner may ask of a planner.

    Attributes:
        requests_per_second: of each kind, on average; 0 for as many as one likes. What one does with leases counts by
            itself, so that a flood of requests lets no lease expire.
        burst: so many at once, after a time without any.
        waiting: requests in line.
        request_bytes: of one message.
        leases: active ones.
        lease_bytes: of their records in the bucket, and of those that ended of late.
    """

    requests_per_second: float = 500.0
    burst: float = 2000.0
    waiting: int = 1000
    request_bytes: int = 2**20
    leases: int = 10_000
    lease_bytes: int = 64 * 2**20


class TokenBuckets:
    """One bucket a key: it holds `burst` tokens at most, gets `rate` a second, and each question takes one.

    Args:
        rate: tokens a second; 0 lets everything through.
        burst: most that a bucket holds.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = max(1.0, burst)
        self._buckets: Kept[object, tuple[float, float]] = Kept(_MOST_OWNERS)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: object, now: float) -> float:
        """Take a token.

        Args:
            key: whose bucket.
            now: seconds, by a clock that does not go back.

        Returns:
            0 where there was one, else the seconds until there is.
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
    """Looks at each message before any work is done for it.

    Args:
        limits: see `Limits`.

    Attributes:
        events: what each owner has taken of the stream of events.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.events = EventBudget()
        self._buckets = TokenBuckets(limits.requests_per_second, limits.burst)

    def size(self, data: bytes) -> Error | None:
        """The refusal of a message that is too large; None lets it through."""
        most = self.limits.request_bytes
        if len(data) <= most:
            return None
        message = f"The message has {len(data)} bytes, {most} are the most here: give items as a count"
        return Error(code="too_large", message=message)

    def rate(self, owner: str, kind: Kind, now: float) -> Error | None:
        """The refusal of an owner who asks too often; None lets it through.

        Args:
            owner: who asks.
            kind: of the question; each kind is counted by itself.
            now: seconds, by a clock that does not go back.
        """
        after = self._buckets.take((owner, kind), now)
        if not after:
            return None
        # In milliseconds, rounded up, so that who waits for so long is not too early.
        after = -(-after * 1000 // 1) / 1000
        return Error(
            code="too_many_requests",
            message=(
                f"{owner!r} asks more than {self.limits.requests_per_second:g} times a second: "
                f"ask again in {after:.3f} s"
            ),
            retry_after_seconds=after,
        )

    def telling(self, owner: str, now: float) -> Error | None:
        """The refusal of an owner whose leases come and go so often that others' events would not be kept.

        Args:
            owner: who asks for a lease.
            now: seconds, by a clock that does not go back.
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

    def waiting(self, owner: str, there: int) -> Error | None:
        """The refusal of an owner who has too many requests in line; None lets one more in."""
        if there < self.limits.waiting:
            return None
        return Error(
            code="too_many_requests",
            message=(
                f"{owner!r} has {there} requests in line, {self.limits.waiting} are the most: withdraw some, or wait "
                "until some are granted"
            ),
        )

    def one_more(self, owner: str, owners: Owners, size: int, most_bytes: int, used_bytes: int = 0) -> Error | None:
        """The refusal of one more lease; None lets it be granted. Renewals and releases are never refused so.

        Args:
            owner: who asks.
            owners: what all have.
            size: bytes of the new lease.
            most_bytes: that the bucket takes; 0 or less where there is no limit.
            used_bytes: that it holds, as measured last.
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
        if 0 < most_bytes * RECORD_PART < size:
            most = units.format_bytes(int(most_bytes * RECORD_PART))
            return Error(
                code="too_large",
                message=(
                    f"The lease would take {units.format_bytes(size)}, {most} are the most in a bucket of "
                    f"{units.format_bytes(most_bytes)}: give fewer work items, or give them as a count"
                ),
                field="$.distribution",
            )
        if 0 < most_bytes * FULL_PART < max(owners.bytes, used_bytes) + size:
            return Error(
                code="unavailable",
                message=(
                    "The planner's bucket is nearly full: nothing is granted until leases end; those that are there "
                    "are renewed and released as ever"
                ),
            )
        return None
