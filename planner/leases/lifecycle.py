"""Life cycle of a lease, as pure functions over records, and the table of all records.

```
          renew ↺      ┌─ release ──► released
 grant ──► active ─────┼─ time ─────► expired      (announced as `expiring` before)
                       ├─ host gone ► lost
                       ├─ operator ─► evicted
                       ├─ idle ─────► evicted      (warned before, in `idle`)
                       └─ notice ───► evicted      (announced as `preempting` before)
```

The notice of a preemption leaves a lease active for its `grace_seconds`. The holder may end it sooner (`saved`,
`release`) or put the end off once (`busy`), and the notice may be withdrawn. How the devices of an elastic lease change
is in `resizing.py`.

The bucket has a record under `lease.<id>`: the lease, the number of its last change, and the changes whose events may
not be on the facts stream yet. Each change raises `version` by one. An event is identified by lease and version, so
that publishing it again after a crash does not duplicate it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from datetime import datetime, timedelta
from heapq import heapify, heappop, heappush
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.requests import (
    Assignment,
    Distributed,
    Error,
    GpuRange,
    Grant,
    IdleNotice,
    Lease,
    LeaseEvent,
    LeaseEventKind,
    LeaseState,
    Preemption,
    UnassignedItem,
    WorkRequest,
)
from ...schemas.values.durations import shape_of_request
from .event_rate import slim
from .service_time import Outage, ends_at
from .usage import UsageByOwner, size_of

WARN_FRACTION: Final = 0.2
"""An `expiring` event is published when this part of a lease's time to live is left."""

_SHORT_LIFE: Final = 6
"""A lease is short if its time to live is at most so many times that after which a host is lost."""

KIND_OF_END: Final = {
    LeaseState.RELEASED: LeaseEventKind.RELEASED,
    LeaseState.EXPIRED: LeaseEventKind.EXPIRED,
    LeaseState.LOST: LeaseEventKind.LOST,
    LeaseState.EVICTED: LeaseEventKind.EVICTED,
}
"""Kind of the event of each end."""
RESIZES: Final = (LeaseEventKind.RESIZE_OFFERED, LeaseEventKind.RESIZE_REQUESTED, LeaseEventKind.RESIZED)
"""Kinds of events about the devices of an elastic lease."""


