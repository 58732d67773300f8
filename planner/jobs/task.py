"""State machine of a task that has been started, or has ended.

```
 pending ── lease ──► starting ──► running ──► completing ──► done, failed, cancelled, preempted, lost
    ▲                                                           │
    └───────────────── retry, requeue, resubmit ────────────────┘
```

The state of an attempt follows from what the runners report of its parts (one on each host), and from `ending`: why it
is being ended. Nothing is final before all parts have ended, or nobody is left who could say how they did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from msgspec.structs import replace

from ...schemas.requests import Lease, LeaseState
from ...schemas.work.jobs import FINAL, JobSpec, JobState, JobTask, TaskPart
from ...schemas.work.runs import RunReport
from .records import Ending, StoredTask

LOST_RUN: Final = "the runner knows nothing of it"
_MARGIN_SECONDS: Final = 5.0
"""Time between SIGTERM and the end of a lease that is preempted, or at its limit: as much, or a fifth of the time."""
_MARGIN_FRACTION: Final = 0.2
_ANSWER_SECONDS: Final = 30.0
"""Time beyond the grace in which a runner reports that the parts of a lease that has ended are gone."""

_LIVE: Final = frozenset({JobState.STARTING, JobState.RUNNING, JobState.COMPLETING})


class Task:
    """A task of a job.

    Attributes:
        index: in the array.
        attempt: number of its starts.
        state: see `JobState`.
        lease_id: of the attempt.
        lease_over: true if the lease has ended by other means than the end of the task.
        parts: by host, in the order of ranks.
        prepared: hosts that could start it.
        begun: true if the hosts were told to start it, rather than to prepare.
        ending: why it is being ended; None if it is not.
        notice: number of the last signal for its processes.
        notice_signal: the signal; 0 for none.
        notice_reason: why.
        stop_at: time at which it is ended, in seconds since the epoch; infinite for none.
        stop_margin: time from then to the end of its lease, in seconds.
        stop_for: what it becomes then.
        lost_at: time from which nobody is expected to say how its parts ended; infinite for none.
        grace_seconds: time between SIGTERM and SIGKILL when it is stopped.
        host_fault: true if a host was why its first part failed that did, and no command of that was executed.
        taken_over: true if an earlier leader began the attempt.
        last: its last attempt, as it ended; None if none has, or if it has not gone on since.
        queued_at: time from which it counts as waiting, in seconds since the epoch.
        requeue_of: id of the preempted lease whose work it goes on with; empty for none.
    """

    __slots__ = (
        "attempt",
        "begun",
        "ended_at",
        "ending",
        "exit_code",
        "grace_seconds",
        "host_fault",
        "index",
        "last",
        "lease_id",
        "lease_over",
        "lost_at",
        "message",
        "notice",
        "notice_reason",
        "notice_signal",
        "parts",
        "prepared",
        "progress",
        "queued_at",
        "requeue_of",
        "retries_left",
        "signal",
        "started_at",
        "state",
        "stop_at",
        "stop_for",
        "stop_margin",
        "taken_over",
    )

    def __init__(self, index: int, queued_at: float, retries_left: int, state: JobState = JobState.PENDING) -> None:
        self.index = index
        self.attempt = 0
        self.state = state
        self.queued_at = queued_at
        self.retries_left = retries_left
        self.requeue_of = ""
        self.message = ""
        self.last: JobTask | None = None
        self._clear()

    def _clear(self) -> None:
        """Forget the last attempt."""
        self.lease_id = ""
        self.lease_over = self.begun = False
        self.parts: dict[str, TaskPart] = {}
        self.prepared: set[str] = set()
        self.ending: Ending | None = None
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.started_at: datetime | None = None
        self.ended_at: datetime | None = None
        self.progress: float | None = None
        self.notice = self.notice_signal = 0
        self.notice_reason = ""
        self.stop_at = self.lost_at = math.inf
        self.stop_margin = 0.0
        self.stop_for: Ending | None = None
        self.grace_seconds = 0.0
        self.host_fault = self.taken_over = False

    @property
    def is_live(self) -> bool:
        """True if it has an attempt that has not ended."""
        return self.state in _LIVE

    @property
    def is_final(self) -> bool:
        """True if it has ended."""
        return self.state in FINAL

    @property
    def is_blameless(self) -> bool:
        """True if its attempt failed by a host that could not start it, and no command of it was executed anywhere."""
        # An earlier leader may have had it started on several hosts before it could note that.
        started = any(_has_run(part) for part in self.parts.values()) or (self.taken_over and len(self.parts) > 1)
        return self.host_fault and self.state is JobState.FAILED and not started

    # Durable form

    def listed(self) -> JobTask:
        """The task as it is published."""
        waits = self.state is JobState.PENDING
        return JobTask(
            index=self.index,
            attempt=self.attempt,
            state=self.state,
            lease_id=self.lease_id,
            parts=list(self.parts.values()),
            exit_code=self.exit_code,
            signal=self.signal,
            pending_since=time_of(self.queued_at) if self.queued_at else None,
            started_at=self.started_at,
            ended_at=None if waits else self.ended_at,
            progress=self.progress,
            message=self.message,
            retries_left=self.retries_left,
        )

    def stored(self) -> StoredTask:
        """The task as the bucket holds it."""
        return StoredTask(
            task=self.listed(),
            ending=self.ending,
            requeue_of=self.requeue_of,
            queued_at=self.queued_at,
            last=self.last,
        )

    @classmethod
    def restored(cls, stored: StoredTask) -> Task:
        """A task as it was stored. One with an attempt that had not ended needs its lease (`take_up`)."""
        listed = stored.task
        task = cls(listed.index, stored.queued_at, listed.retries_left, listed.state)
        task.attempt = listed.attempt
        task.lease_id = listed.lease_id
        task.parts = {part.host: part for part in listed.parts}
        task.exit_code, task.signal = listed.exit_code, listed.signal
        task.started_at, task.ended_at = listed.started_at, listed.ended_at
        task.progress, task.message = listed.progress, listed.message
        task.ending, task.requeue_of, task.last = stored.ending, stored.requeue_of, stored.last
        task.host_fault = stored.ending is not None and stored.ending.host_fault
        return task

    # Leases

    def granted(self, attempt: int, lease: Lease, spec: JobSpec) -> None:
        """Take a lease: the attempt begins."""
        self._clear()
        self.attempt, self.state, self.message = attempt, JobState.STARTING, ""
        self.take_up(lease, spec)

    def take_up(self, lease: Lease, spec: JobSpec) -> None:
        """Go on with the lease of an attempt, such as after a takeover."""
        self.lease_id = lease.lease_id
        hosts = hosts_of(lease)
        before = self.parts
        self.parts = {
            host: before.get(host) or TaskPart(host=host, rank=rank, state=JobState.STARTING)
            for rank, host in enumerate(hosts)
        }
        self.begun = self.begun or len(hosts) == 1 or any(_has_run(part) for part in self.parts.values())
        self.grace_seconds = spec.grace_seconds
        self.expect_end(lease)

    def expect_end(self, lease: Lease) -> None:
        """Note when the lease ends however often it is renewed: its processes are ended some seconds before."""
        self.stop_at, self.stop_for = math.inf, None
        if lease.ends_at is not None:
            limit = (lease.ends_at - lease.granted_at).total_seconds()
            self.stop_margin = min(_MARGIN_SECONDS, _MARGIN_FRACTION * limit)
            self.stop_at = lease.ends_at.timestamp() - self.stop_margin
            self.stop_for = over_limit(lease)
        notice = lease.preemption
        if notice is None:
            return
        length = (notice.ends_at - notice.notified_at).total_seconds()
        margin = min(_MARGIN_SECONDS, _MARGIN_FRACTION * length)
        at = notice.ends_at.timestamp() - margin
        if at < self.stop_at:
            self.stop_at, self.stop_margin = at, margin
            self.stop_for = Ending(state=JobState.PREEMPTED, message=f"preempted: {notice.reason}")

    def noticed(self, lease: Lease, number: int) -> None:
        """Take the notice of a preemption, that it is put off, or that it is withdrawn.

        Args:
            lease: as it is now.
            number: of the signal that the job has for notices; 0 for none.
        """
        self.expect_end(lease)
        if lease.preemption is not None and not lease.preemption.extended and number:
            self.send(number, f"preempted: {lease.preemption.reason}")

    def send(self, number: int, reason: str) -> None:
        """Have a signal sent to its processes."""
        self.notice += 1
        self.notice_signal, self.notice_reason = number, reason

    def lease_ended(self, lease: Lease, now: float) -> None:
        """Note that the lease has ended by other means than the end of the task."""
        if self.lease_over:
            return
        self.lease_over = True
        # Its devices may be another's already.
        self.grace_seconds = min(self.grace_seconds, _MARGIN_SECONDS)
        if self.ending is None:
            self.stop(ending_of(lease), now)
        if lease.state is LeaseState.LOST or (self.ending is not None and self.ending.state is JobState.LOST):
            self.give_up(now)
        else:
            self.lost_at = min(self.lost_at, now + self.grace_seconds + _ANSWER_SECONDS)

    # Ends

    def stop_in_time(self, now: float) -> None:
        """End it since its lease ends soon: what is left of it then is killed, as its devices may be another's."""
        if self.stop_for is not None:
            self.stop_at = math.inf
            self.grace_seconds = min(self.grace_seconds, self.stop_margin)
            self.stop(self.stop_for, now)

    def stop(self, ending: Ending, now: float) -> None:
        """End it; the first reason counts, unless it was not for good. Parts that were never started end at once."""
        if not self.is_live:
            return
        if self.ending is None or (ending.final and not self.ending.final):
            self.ending = ending
            self.message = ending.message
        if not self.begun:
            for part in list(self.parts.values()):
                if part.state not in FINAL:
                    self._end_part(part, JobState.CANCELLED, now)
        self._settle(now)

    def give_up(self, now: float) -> None:
        """End the parts of which nothing is known any more."""
        for part in list(self.parts.values()):
            if part.state not in FINAL:
                self._end_part(part, JobState.LOST if self.begun else JobState.CANCELLED, now)
        self._settle(now)

    def part_unknown(self, host: str, now: float) -> None:
        """Note that the runner of a host knows nothing of its part, which it was told of."""
        part = self.parts.get(host)
        if part is None or part.state in FINAL or not self.is_live:
            return
        self._end_part(part, JobState.LOST if self.begun else JobState.FAILED, now, LOST_RUN)
        self._settle(now)

    def _end_part(self, part: TaskPart, state: JobState, now: float, message: str = "") -> None:
        changed = replace(part, state=state, ended_at=time_of(now), message=part.message or message)
        self.parts[part.host] = changed

    def reported(self, host: str, report: RunReport, now: float) -> bool:
        """Take a runner's report of a part; returns true if it says anything new."""
        before = self.parts.get(host)
        if before is None or not self.is_live or before.state in FINAL:
            return False
        part = replace(report.part, host=host, rank=before.rank)
        if part.state is JobState.PENDING:
            part = replace(part, state=JobState.STARTING)
        new = part != before or (report.prepared and host not in self.prepared)
        new = new or (report.progress is not None and report.progress != self.progress)
        self.parts[host] = part
        if report.host_fault and part.state is JobState.FAILED and self.ending is None:
            self.host_fault = True
        if report.prepared:
            self.prepared.add(host)
        if report.progress is not None:
            self.progress = min(1.0, max(0.0, report.progress))
        if new:
            self._settle(now)
        return new

    def _settle(self, now: float) -> None:
        """Bring the state of the task up to date with its parts."""
        parts = list(self.parts.values())
        starts = [part.started_at for part in parts if part.started_at is not None]
        self.started_at = min(starts, default=None)
        if not self.begun and self.ending is None:
            self.begun = self.prepared >= self.parts.keys() or any(map(_has_run, parts))
        failed = [part for part in parts if part.state in FINAL and not _is_done(part)]
        if any(part.state not in FINAL for part in parts):
            if failed and self.ending is None:
                self._stop_others(failed[0], now)
                return
            states = {part.state for part in parts}
            if JobState.RUNNING in states:
                self.state = JobState.RUNNING
            elif states & ({JobState.COMPLETING} | FINAL):
                self.state = JobState.COMPLETING
            return
        self._finish(failed, now)

    def _stop_others(self, failed: TaskPart, now: float) -> None:
        """End the other parts, since one has failed: the task has its end."""
        state = JobState.LOST if failed.state is JobState.LOST else JobState.FAILED
        message = f"{words(failed)} on {failed.host}"
        self.stop(Ending(state=state, message=message, host_fault=self.host_fault), now)

    def _finish(self, failed: Sequence[TaskPart], now: float) -> None:
        """Reach a final state: all parts have ended."""
        first = min(failed, key=_ended_at, default=None)
        ending = self.ending
        if ending is not None and ending.state in (JobState.FAILED, JobState.LOST) and not self.lease_over:
            # Others were ended since one failed: that one counts.
            stopped = [part for part in failed if part.state is not JobState.CANCELLED]
            first = min(stopped, key=_ended_at, default=first)
        self.ended_at = max((part.ended_at for part in self.parts.values() if part.ended_at), default=time_of(now))
        self.exit_code, self.signal = (0, None) if first is None else (first.exit_code, first.signal)
        if ending is not None:
            self.state, self.message = ending.state, ending.message
        elif first is None:
            self.state, self.message = JobState.DONE, ""
            self.progress = None if self.progress is None else 1.0
        else:
            self.state = JobState.LOST if first.state is JobState.LOST else JobState.FAILED
            self.message = words(first) if len(self.parts) == 1 else f"{words(first)} on {first.host}"
            if self.stop_for is not None and self.stop_for.state is JobState.PREEMPTED:
                self.state, self.message = JobState.PREEMPTED, self.stop_for.message
        self.stop_at = self.lost_at = math.inf

    def wait_again(self, now: float, *, in_place: bool) -> None:
        """Wait for a further attempt.

        Args:
            now: seconds since the epoch.
            in_place: true if it keeps its place, by the time since which it has waited.
        """
        if self.lease_id:
            self.last = self.listed()
        preempted = self.state is JobState.PREEMPTED
        self.requeue_of = self.lease_id if preempted else ""
        message, attempt = self.message, self.attempt
        self._clear()
        self.state, self.attempt = JobState.PENDING, attempt
        self.message = f"attempt {attempt}: {message}" if message else ""
        if not in_place or not self.queued_at:
            self.queued_at = now

    def end_unstarted(self, state: JobState, message: str, now: float) -> None:
        """End a task that waits."""
        attempt = self.attempt
        self._clear()
        self.attempt, self.state, self.message = attempt, state, message
        self.ended_at = time_of(now)


