"""Jobs of one term: has their tasks wait in the queue, and carries out what follows of grants, reports and commands.

A task in the queue is an entry like others, but of no client. Its request id names job, index and attempt, so that it
gets the lease again that it was granted. What a task was granted or has become is durable before anybody acts on it:
the lease before its start is ordered, the record of a task that has ended before its lease is released.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable
from typing import Final

from msgspec import Struct
from nats.aio.client import Client
from nats.errors import Error as NatsError

from ....bus.tasks import BackgroundTasks
from ....schemas.requests import Assignment, Error, Lease, LeaseState, Rejection, RejectionCode
from ....schemas.work.jobs import FINAL, Attempt, attempt_of_request
from ....schemas.work.runs import Run, RunnerReport
from ...durable.store import Deposed, WriteFailed
from ...jobs.changes import Changes, Release
from ...jobs.checks import TTL_SECONDS, request_of
from ...jobs.job import Job
from ...jobs.orders import is_reported, run_of
from ...jobs.records import attempt_of_run, state_key, task_key
from ...jobs.retention import to_forget
from ...jobs.table import JobTable
from ...leases import lifecycle
from ...leases.ledger import Ledger, clock
from ...leases.lifecycle import LeaseRecord, Refused
from ..broker import RequestBroker
from ..pending import Responder
from ..waiting.stored_queue import StoredCaller
from .events import JobEvents
from .records import FoundJobs, JobRecords, encoded
from .runners import Runners

log = logging.getLogger("corral.planner.broker.jobs.broker")

OWNER_IN_LINE: Final = 256
"""Tasks of an owner that wait in the queue at a time."""
LATER_SECONDS: Final = 2.0
"""Time after which the record of a task that was started is written: until then its lease says so."""
TICK_SECONDS: Final = 0.5
_AGAIN_SECONDS: Final = 1.0
"""Time after which a task enters the queue again that was refused, or that names devices which it can't have now."""
_RENEW_PART: Final = 1 / 3
_FORGET_SECONDS: Final = 60.0


