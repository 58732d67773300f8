"""A request that waits in the planner's queue: sent again when its answer or its place in the queue may be lost."""

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

from ..bus.tasks import cancellations, heed_cancellation, heeding
from ..schemas import codec, operations, requests, subjects
from ..schemas.instruments import ServiceKind
from .errors import CorralError, NoService, ServiceError, TimedOut, TooManyRequests, error_of
from .rpc import RETRY_SECONDS, Waiting, no_service, raise_error

FIRST_CHECK_SECONDS: Final = 1.0
_LEADER_SECONDS: Final = 5.0
"""Interval of checks for a new leader: it grants a request that waits only once it has heard its client."""
_PING_SECONDS: Final = 0.5
_QUEUE_SECONDS: Final = 10.0
"""Interval of reading the queue without `on_wait`; with `on_wait` it is read every second while it is short."""
_SECONDS_AN_ENTRY: Final = 0.06
"""Minimum interval per request in the queue, so that a long queue costs the bus no more than a short one."""
_QUEUE_MAX_SECONDS: Final = 60.0
_QUEUE_REFUSED_SECONDS: Final = 300.0
"""Interval if the planner refuses to list the queue (because it doesn't fit in a message, for example)."""
RESEND_SECONDS: Final = 10.0
"""Interval in which a waiting request is sent again: the planner drops requests that it hasn't seen for 30 s."""
_LARGE_BYTES: Final = 48 * 1024
"""Requests above this size are sent again half as often, since the planner takes long to decode them. The planner asks
for the request if that is too seldom."""
_ABSENCE_SECONDS: Final = 2.0
"""A "no planner" answer that comes this long after the last one starts a new absence, with its full patience."""


class _Ping(Struct, frozen=True):
    """Reply of a service to `$SRV.PING`; the planner's id changes with each term as leader."""

    id: str
    metadata: dict[str, str] = {}


_Reply = requests.Assignment | requests.Rejection | requests.Error | operations.Queue


