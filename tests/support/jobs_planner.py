"""The planner's side of jobs, as clients see it: keeps what is submitted, and has the states that a test sets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from corral.schemas import codec
from corral.schemas.requests import Error
from corral.schemas.subjects import PlanSubject, log_subject
from corral.schemas.work.jobs import (
    FINAL,
    Job,
    JobAction,
    JobDetails,
    JobFilter,
    JobListing,
    Jobs,
    JobSpec,
    JobState,
    JobTask,
    JobVerb,
    OverrideAction,
    TaskPart,
    array_indexes,
)
from corral.schemas.work.runs import LogChunk, run_id
from msgspec.structs import replace
from nats.aio.client import Client
from nats.aio.msg import Msg

HOST = "host-1"


class JobsPlanner:
    """Answers about jobs.

    Attributes:
        specs: jobs as submitted, by id.
        tasks: of each, by index.
        commands: received, in order.
        listed: set at each listing that is asked for.
    """

    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.specs: dict[str, JobSpec] = {}
        self.tasks: dict[str, dict[int, JobTask]] = {}
        self.commands: list[JobAction | OverrideAction] = []
        self.listed = asyncio.Event()
        self._by_submit_id: dict[str, str] = {}

    async def start(self) -> None:
        """Answer from now on."""
        for subject in (PlanSubject.SUBMIT, PlanSubject.JOBS, PlanSubject.JOB, PlanSubject.JOB_OVERRIDE):
            for form in (subject, f"{subject}.>"):
                await self.nc.subscribe(form, cb=self._answer)
        await self.nc.flush()

    async def _answer(self, message: Msg) -> None:
        subject = next(one for one in (PlanSubject.JOB_OVERRIDE, PlanSubject.SUBMIT, PlanSubject.JOBS, PlanSubject.JOB)
                       if message.subject == one or message.subject.startswith(f"{one}."))  # fmt: skip
        answers: dict[str, Any] = {
            PlanSubject.SUBMIT: (JobSpec, self._submit),
            PlanSubject.JOBS: (JobFilter, self._list),
            PlanSubject.JOB: (JobAction, self._command),
            PlanSubject.JOB_OVERRIDE: (OverrideAction, self._override),
        }
        kind, handle = answers[subject]
        answer = handle(codec.decode(message.data, kind, codec.JSON))
        await message.respond(codec.encode(answer, codec.JSON))

    def _submit(self, spec: JobSpec) -> Any:
        assert spec.submit_id
        job_id = self._by_submit_id.setdefault(spec.submit_id, str(1000 + len(self.specs)))
        if job_id not in self.specs:
            self.specs[job_id] = spec
            self.tasks[job_id] = {index: JobTask(index=index) for index in array_indexes(spec)}
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        """A job as everyone sees it."""
        spec, tasks = self.specs[job_id], self.tasks[job_id].values()
        states = {task.state for task in tasks}
        final = states <= FINAL
        return Job(
            job_id=job_id,
            owner=spec.request.owner,
            name=spec.request.name,
            state=next(state for state in JobState if state in states),
            submitted_at=datetime(2026, 3, 2, tzinfo=UTC),
            ended_at=max((task.ended_at for task in tasks if task.ended_at), default=None) if final else None,
            array=spec.array,
            counts={state.value: n for state in JobState if (n := sum(task.state is state for task in tasks))},
            gpus=spec.request.gpus,
            hosts=spec.hosts,
            held=spec.held,
            after=spec.after,
            request=spec.request,
        )

    def _list(self, wanted: JobFilter) -> Jobs:
        self.listed.set()
        found = [
            self.job(job_id)
            for job_id in reversed(self.specs)
            if (not wanted.job_ids or job_id in wanted.job_ids)
            and wanted.owner in (None, self.specs[job_id].request.owner)
        ]
        found = [job for job in found if not wanted.states or job.state in wanted.states]
        found = [job for job in found if not wanted.active or job.state not in FINAL]
        if not wanted.tasks:
            part = found[wanted.offset : wanted.offset + (wanted.limit or 2)]  # a message holds two
            return Jobs(jobs=[JobListing(job=job) for job in part], total=len(found))
        tasks = [
            task
            for job in found
            for task in self.tasks[job.job_id].values()
            if (not wanted.indexes or task.index in wanted.indexes)
            and (not wanted.task_states or task.state in wanted.task_states)
        ]
        part = tasks[wanted.offset : wanted.offset + min(wanted.limit or 60, 60)]  # and sixty tasks
        return Jobs(jobs=[JobListing(job=job, tasks=part, total_tasks=len(tasks)) for job in found], total=len(found))

    def _command(self, action: JobAction, operator: bool = False) -> Any:
        if not operator:
            self.commands.append(action)
        spec = self.specs.get(action.job_id)
        if spec is None:
            return Error(code="not_found", message=f"there is no job {action.job_id}")
        if not operator and action.owner != spec.request.owner:
            return Error(code="not_owner", message=f"job {action.job_id} is {spec.request.owner!r}'s")
        changed = 0
        if action.verb is JobVerb.CANCEL:
            for index, task in self.tasks[action.job_id].items():
                if task.state not in FINAL and (not action.indexes or index in action.indexes):
                    self.set(action.job_id, JobState.CANCELLED, index=index)
                    changed += 1
        shown = spec if action.verb is JobVerb.SHOW else None
        return JobDetails(job=self.job(action.job_id), spec=shown, changed=changed)

    def _override(self, action: OverrideAction) -> Any:
        self.commands.append(action)
        return self._command(action.action, operator=True)

    def set(
        self, job_id: str, state: JobState, *, index: int = 0, log_bytes: int = 0, attempt: int = 1, **values: Any
    ) -> None:
        """Set the state of a task."""
        task = self.tasks[job_id][index]
        now = datetime.now(UTC)
        part = TaskPart(
            host=HOST,
            state=state,
            started_at=task.started_at or now,
            ended_at=now if state in FINAL else None,
            log_bytes=log_bytes,
            log_file=f"/logs/{job_id}_{index}",
        )
        self.tasks[job_id][index] = replace(
            task,
            state=state,
            attempt=max(task.attempt, attempt),
            parts=[part],
            started_at=task.started_at or now,
            ended_at=now if state in FINAL else None,
            **values,
        )

    async def print(
        self, job_id: str, name: str, offset: int, data: bytes, *, index: int = 0, attempt: int = 1, ended: bool = False
    ) -> None:
        """Publish a piece of what a task prints, and wait until it is stored."""
        chunk = LogChunk(
            run_id=run_id(job_id, index, attempt), time=datetime.now(UTC), offset=offset, data=data, ended=ended
        )
        owner = self.specs[job_id].request.owner
        subject = log_subject(HOST, job_id, index, name, owner, attempt=attempt)
        await self.nc.jetstream().publish(subject, codec.encode(chunk))


@contextlib.asynccontextmanager
async def jobs_planner(nc: Client) -> AsyncIterator[JobsPlanner]:
    """Answers for as long as the block lasts."""
    made = JobsPlanner(nc)
    await made.start()
    yield made
    await asyncio.sleep(0)
