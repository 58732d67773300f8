"""What is told of a lease, and how often: events are small, and one owner's can't push the others' off their stream.

The stream of events is to hold 30 days of them, and drops its oldest once it is full. So no event carries work items,
and renewals that follow each other fast are told as one, the last: once a second for a lease, or more seldom where its
owner takes much of the stream, but always before the end that was told last.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.requests import Grant, Lease, LeaseEventKind
from ..fleet.lru import Kept

SHORTEST_SECONDS: Final = 1.0
"""Between two renewals of a lease that are told."""
_UNLIMITED_BYTES: Final = 2**30
"""A stream without a limit is taken for one of this."""
_RENEWALS_PART: Final = 1 / 32
"""Of the stream: an owner who takes more has renewals told when they must be."""
_GRANTS_PART: Final = 1 / 4
"""Of the stream: an owner who takes more is granted no more."""
_PART_SECONDS: Final = 86_400.0
"""What an owner took is forgotten at `_GRANTS_PART` of the stream in this time."""
_MOST_OWNERS: Final = 10_000
_LABELS_BYTES: Final = 1024
_GRANTS: Final = 16
_WEIGHTS: Final = 64
_END_FRACTION: Final = 0.2
_END_SECONDS: Final = 0.7
"""Longer than the pause between two looks at what waits."""


def slim(lease: Lease, kind: LeaseEventKind) -> Lease:
    """A lease as an event tells it.

    Nobody needs its work items to know who holds what. The history takes labels and devices from the first event of a
    lease, so that those of a renewal may be left out where they are many. Who asks the planner finds all of it.
    """
    granted = kind is LeaseEventKind.GRANTED
    if granted and lease.distribution is None and not any(grant.items for grant in lease.grants):
        return lease
    passing = kind in (LeaseEventKind.RENEWED, LeaseEventKind.EXPIRING)
    few = granted or sum(len(name) + len(value) for name, value in lease.labels.items()) <= _LABELS_BYTES
    report = lease.distribution
    grants = [] if passing and len(lease.grants) > _GRANTS else [_slim(grant, granted) for grant in lease.grants]
    return replace(
        lease,
        grants=grants,
        labels=lease.labels if few else {},
        environment=lease.environment if granted else {},
        addresses=lease.addresses if granted else {},
        unassigned=[],
        distribution=report if granted and report is not None and len(report.weights) <= _WEIGHTS else None,
    )


def _slim(grant: Grant, granted: bool) -> Grant:
    return grant if granted and not grant.items else replace(grant, items=[], score_parts={})


class Telling(Struct):
    """Counts over all terms of a planner.

    Attributes:
        sent_bytes: of events that were published, each counted once.
        merged: renewals that were not told, since a later one was.
    """

    sent_bytes: int = 0
    merged: int = 0


class EventBudget:
    """How much of the stream of events each owner has taken of late.

    Args:
        most_bytes: that the stream takes; 0 or less where there is no limit.
    """

    def __init__(self, most_bytes: int = 0) -> None:
        self.most_bytes = most_bytes
        self._taken: Kept[str, tuple[float, float]] = Kept(_MOST_OWNERS)

    def spend(self, owner: str, size: int, now: float) -> None:
        """An event was published.

        Args:
            owner: of the lease.
            size: bytes of the message.
            now: seconds, by a clock that does not go back.
        """
        self._taken.put(owner, (self._left(owner, now) + size, now))

    def lavish(self, owner: str, now: float) -> bool:
        """Whether an owner takes so much that renewals are told when they must be."""
        return self._left(owner, now) > self._most * _RENEWALS_PART

    def wait_seconds(self, owner: str, now: float) -> float:
        """For how long an owner is granted no more; 0 for one who is."""
        over = self._left(owner, now) - self._most * _GRANTS_PART
        return max(0.0, over / self._rate)

    @property
    def _most(self) -> int:
        return self.most_bytes if self.most_bytes > 0 else _UNLIMITED_BYTES

    @property
    def _rate(self) -> float:
        return self._most * _GRANTS_PART / _PART_SECONDS

    def _left(self, owner: str, now: float) -> float:
        taken, at = self._taken.get(owner) or (0.0, now)
        return max(0.0, taken - max(0.0, now - at) * self._rate)


class _Told(Struct):
    at: float
    changed_at: datetime
    expires_at: datetime

    @property
    def must_at(self) -> datetime:
        """In time for the end that was told: a fifth of the time before it, 0.7 s at least."""
        left = (self.expires_at - self.changed_at).total_seconds()
        return self.expires_at - timedelta(seconds=max(left * _END_FRACTION, min(left, 1.0) * _END_SECONDS))


class Pace:
    """When renewals of each lease were told, and when the next one must be."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def told(self, lease: Lease, kind: LeaseEventKind, changed_at: datetime, now: float) -> None:
        """An event was published.

        Args:
            lease: as it was told.
            kind: of the event.
            changed_at: its time.
            now: seconds, by a clock that does not go back.
        """
        if kind not in (LeaseEventKind.GRANTED, LeaseEventKind.RENEWED, LeaseEventKind.EXPIRING):
            self._told.pop(lease.lease_id, None)
            return
        at = now if kind is not LeaseEventKind.GRANTED else now - SHORTEST_SECONDS
        self._told[lease.lease_id] = _Told(at, changed_at, lease.expires_at)

    def may_wait(self, lease_id: str, lavish: bool, clock: datetime, now: float) -> bool:
        """Whether a renewal need not be told yet.

        Args:
            lease_id: of the lease.
            lavish: whether its owner takes much of the stream.
            clock: the time.
            now: seconds, by a clock that does not go back.
        """
        told = self._told.get(lease_id)
        if told is None or clock >= told.must_at:
            return False
        return lavish or now - told.at < SHORTEST_SECONDS
