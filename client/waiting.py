"""A request that stays in line until it is answered: asked again where its answer may be lost, or nobody knows it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Awaitable, Callable
from typing import Final

import nats.errors
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..schemas import codec, operations, requests, subjects
from .errors import CorralError, NoService, ServiceError, TimedOut, TooManyRequests, error_of
from .rpc import RETRY_SECONDS, Waiting, no_service, raise_error

FIRST_LOOK_SECONDS: Final = 1.0
_LEADER_SECONDS: Final = 5.0
"""So often it is looked who leads: the queue is that planner's alone, and ends with its term."""
_PING_SECONDS: Final = 0.5
_QUEUE_SECONDS: Final = 10.0
"""So often the queue is read where nobody wants to know the place in it; else each second, if it is short."""
_SECONDS_AN_ENTRY: Final = 0.06
"""Who is far behind in a long queue reads its place less often: all of them cost the bus as much as a few in front."""
_QUEUE_MOST_SECONDS: Final = 60.0
_QUEUE_REFUSED_SECONDS: Final = 300.0
"""Where the queue can't be read (it does not fit in a message, say)."""
ASK_AGAIN_SECONDS: Final = 10.0
"""Who is not heard for 30 s is out of line: whoever waits asks again, so often."""
_LARGE_BYTES: Final = 48 * 1024
"""What takes the planner long to read is said half as often; the planner asks for it where that is too seldom."""
_ABSENCE_SECONDS: Final = 2.0
"""Where nobody was there, and again so long after, it is for another time."""


class _Ping(Struct, frozen=True):
    """What a service says to `$SRV.PING`; its id is another one in each term."""

    id: str
    metadata: dict[str, str] = {}


_Reply = requests.Assignment | requests.Rejection | requests.Error | operations.Queue


