"""Jobs: submit, list, command and wait for them, and read what they print."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, Unpack

from msgspec.structs import replace

from ...schemas import requests
from ...schemas.subjects import PlanSubject
from ...schemas.work.attach import LOST_SECONDS, TerminalSize
from ...schemas.work.jobs import (
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
)
from ..attach import AttachedSession, open_session, place_of
from ..errors import InvalidRequest, NotFound, Rejected, ServiceError, TimedOut, Unavailable
from ..owned_calls import OwnedCalls
from .functions import script_of_map, shell_map
from .logs import LogPiece, follow_logs, stored_logs
from .names import HasJob, Selection, parse_selection
from .spec import JobFields, Work, job_spec, name_of

T = TypeVar("T")

_FIRST_POLL_SECONDS: Final = 0.1
_LONGEST_POLL_SECONDS: Final = 2.0
_IDS_PER_CALL: Final = 1000
_TASKS_PER_CALL: Final = 2000

Which = str | HasJob | Selection
"""A job, or some of its tasks: `"1234"`, `"1234_7"`, `"1234_[0-9]"`, or what `submit` returned."""


class JobCalls(OwnedCalls):
    """Calls about jobs, as `client.jobs`.

    `operator` of a command makes it one of an operator's, for a job of any owner: True signs it with the credentials'
    user, and a name with that.
    """

    async def submit(self, work: Work, *arguments: Any, **fields: Unpack[JobFields]) -> Job:
        """Submit a job. It is durable once this returns.

        Args:
            work: the words of a command; a `Path` of a script, or its text, which begins with `#!`; or a function.
                `#CORRAL` lines of a script are those of the command line, and are not read here.
            arguments: of the script or function, or further words of the command.
            fields: what each task needs and how it is queued; see `JobFields`.

        Raises:
            InvalidRequest: a field is wrong, or the function can't be sent to another host.
            Rejected: the fleet could never hold it.
            TooManyRequests: the owner has too many jobs.
            Unavailable, NoService, TimedOut: no planner answered.
        """
        return await self.send(job_spec(self.owner, work, arguments, fields))

    async def map(self, work: Work, inputs: Iterable[Any], **fields: Unpack[JobFields]) -> Job:
        """Submit an array with a task for each input: a function is called with it, a command gets it as a last word.

        Args:
            work: a function, or the words of a command.
            inputs: plain values, in the order of the tasks' indexes from 0.
            fields: as in `submit`. `array` may be `%10`, so that at most 10 tasks run at a time.
        """
        values = list(inputs)
        if not values:
            raise InvalidRequest("there are no inputs: an array has a task for each", "invalid", "$.array")
        limit = fields.get("array", "")
        if limit and not (isinstance(limit, str) and limit.startswith("%")):
            text = f"array={limit!r}: the inputs number the tasks; only how many may run at a time goes here, as %10"
            raise InvalidRequest(text, "invalid", "$.array")
        if callable(work):
            script = script_of_map(work, values, fields.get("python"))
            fields.setdefault("directory", Path.cwd())
        elif isinstance(work, str | Path):
            text = "map takes a function or the words of a command; a script has its index in CORRAL_ARRAY_INDEX"
            raise InvalidRequest(text, "invalid", "$.script")
        else:
            script = shell_map(work, values)
        fields.setdefault("name", name_of(work))
        fields["array"] = f"0-{len(values) - 1}{limit}"
        return await self.send(job_spec(self.owner, script, (), fields))

    async def send(self, spec: JobSpec) -> Job:
        """Submit a `JobSpec`; otherwise as `submit`.

        Without a `submit_id` it is given one, so that it is submitted once if it is sent twice.
        """
        if spec.submit_id is None:
            spec = replace(spec, submit_id=uuid.uuid4().hex)
        owner = spec.request.owner
        expected: Any = Job | requests.Rejection
        try:
            answer: Job | requests.Rejection = await self._plan(self._owned(PlanSubject.SUBMIT, owner), spec, expected)
        except ServiceError as error:
            if error.code != requests.RejectionCode.IMPOSSIBLE:
                raise
            raise Rejected(requests.Rejection(code=requests.RejectionCode.IMPOSSIBLE, message=str(error))) from None
        if isinstance(answer, requests.Rejection):
            raise Rejected(answer)
        return answer

    async def find(
        self,
        *,
        ids: Sequence[str] = (),
        owner: str | None = None,
        states: Sequence[JobState | str] = (),
        name: str = "",
        active: bool = False,
    ) -> list[Job]:
        """Jobs that have not ended and those that ended lately, the newest first.

        Args:
            ids: only these.
            owner: only of this owner.
            states: only in these states.
            name: glob over names.
            active: only jobs that have not ended.
        """
        wanted = JobFilter(owner=owner, states=[JobState(one) for one in states], name=name, active=active)
        parts = [list(ids[at : at + _IDS_PER_CALL]) for at in range(0, len(ids), _IDS_PER_CALL)] or [[]]
        found: dict[str, Job] = {}
        for part in parts:
            async for listing in self._listings(replace(wanted, job_ids=part)):
                found[listing.job.job_id] = listing.job
        return sorted(found.values(), key=lambda job: int(job.job_id), reverse=True)

    async def page(self, wanted: JobFilter) -> Jobs:
        """One page of a listing, as the planner answers it: with `total`, and cut at the size of a message.

        Args:
            wanted: filter, `offset` and `limit`.
        """
        return await self._plan(PlanSubject.JOBS, wanted, Jobs)

    async def get(self, which: Which, *, tasks: bool = True, task_states: Sequence[JobState | str] = ()) -> JobListing:
        """A job with its tasks, in the order of their indexes.

        Args:
            which: the job, or some of its tasks.
            tasks: with its tasks; else with none.
            task_states: only tasks in these states.

        Raises:
            NotFound: there is no such job, or it ended too long ago.
        """
        job_id, indexes = selection(which)
        wanted = JobFilter(
            job_ids=[job_id], tasks=tasks, indexes=list(indexes), task_states=[JobState(one) for one in task_states]
        )
        if not tasks:
            async for listing in self._listings(wanted):
                return listing
            raise _no_job(job_id)
        found: dict[int, JobTask] = {}
        offset = 0
        while True:
            answer = await self._plan(PlanSubject.JOBS, replace(wanted, offset=offset, limit=_TASKS_PER_CALL), Jobs)
            if not answer.jobs:
                raise _no_job(job_id)
            listing = answer.jobs[0]
            found.update((task.index, task) for task in listing.tasks)
            offset += len(listing.tasks)
            if not listing.tasks or offset >= listing.total_tasks:
                return replace(listing, tasks=[found[index] for index in sorted(found)])

    async def _listings(self, wanted: JobFilter) -> AsyncIterator[JobListing]:
        offset = 0
        while True:
            answer = await self._plan(PlanSubject.JOBS, replace(wanted, offset=offset), Jobs)
            for listing in answer.jobs:
                yield listing
            offset += len(answer.jobs)
            if not answer.jobs or offset >= answer.total:
                return

    # Commands

    async def show(self, which: Which, *, operator: bool | str = False) -> JobDetails:
        """A job as it was submitted, with its command or script: for its owner and operators."""
        return await self._command(which, JobVerb.SHOW, operator)

    async def cancel(
        self, which: Which, *, reason: str = "", signal: str = "", operator: bool | str = False
    ) -> JobDetails:
        """End a job, or some of its tasks, or take them from the queue.

        Args:
            which: the job, or some of its tasks.
            reason: why, for the history.
            signal: to send first, in place of SIGTERM; SIGKILL follows after the grace.
            operator: as an operator, for a job of any owner.

        Raises:
            NotFound: there is no such job.
            NotOwner: it belongs to another owner.
        """
        return await self._command(which, JobVerb.CANCEL, operator, reason=reason, signal=signal)

    async def hold(self, which: Which, *, reason: str = "", operator: bool | str = False) -> JobDetails:
        """Keep what waits of a job from being started; what runs goes on."""
        return await self._command(which, JobVerb.HOLD, operator, reason=reason)

    async def release(self, which: Which, *, reason: str = "", operator: bool | str = False) -> JobDetails:
        """Let what is held of a job be started again."""
        return await self._command(which, JobVerb.RELEASE, operator, reason=reason)

    async def resubmit(self, which: Which, *, reason: str = "", operator: bool | str = False) -> JobDetails:
        """Queue tasks that have ended again: those named, or all that have not ended well."""
        return await self._command(which, JobVerb.RESUBMIT, operator, reason=reason)

    async def _command(self, which: Which, verb: JobVerb, operator: bool | str, **more: str) -> JobDetails:
        job_id, indexes = selection(which)
        action = JobAction(job_id=job_id, verb=verb, indexes=list(indexes), **more)
        if operator:
            signer = self._operator(None if operator is True else operator)
            body = OverrideAction(operator=signer, action=action)
            return await self._plan(self._signed_by(PlanSubject.JOB_OVERRIDE, signer), body, JobDetails)
        own = replace(action, owner=self.owner)
        return await self._plan(self._owned(PlanSubject.JOB, self.owner), own, JobDetails)

    # Waiting

    async def _through_outages(self, ask: Callable[[], Awaitable[T]], *, first: bool) -> T:
        """An answer of the planner; unless it is the first, outages of bus and planner are waited for."""
        while True:
            try:
                return await ask()
            except (Unavailable, TimedOut):
                if first:
                    raise
            await asyncio.sleep(_LONGEST_POLL_SECONDS)

    async def wait(self, which: Which, *, timeout: float | None = None) -> JobListing:
        """Wait until a job, or tasks of it, have ended; returns it with these tasks.

        Args:
            which: the job, or some of its tasks.
            timeout: seconds; None for no limit.

        Raises:
            TimeoutError: it has not ended by then.
            NotFound: there is no such job.
        """
        async with asyncio.timeout(timeout):
            pause = _FIRST_POLL_SECONDS
            chosen = selection(which)
            first = True
            while True:
                found = await self._through_outages(lambda: self.get(chosen, tasks=bool(chosen.indexes)), first=first)
                first = False
                ended = all(task.state in FINAL for task in found.tasks) if chosen.indexes else ended_job(found.job)
                if ended:
                    return (
                        found if chosen.indexes else await self._through_outages(lambda: self.get(chosen), first=False)
                    )
                await asyncio.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_POLL_SECONDS)

    async def as_completed(self, jobs: Iterable[Which], *, timeout: float | None = None) -> AsyncIterator[Job]:
        """Jobs in the order in which they end, each once.

        Args:
            jobs: the jobs.
            timeout: seconds; None for no limit.

        Raises:
            TimeoutError: not all have ended by then.
            NotFound: one of them does not exist.
        """
        waiting = {selection(job).job_id for job in jobs}
        end = None if timeout is None else asyncio.get_running_loop().time() + timeout
        pause = _FIRST_POLL_SECONDS
        first = True
        while waiting:
            listed = await self._through_outages(lambda: self.find(ids=sorted(waiting)), first=first)
            first = False
            found = {job.job_id: job for job in listed}
            if missing := waiting - set(found):
                raise _no_job(min(missing))
            ended = sorted(
                (job for job in found.values() if ended_job(job)),
                key=lambda job: (job.ended_at or job.submitted_at, int(job.job_id)),
            )
            for job in ended:
                waiting.discard(job.job_id)
                pause = _FIRST_POLL_SECONDS
                yield job
            if not waiting:
                return
            if end is not None and asyncio.get_running_loop().time() + pause > end:
                raise TimeoutError(f"{len(waiting)} jobs have not ended within {timeout:g} s")
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL_SECONDS)

    async def tasks_as_completed(self, which: Which, *, timeout: float | None = None) -> AsyncIterator[JobTask]:
        """Tasks of a job in the order in which they end, each once; otherwise as `as_completed`."""
        chosen = selection(which)
        end = None if timeout is None else asyncio.get_running_loop().time() + timeout
        pause = _FIRST_POLL_SECONDS
        seen: set[int] = set()
        first = True
        while True:
            everything = await self._through_outages(lambda: self.get(chosen, tasks=bool(chosen.indexes)), first=first)
            first = False
            over = all(t.state in FINAL for t in everything.tasks) if chosen.indexes else ended_job(everything.job)
            finished = await self._through_outages(lambda: self.get(chosen, task_states=sorted(FINAL)), first=False)
            ended = finished.tasks
            fresh = [task for task in ended if task.index not in seen]
            for task in sorted(fresh, key=lambda task: (task.ended_at or everything.job.submitted_at, task.index)):
                seen.add(task.index)
                pause = _FIRST_POLL_SECONDS
                yield task
            if over:
                return
            if end is not None and asyncio.get_running_loop().time() + pause > end:
                raise TimeoutError(f"not all tasks of job {chosen.job_id} have ended within {timeout:g} s")
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL_SECONDS)

    # Output

    def logs(
        self, which: Which, *, follow: bool = False, host: str | None = None, attempt: int | None = None
    ) -> AsyncIterator[LogPiece]:
        """Iterate over the output of a job: the begin and the end that the bus has kept; with `follow` all that comes.

        Args:
            which: the job, or some of its tasks.
            follow: go on until all of these tasks have ended.
            host: only of this host, for tasks on several hosts.
            attempt: number of an attempt, from 1; None for the last of each task. It goes without `follow`.

        Raises:
            NotFound: there is no such job, or nothing is kept of that attempt.
            Refused: the job is another owner's.
            ValueError: an attempt can't be followed.
        """
        chosen = selection(which)
        if follow and attempt is not None:
            raise ValueError("an attempt can't be followed: give either follow or attempt")
        if not follow:
            return stored_logs(self.nc, lambda: self.get(chosen), host, attempt)
        asked = False

        async def ask() -> JobListing:
            nonlocal asked
            listing = await self._through_outages(lambda: self.get(chosen), first=not asked)
            asked = True
            return listing

        return follow_logs(self.nc, ask, chosen, host)

    # Sessions

    async def attach(
        self,
        which: Which,
        command: Sequence[str] = (),
        *,
        host: str | None = None,
        terminal: TerminalSize | None = None,
        terminal_type: str = "",
        operator: bool | str = False,
        lost_seconds: float = LOST_SECONDS,
    ) -> AttachedSession:
        """Start a command inside a running job: on its host, as its account, with its environment and its GPUs.

        Args:
            which: the job, or one task of an array.
            command: its words; empty for a shell.
            host: of a task on several hosts; None for the first.
            terminal: size of its pseudo-terminal; None for pipes.
            terminal_type: of the terminal, as in `TERM`.
            operator: as an operator, in a job of any owner.
            lost_seconds: once the bus is away for so long, the command is ended, and the session is lost.

        Raises:
            Conflict: nothing of it runs.
            InvalidRequest: several tasks run.
            NotFound: there is no such job or host.
            NotOwner, Refused: it belongs to another owner.
            Unavailable: no runner answers for its host.
        """
        place = place_of(await self.get(which), host)
        name = self._operator(None if operator is True else operator) if operator else self.owner
        return await open_session(
            self.nc,
            place,
            name,
            command,
            override=bool(operator),
            terminal=terminal,
            terminal_type=terminal_type,
            lost_seconds=lost_seconds,
        )


def selection(which: Which) -> Selection:
    """Job and indexes of what names them.

    Raises:
        InvalidRequest: it names none.
    """
    if isinstance(which, Selection):
        return which
    return Selection(which.job_id) if isinstance(which, HasJob) else parse_selection(str(which))


def ended_job(job: Job) -> bool:
    """True if all tasks of a job have reached a final state."""
    return job.ended_at is not None or job.state in FINAL


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id}, or it ended too long ago: the history has it", "not_found", "$.job_id")
