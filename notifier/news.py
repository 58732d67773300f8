"""News: what has happened, and to whom; made of lease events, changes of jobs, reports, and the fleet. Pure.

Each has a cause: the same cause always gives the same text, however often it is found out. A target is told once of a
cause.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ..schemas.operations import DeviceStatus
from ..schemas.requests import Lease, LeaseEvent, LeaseEventKind, LeaseState
from ..schemas.work.jobs import FINAL, Job, JobEvent, JobState, JobTask, attempt_of_request
from ..schemas.work.notifications import NewsKind, NotifyRule
from ..schemas.work.reports import ReportWritten

_ENDS: Final = frozenset({LeaseEventKind.RELEASED, LeaseEventKind.EXPIRED, LeaseEventKind.LOST, LeaseEventKind.EVICTED})
LEASE_EVENTS: Final = (LeaseEventKind.GRANTED, LeaseEventKind.EXPIRING, LeaseEventKind.PREEMPTING, *sorted(_ENDS))
"""Kinds of lease events that news are made of."""
_NOT_ENDED: Final = frozenset({JobState.PENDING.value, JobState.STARTING.value, JobState.RUNNING.value})
_TTL_PART: Final = 0.2
"""Part of a time to live that is left when a lease counts as expiring, as for the planner."""


class JobEnd(Struct, frozen=True):
    """A job that has ended, or started.

    Attributes:
        job: the job.
        tasks: of its tasks those that changed last.
        summary: names and values of the summary from the history; empty if it is not known.
    """

    job: Job
    tasks: Sequence[JobTask] = ()
    summary: Sequence[tuple[str, str]] = ()


class Trouble(Struct, frozen=True, tag=True, omit_defaults=True):
    """Devices of a host that take no new work.

    Attributes:
        host: the host's name.
        devices: the device, or all devices of a host that is lost.
        lost: true if the host is lost.
        over: true if they take work again.
    """

    host: str
    devices: Sequence[DeviceStatus]
    lost: bool = False
    over: bool = False


class LongQueue(Struct, frozen=True, tag=True, omit_defaults=True):
    """The queue, where it is long.

    Attributes:
        requests: number of requests that wait.
        gpus: devices that they ask for.
        longest_seconds: time that one of them has waited.
        longest_owner: owner of that request.
        over: true if it is not long any more.
    """

    requests: int
    gpus: int
    longest_seconds: float
    longest_owner: str
    over: bool = False


class Excess(Struct, frozen=True, tag=True, omit_defaults=True):
    """Use of a group beyond its share.

    Attributes:
        group: name of the group.
        usage: part of all recent use, 0 to 1.
        fair_usage: the part that its weight gives it.
        waiting: requests of other groups that wait.
        over: true if it is not beyond its share any more.
    """

    group: str
    usage: float
    fair_usage: float
    waiting: int
    over: bool = False


class IdleLease(Struct, frozen=True):
    """A lease whose devices are idle.

    Attributes:
        lease: the lease; its `idle` is set if the planner has warned its holder.
        since: time from which on they are idle.
        mean_percent: mean GPU utilization since then; null if unknown.
    """

    lease: Lease
    since: datetime
    mean_percent: float | None = None


Subject = Lease | JobEnd | Trouble | LongQueue | Excess | IdleLease | ReportWritten


class News(Struct, frozen=True, kw_only=True):
    """Something that has happened.

    Attributes:
        kind: kind of it.
        also: further kinds that it counts as.
        cause: text that is the same for the same cause.
        at: when it happened.
        subject: what it is about.
        owners: of the lease or the job, or of the leases on the device.
        groups: of the owner; or the group that is beyond its share.
        hosts: of the lease, the device or the job.
        models: of the devices.
        workload: name of the lease, the job or the report.
        waited_seconds: time that the request waited in the queue.
        end: for `expiring`: when the lease ends.
    """

    kind: NewsKind
    also: frozenset[NewsKind] = frozenset()
    cause: str
    at: datetime
    subject: Subject
    owners: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    workload: str = ""
    waited_seconds: float = 0.0
    end: datetime | None = None

    @property
    def kinds(self) -> frozenset[NewsKind]:
        """All kinds that it counts as."""
        return self.also | {self.kind}


def of_job(lease: Lease) -> bool:
    """True if a lease is that of a job's task."""
    return attempt_of_request(lease.request_id) is not None


def _about(lease: Lease, kind: NewsKind, cause: str, at: datetime, subject: Subject | None = None) -> News:
    return News(
        kind=kind,
        also=frozenset({NewsKind.CUT_SHORT})
        if kind is NewsKind.ENDED and lease.state is not LeaseState.RELEASED
        else frozenset(),
        cause=f"{kind.value}:{lease.lease_id}{cause}",
        at=at,
        subject=lease if subject is None else subject,
        owners=frozenset({lease.owner}),
        groups=frozenset({lease.group} if lease.group else ()),
        hosts=frozenset(grant.host for grant in lease.grants),
        models=frozenset(grant.model for grant in lease.grants if grant.model),
        workload=lease.name,
        waited_seconds=max(0.0, (lease.granted_at - lease.asked_at).total_seconds()) if lease.asked_at else 0.0,
    )


