"""Jobs for programs without asyncio: the twin of `JobCalls`, and functions over a connection of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, Unpack

from ...schemas.work.attach import LOST_SECONDS, AttachExit, TerminalSize
from ...schemas.work.jobs import Job, JobDetails, JobListing, JobSpec, JobState, JobTask
from ..attach import AttachedSession, Place, Written
from .calls import JobCalls, Which
from .logs import LogPiece
from .spec import JobFields, Work

T = TypeVar("T")


class Runs(Protocol):
    """An event loop in another thread."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait for its result."""
        ...

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """Iterate over an asynchronous iterator."""
        ...


class SyncSession:
    """A command inside a running job, for programs without asyncio. The methods are those of `AttachedSession`.

    It is closed at the end of a `with` block. `output` may be read in one thread while another writes.

    Args:
        loop: runs the calls.
        session: the asynchronous one.
    """

    def __init__(self, loop: Runs, session: AttachedSession) -> None:
        self._loop = loop
        self._session = session

    @property
    def place(self) -> Place:
        """Place where it runs."""
        return self._session.place

    @property
    def executor(self) -> str:
        """Executor that confines the job, and so this."""
        return self._session.executor

    @property
    def exit(self) -> AttachExit | None:
        """Its end; None before."""
        return self._session.exit

    def output(self) -> Iterator[Written]:
        """See `AttachedSession.output`."""
        return self._loop.iterate(self._session.output())

    def write(self, data: bytes, *, ended: bool = False) -> None:
        """See `AttachedSession.write`."""
        self._loop.run(self._session.write(data, ended=ended))

    def resize(self, size: TerminalSize) -> None:
        """See `AttachedSession.resize`."""
        self._loop.run(self._session.resize(size))

    def signal(self, number: int) -> None:
        """See `AttachedSession.signal`."""
        self._loop.run(self._session.signal(number))

    def close(self) -> None:
        """See `AttachedSession.close`."""
        self._loop.run(self._session.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SyncJobCalls:
    """Calls about jobs, as `client.jobs` of a `SyncClient`. The methods are those of `JobCalls`.

    Args:
        loop: runs the calls.
        calls: the asynchronous ones.
    """

    def __init__(self, loop: Runs, calls: JobCalls) -> None:
        self._loop = loop
        self._calls = calls

    def submit(self, work: Work, *arguments: Any, **fields: Unpack[JobFields]) -> Job:
        """See `JobCalls.submit`."""
        return self._loop.run(self._calls.submit(work, *arguments, **fields))

    def map(self, work: Work, inputs: Iterable[Any], **fields: Unpack[JobFields]) -> Job:
        """See `JobCalls.map`."""
        return self._loop.run(self._calls.map(work, inputs, **fields))

    def send(self, spec: JobSpec) -> Job:
        """See `JobCalls.send`."""
        return self._loop.run(self._calls.send(spec))

    def find(
        self,
        *,
        ids: Sequence[str] = (),
        owner: str | None = None,
        states: Sequence[JobState | str] = (),
        name: str = "",
        active: bool = False,
    ) -> list[Job]:
        """See `JobCalls.find`."""
        return self._loop.run(self._calls.find(ids=ids, owner=owner, states=states, name=name, active=active))

    def get(self, which: Which, *, tasks: bool = True, task_states: Sequence[JobState | str] = ()) -> JobListing:
        """See `JobCalls.get`."""
        return self._loop.run(self._calls.get(which, tasks=tasks, task_states=task_states))

    def show(self, which: Which, *, operator: bool | str = False) -> JobDetails:
        """See `JobCalls.show`."""
        return self._loop.run(self._calls.show(which, operator=operator))

    def cancel(self, which: Which, *, reason: str = "", signal: str = "", operator: bool | str = False) -> JobDetails:
        """See `JobCalls.cancel`."""
        return self._loop.run(self._calls.cancel(which, reason=reason, signal=signal, operator=operator))

    def hold(self, which: Which, *, reason: str = "", operator: bool | str = False) -> JobDetails:
        """See `JobCalls.hold`."""
        return self._loop.run(self._calls.hold(which, reason=reason, operator=operator))

    def release(self, which: Which, *, reason: str = "", operator: bool | str = False) -> JobDetails:
        """See `JobCalls.release`."""
        return self._loop.run(self._calls.release(which, reason=reason, operator=operator))

    def resubmit(self, which: Which, *, reason: str = "", operator: bool | str = False) -> JobDetails:
        """See `JobCalls.resubmit`."""
        return self._loop.run(self._calls.resubmit(which, reason=reason, operator=operator))

    def wait(self, which: Which, *, timeout: float | None = None) -> JobListing:
        """See `JobCalls.wait`."""
        return self._loop.run(self._calls.wait(which, timeout=timeout))

    def as_completed(self, jobs: Iterable[Which], *, timeout: float | None = None) -> Iterator[Job]:
        """See `JobCalls.as_completed`."""
        return self._loop.iterate(self._calls.as_completed(jobs, timeout=timeout))

    def tasks_as_completed(self, which: Which, *, timeout: float | None = None) -> Iterator[JobTask]:
        """See `JobCalls.tasks_as_completed`."""
        return self._loop.iterate(self._calls.tasks_as_completed(which, timeout=timeout))

    def logs(
        self, which: Which, *, follow: bool = False, host: str | None = None, attempt: int | None = None
    ) -> Iterator[LogPiece]:
        """See `JobCalls.logs`."""
        return self._loop.iterate(self._calls.logs(which, follow=follow, host=host, attempt=attempt))

    def attach(
        self,
        which: Which,
        command: Sequence[str] = (),
        *,
        host: str | None = None,
        terminal: TerminalSize | None = None,
        terminal_type: str = "",
        operator: bool | str = False,
        lost_seconds: float = LOST_SECONDS,
    ) -> SyncSession:
        """See `JobCalls.attach`."""
        work = self._calls.attach(
            which,
            command,
            host=host,
            terminal=terminal,
            terminal_type=terminal_type,
            operator=operator,
            lost_seconds=lost_seconds,
        )
        return SyncSession(self._loop, self._loop.run(work))