class Line:
    """One request in line.

    Args:
        nc: the connection.
        subject: of the request.
        request: with its id. It is always sent alike, since another body under the id would be another request: a
            planner that takes over counts its wait from then on, so that whoever gives up withdraws it.
        queue: reads the queue.
        timeout: seconds to wait for an answer beyond the request's own wait.
        patience: seconds to wait for a planner that is not there.
        on_wait: told where it stands.
    """

    def __init__(
        self,
        nc: Client,
        subject: str,
        request: requests.WorkRequest,
        queue: Callable[[], Awaitable[operations.Queue]],
        *,
        timeout: float,
        patience: float,
        on_wait: Waiting | None,
    ) -> None:
        self._nc = nc
        self._subject = subject
        self._request = request
        self._queue = queue
        self._answer_seconds = request.wait_seconds + timeout
        self._give_up = math.inf
        self._patience = max(patience, FIRST_LOOK_SECONDS)
        self._on_wait = on_wait
        self._payload = codec.encode(request, codec.JSON)
        self._inbox = nc.new_inbox()
        self._loop = asyncio.get_running_loop()
        self._again_seconds = ASK_AGAIN_SECONDS * (1 if len(self._payload) <= _LARGE_BYTES else 2)
        self._again_due = self._loop.time() + self._again_seconds * random.uniform(0.8, 1.2)
        self._leader: str | None = None
        self._leader_due = self._queue_due = self._loop.time() + FIRST_LOOK_SECONDS
        self._reconnects = nc.stats["reconnects"]
        self._unseen = 0
        self._absent_since = self._absent_at = -math.inf

    async def answer(self) -> requests.Assignment | requests.Rejection:
        """Ask, and wait for the answer.

        Raises:
            TimedOut: none came within the request's wait.
            ServiceError: it was refused.
            NoService: nobody is there to answer.
            nats.errors.Error: the connection is lost.
        """
        give_up = self._give_up = self._loop.time() + self._answer_seconds
        answers = await self._nc.subscribe(self._inbox)
        try:
            await self._ask()
            while (now := self._loop.time()) < give_up:
                reply = await _next(answers, min(self._leader_due, self._queue_due, self._again_due, give_up) - now)
                if reply is None:
                    await self._look()
                elif (answer := await self._read(reply)) is not None:
                    return answer
        finally:
            with contextlib.suppress(nats.errors.Error):
                await answers.unsubscribe()
        raise TimedOut(f"no answer on {self._subject} within {self._answer_seconds:g} s")

    async def _ask(self) -> None:
        self._again_due = self._loop.time() + self._again_seconds * random.uniform(0.8, 1.2)
        headers = {codec.CONTENT_TYPE_HEADER: codec.JSON, codec.LINE_HEADER: self._inbox}
        await self._nc.publish(self._subject, self._payload, reply=self._inbox, headers=headers)

    async def _read(self, reply: Msg) -> requests.Assignment | requests.Rejection | None:
        """The answer; None where there is none yet, and it was asked again."""
        try:
            if (reply.headers or {}).get("Status") == "503" and not reply.data:
                raise no_service(self._subject)
            raise_error(reply)
        except NoService:  # the planner stops, or has stopped: the next one does not know who waits
            now = self._loop.time()
            if now - self._absent_at > _ABSENCE_SECONDS:
                self._absent_since = now
            self._absent_at = now
            if now - self._absent_since > self._patience:
                raise
            await self._ask_after(RETRY_SECONDS)
            return None
        except TooManyRequests as refused:  # who waits for hours has time for this, too
            after = refused.retry_after_seconds
            if after is None or self._loop.time() + after > self._give_up:
                raise
            await self._ask_after(after)
            return None
        answer = codec.decode(reply.data, _Reply, codec.JSON)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
        if isinstance(answer, operations.Queue):  # an earlier asking has done its work
            return None
        if isinstance(answer, requests.Error):
            raise error_of(answer)
        return answer  # pyright: ignore[reportReturnType]

    async def _ask_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._ask()

    async def _look(self) -> None:
        """See whether there is still a planner that knows of the request, and where it stands."""
        now = self._loop.time()
        if now >= self._again_due:
            await self._ask()
        if now >= self._leader_due:
            self._leader_due = now + _LEADER_SECONDS * random.uniform(0.8, 1.2)
            await self._look_who_leads()
        if now >= self._queue_due:
            self._queue_due = self._loop.time() + await self._look_at_the_queue()

    async def _look_who_leads(self) -> None:
        leader = await self._who_leads()
        reconnects = self._nc.stats["reconnects"]
        # With the connection an answer may have been lost, with the leader its queue.
        if reconnects != self._reconnects or (leader and self._leader and leader != self._leader):
            await self._ask()
        self._reconnects, self._leader = reconnects, leader or self._leader

    async def _who_leads(self) -> str | None:
        """Names the term of the planner that leads; None where none says that it does."""
        inbox = self._nc.new_inbox()
        answers = await self._nc.subscribe(inbox)
        try:
            await self._nc.publish(f"$SRV.PING.{subjects.PLANNER_SERVICE}", b"", reply=inbox)
            end = self._loop.time() + _PING_SECONDS
            while reply := await _next(answers, end - self._loop.time()):
                with contextlib.suppress(codec.DecodeError):
                    ping = codec.decode(reply.data, _Ping, codec.JSON)
                    if ping.metadata.get("role") == "leader":
                        return ping.id
            return None
        finally:
            with contextlib.suppress(nats.errors.Error):
                await answers.unsubscribe()

    async def _look_at_the_queue(self) -> float:
        """Tell where the request stands, or ask again where it is not in line. Returns seconds until the next look."""
        try:
            queue = await self._queue()
        except ServiceError:
            await self._ask()  # it may be in line or not: asked again it is
            return _QUEUE_REFUSED_SECONDS
        except (CorralError, codec.DecodeError):  # the planner restarts: it is asked again once it is back
            self._unseen = 1
            return FIRST_LOOK_SECONDS
        own = self._request.owner, self._request.request_id
        entry = next((e for e in queue.entries if (e.owner, e.request_id) == own), None)
        if entry is None:
            self._unseen += 1
            if self._unseen > 1:  # once, its answer may just be on its way
                self._unseen = 0
                await self._ask()
            return FIRST_LOOK_SECONDS
        self._unseen = 0
        if self._on_wait is not None:
            self._on_wait(entry)
        shortest = FIRST_LOOK_SECONDS if self._on_wait is not None else _QUEUE_SECONDS
        behind = max(len(queue.entries), entry.position)  # a planner of an earlier version lists all
        return max(shortest, min(_SECONDS_AN_ENTRY * behind, _QUEUE_MOST_SECONDS))


async def _next(answers: Subscription, seconds: float) -> Msg | None:
    """The next message; None if there is none in time."""
    try:
        return await answers.next_msg(timeout=max(0.001, seconds))
    except nats.errors.TimeoutError:
        return None
