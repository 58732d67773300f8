"""Jobs for all browsers: a question is asked once per refresh of the fleet, and only while a page shows the answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator
from typing import Any, Final, Generic, TypeVar

import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..bus.tasks import heed_cancellation
from ..client import Client, CorralError, NotFound, Refused, Unavailable
from ..client.jobs.calls import JobCalls
from ..client.jobs.names import Selection
from ..client.jobs.summary import JobSummary, statement, summary_of
from ..schemas import codec, subjects
from ..schemas.work.jobs import JobDetails, JobEvent, JobFilter, JobListing, Jobs, JobState, JobTask, JobVerb, task_name
from .fleet import Fleet
from .job_output import OutputText
from .job_tasks import STATES, TaskStates

log = logging.getLogger("corral.dashboard")

K = TypeVar("K")

_KEPT: Final = 256
"""Answers that are kept: one for each filter and page that somebody looks at."""
_ABSENT_SECONDS: Final = 30.0
"""Time for which the numbers of jobs are not asked for once a planner did not answer."""
_RELOAD_SECONDS: Final = 5.0
"""Least time between two listings of all tasks, and time without an event after which states are compared."""
_RELOAD_SHARE: Final = 20.0
"""Least time between two listings of all tasks, as a multiple of what one takes."""
_RETRY_SECONDS: Final = 3.0
_SUMMARY_SECONDS: Final = 15.0
"""Time for which a summary is kept."""
_MOST_OUTPUTS: Final = 64
"""Outputs that are followed at a time."""

_GOING: Final = [JobState.RUNNING, JobState.COMPLETING, JobState.STARTING]


class JobCounts(Struct, frozen=True):
    """Numbers of jobs that have not ended.

    Attributes:
        going: with a task that has its devices.
        waiting: with none.
    """

    going: int
    waiting: int


class JobBoard:
    """Questions and commands about jobs.

    Args:
        fleet: connection, and the refreshes that the answers are as of.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._answers: OrderedDict[bytes, tuple[int, asyncio.Task[Jobs]]] = OrderedDict()
        self._summaries: OrderedDict[str, tuple[float, asyncio.Task[JobSummary | None]]] = OrderedDict()
        self._tasks = _Shared[str, WatchedTasks](lambda job_id: WatchedTasks(fleet, job_id))
        self._outputs = _Shared[tuple[str, int], FollowedOutput](lambda key: FollowedOutput(fleet, *key))
        self._absent_until = 0.0

    # Listing

    async def page(self, wanted: JobFilter) -> Jobs:
        """Jobs that match a filter, as of the last refresh.

        Raises:
            CorralError: the call failed.
        """
        key = codec.encode(wanted, codec.JSON)
        kept = self._answers.get(key)
        if kept is None or kept[0] != self._fleet.refreshes or _failed(kept[1]):
            task = asyncio.ensure_future(self._fleet.ask(lambda client: client.jobs.page(wanted)))
            task.add_done_callback(_failed)
            kept = self._answers[key] = (self._fleet.refreshes, task)
        self._answers.move_to_end(key)
        while len(self._answers) > _KEPT:
            self._answers.popitem(last=False)
        return await asyncio.shield(kept[1])

    async def job(self, job_id: str, index: int | None = None) -> JobListing:
        """A job, with one of its tasks if an index is given, as of the last refresh.

        Raises:
            NotFound: there is no such job, or it ended too long ago.
            CorralError: the call failed.
        """
        wanted = JobFilter(job_ids=[job_id], tasks=index is not None, indexes=[] if index is None else [index])
        answer = await self.page(wanted)
        if not answer.jobs:
            raise NotFound(f"there is no job {job_id}, or it ended too long ago", "not_found", "$.job_id")
        return answer.jobs[0]

    async def counts(self) -> JobCounts | None:
        """Numbers of jobs as of the last refresh; None if they are unknown, as with a planner of an earlier version."""
        if time.monotonic() < self._absent_until:
            return None
        try:
            active = await self.page(JobFilter(active=True, limit=1))
            going = await self.page(JobFilter(states=_GOING, limit=1))
        except CorralError:
            self._absent_until = time.monotonic() + _ABSENT_SECONDS
            return None
        return JobCounts(going=going.total, waiting=max(0, active.total - going.total))

    async def summary(self, name: str) -> JobSummary | None:
        """Use of a job or a task, from the history, at most 15 s old; None if the history does not know it.

        Args:
            name: `1234` or `1234_7`.

        Raises:
            CorralError: the history did not answer.
        """

        async def asked(client: Client) -> JobSummary | None:
            found = await client.query(statement(name), timeout=20)
            return summary_of(name, found.dicts())

        kept = self._summaries.get(name)
        if kept is None or (kept[1].done() and time.monotonic() - kept[0] > _SUMMARY_SECONDS):
            task = asyncio.ensure_future(self._fleet.ask(asked))
            task.add_done_callback(_failed)
            kept = self._summaries[name] = (time.monotonic(), task)
        self._summaries.move_to_end(name)
        while len(self._summaries) > _KEPT:
            self._summaries.popitem(last=False)
        return await asyncio.shield(kept[1])

    # Commands

    async def act(
        self, verb: JobVerb, which: Selection, *, owner: str = "", operator: str = "", reason: str = ""
    ) -> JobDetails:
        """Give a command about a job, or about tasks of it.

        Args:
            verb: the command.
            which: the job, and the tasks.
            owner: who gives it, of a job of their own; empty for an operator's.
            operator: who gives it, about a job of anybody.
            reason: why, for the history.

        Raises:
            CorralError: the call failed.
        """

        async def asked(client: Client) -> JobDetails:
            calls: JobCalls = client.jobs
            calls.owner = owner or calls.owner
            by = operator or False
            match verb:
                case JobVerb.CANCEL:
                    return await calls.cancel(which, reason=reason, operator=by)
                case JobVerb.HOLD:
                    return await calls.hold(which, reason=reason, operator=by)
                case JobVerb.RELEASE:
                    return await calls.release(which, reason=reason, operator=by)
                case JobVerb.RESUBMIT:
                    return await calls.resubmit(which, reason=reason, operator=by)
                case JobVerb.SHOW:
                    return await calls.show(which, operator=by)

        return await self._fleet.ask(asked)

    # What is followed while somebody looks at it

    def watch_tasks(self, job_id: str) -> contextlib.AbstractContextManager[WatchedTasks]:
        """States of the tasks of a job, followed for as long as the block is open in any browser."""
        return self._tasks.opened(job_id)

    def follow_output(self, job_id: str, index: int) -> contextlib.AbstractContextManager[FollowedOutput]:
        """Output of a task, followed for as long as the block is open in any browser.

        Raises:
            Refused: too many outputs are followed.
        """
        key = (job_id, index)
        if key not in self._outputs and len(self._outputs) >= _MOST_OUTPUTS:
            raise Refused(f"{_MOST_OUTPUTS} outputs are followed already: try again later", "limit")
        return self._outputs.opened(key)


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