def of_lease_event(event: LeaseEvent) -> News | None:
    """News of a lease event; None if it is none, or `expiring`, which depends on the rule (`expiring`)."""
    lease = event.lease
    if event.kind is LeaseEventKind.PREEMPTING and lease.preemption is not None:
        notified = lease.preemption.notified_at
        return _about(lease, NewsKind.PREEMPTED, f":{notified.timestamp():.3f}", notified)
    if of_job(lease):
        return None
    if event.kind is LeaseEventKind.GRANTED:
        return _about(lease, NewsKind.GRANTED, "", lease.granted_at)
    if event.kind in _ENDS:
        return _about(lease, NewsKind.ENDED, "", lease.ended_at or event.time)
    return None


def ends_soon(lease: Lease, before_seconds: float, now: datetime) -> datetime | None:
    """End of a lease, if that is soon: by its limit, or by its time to live unless it is renewed.

    The limit counts from `before_seconds` on, or from half of the lease's whole time. The time to live counts from a
    fifth of it at most, since a holder that is alive renews it before.
    """
    if lease.ends_at is not None:
        whole = (lease.ends_at - lease.granted_at).total_seconds()
        if lease.ends_at - now <= timedelta(seconds=min(before_seconds, whole / 2)):
            return lease.ends_at
    if lease.expires_at - now <= timedelta(seconds=min(before_seconds, lease.ttl_seconds * _TTL_PART)):
        return lease.expires_at
    return None


def expiring(rule: NotifyRule, leases: Iterable[Lease], now: datetime) -> list[News]:
    """News of leases that end soon, as a rule has it."""
    found: list[News] = []
    for lease in leases:
        if lease.state is LeaseState.ACTIVE and not of_job(lease):
            end = ends_soon(lease, rule.before_seconds, now)
            if end is not None:
                news = _about(lease, NewsKind.EXPIRING, f":{end.timestamp():.3f}", now)
                found.append(replace(news, end=end))
    return found


def idle_warnings(leases: Iterable[Lease]) -> list[News]:
    """News of leases whose holders the planner has warned, by the rule of their group."""
    return [
        _about(
            lease,
            NewsKind.IDLE,
            f":warned:{notice.noticed_at.timestamp():.3f}",
            notice.noticed_at,
            IdleLease(lease, notice.since, notice.mean_percent),
        )
        for lease in leases
        if (notice := lease.idle) is not None
    ]


def of_condition(subject: Trouble | LongQueue | Excess | IdleLease, cause: str, since: datetime) -> News:
    """News of a condition that lasts.

    Args:
        subject: what it is about.
        cause: what tells it from others, apart from its kind.
        since: when it began.
    """
    cause = f":{cause}:{since.timestamp():.3f}"
    if isinstance(subject, IdleLease):
        return _about(subject.lease, NewsKind.IDLE, cause, since, subject)
    if isinstance(subject, Trouble):
        return News(
            kind=NewsKind.UNHEALTHY,
            cause=f"{NewsKind.UNHEALTHY}{cause}",
            at=since,
            subject=subject,
            hosts=frozenset({subject.host}),
            models=frozenset(device.model for device in subject.devices if device.model),
        )
    kind = NewsKind.QUEUE_LONG if isinstance(subject, LongQueue) else NewsKind.OVER_SHARE
    groups = frozenset({subject.group} if isinstance(subject, Excess) else ())
    return News(kind=kind, cause=f"{kind}{cause}", at=since, subject=subject, groups=groups)


def of_job_event(event: JobEvent) -> News | None:
    """News of a change of a job; None if it has neither started nor ended with it."""
    job = event.job
    if job.state in FINAL and job.ended_at is not None:
        also = frozenset({NewsKind.JOB_FAILED}) if job.state is not JobState.DONE else frozenset[NewsKind]()
        return _about_job(event, NewsKind.JOB_ENDED, also, f":{job.ended_at.timestamp():.3f}", job.ended_at)
    if job.state is JobState.RUNNING and job.counts.keys() <= _NOT_ENDED:
        return _about_job(event, NewsKind.JOB_STARTED, frozenset(), f":{job.submitted_at.timestamp():.3f}", event.time)
    return None


def _about_job(event: JobEvent, kind: NewsKind, also: frozenset[NewsKind], cause: str, at: datetime) -> News:
    job = event.job
    return News(
        kind=kind,
        also=also,
        cause=f"{kind.value}:{job.job_id}{cause}",
        at=at,
        subject=JobEnd(job, event.tasks),
        owners=frozenset({job.owner}),
        groups=frozenset({job.group} if job.group else ()),
        hosts=frozenset(part.host for task in event.tasks for part in task.parts),
        workload=job.name,
    )


def of_report(report: ReportWritten) -> News:
    """News of a report that was written."""
    return News(
        kind=NewsKind.REPORT,
        cause=f"{NewsKind.REPORT}:{report.report_id}",
        at=report.written_at,
        subject=report,
        owners=frozenset({report.owner} if report.owner else ()),
        groups=frozenset({report.group} if report.group else ()),
        workload=report.name,
    )
