"""Content and rate of lease events: they are small, and those of one owner can't evict the others' from the stream.

The event stream should hold 30 days of events, and drops its oldest once it is full. So no event has work items, and
renewals in quick succession are merged: only the last is published, once a second for a lease. If the owner takes much
of the stream it is published less often, but always before the end of the lease that was published last.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.requests import Grant, Lease, LeaseEventKind
from ..fleet.lru import LRUCache

MIN_INTERVAL_SECONDS: Final = 1.0
"""Interval between two published renewals of a lease."""
_UNLIMITED_BYTES: Final = 2**30
"""Assumed size of a stream without a limit."""
_RENEWALS_PART: Final = 1 / 32
"""Part of the stream: if an owner takes more, its renewals are published only when they must be."""
_GRANTS_PART: Final = 1 / 4
"""Part of the stream: an owner that takes more gets no more leases."""
_PART_SECONDS: Final = 86_400.0
"""An owner's usage decays at the rate of `_GRANTS_PART` of the stream in this time."""
_MAX_OWNERS: Final = 10_000
_LABELS_BYTES: Final = 1024
_GRANTS: Final = 16
_WEIGHTS: Final = 64
PASSING: Final = (
    LeaseEventKind.RENEWED,
    LeaseEventKind.EXPIRING,
    LeaseEventKind.PREEMPTING,
    LeaseEventKind.RESIZE_OFFERED,
    LeaseEventKind.RESIZE_REQUESTED,
    LeaseEventKind.RESIZED,
)
"""Kinds of events between the grant of a lease and its end."""
_END_FRACTION: Final = 0.2
_END_SECONDS: Final = 0.7
"""Longer than the interval between two checks of withheld renewals."""


def slim(lease: Lease, kind: LeaseEventKind) -> Lease:
    """A lease as it goes into an event: without work items, and with less in later events than in the first.

    Work items are not needed to know which owner holds what. The history takes labels and devices from the first event
    of a lease, and from those of its changes of devices, so that those of a renewal, warning or notice are left out if
    they are many. The planner's answers have all.
    """
    granted = kind is LeaseEventKind.GRANTED
    if granted and lease.distribution is None and not any(grant.items for grant in lease.grants):
        return lease
    passing = kind in PASSING and kind is not LeaseEventKind.RESIZED
    few = granted or sum(len(name) + len(value) for name, value in lease.labels.items()) <= _LABELS_BYTES
    report = lease.distribution
    grants = [] if passing and len(lease.grants) > _GRANTS else [_slim(grant, granted) for grant in lease.grants]
    resize = lease.resize
    return replace(
        lease,
        grants=grants,
        resize=None if resize is None else replace(resize, grants=[_slim(grant, False) for grant in resize.grants]),
        labels=lease.labels if few else {},
        environment=lease.environment if granted else {},
        addresses=lease.addresses if granted else {},
        unassigned=[],
        distribution=report if granted and report is not None and len(report.weights) <= _WEIGHTS else None,
    )


def _slim(grant: Grant, granted: bool) -> Grant:
    return grant if granted and not grant.items else replace(grant, items=[], score_parts={})


class EventCounts(Struct):
    """Counts of lease events over all terms of a planner.

    Attributes:
        sent_bytes: size of the events that were published, each counted once.
        merged: number of renewals whose event was replaced by that of a later change.
    """

    sent_bytes: int = 0
    merged: int = 0


class EventBudget:
    """Recent usage of the event stream by owner.

    Args:
        max_bytes: size limit of the stream; 0 or less for none.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self._taken: LRUCache[str, tuple[float, float]] = LRUCache(_MAX_OWNERS)

    def spend(self, owner: str, size: int, now: float) -> None:
        """Count a published event.

        Args:
            owner: of the lease.
            size: bytes of the message.
            now: seconds, by a monotonic clock.
        """
        self._taken.put(owner, (self._left(owner, now) + size, now))

    def over_share(self, owner: str, now: float) -> bool:
        """True if an owner takes so much that its renewals are published only when they must be."""
        return self._left(owner, now) > self._most * _RENEWALS_PART

    def wait_seconds(self, owner: str, now: float) -> float:
        """Seconds for which an owner gets no more leases; 0 if it may get one now."""
        over = self._left(owner, now) - self._most * _GRANTS_PART
        return max(0.0, over / self._rate)

    @property
    def _most(self) -> int:
        return self.max_bytes if self.max_bytes > 0 else _UNLIMITED_BYTES

    @property
    def _rate(self) -> float:
        return self._most * _GRANTS_PART / _PART_SECONDS

    def _left(self, owner: str, now: float) -> float:
        taken, at = self._taken.get(owner) or (0.0, now)
        return max(0.0, taken - max(0.0, now - at) * self._rate)


class _Published(Struct):
    at: float
    changed_at: datetime
    expires_at: datetime

    @property
    def due_at(self) -> datetime:
        """Latest time for the next event: before the published end of the lease, by a fifth of the time to it.

        By at least 0.7 s, or 0.7 of the time if that is less than a second.
        """
        left = (self.expires_at - self.changed_at).total_seconds()
        return self.expires_at - timedelta(seconds=max(left * _END_FRACTION, min(left, 1.0) * _END_SECONDS))


class Pace:
    """Times when renewals of each lease were published, to decide when the next one must be."""

    def __init__(self) -> None:
        self._published: dict[str, _Published] = {}

    def note_published(self, lease: Lease, kind: LeaseEventKind, changed_at: datetime, now: float) -> None:
        """Note a published event.

        Args:
            lease: as in the event.
            kind: of the event.
            changed_at: time of the event.
            now: seconds, by a monotonic clock.
        """
        if kind is not LeaseEventKind.GRANTED and kind not in PASSING:
            self._published.pop(lease.lease_id, None)
            return
        at = now if kind is not LeaseEventKind.GRANTED else now - MIN_INTERVAL_SECONDS
        self._published[lease.lease_id] = _Published(at, changed_at, lease.expires_at)

    def may_withhold(self, lease_id: str, over_share: bool, clock: datetime, now: float) -> bool:
        """True if the event of a renewal may be withheld for now.

        Args:
            lease_id: of the lease.
            over_share: true if its owner takes much of the stream.
            clock: the wall-clock time.
            now: seconds, by a monotonic clock.
        """
        note_published = self._published.get(lease_id)
        if note_published is None or clock >= note_published.due_at:
            return False
        return over_share or now - note_published.at < MIN_INTERVAL_SECONDS
