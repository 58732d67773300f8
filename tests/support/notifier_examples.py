"""Leases, jobs and rules for the notifier's tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from corral.notifier.messages import Message
from corral.notifier.rules import Delivery
from corral.schemas.operations import DeviceStatus
from corral.schemas.requests import Grant, Lease, LeaseEvent, LeaseEventKind, LeaseState, Preemption
from corral.schemas.work.jobs import Job, JobEvent, JobEventKind, JobState, JobTask
from corral.schemas.work.notifications import NewsKind, NotifyRule, OwnedRule

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
GRANT = Grant(host="node-7", device="GPU-1", model="NVIDIA H100 80GB HBM3", memory_bytes=2**36)


def lease(lease_id: str = "l-1", *, at: datetime = NOON, ttl: float = 3600.0, **more: Any) -> Lease:
    fields: dict[str, Any] = {
        "owner": "ann",
        "state": LeaseState.ACTIVE,
        "granted_at": at,
        "expires_at": at + timedelta(seconds=ttl),
        "ttl_seconds": ttl,
        "grants": [GRANT],
        "name": "train",
        "asked_at": at - timedelta(minutes=5),
    }
    return Lease(lease_id=lease_id, **(fields | more))


def event(kind: LeaseEventKind, lease: Lease, at: datetime | None = None) -> LeaseEvent:
    return LeaseEvent(kind=kind, time=at or lease.granted_at, lease=lease)


def preempting(lease_id: str = "l-1", **more: Any) -> LeaseEvent:
    notice = Preemption(notified_at=NOON, ends_at=NOON + timedelta(minutes=2), claimant_owner="bob")
    return event(LeaseEventKind.PREEMPTING, lease(lease_id, preemption=notice, **more))


def job_event(job_id: str = "12", state: JobState = JobState.DONE, **more: Any) -> JobEvent:
    ended = None if state in (JobState.RUNNING, JobState.PENDING) else NOON
    job = Job(
        job_id=job_id,
        owner="ann",
        name="sweep",
        state=state,
        submitted_at=NOON - timedelta(hours=1),
        ended_at=ended,
        counts={state.value: 1},
        **more,
    )
    return JobEvent(kind=JobEventKind.CHANGED, time=NOON, job=job, version=3, tasks=[JobTask(index=0, state=state)])


def device(uuid: str = "GPU-1", *why_not: str, host: str = "node-7", **more: Any) -> DeviceStatus:
    return DeviceStatus(
        uuid=uuid, host=host, index=0, model="NVIDIA H100", usable=not why_not, why_not=list(why_not), **more
    )


def owned(*on: NewsKind | str, owner: str = "", to: tuple[str, ...] = ("mail",), **more: Any) -> OwnedRule:
    rule = NotifyRule(name=more.pop("name", "rule"), on=[NewsKind(kind) for kind in on], to=list(to), **more)
    return OwnedRule(rule=rule, owner=owner)


def delivery(cause: str, target: str = "mail", at: datetime = NOON, until: datetime | None = None) -> Delivery:
    message = Message(title=f"about {cause}", at="Mon 30 Nov 12:00 UTC", summary="It happened.", reference=cause)
    return Delivery(
        cause=cause,
        kind=NewsKind.ENDED,
        target=target,
        rule="/rule",
        message=message,
        made_at=at,
        not_before=until,
    )
