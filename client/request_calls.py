"""Requests for devices: asked until they are answered, made sure of, and taken back where nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from types import TracebackType
from typing import Any, Final, Self, Unpack

import nats.aio.client
import nats.errors
from msgspec.structs import replace

from ..schemas import codec, operations, requests
from ..schemas.subjects import PlanSubject
from .confirmed import Granted, confirmed
from .errors import CorralError, NoService, Rejected, TimedOut, TooManyRequests, Unavailable
from .holder import may_be_anothers
from .lease_calls import LeaseCalls
from .request import RequestFields, work_request
from .rpc import Waiting
from .waiting import Line

_Answer: Any = requests.Assignment | requests.Rejection

_TAKE_BACK_SECONDS: Final = 3.0
"""A caller that was cancelled is held up no longer by taking its request back: the lease would end by itself."""


class RequestCalls(LeaseCalls):
    """Requests over a connection, which closing it takes back; see `LeaseCalls`."""

    def __init__(
        self,
        nc: nats.aio.client.Client,
        *,
        owner: str | None,
        timeout: float,
        patience: float,
        owned_subjects: bool | None,
    ) -> None:
        super().__init__(nc, owner=owner, timeout=timeout, patience=patience, owned_subjects=owned_subjects)
        self._asked: dict[tuple[str, str], requests.WorkRequest] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection: what still waits is withdrawn, leases stay until they are released or end."""
        if self.forked:
            return
        # While the server is away nats-py fails in several ways, and it is closed all the same.
        with contextlib.suppress(nats.errors.Error, OSError, RuntimeError):
            await self._soon_taken_back(*self._asked.values())
            await self.nc.close()

    async def request(self, *, on_wait: Waiting | None = None, **fields: Unpack[RequestFields]) -> requests.Assignment:
        """Ask for devices: all of them, or a `Rejected`.

        A caller that is cancelled withdraws the request, and releases what was granted meanwhile.

        Raises:
            Rejected: they can't be had; the reasons are counted in it.
            InvalidRequest: a field is wrong.
            Unavailable, NoService, TimedOut: nobody answered.
        """
        return await self.submit(work_request(self.owner, fields), on_wait=on_wait)

    async def submit(self, request: requests.WorkRequest, *, on_wait: Waiting | None = None) -> requests.Assignment:
        """As `request`, with the message ready made. It is given a `request_id` where it has none, so that it can be
        sent again without being granted twice.

        Where no answer comes it is withdrawn, so that nothing is granted to nobody; a request that does not wait and
        came with an id of its own is not, since it may be asked again. The error says the id (`request_id`). A lease
        that another process holds under the id is left to it.

        Raises:
            Ended: the id was used before, and the lease that it was granted has ended.
        """
        return (await self.granted(request, on_wait=on_wait)).assignment

    async def granted(self, request: requests.WorkRequest, *, on_wait: Waiting | None = None) -> Granted:
        """As `submit`, with the time of the planner's word that the lease holds: it is asked again where the answer may
        be an old one, since this process or its machine has slept, say, or the id was used before."""
        return await confirmed(self, request, lambda asked: self._assignment(asked, on_wait))

    async def _assignment(self, request: requests.WorkRequest, on_wait: Waiting | None) -> requests.Assignment:
        named = request.request_id is not None
        if request.request_id is None:
            request = _with_id(request)
        request_id = request.request_id or ""
        subject = self._owned(PlanSubject.REQUEST, request.owner)
        self._asked[request.owner, request_id] = request
        try:
            reply = await self._answer_to(subject, request, on_wait)
        except asyncio.CancelledError:
            await self._soon_taken_back(request)
            raise
        except (CorralError, codec.DecodeError) as error:
            if isinstance(error, CorralError):
                error.request_id = request_id
            if _may_be_granted(error, request) and (request.wait_seconds > 0 or not named):
                await self._soon_taken_back(request)
            raise
        finally:
            self._asked.pop((request.owner, request_id), None)
        if isinstance(reply, requests.Rejection):
            raise Rejected(reply)
        return reply

    async def withdraw(self, request_id: str, *, owner: str | None = None) -> requests.Rejection | requests.Assignment:
        """Take a request back that may still wait.

        Returns:
            The answer that the request has: the rejection `withdrawn`; the assignment, if it was granted before (its
            lease goes on until it is released); or the rejection that it got before.

        Raises:
            NotOwner: somebody else asked.
        """
        owner = owner or self.owner
        action = requests.WithdrawAction(request_id=request_id, owner=owner)
        return await self._plan(self._owned(PlanSubject.WITHDRAW, owner), action, _Answer)

    async def _answer_to(
        self, subject: str, request: requests.WorkRequest, on_wait: Waiting | None
    ) -> requests.Assignment | requests.Rejection:
        if request.wait_seconds <= 0:
            return await self._plan(subject, request, _Answer)
        own = operations.QueueFilter(owner=request.owner, request_id=request.request_id)
        line = Line(
            self.nc,
            subject,
            request,
            lambda: self._plan(PlanSubject.QUEUE, own, operations.Queue),
            timeout=self.timeout,
            patience=self.patience,
            on_wait=on_wait,
        )
        try:
            return await line.answer()
        except nats.errors.Error as error:
            raise self._bus_error(error, subject) from error

    async def _soon_taken_back(self, *asked: requests.WorkRequest) -> None:
        """Take requests back, as far as that can be done in a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TAKE_BACK_SECONDS):
                await asyncio.gather(*(self._take_back(request) for request in asked), return_exceptions=True)

    async def _take_back(self, request: requests.WorkRequest) -> None:
        assert request.request_id is not None
        answer = await self.withdraw(request.request_id, owner=request.owner)
        if not isinstance(answer, requests.Assignment) or answer.lease.state is not requests.LeaseState.ACTIVE:
            return
        # Under an id that is used again it may be the lease that another process works with.
        if not may_be_anothers(answer.lease, request.holder):
            await self.release(answer.lease.lease_id, owner=request.owner)


def _may_be_granted(error: Exception, request: requests.WorkRequest) -> bool:
    """Whether a request that ended so may have been granted all the same, or may still be."""
    if isinstance(error, TooManyRequests) and error.retry_after_seconds is not None:
        # It may have been in line already when it was asked again.
        return request.wait_seconds > 0
    return isinstance(error, TimedOut | Unavailable | codec.DecodeError) and not isinstance(error, NoService)


def _with_id(request: requests.WorkRequest) -> requests.WorkRequest:
    return replace(request, request_id=uuid.uuid4().hex)
