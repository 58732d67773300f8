"""How much one owner may ask: requests a second, bytes a message, requests in line. One must not starve the others."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from ..schemas.operations import ExplainRequest
from ..schemas.requests import Error, LeaseAction, WithdrawAction, WorkRequest

_MOST_OWNERS: Final = 10_000
"""Buckets that are kept; full ones, which say nothing, are dropped beyond it."""


class Limits(Struct, frozen=True, kw_only=True):
    """What one owner may ask of a planner.

    Attributes:
        requests_per_second: on average; 0 for as many as one likes. What one does with leases counts by itself, so that
            a flood of requests lets no lease expire.
        burst: so many at once, after a time without any.
        waiting: requests in line.
        request_bytes: of one message.
    """

    requests_per_second: float = 500.0
    burst: float = 2000.0
    waiting: int = 1000
    request_bytes: int = 2**20


class TokenBuckets:
    """One bucket a key: it holds `burst` tokens at most, gets `rate` a second, and each question takes one.

    Args:
        rate: tokens a second; 0 lets everything through.
        burst: most that a bucket holds.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = max(1.0, burst)
        self._buckets: dict[object, tuple[float, float]] = {}

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
        held, at = self._buckets.get(key, (self._burst, now))
        held = min(self._burst, held + max(0.0, now - at) * self._rate)
        if held < 1.0:
            self._buckets[key] = held, now
            return (1.0 - held) / self._rate
        if len(self._buckets) >= _MOST_OWNERS and key not in self._buckets:
            self._drop_full(now)
        self._buckets[key] = held - 1.0, now
        return 0.0

    def _drop_full(self, now: float) -> None:
        full = self._burst - 1.0
        self._buckets = {
            key: (held, at) for key, (held, at) in self._buckets.items() if held + (now - at) * self._rate < full
        }
        if len(self._buckets) >= _MOST_OWNERS:  # names made up in a flood: nobody is known by them
            self._buckets.clear()


class Limiter:
    """Looks at each message before any work is done for it.

    Args:
        limits: see `Limits`.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._buckets = TokenBuckets(limits.requests_per_second, limits.burst)

    def size(self, data: bytes) -> Error | None:
        """The refusal of a message that is too large; None lets it through."""
        most = self.limits.request_bytes
        if len(data) <= most:
            return None
        message = f"The message has {len(data)} bytes, {most} are the most here: give items as a count"
        return Error(code="too_large", message=message)

    def rate(self, body: object, now: float) -> Error | None:
        """The refusal of an owner who asks too often; None lets it through."""
        if isinstance(body, WorkRequest):
            owner, kind = body.owner, "requests"
        elif isinstance(body, ExplainRequest):
            owner, kind = body.request.owner, "requests"
        elif isinstance(body, LeaseAction | WithdrawAction):
            owner, kind = body.owner, "leases"
        else:
            return None
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