class _Running(ABC):
    """Something that is kept up to date by a background task, from `start` to `stop`."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the task."""
        self._running = asyncio.create_task(self._run())

    def stop(self) -> None:
        """Stop the task."""
        if self._running is not None:
            self._running.cancel()

    @abstractmethod
    async def _run(self) -> None: ...


R = TypeVar("R", bound=_Running)


class _Shared(Generic[K, R]):
    """Tasks that run while at least one browser has their page open, by key.

    Args:
        make: creates it for a key.
    """

    def __init__(self, make: Callable[[K], R]) -> None:
        self._make = make
        self._open: dict[K, tuple[R, list[None]]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: object) -> bool:
        return key in self._open

    @contextlib.contextmanager
    def opened(self, key: K) -> Generator[R]:
        """Start it, unless another browser has; at the end of the block stop it, unless another one has it open."""
        if key not in self._open:
            made = self._make(key)
            made.start()
            self._open[key] = (made, [])
        made, users = self._open[key]
        users.append(None)
        try:
            yield made
        finally:
            users.pop()
            if not users:
                del self._open[key]
                made.stop()


class WatchedTasks(_Running):
    """States of the tasks of a job: listed once, and then followed by its events.

    They are listed again where an event may be missing, or where they disagree with the planner's numbers.

    Args:
        fleet: connection.
        job_id: id of the job.

    Attributes:
        states: None until they are known.
        error: why they are not known, or no longer followed; None if they are.
    """

    def __init__(self, fleet: Fleet, job_id: str) -> None:
        super().__init__(fleet)
        self.states: TaskStates | None = None
        self.error: CorralError | None = None
        self._job_id = job_id
        self._listing = asyncio.Event()
        self._listed_at = self._event_at = 0.0
        self._took_seconds = 0.0
        self._came: list[JobEvent] | None = None

    def check(self, listing: JobListing) -> None:
        """Compare the states with the numbers of the job; if they disagree without an event, list the tasks again."""
        now = time.monotonic()
        rests = now - max(self._listed_at, self._event_at) > max(_RELOAD_SECONDS, _RELOAD_SHARE * self._took_seconds)
        if rests and self.states is not None and not self.states.agrees(listing.job):
            self._listing.set()

    async def _run(self) -> None:
        subscription: Subscription | None = None
        try:
            while True:
                heed_cancellation()
                try:
                    if subscription is None:
                        subject = subjects.job_events_subject(self._job_id)
                        subscription = await self.fleet.connection().subscribe(subject, cb=self._on_event)
                    await self._list()
                    self.error = None
                except NotFound as error:
                    self.error = error
                except CorralError as error:
                    self.error = error
                    self._listing.set()
                except (nats.errors.Error, OSError) as error:
                    self.error = Unavailable(f"{type(error).__name__}: {error}")
                    self._listing.set()
                await asyncio.sleep(_RETRY_SECONDS if self.error else 0)
                await self._listing.wait()
        finally:
            if subscription is not None:
                with contextlib.suppress(Exception):  # the connection may be closed already
                    await subscription.unsubscribe()

    async def _list(self) -> None:
        self._listing.clear()
        came = self._came = []
        began = time.monotonic()
        started = [state for state in STATES if state is not JobState.PENDING]
        listing = await self.fleet.ask(lambda client: client.jobs.get(self._job_id, task_states=started))
        states = TaskStates(listing.job.array)
        states.set_all(listing.tasks)
        for event in came:  # came during the listing, and may be newer than it
            states.apply(event)
        self.states, self._came = states, None
        self._listed_at = time.monotonic()
        self._took_seconds = self._listed_at - began

    async def _on_event(self, message: Msg) -> None:
        try:
            event = codec.decode(message.data, JobEvent, codec.JSON)
        except codec.DecodeError as error:
            log.debug("an event of job %s: %s", self._job_id, error)
            return
        self._event_at = time.monotonic()
        if self._came is not None:
            self._came.append(event)
        if self.states is not None and not self.states.apply(event) and self._came is None:
            self._listing.set()