class JobBroker:
    """The jobs of one term.

    Args:
        nc: connection of the planner.
        broker: of the term.
        ledger: leases of the term.
        records: writes records of jobs.
        planner: id of this planner.
        term: revision of the leader's key.
        max_bytes: size limit of a message.
        bucket_bytes: capacity of the bucket; 0 or less for no limit.
        runner_lost_seconds: a host whose runner is not heard for so long gets no more jobs.

    Attributes:
        table: the jobs.
        runners: of the hosts.
        events: publishes what has changed.
        why_not: why jobs can't have the devices that they name, by id.
    """

    def __init__(
        self,
        nc: Client,
        broker: RequestBroker,
        ledger: Ledger,
        records: JobRecords,
        *,
        planner: str,
        term: int,
        max_bytes: int,
        bucket_bytes: int,
        runner_lost_seconds: float,
    ) -> None:
        self.table = JobTable()
        self.records = records
        self.runners = Runners(
            nc, broker.fleet, planner, term, runner_lost_seconds, self._hosts_changed, self._runs_for
        )
        self.events = JobEvents(nc, planner, records, max_bytes, self.table.jobs.get)
        self._broker = broker
        self._ledger = ledger
        self._planner = planner
        self._bucket_bytes = bucket_bytes
        self._tasks = BackgroundTasks()
        self.why_not: dict[str, str] = {}
        self._later: dict[tuple[str, int], float] = {}
        self._in_line: dict[str, int] = {}
        """Number of tasks in the queue, by owner."""
        self._short: dict[str, dict[str, None]] = {}
        """Jobs that have tasks which would wait, were it not for the limit on those of their owner."""
        self._refill: dict[str, None] = {}
        self._refilling = False
        self._forget_at = 0.0
        self._closed = False
        broker.on_lease_end = self._lease_ended
        broker.on_notice = self._noticed

    # The term

    def restore(self, found: FoundJobs) -> None:
        """Take up the jobs of earlier terms."""
        jobs, forgotten = found.decode()
        now = time.time()
        for job in jobs:
            self.table.add(job)
        for record in self._ledger.table:
            attempt = attempt_of_lease(record)
            if attempt is not None:
                self.table.restore_lease(record.lease, attempt, now)
        for job in jobs:
            for index in list(job.live):
                task = job.tasks[index]
                if self._ledger.table.get(task.lease_id) is None:
                    self.table.lease_gone((job.job_id, index), now)
        for job in jobs:
            self.table.wait_for_others(job, now)
            ended = job.ended_at
            if ended is None or now - ended.timestamp() < _FORGET_SECONDS * 10:
                ended_before = [task.last for task in job.tasks.values() if task.last is not None]
                self.events.add(job.job_id, job.tasks, ended_before)
        self.records.forget(forgotten)
        self.carry_out()

    def stop(self) -> None:
        """Take no more answers to requests of tasks, and have no more enter the queue."""
        self._closed = True

    async def close(self) -> None:
        """End what is in flight. Call it once the store has abandoned its writes."""
        self._closed = True
        await self._tasks.cancel()
        await self.runners.close()
        await self.records.close()

    async def settle(self) -> None:
        """Write and publish what is due, before the planner stops."""
        with contextlib.suppress(NatsError, TimeoutError):
            self._write_later(math.inf)
            await self.events.flush()

    def pause(self) -> float:
        """Seconds until `tick` is due again."""
        return min(TICK_SECONDS, max(0.02, self.table.next_due() - time.time()))

    def tick(self) -> None:
        """Do what is due by time; only while runners can be heard."""
        now = time.time()
        self.runners.tick(time.monotonic())
        self.table.tick(now)
        self._write_later(time.monotonic() - LATER_SECONDS)
        if now >= self._forget_at:
            self._forget_at = now + _FORGET_SECONDS
            gone = to_forget(self.table.jobs.values(), now, self._bucket_bytes)
            for job_id in gone:
                self.table.forget(job_id)
                self.why_not.pop(job_id, None)
            self.records.forget(gone)
        self.carry_out()

    def carry_out(self) -> None:
        """Carry out what follows of changes of the table."""
        changes, self.table.changes = self.table.changes, Changes()
        jobs = self.table.jobs
        for job_id in changes.states:
            if (job := jobs.get(job_id)) is not None:
                self.save_state(job)
        now = time.monotonic()
        for key in changes.later:
            self._later[key] = now
        for job_id, index in changes.tasks:
            self._later.pop((job_id, index), None)
            self._save_task(job_id, index)
        for owner, request_id in changes.leave:
            self._broker.leave(owner, request_id)
        for release in changes.releases:
            self._tasks.start(self._release(release))
        for host, keys in changes.orders.items():
            self.runners.order(host, keys)
        for job_id, indexes in changes.events.items():
            self.events.add(job_id, indexes, changes.ended.get(job_id, ()))
        self._refill_soon(changes.refill)
        if changes.leave:
            self._recount()

    def save_state(self, job: Job) -> None:
        """Write the state of a job."""
        self.records.save(state_key(job.job_id), lambda: encoded(job.to_store()))

    def _save_task(self, job_id: str, index: int) -> None:
        job = self.table.jobs.get(job_id)
        task = None if job is None else job.tasks.get(index)
        if task is not None:
            self.records.save(task_key(job_id, index), lambda: encoded(task.stored()))

    def _write_later(self, before: float) -> None:
        """Write records of tasks that were started before a time."""
        while self._later:
            key, at = next(iter(self._later.items()))
            if at > before:
                return
            del self._later[key]
            self._save_task(*key)

    async def _release(self, release: Release) -> None:
        """Release a lease, once the record of its task is stored."""
        if release.after is not None:
            await self.records.saved([task_key(*release.after)])

        def step(record: LeaseRecord | None) -> LeaseRecord | None:
            if record is None or record.lease.state is not LeaseState.ACTIVE:
                return record
            return lifecycle.end(record, LeaseState.RELEASED, release.reason, clock(), self._planner)

        while True:
            try:
                await self._ledger.change(release.lease_id, step)
                break
            except WriteFailed as error:
                log.warning("lease %s is not released yet: %s", release.lease_id, error)
                await asyncio.sleep(_AGAIN_SECONDS)
            except (Deposed, Refused):
                return
        if release.after is not None:
            self.table.released(*release.after)
            self.carry_out()

    # The queue

    def _refill_soon(self, job_ids: Iterable[str]) -> None:
        self._refill.update(dict.fromkeys(job_ids))
        if self._refill and not self._refilling and not self._closed:
            self._refilling = True
            self._tasks.start(self._enter_ready())

    async def _enter_ready(self) -> None:
        """Have tasks enter the queue, as many as may."""
        try:
            entered = 0
            while self._refill and not self._closed:
                job_id = next(iter(self._refill))
                del self._refill[job_id]
                job = self.table.jobs.get(job_id)
                if job is None:
                    continue
                free = OWNER_IN_LINE - self._in_line.get(job.owner, 0)
                room = job.room()
                if room > free:
                    self._short.setdefault(job.owner, {})[job_id] = None
                for index in job.take_waiting(min(room, free)) if min(room, free) > 0 else ():
                    self._in_line[job.owner] = self._in_line.get(job.owner, 0) + 1
                    await self._enter(job, job.attempt(index))
                    entered += 1
                    if entered % 32 == 0:
                        await asyncio.sleep(0)
        finally:
            self._refilling = False

    async def _enter(self, job: Job, attempt: Attempt) -> None:
        task = job.tasks.get(attempt.task)
        queued_at = job.stored.submitted_at if task is None else task.queued_at
        request = request_of(job.stored.spec, attempt, "" if task is None else task.requeue_of)
        try:
            await self._broker.enter(request, _TaskResponder(self, attempt), queued_at)
        except Exception as error:
            log.exception("task %s_%d could not enter the queue", job.job_id, attempt.task)
            self.answered(attempt, Error(code="internal", message=str(error)))

    def answered(self, attempt: Attempt, reply: Struct) -> None:
        """Take the answer to the request of an attempt."""
        job = self.table.jobs.get(attempt.job_id)
        if self._closed:
            return
        if job is not None:
            self._left(job.owner)
        if isinstance(reply, Assignment):
            self.why_not.pop(attempt.job_id, None)
            self.table.granted(attempt, reply.lease, time.time())
        elif isinstance(reply, Error) and reply.code == "ended" and job is not None:
            self.table.spent(attempt)
        elif job is not None:
            job.left_line(attempt.task)
            timed_out = isinstance(reply, Rejection) and reply.code is RejectionCode.TIMED_OUT
            if isinstance(reply, Rejection) and job.stored.spec.request.devices:
                self.why_not[job.job_id] = reply.message
            elif not timed_out:
                log.warning("task %s_%d waits again: %s", attempt.job_id, attempt.task, _words(reply))
            pause = 0.0 if timed_out else _AGAIN_SECONDS
            asyncio.get_running_loop().call_later(pause, self._refill_soon, [job.job_id])
        self.carry_out()

    def _left(self, owner: str) -> None:
        """Count one task of an owner less in the queue: others may enter."""
        self._in_line[owner] = self._in_line.get(owner, 0) - 1
        if self._in_line[owner] <= 0:
            del self._in_line[owner]
        self._refill_soon(self._short.pop(owner, ()))

    def _recount(self) -> None:
        """Count the tasks in the queue anew, after some have left it unanswered."""
        counts: dict[str, int] = {}
        for job in self.table.jobs.values():
            if job.in_line:
                counts[job.owner] = counts.get(job.owner, 0) + len(job.in_line)
        self._in_line = counts
        short, self._short = self._short, {}
        for job_ids in short.values():
            self._refill_soon(job_ids)

    def _hosts_changed(self) -> None:
        """Have the queue tried again: a host has got a runner, or has none any more."""
        self._broker.line.reopen()
        self._broker.wake.set()

    # Leases

    def _lease_ended(self, record: LeaseRecord) -> None:
        attempt = attempt_of_lease(record)
        if attempt is not None:
            self.table.lease_ended(record.lease, attempt, time.time())
            self.carry_out()

    def _noticed(self, lease: Lease) -> None:
        record = self._ledger.table.get(lease.lease_id)
        attempt = None if record is None else attempt_of_lease(record)
        if attempt is not None:
            self.table.noticed(lease, attempt, time.time())
            self.carry_out()

    def _renew(self, lease_id: str) -> None:
        """Renew the lease of a run that goes on, if a third of its time to live is over."""
        record = self._ledger.table.get(lease_id)
        if record is None or record.lease.state is not LeaseState.ACTIVE:
            return
        served = self._ledger.service_seconds()
        if served - (record.extended_service_seconds or 0.0) < TTL_SECONDS * _RENEW_PART:
            return

        def step(current: LeaseRecord | None) -> LeaseRecord | None:
            if current is None or current.lease.state is not LeaseState.ACTIVE:
                return current
            if served - (current.extended_service_seconds or 0.0) < TTL_SECONDS * _RENEW_PART:
                return current
            return lifecycle.renew(current, None, clock(), self._planner, self._ledger.service_seconds())

        self._ledger.start_change(lease_id, step)

    # Runners

    async def report(self, report: RunnerReport, caller: Responder) -> None:
        """Take the report of a runner, and answer with its orders, once what it has reported is durable."""
        self.runners.heard(report)
        now = time.time()
        finals: list[tuple[str, str]] = []
        for run in report.runs:
            key = self.table.reported(report.host, run, now)
            if run.part.state in FINAL:
                finals.append((run.run_id, "" if key is None else task_key(*key)))
            elif self.table.is_current(report.host, run):
                self._renew(run.lease_id)
        if report.complete:
            for run_id in self.runners.unknown(report):
                attempt = attempt_of_run(run_id)
                if attempt is not None:
                    self.table.part_unknown(report.host, (attempt.job_id, attempt.task), now)
        self.carry_out()
        await self.records.saved([key for _, key in finals if key])
        known = [run_id for run_id, _ in finals]
        if report.complete:
            runs = self._runs_for(report.host, self.table.on_host(report.host))
            await caller.answer(self.runners.answer(report.host, runs, known))
        else:
            runs = self.runners.take_orders(report.host)
            await caller.answer(self.runners.orders(report.host, runs, known, complete=False))

    def _runs_for(self, host: str, keys: Iterable[tuple[str, int]]) -> list[Run]:
        found: list[Run] = []
        for job_id, index in keys:
            job = self.table.jobs.get(job_id)
            task = None if job is None else job.tasks.get(index)
            record = None if task is None else self._ledger.table.get(task.lease_id)
            if job is None or task is None or record is None:
                continue
            run = run_of(job, task, host, record.lease, with_spec=not is_reported(task, host))
            if run is not None:
                found.append(run)
        return found


class _TaskResponder:
    """Takes the answer to the request of an attempt."""

    reply_to = ""
    client_name = ""
    stored: StoredCaller | None = None

    def __init__(self, jobs: JobBroker, attempt: Attempt) -> None:
        self._jobs = jobs
        self._attempt = attempt

    async def answer(self, reply: Struct) -> None:
        """Take the answer."""
        self._jobs.answered(self._attempt, reply)

    def forward(self, body: Struct) -> None:
        """Do nothing: the next leader restores the task from its job."""


def attempt_of_lease(record: LeaseRecord) -> Attempt | None:
    """Attempt that a lease was granted to; None for any other, such as one that a client asked for under such an id."""
    return attempt_of_request(record.lease.request_id) if not record.digest else None


def _words(reply: Struct) -> str:
    return reply.message if isinstance(reply, Error | Rejection) else repr(reply)