class QueuedRequest:
    """One request that waits in the queue.

    Args:
        nc: the connection.
        subject: subject that the request is sent on.
        request: the request, with its id. It is always sent with the same body, since a different body under the same
            id would be a different request. A caller that gives up must withdraw it.
        queue: reads the request's entry in the queue.
        timeout: seconds to wait for an answer beyond the request's wait.
        patience: seconds to keep retrying while there is no planner.
        on_wait: called with the request's queue entry.
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
        self._patience = max(patience, FIRST_CHECK_SECONDS)
        self._on_wait = on_wait
        self._payload = codec.encode(request, codec.JSON)
        self._inbox = nc.new_inbox()
        self._loop = asyncio.get_running_loop()
        self._resend_seconds = RESEND_SECONDS * (1 if len(self._payload) <= _LARGE_BYTES else 2)
        self._resend_due = self._loop.time() + self._resend_seconds * random.uniform(0.8, 1.2)
        self._leader: str | None = None
        self._leader_due = self._queue_due = self._loop.time() + FIRST_CHECK_SECONDS
        self._reconnects = nc.stats["reconnects"]
        self._unseen = 0
        self._absent_since = self._absent_at = -math.inf

    async def answer(self) -> requests.Assignment | requests.Rejection:
        """Send the request, and wait for the answer.

        Raises:
            TimedOut: no answer came within the request's wait and the timeout.
            ServiceError: the planner refused the request.
            NoService: no planner was running for longer than `patience`.
            nats.errors.Error: the connection is lost.
        """
        give_up = self._give_up = self._loop.time() + self._answer_seconds
        before = cancellations()
        answers = await self._nc.subscribe(self._inbox)
        try:
            await self._send()
            while (now := self._loop.time()) < give_up:
                heed_cancellation(before)
                reply = await _next(answers, min(self._leader_due, self._queue_due, self._resend_due, give_up) - now)
                if reply is None:
                    await self._run_due_checks()
                elif (answer := await self._read(reply)) is not None:
                    return answer
        finally:
            with contextlib.suppress(nats.errors.Error):
                await answers.unsubscribe()
        raise TimedOut(f"no answer on {self._subject} within {self._answer_seconds:g} s")

    async def _send(self) -> None:
        self._resend_due = self._loop.time() + self._resend_seconds * random.uniform(0.8, 1.2)
        headers = {codec.CONTENT_TYPE_HEADER: codec.JSON, codec.LINE_HEADER: self._inbox}
        await self._nc.publish(self._subject, self._payload, reply=self._inbox, headers=headers)

    async def _read(self, reply: Msg) -> requests.Assignment | requests.Rejection | None:
        """The answer in a reply; None if it isn't final. The request is then sent again where necessary."""
        try:
            if (reply.headers or {}).get("Status") == "503" and not reply.data:
                raise no_service(self._subject)
            raise_error(reply, self._subject)
        except NoService:  # the planner is stopping or has stopped, or has not heard this client for long
            now = self._loop.time()
            if now - self._absent_at > _ABSENCE_SECONDS:
                self._absent_since = now
            self._absent_at = now
            if now - self._absent_since > self._patience:
                raise
            await self._send_after(RETRY_SECONDS)
            return None
        except TooManyRequests as refused:  # a retry is fine as long as it is within the request's wait
            after = refused.retry_after_seconds
            if after is None or self._loop.time() + after > self._give_up:
                raise
            await self._send_after(after)
            return None
        answer = codec.decode(reply.data, _Reply, codec.JSON)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
        if isinstance(answer, operations.Queue):  # closes an earlier send that a later one has replaced
            return None
        if isinstance(answer, requests.Error):
            raise error_of(answer, ServiceKind.PLANNER)
        return answer  # pyright: ignore[reportReturnType]

    async def _send_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._send()

    async def _run_due_checks(self) -> None:
        """Run the checks that are due: send the request again, check the leader, read the queue."""
        now = self._loop.time()
        if now >= self._resend_due:
            await self._send()
        if now >= self._leader_due:
            self._leader_due = now + _LEADER_SECONDS * random.uniform(0.8, 1.2)
            await self._check_leader()
        if now >= self._queue_due:
            self._queue_due = self._loop.time() + await self._check_queue()

    async def _check_leader(self) -> None:
        leader = await self._leader_id()
        reconnects = self._nc.stats["reconnects"]
        # After a reconnection an answer may be lost, and a new leader waits to hear from its clients.
        if reconnects != self._reconnects or (leader and self._leader and leader != self._leader):
            await self._send()
        self._reconnects, self._leader = reconnects, leader or self._leader

    async def _leader_id(self) -> str | None:
        """Id of the leading planner's term; None if no planner reports that it leads."""
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

    async def _check_queue(self) -> float:
        """Read the queue and report the request's place in it; send the request again if it isn't in the queue.

        Returns:
            Seconds until the queue should be read again.
        """
        try:
            queue = await self._queue()
        except ServiceError:
            await self._send()  # it is unknown whether the request is in the queue; after this it is
            return _QUEUE_REFUSED_SECONDS
        except (CorralError, codec.DecodeError):  # the planner may be restarting: send again once it answers
            self._unseen = 1
            return FIRST_CHECK_SECONDS
        own = self._request.owner, self._request.request_id
        entry = next((e for e in queue.entries if (e.owner, e.request_id) == own), None)
        if entry is None:
            self._unseen += 1
            if self._unseen > 1:  # the first time, the answer may still be in transit
                self._unseen = 0
                await self._send()
            return FIRST_CHECK_SECONDS
        self._unseen = 0
        if self._on_wait is not None:
            self._on_wait(entry)
        shortest = FIRST_CHECK_SECONDS if self._on_wait is not None else _QUEUE_SECONDS
        behind = max(len(queue.entries), entry.position)  # a planner of an earlier version lists all
        return max(shortest, min(_SECONDS_AN_ENTRY * behind, _QUEUE_MAX_SECONDS))


async def _next(answers: Subscription, seconds: float) -> Msg | None:
    """The next message; None if none arrives within `seconds`."""
    try:
        return await heeding(answers.next_msg(timeout=max(0.001, seconds)))
    except nats.errors.TimeoutError:
        return None