class FollowedOutput(_Running):
    """Output of a task on each of its hosts, from its stored begin and end to what it prints now.

    Args:
        fleet: connection.
        job_id: id of the job.
        index: of the task.

    Attributes:
        texts: by host.
        ended: true once the task has ended and nothing more follows.
        error: why nothing can be read; None if it can.
    """

    def __init__(self, fleet: Fleet, job_id: str, index: int) -> None:
        super().__init__(fleet)
        self.texts: dict[str, OutputText] = {}
        self.ended = False
        self.error: CorralError | None = None
        self._which = Selection(job_id, (index,))
        self._name = task_name(job_id, index)
        self._again = asyncio.Event()
        self._attempt = self._read_attempt = 0

    def follow(self, task: JobTask) -> None:
        """Go on with a further attempt of the task, where an earlier one has ended."""
        self._attempt = max(self._attempt, task.attempt)
        if self.ended and self._attempt > self._read_attempt:
            self._again.set()

    async def _run(self) -> None:
        while True:
            heed_cancellation()
            self._again.clear()
            try:
                await self.fleet.ask(self._read)
                self._read_attempt = max([self._attempt, *(text.attempt for text in self.texts.values())])
                self.ended, self.error = True, None
            except CorralError as error:
                self.error = error
                if not isinstance(error, Refused | NotFound):
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
            except Exception as error:
                log.exception("the output of job %s can't be followed", self._name)
                self.error = CorralError(f"{type(error).__name__}: {error}")
            await self._again.wait()
            self.ended = False

    async def _read(self, client: Client) -> None:
        async for piece in client.jobs.logs(self._which, follow=True):
            self.error = None
            self.texts.setdefault(piece.host, OutputText()).add(piece)
