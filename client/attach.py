"""A command inside a running job: its input and output, over the runner of the job's host."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import nats.aio.client
import nats.errors
from msgspec import Struct

from ..bus import permissions
from ..schemas import codec, subjects
from ..schemas.instruments import ServiceKind
from ..schemas.requests import Error
from ..schemas.work.attach import (
    MOST_WAIT_SECONDS,
    PIECE_BYTES,
    AttachExit,
    AttachNews,
    AttachOpen,
    AttachOpened,
    AttachStep,
    TerminalSize,
)
from ..schemas.work.jobs import JobListing, JobState, JobTask, task_name
from ..schemas.work.runs import run_id
from .errors import Conflict, CorralError, InvalidRequest, NotFound, Refused, Unavailable, error_of

_ANSWER_SECONDS: Final = MOST_WAIT_SECONDS + 3.0
_OPEN_SECONDS: Final = 15.0
_RETRY_SECONDS: Final = 0.2
_NOBODY_SECONDS: Final = 2.0
"""A session has ended once nothing answers for its host for so long: a runner that is started anew has no sessions."""
_CLOSE_SECONDS: Final = 2.0
_HEADERS: Final = {codec.CONTENT_TYPE_HEADER: codec.MSGPACK}

_T = TypeVar("_T", bound=Struct)


class Place(NamedTuple):
    """Place where a part of a task runs.

    Attributes:
        run_id: of the attempt.
        host: that it runs on.
        name: of the task.
    """

    run_id: str
    host: str
    name: str


def place_of(listing: JobListing, host: str | None) -> Place:
    """Choose where to attach: the one running task, at its first host unless one is named.

    Args:
        listing: the job with the tasks that were asked for.
        host: name of the host; None for the first.

    Raises:
        Conflict: none of the tasks runs.
        InvalidRequest: several tasks run.
        NotFound: the task has no such host.
    """
    job = listing.job
    running = [task for task in listing.tasks if task.state is JobState.RUNNING]
    if not running:
        states = sorted({task.state.value for task in listing.tasks}) or [job.state.value]
        raise Conflict(f"nothing runs of job {job.job_id}: it is {', '.join(states)}", "conflict", "$.job_id")
    names = [task_name(job.job_id, task.index if job.array else None) for task in running]
    if len(running) > 1:
        text = f"{len(running)} tasks of job {job.job_id} run: name one, such as {names[0]}"
        raise InvalidRequest(text, "invalid", "$.job_id")
    task: JobTask = running[0]
    hosts = [part.host for part in task.parts if part.state is JobState.RUNNING]
    chosen = host or next(iter(hosts), "")
    if chosen not in hosts:
        raise NotFound(f"{names[0]} does not run on {chosen}: it runs on {', '.join(hosts)}", "not_found", "$.host")
    return Place(run_id(job.job_id, task.index, task.attempt), chosen, names[0])


class Written(NamedTuple):
    """Something that the command has written.

    Attributes:
        output: to its standard output, or to its terminal.
        error_output: to its standard error.
    """

    output: bytes
    error_output: bytes


class AttachedSession:
    """A command inside a running job. It ends with its processes once it is closed, or its client is gone.

    Args:
        nc: connection to the bus.
        place: where it runs.
        subject: of its steps.
        opened: the runner's answer.
        lost_seconds: time after which runner and client take each other for lost.

    Attributes:
        place: where it runs.
        executor: what confines the job, and so this.
        exit: its end; None before.
    """

    def __init__(
        self, nc: nats.aio.client.Client, place: Place, subject: str, opened: AttachOpened, lost_seconds: float
    ) -> None:
        self.place = place
        self.executor = opened.executor
        self.exit: AttachExit | None = None
        self._nc = nc
        self._subject = subject
        self._session = opened.session
        self._answered = asyncio.get_running_loop().time()
        self._lost_seconds = lost_seconds
        self._wait_seconds = min(MOST_WAIT_SECONDS, lost_seconds / 3)
        self._written = 0
        self._writing = asyncio.Lock()
        self._beats = asyncio.create_task(self._beat(), name="session heartbeat")

    async def output(self) -> AsyncIterator[Written]:
        """Iterate over the output of the command until it has ended. Then `exit` says how. Read one iterator at a time.

        Raises:
            Unavailable: the session is lost.
        """
        received = 0
        while self.exit is None:
            news = await self._step(received=received)
            if news.piece > received:
                received = news.piece
                yield Written(news.output, news.error_output)
            self.exit = news.exit

    async def write(self, data: bytes, *, ended: bool = False) -> None:
        """Write to the command's standard input. Returns once the command's input has taken it all.

        Args:
            data: to write.
            ended: nothing follows.
        """
        pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)] or [b""]
        async with self._writing:
            for at, piece in enumerate(pieces):
                number = self._written + 1
                taken = 0
                while taken < number and self.exit is None:
                    last = ended and at == len(pieces) - 1
                    news = await self._step(number=number, data=piece, input_ended=last)
                    taken = number if news.exit is not None else news.taken
                self._written = number

    async def resize(self, size: TerminalSize) -> None:
        """Set the size of the command's terminal."""
        await self._step(terminal=size)

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        await self._step(signal=number)

    async def close(self) -> None:
        """End the session with its processes; without effect once it has ended."""
        self._beats.cancel()
        if self.exit is None:
            with contextlib.suppress(CorralError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._step(close=True)

    async def _beat(self) -> None:
        """Ask something from time to time, while output waits to be read."""
        with contextlib.suppress(CorralError):
            while self.exit is None:
                await asyncio.sleep(self._wait_seconds)
                if asyncio.get_running_loop().time() - self._answered >= self._wait_seconds:
                    await self._step()

    async def _step(self, **fields: Any) -> AttachNews:
        body = codec.encode(AttachStep(session=self._session, wait_seconds=self._wait_seconds, **fields))
        loop = asyncio.get_running_loop()
        while True:
            try:
                news = await ask(self._nc, self._subject, body, AttachNews, _ANSWER_SECONDS)
            except CorralError:
                raise
            except nats.errors.NoRespondersError:
                patience, why = _NOBODY_SECONDS, f"no runner answers for {self.place.host}"
            except (nats.errors.Error, OSError, TimeoutError) as error:
                patience, why = self._lost_seconds, f"{type(error).__name__}: the bus or the runner does not answer"
            else:
                self._answered = loop.time()
                return news
            if loop.time() - self._answered > patience:
                raise Unavailable(f"the session in {self.place.name} is lost: {why}")
            await asyncio.sleep(_RETRY_SECONDS)


async def open_session(
    nc: nats.aio.client.Client,
    place: Place,
    name: str,
    command: Sequence[str],
    *,
    override: bool,
    terminal: TerminalSize | None,
    terminal_type: str,
    lost_seconds: float,
) -> AttachedSession:
    """Start a command inside a running job.

    Args:
        nc: connection to the bus.
        place: where.
        name: of the job's owner; with `override`, of the operator.
        command: its words; empty for a shell.
        override: as an operator.
        terminal: size of its pseudo-terminal; None for pipes.
        terminal_type: of the terminal, as in `TERM`.
        lost_seconds: time after which runner and client take each other for lost.

    Raises:
        NotFound: the task does not run there any more.
        NotOwner: it belongs to another owner.
        Refused: the bus does not permit it.
        Unavailable: no runner answers for the host, or it can't start a session.
    """
    token = subjects.host_token(place.host)
    asked = AttachOpen(
        run_id=place.run_id,
        command=list(command),
        terminal=terminal,
        terminal_type=terminal_type,
        lost_seconds=lost_seconds,
    )
    subject = subjects.attach_subject(token, name, step=False, override=override)
    try:
        opened = await ask(nc, subject, codec.encode(asked), AttachOpened, _OPEN_SECONDS)
    except CorralError:
        raise
    except permissions.NotAllowed as error:
        raise Refused(str(error), "refused") from None
    except nats.errors.NoRespondersError:
        raise Unavailable(f"no runner answers for {place.host}, or one of an earlier version") from None
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise Unavailable(f"the runner of {place.host} does not answer ({type(error).__name__})") from error
    steps = subjects.attach_subject(token, name, step=True, override=override)
    return AttachedSession(nc, place, steps, opened, lost_seconds)


async def ask(nc: nats.aio.client.Client, subject: str, body: bytes, expected: type[_T], seconds: float) -> _T:
    """Ask a runner.

    Raises:
        CorralError: it has answered with an error.
        nats.errors.Error: it has not answered.
    """
    answer = await permissions.request(nc, subject, body, timeout=seconds, headers=_HEADERS)
    found: Any = codec.decode(answer.data, expected | Error, codec.content_type(answer.headers))  # pyright: ignore[reportArgumentType]
    if isinstance(found, Error):
        raise error_of(found, ServiceKind.RUNNER)
    return found