class Refused(Exception):
    """An operation is refused; `error` is the answer."""

    def __init__(self, code: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.error = Error(code=code, message=message, field=field)

    @classmethod
    def by(cls, error: Error) -> Refused:
        """With an answer that is there already."""
        refused = cls(error.code, error.message, error.field)
        refused.error = error
        return refused


class Announcement(Struct, frozen=True, kw_only=True):
    """An event that may not be on the facts stream yet.

    Attributes:
        version: of the record that the event reports.
        event: to publish.
    """

    version: int
    event: LeaseEvent


class Returned(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A device that an elastic lease has given back.

    Attributes:
        grant: of the device.
        until: time up to which the lease had it.
    """

    grant: Grant
    until: datetime


class LeaseRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A lease as the bucket holds it.

    Attributes:
        lease: as it is after the last change.
        version: number of changes, from 1.
        changed_at: time of the last change.
        kind: of the last change. That of a notice is `renewed`, with `is_notice`: earlier planners could not read the
            lease otherwise, and would grant its devices again.
        extended_at: time when its time to live was last set.
        extended_service_seconds: likewise, in service time (`service_time.py`), by which it ends; None in records of
            earlier versions.
        shape: what was asked for, as durations are learned by (`schemas/values/durations.py`); empty in older records.
        digest: of the request's body, to detect the same id with another body.
        planner: id of the planner that made the last change.
        told: events up to this version are certainly on the facts stream.
        earlier: events of earlier changes that were not acknowledged when this one was written.
        requeue_of: id of the preempted lease whose work goes on in this one; empty for none.
        age_from: time from which its request counts as waiting, if that is before it was asked: that of the request
            of the preempted lease.
        is_notice: true if the last change was the notice of a preemption, or put its end off.
        request: what was asked for, without its names and labels; for an elastic lease alone.
        resize_kind: kind of the last change if that is about the devices of an elastic lease. `kind` is `renewed` then,
            as for a notice.
        returned: devices that were given back in the last minutes.
        answered: number of the last notice of a resize that the holder agreed to.
    """

    lease: Lease
    version: int
    changed_at: datetime
    kind: LeaseEventKind
    extended_at: datetime
    extended_service_seconds: float | None = None
    shape: str = ""
    digest: str = ""
    planner: str = ""
    told: int = 0
    earlier: list[Announcement] = []
    requeue_of: str = ""
    age_from: datetime | None = None
    is_notice: bool = False
    request: WorkRequest | None = None
    resize_kind: LeaseEventKind | None = None
    returned: list[Returned] = []
    answered: int = 0

    @property
    def event_kind(self) -> LeaseEventKind:
        """Kind of the event of the last change."""
        return LeaseEventKind.PREEMPTING if self.is_notice else self.resize_kind or self.kind

    @property
    def warned(self) -> bool:
        """True if an `expiring` event was made since its time to live was last set."""
        return self.kind is LeaseEventKind.EXPIRING

    @property
    def life_seconds(self) -> float:
        """The time to live that was last set."""
        return (self.lease.expires_at - self.extended_at).total_seconds()

    def ends_at(self, outages: Sequence[Outage] = ()) -> float:
        """End in service time, unless it is renewed."""
        return ends_at(self.extended_service_seconds or 0.0, self.life_seconds, outages)

    def due_at(self, outages: Sequence[Outage] = ()) -> float:
        """Service time of the next change that is due by time: the warning, then the end."""
        ends = self.ends_at(outages)
        return ends if self.warned else ends - self.life_seconds * WARN_FRACTION

    def event(self) -> LeaseEvent:
        """Event of the last change."""
        kind = self.event_kind
        lease = slim(self.lease, kind)
        resized = self.returned if kind is LeaseEventKind.RESIZED else ()
        returned = [each.grant for each in resized if each.until == self.changed_at]
        return LeaseEvent(kind=kind, time=self.changed_at, lease=lease, planner=self.planner, returned=returned)

    def announcements(self) -> list[Announcement]:
        """Events that may not be on the facts stream yet, oldest first."""
        if self.told >= self.version:
            return []
        own = Announcement(version=self.version, event=self.event())
        return [*(earlier for earlier in self.earlier if earlier.version > self.told), own]

    def without(self, heard: Set[int]) -> LeaseRecord:
        """Record after the events of some versions were acknowledged, in any order."""
        waiting = [announcement for announcement in self.announcements() if announcement.version not in heard]
        told = waiting[0].version - 1 if waiting else self.version
        return replace(self, told=told, earlier=[before for before in waiting if before.version < self.version])


def without_items(record: LeaseRecord) -> LeaseRecord:
    """Drop a record's work items, to check that it can be decoded: they have no numbers that JSON lacks."""
    lease = record.lease
    if lease.distribution is None:
        return record
    grants = [replace(grant, items=[]) for grant in lease.grants]
    return replace(record, lease=replace(lease, grants=grants, unassigned=[]))


def change_id(lease_id: str, version: int) -> str:
    """Message id of the write of a change. Only planners publish to that stream, so it needs no key."""
    return f"{lease_id}.{version}"


def grant(
    request: WorkRequest,
    grants: list[Grant],
    *,
    lease_id: str,
    now: datetime,
    digest: str,
    planner: str,
    environment: dict[str, dict[str, str]],
    addresses: dict[str, str] | None = None,
    unassigned: list[UnassignedItem] | None = None,
    policy: str = "",
    distribution: Distributed | None = None,
    service_seconds: float | None = None,
    asked_at: datetime | None = None,
    age_from: datetime | None = None,
    until: datetime | None = None,
    window: str = "",
    group: str = "",
) -> LeaseRecord:
    """Record of a new lease for a request that was decided.

    `service_seconds` is `now` in service time. The lease ends `until` then at the latest; `window` is the id of the
    booked window that it is in, `group` the name of its owner's group.
    """
    ends_at = None if request.max_seconds is None else now + timedelta(seconds=request.max_seconds)
    if until is not None:
        ends_at = _limited(until, ends_at)
    lease = Lease(
        lease_id=lease_id,
        owner=request.owner,
        state=LeaseState.ACTIVE,
        granted_at=now,
        expires_at=_limited(now + timedelta(seconds=request.ttl_seconds), ends_at),
        ttl_seconds=request.ttl_seconds,
        grants=grants,
        request_id=request.request_id or "",
        name=request.name,
        labels=request.labels,
        environment=environment,
        unassigned=unassigned or [],
        policy=policy,
        distribution=distribution,
        holder=request.holder,
        addresses=addresses or {},
        asked_at=asked_at,
        expected_seconds=request.expected_seconds,
        ends_at=ends_at,
        preemptible=request.preemptible,
        grace_seconds=request.grace_seconds,
        checkpoint=request.checkpoint,
        min_run_seconds=request.min_run_seconds,
        priority=request.priority,
        requeued=request.requeue_of is not None,
        window=window,
        group=group,
        elastic=None if request.gpus_max is None else GpuRange(min=request.gpus, max=request.gpus_max),
    )
    kept = None
    if request.gpus_max is not None:
        kept = replace(request, labels={}, name="", holder="", request_id=None)
    return LeaseRecord(
        lease=lease,
        version=1,
        changed_at=now,
        kind=LeaseEventKind.GRANTED,
        extended_at=now,
        extended_service_seconds=service_seconds,
        shape=shape_of_request(request),
        digest=digest,
        planner=planner,
        requeue_of=request.requeue_of or "",
        age_from=age_from,
        request=kept,
    )


def _limited(expires_at: datetime, ends_at: datetime | None) -> datetime:
    return expires_at if ends_at is None else min(expires_at, ends_at)


def repeat_answer(record: LeaseRecord) -> Assignment | Error:
    """Answer to a retry of a granted request: the grant that it got, as long as its lease is active.

    After that it is an error: its devices may belong to another lease, so the answer must not look like a grant.
    """
    lease = record.lease
    if lease.state is not LeaseState.ACTIVE:
        return Error(
            code="ended",
            message=f"Request id {lease.request_id!r} was granted lease {lease.lease_id}, which was "
            f"{_how_it_ended(lease)}: ask under another id, or without one",
            field="$.request_id",
        )
    if record.version == 1:
        return Assignment(lease=lease)
    return Assignment(
        lease=replace(
            lease,
            expires_at=_limited(lease.granted_at + timedelta(seconds=lease.ttl_seconds), lease.ends_at),
        )
    )


def check_holder(record: LeaseRecord | None, lease_id: str, owner: str) -> LeaseRecord:
    """Check that an owner holds an active lease, and return its record. An overdue lease counts until it has ended.

    Raises:
        Refused: there is none, another owner has it, or it has ended.
    """
    return check_active(check_known(record, lease_id, owner))


def check_known(record: LeaseRecord | None, lease_id: str, owner: str | None = None) -> LeaseRecord:
    """Check that a lease is known, ended or not, and return its record.

    Args:
        record: as the table has it; None if it has none.
        lease_id: that the message names.
        owner: that must have it; None for any.

    Raises:
        Refused: there is none, or another owner has it.
    """
    if record is None:
        raise Refused("not_found", f"There is no lease {lease_id!r}: it never was, or it ended long ago", "$.lease_id")
    if owner is not None and record.lease.owner != owner:
        raise Refused("not_owner", f"Lease {lease_id} is not {owner!r}'s: only its owner may do this", "$.owner")
    return record


def check_active(record: LeaseRecord) -> LeaseRecord:
    """Check that a lease is active, and return its record.

    Raises:
        Refused: it has ended.
    """
    lease = record.lease
    if lease.state is not LeaseState.ACTIVE:
        raise Refused("ended", f"Lease {lease.lease_id} was {_how_it_ended(lease)}: request again", "$.lease_id")
    return record


def _how_it_ended(lease: Lease) -> str:
    ended = f" at {lease.ended_at.isoformat(timespec='seconds')}" if lease.ended_at else ""
    return f"{lease.state.value}{ended}{f' ({lease.reason})' if lease.reason else ''}"


def renew(
    record: LeaseRecord,
    ttl_seconds: float | None,
    now: datetime,
    planner: str,
    service_seconds: float | None = None,
    holder: str = "",
) -> LeaseRecord:
    """Renew: the end moves to now plus the lease's time to live, or the one that is given, for this renewal only.

    It never moves beyond the limit that `max_seconds` of the request sets.
    """
    ttl = record.lease.ttl_seconds if ttl_seconds is None else ttl_seconds
    expires_at = _limited(now + timedelta(seconds=ttl), record.lease.ends_at)
    lease = replace(record.lease, expires_at=expires_at, holder=holder or record.lease.holder)
    after = next_record(record, LeaseEventKind.RENEWED, lease, now, planner)
    return replace(after, extended_at=now, extended_service_seconds=service_seconds)


def warn(record: LeaseRecord, now: datetime, planner: str) -> LeaseRecord:
    """Warn: the end is near, and its event says so.

    Args:
        record: of an active lease.
        now: time since which the warning is due. Another change may have been written since: its event is not later.
        planner: id of this planner.
    """
    return next_record(record, LeaseEventKind.EXPIRING, record.lease, max(now, record.changed_at), planner)


def end(
    record: LeaseRecord, state: LeaseState, reason: str, now: datetime, planner: str, ended_at: datetime | None = None
) -> LeaseRecord:
    """End a lease; its devices are free once this is durable.

    Args:
        record: of an active lease.
        state: after the end.
        reason: of the end.
        now: time of the change.
        planner: id of this planner.
        ended_at: time of the end, if that was before now.
    """
    lease = replace(record.lease, state=state, ended_at=ended_at or now, reason=reason, resize=None)
    return next_record(record, KIND_OF_END[state], lease, now, planner)


def notify(record: LeaseRecord, preemption: Preemption, now: datetime, planner: str) -> LeaseRecord:
    """Give the holder of an active lease the notice of a preemption; with no grace, end the lease at once.

    A notice that is out stays as it is. One that ends before the grace is over ends when that is.

    Raises:
        Refused: the lease is not preemptible, or has not lasted for its `min_run_seconds` yet.
    """
    lease = record.lease
    if lease.preemption is not None:
        return record
    if not lease.preemptible:
        raise Refused("refused", f"Lease {lease.lease_id} is not preemptible: an operator can evict it", "$.lease_id")
    if now < (allowed_at := preemptible_from(lease)):
        left = (allowed_at - now).total_seconds()
        raise Refused(
            "refused",
            f"Lease {lease.lease_id} may be preempted in {left:.1f} s, after its min_run_seconds of "
            f"{lease.min_run_seconds:g} s; an operator can evict it now",
            "$.lease_id",
        )
    ends_at = max(preemption.ends_at, now + timedelta(seconds=lease.grace_seconds))
    notified = replace(lease, preemption=replace(preemption, ends_at=ends_at), resize=None)
    if not lease.grace_seconds:
        return preempted(record, notified, now, planner)
    return next_record(record, LeaseEventKind.PREEMPTING, notified, now, planner)


def preemptible_from(lease: Lease) -> datetime:
    """Time from which a preemptible lease may be preempted."""
    return lease.granted_at + timedelta(seconds=lease.min_run_seconds)


def withdraw_notice(record: LeaseRecord, claimant: str | None, now: datetime, planner: str) -> LeaseRecord:
    """Withdraw the notice of a preemption: the lease goes on.

    Args:
        record: of an active lease; without a notice it stays as it is.
        claimant: for which the notice must be, by request id; None for any.
        now: time of the change.
        planner: id of this planner.
    """
    notice = record.lease.preemption
    if notice is None or claimant not in (None, notice.claimant):
        return record
    return next_record(record, LeaseEventKind.RENEWED, replace(record.lease, preemption=None), now, planner)


def saved(record: LeaseRecord, now: datetime, planner: str) -> LeaseRecord:
    """Note that the work of an active lease is saved; while a notice is out, the lease ends."""
    lease = replace(record.lease, saved_at=now)
    if lease.preemption is None:
        return next_record(record, LeaseEventKind.RENEWED, lease, now, planner)
    return preempted(record, lease, now, planner)


def busy(record: LeaseRecord, seconds: float, now: datetime, planner: str) -> LeaseRecord:
    """Put the end of a preemption off, once: to some seconds from now, and at most by the grace again.

    Raises:
        Refused: no notice is out, or its end was put off before.
    """
    lease, notice = record.lease, record.lease.preemption
    if notice is None:
        raise Refused("refused", f"Lease {lease.lease_id} has no notice of a preemption to answer", "$.busy_seconds")
    if notice.extended:
        ends = notice.ends_at.isoformat(timespec="seconds")
        raise Refused("refused", f"The end of lease {lease.lease_id} was put off once, to {ends}", "$.busy_seconds")
    latest = notice.ends_at + timedelta(seconds=lease.grace_seconds)
    ends_at = min(max(notice.ends_at, now + timedelta(seconds=seconds)), latest)
    extended = replace(lease, preemption=replace(notice, ends_at=ends_at, extended=True))
    return next_record(record, LeaseEventKind.PREEMPTING, extended, now, planner)


def preempted(
    record: LeaseRecord, lease: Lease, now: datetime, planner: str, ended_at: datetime | None = None
) -> LeaseRecord:
    """End a lease by preemption.

    Args:
        record: before this change.
        lease: with the notice.
        now: time of the change.
        planner: id of this planner.
        ended_at: time of the end, if that was before now.
    """
    why = f": {lease.preemption.reason}" if lease.preemption is not None and lease.preemption.reason else ""
    ended = replace(lease, state=LeaseState.EVICTED, ended_at=ended_at or now, reason=f"preempted{why}")
    return next_record(record, LeaseEventKind.EVICTED, ended, now, planner)


def warn_idle(record: LeaseRecord, notice: IdleNotice | None, now: datetime, planner: str) -> LeaseRecord:
    """Warn the holder of an active lease that its devices are idle; with None, withdraw the warning."""
    return next_record(record, LeaseEventKind.RENEWED, replace(record.lease, idle=notice), now, planner)


def make_preemptible(record: LeaseRecord, notice: IdleNotice, now: datetime, planner: str) -> LeaseRecord:
    """Make an active lease preemptible since its devices are idle. It stays so."""
    lease = replace(record.lease, preemptible=True, idle=replace(notice, acted_at=now))
    return next_record(record, LeaseEventKind.RENEWED, lease, now, planner)


def end_idle(record: LeaseRecord, notice: IdleNotice, now: datetime, planner: str) -> LeaseRecord:
    """End an active lease since its devices are idle; its reason has the evidence."""
    lease = replace(record.lease, idle=notice)
    return end(replace(record, lease=lease), LeaseState.EVICTED, idle_reason(notice), now, planner)


def idle_reason(notice: IdleNotice) -> str:
    """Text of why a lease counts as idle, with the evidence."""
    if notice.mean_percent is None or notice.peak_percent is None:
        load = "GPU activity unknown"
    else:
        load = f"GPU activity {notice.mean_percent:.1f}% on average, {notice.peak_percent:.1f}% at most"
    since = notice.since.isoformat(timespec="seconds")
    return f"idle: {notice.rule} (rule of group {notice.group}); {load} since {since}"


def deadline(lease: Lease) -> tuple[datetime, LeaseState] | None:
    """Time at which an active lease ends even if it is renewed, and its state then; None without such a time."""
    notice = lease.preemption
    if notice is not None and (lease.ends_at is None or notice.ends_at <= lease.ends_at):
        return notice.ends_at, LeaseState.EVICTED
    return None if lease.ends_at is None else (lease.ends_at, LeaseState.EXPIRED)


def requeued_age(table: LeaseTable, lease_id: str, owner: str) -> datetime:
    """Time from which a request counts as waiting that goes on with the work of a preempted lease.

    A holder that releases its lease while a notice is out gives way, too: the lease counts as preempted.

    Raises:
        Refused: the lease is unknown, of another owner, active, or was not preempted, or its work goes on in another.
    """
    record = table.get(lease_id)
    if record is None:
        raise Refused(
            "not_found",
            f"There is no lease {lease_id!r} to requeue: it never was, or it ended long ago. Ask without requeue_of",
            "$.requeue_of",
        )
    lease = record.lease
    if lease.owner != owner:
        raise Refused("not_owner", f"Lease {lease_id} is not {owner!r}'s: its owner may requeue it", "$.requeue_of")
    if lease.state is LeaseState.ACTIVE:
        raise Refused("conflict", f"Lease {lease_id} is still active: requeue it once it has ended", "$.requeue_of")
    if lease.preemption is None:
        text = f"Lease {lease_id} was not preempted, but {_how_it_ended(lease)}: ask without requeue_of"
        raise Refused("refused", text, "$.requeue_of")
    if (other := table.requeued_as(lease_id)) is not None:
        raise Refused("conflict", f"The work of lease {lease_id} goes on in lease {other} already", "$.requeue_of")
    return record.age_from or lease.asked_at or lease.granted_at


def outlives_silence(record: LeaseRecord, unrenewed_seconds: float, lost_after_seconds: float) -> bool:
    """True if an active lease continues though its host is lost, since its holder is there, or may be.

    A holder renews each third of the time to live. So half of it without a renewal is allowed, but only for a lease
    that was renewed before, or a short one, which soon ends by time: the holder of another may never renew.
    `lost_after_seconds` without a renewal are always allowed.

    Args:
        record: of the lease.
        unrenewed_seconds: since it was granted or last renewed.
        lost_after_seconds: a host that is silent for so long is lost.
    """
    renews = record.extended_at > record.lease.granted_at
    is_short = record.life_seconds <= _SHORT_LIFE * lost_after_seconds
    allowed = record.life_seconds / 2 if renews or is_short else 0.0
    return unrenewed_seconds <= max(allowed, lost_after_seconds)


def fitting(record: LeaseRecord, max_bytes: int, size_of: Callable[[object], int]) -> LeaseRecord:
    """Drop the oldest earlier events of a record that is too large to be written, as many as necessary.

    Args:
        record: to write.
        max_bytes: size limit. The record is still larger if it would be without any earlier events.
        size_of: returns the encoded bytes of a value.
    """
    left = max_bytes - size_of(replace(record, earlier=[])) - len(',"earlier":[]')
    kept: list[Announcement] = []
    for announcement in reversed(record.earlier):
        left -= size_of(announcement) + len(",")
        if left < 0:
            break
        kept.append(announcement)
    return replace(record, earlier=kept[::-1])


def next_record(
    record: LeaseRecord,
    kind: LeaseEventKind,
    lease: Lease,
    now: datetime,
    planner: str,
) -> LeaseRecord:
    """Record after a change of its lease.

    Args:
        record: before the change.
        kind: of the change.
        lease: after the change.
        now: time of the change.
        planner: id of this planner.
    """
    return replace(
        record,
        lease=lease,
        version=record.version + 1,
        changed_at=now,
        kind=LeaseEventKind.RENEWED if kind is LeaseEventKind.PREEMPTING or kind in RESIZES else kind,
        is_notice=kind is LeaseEventKind.PREEMPTING,
        resize_kind=kind if kind in RESIZES else None,
        planner=planner,
        earlier=record.announcements(),
    )


class LeaseTable:
    """All records by id, by request, by host and by due time.

    Ended ones stay until they are forgotten, since their requests may be retried.

    Attributes:
        active: number of active leases.
        owners: usage by owner.
    """

    def __init__(self, records: Iterable[LeaseRecord] = ()) -> None:
        self._records: dict[str, LeaseRecord] = {}
        self._by_request: dict[tuple[str, str], str] = {}
        self._by_host: dict[str, dict[str, None]] = {}
        self._requeued: dict[str, str] = {}
        self._due: list[tuple[float, str, int]] = []
        self._published_ahead: dict[str, set[int]] = {}
        """Versions after `told` whose events are on the stream, of leases with an earlier event that may not be."""
        self.active = 0
        self.owners = UsageByOwner()
        for record in records:
            self.put(record)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[LeaseRecord]:
        return iter(self._records.values())

    def get(self, lease_id: str) -> LeaseRecord | None:
        """Record of a lease; None if there is none (any more)."""
        return self._records.get(lease_id)

    def of_request(self, owner: str, request_id: str) -> LeaseRecord | None:
        """Record of the lease that an owner's request was granted; None if there is none."""
        lease_id = self._by_request.get((owner, request_id))
        return None if lease_id is None else self._records.get(lease_id)

    def requeued_as(self, lease_id: str) -> str | None:
        """Id of the lease in which the work of a preempted lease goes on, or did; None if there is none."""
        return self._requeued.get(lease_id)

    def ends(self, lease_id: str) -> float:
        """End of a lease unless it is renewed, seconds since the epoch; infinity for an unknown one."""
        record = self._records.get(lease_id)
        return math.inf if record is None else record.lease.expires_at.timestamp()

    def on_host(self, host: str) -> list[LeaseRecord]:
        """Active leases with a grant on a host."""
        return [self._records[lease_id] for lease_id in self._by_host.get(host, ())]

    def count_on(self, host: str) -> int:
        """Number of active leases with a grant on a host."""
        return len(self._by_host.get(host, ()))

    @property
    def hosts(self) -> Iterable[str]:
        """Names of hosts with active leases."""
        return self._by_host.keys()

    def put(self, record: LeaseRecord) -> None:
        """Store a durable record, in place of an earlier one."""
        lease = record.lease
        before = self._records.get(lease.lease_id)
        was_active = before is not None and before.lease.state is LeaseState.ACTIVE
        is_active = lease.state is LeaseState.ACTIVE
        self._records[lease.lease_id] = record
        if before is not None and (record.told < before.told or lease.lease_id in self._published_ahead):
            # Events were acknowledged while the write was in flight.
            self._apply_published(replace(record, told=max(record.told, before.told)))
        size = 0 if before is not None else size_of(lease)
        if before is not None and before.lease.grants is not lease.grants:
            size = size_of(lease) - size_of(before.lease)
        self.owners.add(lease.owner, is_active - was_active, size)
        if before is None and lease.request_id:
            self._by_request[lease.owner, lease.request_id] = lease.lease_id
        if before is None and record.requeue_of:
            self._requeued[record.requeue_of] = lease.lease_id
        if is_active:
            heappush(self._due, (record.due_at(), lease.lease_id, record.version))
            if len(self._due) > 4 * len(self._records) + 64:
                self._compact()
        self.active += is_active - was_active
        if before is not None and was_active and not (is_active and before.lease.grants is lease.grants):
            self._leave_hosts(before.lease)
        if is_active and not (was_active and before is not None and before.lease.grants is lease.grants):
            for part in lease.grants:
                self._by_host.setdefault(part.host, {})[lease.lease_id] = None

    def _leave_hosts(self, lease: Lease) -> None:
        for part in lease.grants:
            held = self._by_host.get(part.host)
            if held is not None:
                held.pop(lease.lease_id, None)
                if not held:
                    del self._by_host[part.host]

    def note_published(self, lease_id: str, version: int) -> None:
        """Note that the event of a lease's change is on the facts stream, in order or not."""
        record = self._records.get(lease_id)
        if record is not None and version > record.told:
            self._published_ahead.setdefault(lease_id, set()).add(version)
            self._apply_published(record)

    def _apply_published(self, record: LeaseRecord) -> None:
        lease_id = record.lease.lease_id
        heard = self._published_ahead.pop(lease_id, set())
        record = self._records[lease_id] = record.without(heard)
        if out_of_turn := {version for version in heard if version > record.told}:
            self._published_ahead[lease_id] = out_of_turn

    def remove(self, lease_id: str) -> None:
        """Remove an ended record."""
        self._published_ahead.pop(lease_id, None)
        record = self._records.pop(lease_id, None)
        if record is not None:
            self.owners.add(record.lease.owner, 0, -size_of(record.lease))
            request = record.lease.owner, record.lease.request_id
            if self._by_request.get(request) == lease_id:
                del self._by_request[request]
            if self._requeued.get(record.requeue_of) == lease_id:
                del self._requeued[record.requeue_of]

    def due(self, now: float, outages: Sequence[Outage] = ()) -> list[LeaseRecord]:
        """Active leases whose warning or end is due. Each is returned once, until it is changed or rescheduled.

        Args:
            now: service time.
            outages: of service time.
        """
        found: list[LeaseRecord] = []
        while self._due and self._due[0][0] <= now:
            _, lease_id, version = heappop(self._due)
            record = self._records.get(lease_id)
            if record is None or record.version != version or record.lease.state is not LeaseState.ACTIVE:
                continue
            due_at = record.due_at(outages)
            if due_at > now:  # an outage has extended it
                heappush(self._due, (due_at, lease_id, version))
            else:
                found.append(record)
        return found

    def next_due(self) -> float | None:
        """Service time when a change is due next; None if none is. It may be early, never late."""
        return self._due[0][0] if self._due else None

    def reschedule(self, record: LeaseRecord, at: float) -> None:
        """Make a record due again at a service time, since its change could not be made yet."""
        heappush(self._due, (at, record.lease.lease_id, record.version))

    def _compact(self) -> None:
        self._due = [
            (record.due_at(), lease_id, record.version)
            for lease_id, record in self._records.items()
            if record.lease.state is LeaseState.ACTIVE
        ]
        heapify(self._due)
