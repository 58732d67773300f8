"""Output of jobs: the begin and the end that the bus keeps of each run, put together, and live pieces.

A run's output is published in pieces, each on a subject of its own; a later piece of the end takes the place of an
earlier one. So there may be a hole between begin and end. Pieces of earlier attempts stay beside those of the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Final

import nats.aio.client
import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.errors import APIError, NotFoundError

from ...bus import stream_reader
from ...bus.permissions import NotAllowed
from ...bus.tasks import heeding
from ...schemas import codec, subjects
from ...schemas.work.jobs import FINAL, JobListing, JobState, JobTask, TaskPart
from ...schemas.work.runs import LOG_CHUNK_BYTES, LOG_HEAD_CHUNKS, LOG_TAIL_CHUNKS, LogChunk
from ..errors import NotFound, Refused, Unavailable
from .names import Selection

log = logging.getLogger("corral.client")

_FIRST_POLL_SECONDS: Final = 0.1
_POLL_SECONDS: Final = 1.0
_AT_ONCE: Final = 64
"""Pieces that are asked for at a time."""
_LAST_TRIES: Final = 15
_LAST_TRY_SECONDS: Final = 0.2
"""Time between the tries to get the last pieces of a run that has ended."""
_PIECES: Final = (
    *(f"h{number}" for number in range(LOG_HEAD_CHUNKS)),
    *(f"t{number}" for number in range(LOG_TAIL_CHUNKS)),
)
_JUST_NOW_SECONDS: Final = 30.0
"""Time after the end of a run in which its last pieces are waited for; clocks of hosts may differ by as much."""
_REPORTED: Final = FINAL - {JobState.LOST}
"""States of parts whose runner has said how they ended."""
_NEW: Final = "n0"
"""What was printed last, which is in no other piece yet."""
_HELD_SECONDS: Final = 16.0
"""Time for which a piece is held while others before it are missing. A runner publishes a piece that grows again within
15 s, and only what is new of it meanwhile."""
_HOST_TOKEN: Final = len(subjects.LOGS.split("."))
_INDEX_TOKEN: Final = _HOST_TOKEN + 2

Ask = Callable[[], Awaitable[JobListing]]


class LogPiece(Struct, frozen=True):
    """Something that a run has printed.

    Attributes:
        index: of its task; 0 without an array.
        host: that it runs on.
        rank: of the host among those of the task.
        attempt: of the task, from 1.
        offset: of the first byte in the output.
        data: bytes, as they were printed: a line may be cut.
        missed: bytes before these that the bus has not kept; they are in `file` alone.
        file: of the whole output, on the host; empty if unknown.
    """

    index: int
    host: str
    rank: int
    attempt: int
    offset: int
    data: bytes
    missed: int = 0
    file: str = ""


class Output:
    """The output of a task on one host, from pieces that come in any order, and more than once.

    Args:
        index: of the task.
        part: what runs there, as it was listed last.
        listed: number of the attempt whose stored pieces are read, as it was listed or heard of last.

    Attributes:
        position: offset of the next byte.
        ended: true once the last piece was seen.
    """

    def __init__(self, index: int, part: TaskPart, listed: int = 1) -> None:
        self.index = index
        self.part = part
        self.listed = max(1, listed)
        self.attempt = 0
        self.position = 0
        self.ended = False
        self._held: list[LogChunk] = []
        self._held_since = 0.0

    def follows(self, chunk: LogChunk) -> bool:
        """True if nothing is missing before this piece."""
        return attempt_of(chunk) == max(self.attempt, 1) and chunk.offset <= self.position

    def take(self, chunk: LogChunk) -> LogPiece | None:
        """Return what is new in a piece; None if nothing is."""
        attempt = attempt_of(chunk)
        if attempt < self.attempt:
            return None
        if attempt > self.attempt:
            self.attempt, self.position, self.ended, self._held = attempt, 0, False, []
        self.ended = self.ended or chunk.ended
        known = max(0, self.position - chunk.offset)
        data = chunk.data[known:]
        missed = max(0, chunk.offset - self.position)
        if not data:
            return None
        self.position = chunk.offset + known + len(data)
        return LogPiece(
            index=self.index,
            host=self.part.host,
            rank=self.part.rank,
            attempt=attempt,
            offset=chunk.offset + known,
            data=data,
            missed=missed,
            file=self.part.log_file,
        )

    def hold(self, chunk: LogChunk, now: float) -> bool:
        """Keep a live piece for later if what is missing before it will be published again soon.

        Args:
            chunk: the piece.
            now: time of a monotonic clock, in seconds.

        Returns:
            True if it is kept.
        """
        same = chunk.offset // LOG_CHUNK_BYTES == self.position // LOG_CHUNK_BYTES
        if self.follows(chunk) or chunk.ended or not same or attempt_of(chunk) != max(self.attempt, 1):
            return False
        if not self._held:
            self._held_since = now
        self._held.append(chunk)
        return True

    def take_held(self, now: float) -> Iterator[LogPiece]:
        """Return what is new in kept pieces: those that follow now, and all once they have been kept for 16 s."""
        held, self._held = self._held, []
        late = bool(held) and now - self._held_since >= _HELD_SECONDS
        for chunk in held:
            if not late and attempt_of(chunk) == self.attempt and not self.follows(chunk):
                self._held.append(chunk)
            elif (piece := self.take(chunk)) is not None:
                yield piece

    @property
    def waits(self) -> bool:
        """True if pieces are kept until others before them come."""
        return bool(self._held)

    def take_all(self, chunks: Iterable[LogChunk]) -> Iterator[LogPiece]:
        """Return what is new in stored pieces: of the newest attempt among them, in the order of the output."""
        known = list(chunks)
        newest = max((attempt_of(chunk) for chunk in known), default=0)
        for chunk in sorted(known, key=lambda chunk: chunk.offset):
            if attempt_of(chunk) == newest and (piece := self.take(chunk)) is not None:
                yield piece

    def take_last(self, chunk: LogChunk | None) -> Iterator[LogPiece]:
        """Return what is new in the piece that was printed last, if nothing is missing before it."""
        if chunk is not None and self.follows(chunk) and (piece := self.take(chunk)) is not None:
            yield piece


def attempt_of(chunk: LogChunk) -> int:
    """Number of the attempt that printed a piece, from its run id; 1 if that has none."""
    _, _, number = chunk.run_id.rpartition(".")
    return int(number) if number.isdecimal() else 1


async def stored_logs(
    nc: nats.aio.client.Client, ask: Ask, host: str | None = None, attempt: int | None = None
) -> AsyncIterator[LogPiece]:
    """Iterate over the output of tasks that the bus has kept, one after the other.

    Args:
        nc: connection; it needs direct access to the owner's pieces in `CORRAL_LOGS`.
        ask: lists the job with these tasks.
        host: only of this host.
        attempt: number of the attempt, from 1; None for the last of each task.

    Raises:
        Refused: the connection may not read them.
        NotFound: the bus keeps no output.
    """
    listing = await ask()
    if attempt is not None:
        for output in await _outputs_of_attempt(nc, listing, host, attempt):
            for piece in await _new_of(nc, listing, output):
                yield piece
        return
    for output in _outputs(listing.tasks, host):
        for piece in await _new_of(nc, listing, output):
            yield piece
        if output.part.state in _REPORTED and _ended_just_now(output.part):
            async for piece in _rest(nc, listing, output):
                yield piece


async def follow_logs(
    nc: nats.aio.client.Client, ask: Ask, chosen: Selection, host: str | None = None
) -> AsyncIterator[LogPiece]:
    """Iterate over the output of tasks that the bus has kept, and then over what they print, until all have ended.

    A piece that the subscription loses is fetched from the stream, within two seconds. Outages of the bus are waited
    for.

    Args:
        nc: connection; as for `stored_logs`.
        ask: lists the job with the tasks.
        chosen: the job, and the tasks.
        host: only of this host.

    Raises:
        Refused: the connection may not read them.
        NotFound: the bus keeps no output.
    """
    listing = await ask()
    known: dict[tuple[int, str], Output] = {}
    everything = subjects.log_subject("*", chosen.job_id, -1, "*", listing.job.owner).replace(".-1.", ".*.")
    subscription = await nc.subscribe(everything, pending_bytes_limit=-1, pending_msgs_limit=-1)
    try:
        fresh: set[tuple[int, str]] = set()
        pause = _FIRST_POLL_SECONDS
        while True:
            for output in _outputs(listing.tasks, host):
                key = (output.index, subjects.host_token(output.part.host))
                current = known.setdefault(key, output)
                current.part, current.listed = output.part, max(current.listed, output.listed)
                behind = current.waits or (current.position < output.part.log_bytes and key not in fresh)
                if current is output or behind:
                    with contextlib.suppress(*([] if current is output else [Unavailable])):
                        for piece in await _new_of(nc, listing, current):
                            yield piece
                    for piece in current.take_held(asyncio.get_running_loop().time()):
                        yield piece
            if all(task.state in FINAL for task in listing.tasks):
                break
            fresh.clear()
            # Its state follows soon where all output has come to its end.
            soon = bool(known) and all(output.ended for output in known.values())
            end = asyncio.get_running_loop().time() + (_LAST_TRY_SECONDS if soon else pause)
            pause = min(1.5 * pause, _POLL_SECONDS)
            while (message := await _next(subscription, end)) is not None:
                found = _live(message, known)
                if found is None:
                    continue
                key, chunk = found
                current = known[key]
                current.listed = max(current.listed, attempt_of(chunk))
                fresh.add(key)
                if not current.follows(chunk):
                    with contextlib.suppress(Unavailable):
                        for piece in await _new_of(nc, listing, current):
                            yield piece
                if not current.hold(chunk, asyncio.get_running_loop().time()):
                    for piece in current.take_held(asyncio.get_running_loop().time()):
                        yield piece
                    if (piece := current.take(chunk)) is not None:
                        yield piece
                if chunk.ended:
                    end = min(end, asyncio.get_running_loop().time() + _LAST_TRY_SECONDS)
            listing = await ask()
        for output in known.values():
            async for piece in _rest(nc, listing, output):
                yield piece
    finally:
        with contextlib.suppress(nats.errors.Error):  # the connection may be closed already
            await subscription.unsubscribe()


async def _rest(nc: nats.aio.client.Client, listing: JobListing, output: Output) -> AsyncIterator[LogPiece]:
    """The last pieces of a run that has ended: its runner may publish them after its last report."""
    for attempt in range(_LAST_TRIES):
        if output.ended or output.part.started_at is None or (attempt and not _ended_just_now(output.part)):
            return
        for piece in await _new_of(nc, listing, output):
            yield piece
        await asyncio.sleep(_LAST_TRY_SECONDS)


def _ended_just_now(part: TaskPart) -> bool:
    ended_at = part.ended_at or datetime.now(UTC)
    return abs((datetime.now(UTC) - ended_at).total_seconds()) < _JUST_NOW_SECONDS


def _outputs(tasks: Iterable[JobTask], host: str | None) -> Iterator[Output]:
    for task in tasks:
        for part in task.parts:
            if host in (None, part.host):
                yield Output(task.index, part, task.attempt)


async def _outputs_of_attempt(
    nc: nats.aio.client.Client, listing: JobListing, host: str | None, attempt: int
) -> list[Output]:
    """Outputs of an attempt, by the subjects that the stream has: a listing knows the hosts of the last attempt alone.

    Raises:
        NotFound: there is no stream, or it has nothing of that attempt.
        Unavailable: the bus does not answer.
    """
    job = listing.job
    subject = subjects.log_subject("*", job.job_id, -1, "h0", job.owner, attempt=attempt).replace(".-1.", ".*.")
    try:
        info = await nc.jetstream().stream_info(subjects.LOGS_STREAM, subjects_filter=subject)
    except NotFoundError:
        raise NotFound(
            f"this bus keeps no output of jobs: there is no stream {subjects.LOGS_STREAM}", "not_found"
        ) from None
    except (nats.errors.Error, APIError, OSError) as error:
        raise Unavailable(f"what job {job.job_id} has printed can't be read: {type(error).__name__} {error}") from error
    tasks = {task.index for task in listing.tasks}
    found: list[Output] = []
    for name in sorted(info.state.subjects or {}):
        tokens = name.split(".")
        token, index = tokens[_HOST_TOKEN], int(tokens[_INDEX_TOKEN])
        if index in tasks and (host is None or subjects.host_token(host) == token):
            found.append(Output(index, TaskPart(host=token), attempt))
    if not found:
        most = max((task.attempt for task in listing.tasks), default=0)
        raise NotFound(
            f"the bus keeps no output of attempt {attempt} of job {job.job_id}: it has had {most} so far", "not_found"
        )
    return sorted(found, key=lambda output: output.index)


def _live(message: Msg, known: dict[tuple[int, str], Output]) -> tuple[tuple[int, str], LogChunk] | None:
    """A piece of a known output; None for any other message."""
    tokens = message.subject.split(".")
    key = (int(tokens[_INDEX_TOKEN]) if tokens[_INDEX_TOKEN].isdecimal() else -1, tokens[_HOST_TOKEN])
    chunk = _decoded(message.data) if key in known else None
    return None if chunk is None else (key, chunk)


async def _next(subscription: Subscription, end: float) -> Msg | None:
    """The next message; None if none came by then."""
    left = end - asyncio.get_running_loop().time()
    if left <= 0:
        return None
    try:
        return await heeding(subscription.next_msg(timeout=left))
    except nats.errors.TimeoutError:
        return None
    except nats.errors.Error:  # the subscription is refused or closed: what is stored is read all the same
        await asyncio.sleep(max(0.0, end - asyncio.get_running_loop().time()))
        return None


async def _new_of(nc: nats.aio.client.Client, listing: JobListing, output: Output) -> list[LogPiece]:
    """Stored pieces of an output that were not taken yet."""
    chunks, last = await _stored(nc, listing, output)
    return [*output.take_all(chunks), *output.take_last(last)]


async def _stored(
    nc: nats.aio.client.Client, listing: JobListing, output: Output
) -> tuple[list[LogChunk], LogChunk | None]:
    """Pieces of begin and end, and the one that was printed last.

    Raises:
        Refused: the connection may not read them.
        NotFound: there is no stream.
        Unavailable: the bus does not answer.
    """
    job = listing.job
    host = subjects.host_token(output.part.host)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def piece(name: str) -> LogChunk | None:
        chunk = await stored(name, output.listed)
        # Runners of earlier versions publish each attempt where they publish the first.
        return await stored(name, 1) if chunk is None and output.listed > 1 else chunk

    async def stored(name: str, attempt: int) -> LogChunk | None:
        subject = subjects.log_subject(host, job.job_id, output.index, name, job.owner, attempt=attempt)
        async with gate:
            found = await stream_reader.last(nc, subjects.LOGS_STREAM, subject)
        chunk = None if found is None else _decoded(found.data)
        return chunk if chunk is not None and attempt_of(chunk) == output.listed else None

    try:
        *chunks, last = await asyncio.gather(*map(piece, (*_PIECES, _NEW)))
        return [chunk for chunk in chunks if chunk is not None], last
    except NotAllowed as error:
        raise Refused(f"what job {job.job_id} prints is for its owner, {job.owner}: {error}", "refused") from None
    except NotFoundError:
        raise NotFound(
            f"this bus keeps no output of jobs: there is no stream {subjects.LOGS_STREAM}", "not_found"
        ) from None
    except (nats.errors.Error, APIError, OSError) as error:
        raise Unavailable(f"what job {job.job_id} has printed can't be read: {type(error).__name__} {error}") from error


def _decoded(data: bytes) -> LogChunk | None:
    try:
        return codec.decode(data, LogChunk, codec.JSON if data[:1] == b"{" else codec.MSGPACK)
    except codec.DecodeError as error:
        log.debug("a piece of output: %s", error)
        return None
