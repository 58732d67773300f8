"""All jobs of a planner, and what happens to them: grants, reports of runners, ends of leases, and commands.

Pure: what follows is collected in `changes`, which the caller takes and carries out.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from ...schemas.requests import Lease
from ...schemas.work.jobs import FINAL, Attempt, Condition, Dependency, JobState
from ...schemas.work.runs import RunReport
from .changes import Changes, Release, TaskKey
from .checks import InvalidJob, notice_signal
from .job import Job
from .records import NOT_STARTED, Ending, StoredJob, attempt_of_run, request_id
from .task import Task, time_of


class JobTable:
    """The jobs of a term.

    Attributes:
        jobs: by id, in the order in which they were submitted.
        changes: what has to follow.
        submits: job ids by owner and `submit_id`.
        bytes: size of all jobs as stored.
        active: number of jobs that have not ended, by owner.
        last_id: greatest job id.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.changes = Changes()
        self.submits: dict[tuple[str, str], str] = {}
        self.bytes = 0
        self.active: Counter[str] = Counter()
        self.last_id = 0
        self._on_host: dict[str, dict[TaskKey, None]] = {}
        """Tasks with a part on a host that has not ended."""
        self._dependents: dict[str, dict[str, None]] = defaultdict(dict)
        self._due: list[tuple[float, TaskKey]] = []

    # Jobs

    def check_dependencies(self, after: Iterable[Dependency]) -> None:
        """Check that jobs may be waited for.

        Raises:
            InvalidJob: one is unknown.
        """
        for at, dependency in enumerate(after):
            if dependency.job_id not in self.jobs:
                raise InvalidJob(
                    f"There is no job {dependency.job_id}: it never was, or it ended long ago",
                    f"$.after[{at}].job_id",
                    "not_found",
                )

    def add(self, job: Job) -> None:
        """Add a job, new or restored with its tasks."""
        spec = job.stored.spec
        self.jobs[job.job_id] = job
        self.bytes += job.size
        self.last_id = max(self.last_id, int(job.job_id))
        if spec.submit_id is not None:
            self.submits[job.owner, spec.submit_id] = job.job_id
        job.correct_end()
        if not job.is_final:
            self.active[job.owner] += 1

    def submit(self, stored: StoredJob, size: int, now: float) -> Job:
        """Add a new job."""
        job = Job(stored, size)
        self.add(job)
        self.changes.events.setdefault(job.job_id, set())
        self.wait_for_others(job, now)
        return job

    def wait_for_others(self, job: Job, now: float) -> None:
        """Have a job wait for those that it depends on; one whose condition can't be met is cancelled."""
        self.changes.refill[job.job_id] = None
        if any(task.attempt for task in job.tasks.values()):
            job.eligible = True
        if job.eligible or job.is_final:
            return
        for dependency in job.stored.spec.after:
            other = self.jobs.get(dependency.job_id)
            # One that was forgotten had ended as asked, or this job would have been cancelled.
            if other is not None and not other.is_final:
                job.waits_for.add(other.job_id)
                self._dependents[other.job_id][job.job_id] = None
        self._check_met(job, now)

    def _check_met(self, job: Job, now: float) -> None:
        for dependency in job.stored.spec.after:
            other = self.jobs.get(dependency.job_id)
            if other is not None and other.is_final and not met(dependency.condition, other.state):
                text = f"job {other.job_id} has not ended as asked for ({dependency.condition.value}): {other.state}"
                self._cancel_all(job, text, 0, now)
                return
        if not job.waits_for:
            job.eligible = True
            self.changes.states[job.job_id] = None
            self.changes.refill[job.job_id] = None

    def states(self) -> dict[str, float]:
        """Number of jobs by state, with those that none has."""
        found = Counter(job.state for job in self.jobs.values())
        return {state.value: float(found[state]) for state in JobState}

    def task_states(self) -> dict[str, float]:
        """Number of tasks by state, with those that none has."""
        found = Counter[JobState]()
        for job in self.jobs.values():
            found.update(job.counts)
        return {state.value: float(found[state]) for state in JobState}

    def forget(self, job_id: str) -> None:
        """Forget a job that has ended."""
        job = self.jobs.pop(job_id)
        self.bytes -= job.size
        submit_id = job.stored.spec.submit_id
        if submit_id is not None and self.submits.get((job.owner, submit_id)) == job_id:
            del self.submits[job.owner, submit_id]
        self._dependents.pop(job_id, None)

    # Attempts

    def granted(self, attempt: Attempt, lease: Lease, now: float) -> bool:
        """Take the lease of an attempt; false if its task does not wait for it any more, and it is released."""
        job = self.jobs.get(attempt.job_id)
        waits = job is not None and job.has(attempt.task) and job.state_of(attempt.task) is JobState.PENDING
        if job is None or not waits or not job.may_start or attempt.task in job.held_tasks:
            self._release_unstarted(job, attempt, lease)
            return False
        task = job.task(attempt.task)
        if task.attempt >= attempt.number:
            self._release_unstarted(job, attempt, lease)
            return False
        task.granted(attempt.number, lease, job.stored.spec)
        job.note(task, JobState.PENDING)
        self._took_lease(job, task)
        self.changes.refill[job.job_id] = None
        self.changes.event((job.job_id, task.index))
        return True

    def _release_unstarted(self, job: Job | None, attempt: Attempt, lease: Lease) -> None:
        self.changes.releases.append(Release(lease.lease_id, lease.owner, NOT_STARTED))
        if job is not None and job.has(attempt.task):
            self.spent(attempt)

    def spent(self, attempt: Attempt) -> None:
        """Note that an attempt was not started, and can't be: its request has got a lease that has ended."""
        job = self.jobs[attempt.job_id]
        task = job.task(attempt.task)
        task.attempt = max(task.attempt, attempt.number)
        job.left_line(attempt.task)
        self.changes.refill[job.job_id] = None

    def _took_lease(self, job: Job, task: Task) -> None:
        key = (job.job_id, task.index)
        for host, part in task.parts.items():
            if part.state not in FINAL:
                self._on_host.setdefault(host, {})[key] = None
                self.changes.order(host, key)
        self.changes.later[key] = None
        self._schedule(key, task)

    def restore_lease(self, lease: Lease, attempt: Attempt, now: float) -> None:
        """Take up the lease of an attempt, active or ended, as it was found at the begin of a term."""
        job = self.jobs.get(attempt.job_id)
        task = None if job is None or not job.has(attempt.task) else job.view(attempt.task)
        active = lease.state == "active"
        known = task is not None and (
            task.attempt > attempt.number
            or (task.attempt == attempt.number and (not task.is_live or task.lease_id != lease.lease_id))
        )
        if job is None or task is None or known or (task.is_final and task.attempt < attempt.number):
            if active:
                self.changes.releases.append(Release(lease.lease_id, lease.owner, NOT_STARTED if not known else ""))
            if job is not None and task is not None and not known:
                job.task(attempt.task).attempt = attempt.number
            return
        task = job.task(attempt.task)
        before = task.state
        unused = task.attempt < attempt.number and (job.held or task.index in job.held_tasks)
        if unused or (not active and lease.reason == NOT_STARTED):
            if active:
                self.changes.releases.append(Release(lease.lease_id, lease.owner, NOT_STARTED))
            task.attempt = attempt.number
            return
        if task.attempt < attempt.number:
            task.granted(attempt.number, lease, job.stored.spec)
        else:
            task.take_up(lease, job.stored.spec)
        task.taken_over = True
        job.note(task, before)
        self._took_lease(job, task)
        self.changes.event((job.job_id, task.index))
        if not active:
            self._after(job, task, lambda: task.lease_ended(lease, now), now)

    def reported(self, host: str, report: RunReport, now: float) -> TaskKey | None:
        """Take a runner's report of a run.

        Returns:
            the task whose record must be stored before a final report is; None if it is of none.
        """
        attempt = attempt_of_run(report.run_id)
        found = None if attempt is None else self._task(attempt.job_id, attempt.task)
        if attempt is None or found is None:
            return None
        job, task = found
        # The end of an earlier attempt may not be durable yet, either.
        if task.attempt == attempt.number and task.lease_id == report.lease_id and host in task.parts:
            self._after(job, task, lambda: task.reported(host, report, now), now)
        return job.job_id, task.index

    def is_current(self, host: str, report: RunReport) -> bool:
        """True if a report is of a part of an attempt that goes on."""
        attempt = attempt_of_run(report.run_id)
        found = None if attempt is None else self._task(attempt.job_id, attempt.task)
        return found is not None and found[1].lease_id == report.lease_id != "" and host in found[1].parts

    def part_unknown(self, host: str, key: TaskKey, now: float) -> None:
        """Note that the runner of a host knows nothing of a task that it was told of."""
        if (found := self._task(*key)) is not None:
            job, task = found
            self._after(job, task, lambda: task.part_unknown(host, now), now)

    def lease_ended(self, lease: Lease, attempt: Attempt, now: float) -> None:
        """Note that the lease of an attempt has ended."""
        found = self._task(attempt.job_id, attempt.task)
        if found is not None and found[1].lease_id == lease.lease_id and found[1].is_live:
            job, task = found
            self._after(job, task, lambda: task.lease_ended(lease, now), now)

    def released(self, job_id: str, index: int) -> None:
        """Note that the end of an attempt is durable, and its lease released: the task may have another one."""
        job = self.jobs.get(job_id)
        if job is not None:
            job.settling.pop(index, None)
            self.changes.refill[job_id] = None

    def lease_gone(self, key: TaskKey, now: float) -> None:
        """Note that nothing is known of the lease of a task (any more): how it ended is unknown."""
        if (found := self._task(*key)) is not None and found[1].is_live:
            job, task = found
            task.lease_over = True
            ending = Ending(state=JobState.LOST, message="its lease ended while no planner led")
            self._after(job, task, lambda: (task.stop(ending, now), task.give_up(now)), now)

    def noticed(self, lease: Lease, attempt: Attempt, now: float) -> None:
        """Note that the lease of an attempt has the notice of a preemption, or has it no more."""
        found = self._task(attempt.job_id, attempt.task)
        if found is not None and found[1].lease_id == lease.lease_id and found[1].is_live:
            job, task = found
            number = notice_signal(job.stored.spec)
            self._after(job, task, lambda: task.noticed(lease, number), now)

    def tick(self, now: float) -> None:
        """End tasks that are at their limit, and give up on those of which nobody says how they ended."""
        while self._due and self._due[0][0] <= now:
            _, key = heappop(self._due)
            found = self._task(*key)
            if found is None or not found[1].is_live:
                continue
            job, task = found
            if task.lost_at <= now:
                self._after(job, task, lambda task=task: task.give_up(now), now)
            elif task.stop_at <= now:
                self._after(job, task, lambda task=task: task.stop_in_time(now), now)

    def next_due(self) -> float:
        """Time of the next change that is due by time; infinite for none. It may be early."""
        return self._due[0][0] if self._due else math.inf

    def _task(self, job_id: str, index: int) -> tuple[Job, Task] | None:
        job = self.jobs.get(job_id)
        task = None if job is None else job.tasks.get(index)
        return None if job is None or task is None else (job, task)

    def _schedule(self, key: TaskKey, task: Task) -> None:
        if (at := min(task.stop_at, task.lost_at)) < math.inf:
            heappush(self._due, (at, key))

    def _after(self, job: Job, task: Task, change: Callable[[], object], now: float) -> None:
        """Make a change of a task that has an attempt, and collect what follows."""
        key = (job.job_id, task.index)
        before, parts = task.state, task.parts.copy()
        told = (task.ending, task.begun, task.notice)
        change()
        if task.state is before and task.parts == parts and told == (task.ending, task.begun, task.notice):
            self._schedule(key, task)
            return
        self.changes.event(key)
        job.says_progress = job.says_progress or task.progress is not None
        for host, part in task.parts.items():
            if part.state in FINAL and parts[host].state not in FINAL:
                self._on_host.get(host, {}).pop(key, None)
                self.changes.tasks[key] = None
        if task.ending is not told[0]:
            self.changes.tasks[key] = None
        if task.is_final:
            self._conclude(job, task, now)
        elif told != (task.ending, task.begun, task.notice):
            for host, part in task.parts.items():
                if part.state not in FINAL:
                    self.changes.order(host, key)
        job.note(task, before)
        self._schedule(key, task)
        if task.state is not before:
            self._check_end(job, now)

    def _conclude(self, job: Job, task: Task, now: float) -> None:
        """Decide if a task whose attempt has ended waits again, and have its lease released."""
        key, spec = (job.job_id, task.index), job.stored.spec
        self.changes.tasks[key] = None
        self.changes.refill[job.job_id] = None
        # One that has ended already, too: until the record is stored, a later leader would take the task up again.
        self.changes.releases.append(Release(task.lease_id, job.owner, after=key))
        job.settling[task.index] = task.lease_id
        job.note_end(task)
        if task.ending is not None and task.ending.final:
            return
        requeued = task.is_blameless or (task.state in (JobState.PREEMPTED, JobState.LOST) and spec.requeue)
        if requeued or (task.state is JobState.FAILED and task.retries_left):
            self.changes.ended.setdefault(job.job_id, []).append(task.listed())
            task.retries_left -= not requeued
            task.wait_again(now, in_place=requeued)

    def _check_end(self, job: Job, now: float) -> None:
        """Note that a job has ended, or goes on again."""
        if job.is_final == (job.ended_at is not None):
            return
        job.ended_at = time_of(now) if job.is_final else None
        self.active[job.owner] += 1 if job.ended_at is None else -1
        self.changes.states[job.job_id] = None
        self.changes.events.setdefault(job.job_id, set())
        if job.ended_at is None:
            return
        for other_id in self._dependents.pop(job.job_id, ()):
            other = self.jobs.get(other_id)
            if other is not None and not other.is_final:
                other.waits_for.discard(job.job_id)
                self._check_met(other, now)

    # Commands

    def cancel(self, job: Job, indexes: Iterable[int], message: str, number: int, now: float) -> int:
        """Cancel tasks; all of a job without indexes. Returns the number of tasks that this changes.

        Args:
            job: the job.
            indexes: of its tasks.
            message: why.
            number: signal to send first; 0 for SIGTERM.
            now: seconds since the epoch.
        """
        some = list(indexes)
        if not some:
            return self._cancel_all(job, message, number, now)
        return sum(self._cancel(job, job.task(index), message, number, now) for index in some)

    def _cancel_all(self, job: Job, message: str, number: int, now: float) -> int:
        changed = 0
        if job.rest is JobState.PENDING:
            rest = list(job.rest_indexes())
            self._leave(job, (index for index in list(job.in_line) if index not in job.tasks))
            self.changes.events.setdefault(job.job_id, set()).update(rest)
            changed += job.set_rest(JobState.CANCELLED, message, time_of(now))
            job.in_line.difference_update(rest)
            self.changes.states[job.job_id] = None
        for task in list(job.tasks.values()):
            changed += self._cancel(job, task, message, number, now)
        self._check_end(job, now)
        return changed

    def _cancel(self, job: Job, task: Task, message: str, number: int, now: float) -> bool:
        if task.is_final:
            return False
        if task.is_live:
            ending = Ending(state=JobState.CANCELLED, message=message, signal=number, final=True)
            if task.ending is not None and task.ending.final:
                return False
            self._after(job, task, lambda: task.stop(ending, now), now)
            return True
        key = (job.job_id, task.index)
        self._leave(job, [task.index] if task.index in job.in_line else [])
        task.end_unstarted(JobState.CANCELLED, message, now)
        job.note_end(task)
        job.note(task, JobState.PENDING)
        self.changes.tasks[key] = None
        self.changes.event(key)
        self._check_end(job, now)
        return True

    def _leave(self, job: Job, indexes: Iterable[int]) -> None:
        self.changes.leave.extend((job.owner, request_id(job.attempt(index))) for index in indexes)

    def hold(self, job: Job, indexes: Iterable[int]) -> int:
        """Hold tasks that wait; all of a job without indexes. Returns the number of tasks that this changes."""
        some = [index for index in indexes if job.state_of(index) is JobState.PENDING]
        if some:
            held = [index for index in some if index not in job.held_tasks]
            job.held_tasks.update(held)
            leaving = [index for index in held if index in job.in_line]
            changed = len(held)
        else:
            changed = 0 if job.held else job.counts[JobState.PENDING]
            job.held = job.held or not job.is_final
            leaving = list(job.in_line)
        self._leave(job, leaving)
        for index in leaving:
            job.left_line(index)
        # A lease of a held task without a record is known never to have been used.
        self.changes.tasks.update({(job.job_id, index): None for index in job.live})
        self._held_changed(job, changed)
        return changed

    def unhold(self, job: Job, indexes: Iterable[int]) -> int:
        """Release held tasks; all of a job without indexes. Returns the number of tasks that this changes."""
        some = list(indexes)
        if some:
            found = job.held_tasks.intersection(some)
            job.held_tasks -= found
            changed = len(found)
        else:
            changed = job.counts[JobState.PENDING] if job.held else len(job.held_tasks)
            job.held = False
            job.held_tasks.clear()
        self._held_changed(job, changed)
        return changed

    def _held_changed(self, job: Job, changed: int) -> None:
        if changed:
            self.changes.states[job.job_id] = None
            self.changes.events.setdefault(job.job_id, set())
        self.changes.refill[job.job_id] = None

    def resubmit(self, job: Job, indexes: Iterable[int], now: float) -> int:
        """Have tasks that have ended wait for a further attempt; without indexes all that are not done.

        Returns the number of tasks that this changes.
        """
        some, changed = list(indexes), 0
        if not some and job.rest in FINAL:
            rest = list(job.rest_indexes())
            self.changes.events.setdefault(job.job_id, set()).update(rest)
            changed += job.set_rest(JobState.PENDING, "", None)
            self.changes.states[job.job_id] = None
        chosen = [job.task(index) for index in some] if some else list(job.tasks.values())
        for task in chosen:
            if not task.is_final or (not some and task.state is JobState.DONE):
                continue
            before = task.state
            if task.lease_id:
                # It may have ended just now: that is published together with what it is next.
                self.changes.ended.setdefault(job.job_id, []).append(task.listed())
            task.message = ""
            task.wait_again(now, in_place=False)
            task.requeue_of = ""
            task.retries_left = job.stored.spec.retries
            job.note(task, before)
            self.changes.tasks[job.job_id, task.index] = None
            self.changes.event((job.job_id, task.index))
            changed += 1
        if changed:
            # What it waited for has ended, however that was.
            job.eligible = True
            job.forget_ends()
            self.changes.states[job.job_id] = None
        self.changes.refill[job.job_id] = None
        self._check_end(job, now)
        return changed

    # Runners

    def on_host(self, host: str) -> list[TaskKey]:
        """Tasks with a part on a host that has not ended."""
        return list(self._on_host.get(host, ()))


def met(condition: Condition, state: JobState) -> bool:
    """True if a job that has ended in a state meets a condition."""
    return condition is Condition.ANY or (condition is Condition.OK) == (state is JobState.DONE)
