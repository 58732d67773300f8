"""Work requests that may wait: the answer waits with them, or says after a while where they stand, or is a stream.

As on the bus, a request that is sent again under its `request_id` keeps its place in the queue. Who goes away in the
meantime without an id of its own can't ask for its answer any more, so that the request is withdrawn; with one it is
left to the planner, which takes it out of the queue after 30 seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, cast

import nats.errors

from ..bus.permissions import NotAllowed, refusals
from ..bus.tasks import cancel_all
from ..client.errors import CorralError, TimedOut, Unavailable
from ..client.waiting import QueuedRequest
from ..schemas import codec
from ..schemas.operations import Queue, QueueEntry, QueueFilter
from ..schemas.requests import Assignment, LeaseState, Rejection, WithdrawAction, WorkRequest
from ..schemas.subjects import PlanSubject
from .answers import REJECTED, Answer, message_answer
from .callers import Caller
from .calls import Passing, subject_of
from .routes import Route

PREFER_HEADER: Final = "Prefer"
_WAIT: Final = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?(?=$|[,;\s])", re.IGNORECASE)
_WITHDRAW_SECONDS: Final = 3.0
_ASK_AGAIN_SECONDS: Final = 1
_QUEUE_SECONDS: Final = 2.0
_REPEAT_SECONDS: Final = 10.0
"""Time after which a place in the queue that has not changed is told again, since its forecast may have."""

Outcome = Assignment | Rejection


def wait_seconds(prefer: str | None) -> float | None:
    """Seconds of `Prefer: wait=N` (RFC 7240): after these the answer says where the request stands. None if not given.

    Args:
        prefer: the header.
    """
    found = _WAIT.search(prefer or "")
    return None if found is None else float(found[1])


class _Line(QueuedRequest):
    """A request that is sent with a body of the client's, which may have fields that this version does not know."""

    def __init__(self, body: bytes, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._payload = body


class WaitingRequest:
    """A work request on its way.

    Args:
        caller: whose it is.
        request: with an id.
        body: the same, as it is sent.
        named: true if the id is the client's own.
        subject: that it is sent on.

    Attributes:
        entry: its place in the queue, as seen last; None before.
    """

    def __init__(self, caller: Caller, request: WorkRequest, body: bytes, *, named: bool, subject: str) -> None:
        self.entry: QueueEntry | None = None
        self._seen: Callable[[], None] = _nothing
        self._caller = caller
        self._request = request
        self._named = named
        self._left = False
        self._subject = subject
        self._calls = Passing(caller)
        self._own = QueueFilter(owner=request.owner, request_id=request.request_id)
        self._line = _Line(
            body,
            caller.nc,
            subject,
            request,
            self._queue,
            timeout=self._calls.timeout,
            patience=self._calls.patience,
            on_wait=self._on_wait,
        )

    @property
    def may_wait(self) -> bool:
        """True if it waits in the queue where nothing fits now."""
        return self._request.wait_seconds > 0

    async def outcome(self) -> Outcome:
        """Wait for the answer. Whoever goes away before it comes leaves no lease behind, unless the id is its own.

        Raises:
            CorralError: the request failed.
        """
        try:
            return await self._answer()
        except nats.errors.Error as error:
            if not isinstance(error, NotAllowed):
                await self.leave()
            raise self._calls._bus_error(error, self._subject) from error  # pyright: ignore[reportPrivateUsage]
        except (asyncio.CancelledError, TimedOut, Unavailable, codec.DecodeError):
            await self.leave()
            raise

    async def _answer(self) -> Outcome:
        answering = asyncio.ensure_future(self._line.answer())
        # The server sends no reply where it does not let a caller ask under this name.
        with refusals(self._caller.nc, self._subject) as refused:
            try:
                await asyncio.wait({answering, refused}, return_when=asyncio.FIRST_COMPLETED)
                if refused.cancelled() and not answering.done():
                    raise NotAllowed(self._subject, self._caller.identity)
                return await answering
            finally:
                await cancel_all([answering])

    async def outcome_within(self, seconds: float) -> Outcome | Queue:
        """Wait for the answer, or for its place in the queue after some seconds. The request then stays in the queue.

        Raises:
            CorralError: the request failed.
        """
        answering = asyncio.ensure_future(self.outcome())
        try:
            await asyncio.wait({answering}, timeout=seconds)
            if answering.done():
                return answering.result()
            if self.entry is None:
                with contextlib.suppress(CorralError, codec.DecodeError, TimeoutError):
                    async with asyncio.timeout(_QUEUE_SECONDS):
                        self.entry = next(iter((await self._queue()).entries), None)
            self._named = True  # its id is in the answer
            own = QueueEntry(
                request_id=self._request.request_id or "",
                owner=self._request.owner,
                position=0,
                waiting_seconds=0.0,
                message="It is not in the queue yet",
                gpus=self._request.gpus,
            )
            return Queue(entries=[self.entry or own], total=1)
        except asyncio.CancelledError:
            await self._untold(answering)
            raise
        finally:
            await cancel_all([answering])

    async def events(self) -> AsyncGenerator[QueueEntry | Outcome]:
        """Places in the queue as they change, and the answer at last.

        Raises:
            CorralError: the request failed.
        """
        changed = asyncio.Event()
        self._seen = changed.set
        answering = asyncio.ensure_future(self.outcome())
        answering.add_done_callback(lambda _: changed.set())
        loop = asyncio.get_running_loop()
        told: tuple[int, str] | None = None
        told_at = 0.0
        told_all = False
        try:
            while True:
                await changed.wait()
                changed.clear()
                if answering.done():
                    break
                entry = self.entry
                if entry is None or (told == _place(entry) and loop.time() - told_at < _REPEAT_SECONDS):
                    continue
                told, told_at = _place(entry), loop.time()
                yield entry
            told_all = True
            yield answering.result()
        finally:
            if not told_all:
                await self._untold(answering)
            await cancel_all([answering])

    async def _untold(self, answering: asyncio.Future[Outcome]) -> None:
        """Give back a lease that was granted at the moment at which its client went away."""
        await cancel_all([answering])
        if not answering.cancelled() and answering.exception() is None:
            await self.leave()

    async def leave(self) -> None:
        """Withdraw the request, and release its lease if it was granted meanwhile. Errors are ignored.

        Nothing is done where the id is the client's own, so that it can ask again.
        """
        if not self._named and not self._left:
            self._left = True
            await asyncio.shield(self._withdraw())

    async def _withdraw(self) -> None:
        owner = self._request.owner
        action = WithdrawAction(request_id=self._request.request_id or "", owner=owner)
        with contextlib.suppress(CorralError, codec.DecodeError, TimeoutError, nats.errors.Error, OSError):
            async with asyncio.timeout(_WITHDRAW_SECONDS):
                reply = await self._calls.reply(f"{PlanSubject.WITHDRAW}.{owner}", codec.encode(action, codec.JSON))
                expected: Any = Assignment | Rejection
                answer: Outcome = codec.decode(reply.data, expected, codec.JSON)
                if isinstance(answer, Assignment) and answer.lease.state is LeaseState.ACTIVE:
                    await self._caller.client.release(answer.lease.lease_id, owner=owner)

    async def _queue(self) -> Queue:
        reply = await self._calls.reply(PlanSubject.QUEUE, codec.encode(self._own, codec.JSON))
        return codec.decode(reply.data, Queue, codec.JSON)

    def _on_wait(self, entry: QueueEntry) -> None:
        self.entry = entry
        self._seen()


def _place(entry: QueueEntry) -> tuple[int, str]:
    return entry.position, entry.message


def _nothing() -> None:
    """No one follows the places."""


def waiting_request(caller: Caller, route: Route, body: bytes) -> WaitingRequest | None:
    """The request of a body; None for one that is wrong, which the planner says in its own words.

    Raises:
        Failed, DecodeError: the body is no JSON object, or does not name the owner whom it is for.
    """
    subject = subject_of(route, caller, body)
    owner = subject.removeprefix(f"{PlanSubject.REQUEST}.")
    codec.refuse_empty(body)
    tree: dict[str, Any] = codec.decode(body, cast("type[Any]", dict[str, Any]), codec.JSON)
    tree.setdefault("owner", owner)
    named = tree.get("request_id") is not None
    if not named:
        # So that it may be sent again without a second grant, and be withdrawn.
        tree["request_id"] = uuid.uuid4().hex
    body = codec.encode_again(tree, codec.JSON)
    try:
        request, _ = codec.decode_request(body, WorkRequest)
    except codec.DecodeError:
        return None
    if request.owner != owner:
        return None
    return WaitingRequest(caller, request, body, named=named, subject=subject)


def answer_of_outcome(outcome: Outcome | Queue) -> Answer:
    """The answer for what has become of a request."""
    if isinstance(outcome, Queue):
        answer = message_answer(outcome, status=202)
        return Answer(answer.status, answer.body, answer.headers | {"Retry-After": str(_ASK_AGAIN_SECONDS)})
    return message_answer(outcome, status=REJECTED if isinstance(outcome, Rejection) else 200)


__all__ = ["Outcome", "WaitingRequest", "answer_of_outcome", "wait_seconds", "waiting_request"]