def hosts_of(lease: Lease) -> list[str]:
    """Hosts of a lease, in the order of their ranks."""
    return list(dict.fromkeys(grant.host for grant in lease.grants))


def over_limit(lease: Lease) -> Ending:
    """State of a task that is ended at the limit of its lease."""
    assert lease.ends_at is not None
    if lease.window:
        return Ending(state=JobState.FAILED, message=f"the booked window {lease.window} is over, or its time limit")
    seconds = (lease.ends_at - lease.granted_at).total_seconds()
    return Ending(state=JobState.FAILED, message=f"time limit of {seconds:g} s")


def ending_of(lease: Lease) -> Ending:
    """State of a task whose lease has ended before it did."""
    why = lease.reason
    if lease.state is LeaseState.EVICTED:
        idle = lease.idle is not None and lease.idle.acted_at is None and lease.preemption is None
        return Ending(state=JobState.PREEMPTED, message=why or "evicted", final=idle)
    if lease.state is LeaseState.EXPIRED and lease.ends_at is not None and lease.expires_at >= lease.ends_at:
        return over_limit(lease)
    if lease.state is LeaseState.RELEASED:
        return Ending(state=JobState.CANCELLED, message="its lease was released", final=True)
    return Ending(state=JobState.LOST, message=why or f"its lease has ended ({lease.state.value})")


def words(part: TaskPart) -> str:
    """End of a part, in words."""
    if part.message:
        return part.message
    if part.state is JobState.LOST:
        return "lost"
    if part.signal is not None:
        return f"signal {part.signal}"
    if part.exit_code is not None:
        return f"exit code {part.exit_code}"
    return part.state.value


def _has_run(part: TaskPart) -> bool:
    """True if processes of a part were started."""
    return part.started_at is not None or part.state in (JobState.RUNNING, JobState.COMPLETING, JobState.DONE)


def _is_done(part: TaskPart) -> bool:
    """True if a part has ended without an error."""
    return part.state is JobState.DONE and not part.exit_code and part.signal is None


def _ended_at(part: TaskPart) -> datetime:
    return part.ended_at or _LATEST


_LATEST: Final = datetime.max.replace(tzinfo=UTC)


def time_of(seconds: float) -> datetime:
    """Time of seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC)
