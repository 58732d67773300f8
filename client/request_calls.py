"""Requests for devices: sent until they are answered, confirmed, and withdrawn if the caller no longer waits."""

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
from .errors import CorralError, NoService, Rejected, TimedOut, TooManyRequests, Unavailable
from .leases.calls import LeaseCalls
from .leases.grant_confirmation import Granted, confirmed
from .leases.holder import may_have_other_holder
from .request import RequestFields, work_request
from .rpc import Waiting
from .waiting import QueuedRequest

_Answer: Any = requests.Assignment | requests.Rejection

_WITHDRAW_SECONDS: Final = 3.0
"""Maximum time for withdrawing a request after a cancellation; a lease that remains expires anyway."""


class RequestCalls(LeaseCalls):
    """Work requests over a connection. Closing it withdraws the requests that still wait; see `LeaseCalls`."""

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
        """Close the connection. Requests that still wait are withdrawn; leases stay until they are released or end."""
        if self.forked:
            return
        # While the server is unreachable, nats-py raises several kinds of error; the connection is closed anyway.
        with contextlib.suppress(nats.errors.Error, OSError, RuntimeError):
            await self._withdraw_in_time(*self._asked.values())
            await self.nc.close()

    async def request(self, *, on_wait: Waiting | None = None, **fields: Unpack[RequestFields]) -> requests.Assignment:
        """Request devices. Either all of them are granted, or the request is rejected.

        If the caller is cancelled, the request is withdrawn, and a lease that was granted in the meantime is released.

        Args:
            on_wait: called every few seconds with the request's `QueueEntry` while it waits.
            fields: fields of the request; see `RequestFields`.

        Raises:
            Rejected: the devices can't be granted; it holds the reasons, each with its number of devices.
            InvalidRequest: a field is invalid.
            Unavailable, NoService, TimedOut: no planner answered.
        """
        return await self.submit(work_request(self.owner, fields), on_wait=on_wait)

    async def submit(self, request: requests.WorkRequest, *, on_wait: Waiting | None = None) -> requests.Assignment:
        """Send a `WorkRequest`; otherwise as `request`.

        A request without a `request_id` is given one, for idempotency: it can be sent again without a second grant.

        If no answer arrives, the request is withdrawn, so that no lease is granted that no process uses. A request
        that doesn't wait and came with a `request_id` isn't withdrawn, since the caller may send it again. The id is
        in the error's `request_id`. A lease that another process holds under the id isn't released.

        Raises:
            Ended: the id was used before, and its lease has ended.
        """
        return (await self.granted(request, on_wait=on_wait)).assignment

    async def granted(self, request: requests.WorkRequest, *, on_wait: Waiting | None = None) -> Granted:
        """Send a request as `submit` does, and return the assignment with the time of its confirmation.

        The planner is asked again if the answer may be outdated: because this process or its machine was suspended,
        for example, or because the request id was used before.
        """
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
            await self._withdraw_in_time(request)
            raise
        except (CorralError, codec.DecodeError) as error:
            if isinstance(error, CorralError):
                error.request_id = request_id
            if _may_be_granted(error, request) and (request.wait_seconds > 0 or not named):
                await self._withdraw_in_time(request)
            raise
        finally:
            self._asked.pop((request.owner, request_id), None)
        if isinstance(reply, requests.Rejection):
            raise Rejected(reply)
        return reply

    async def withdraw(self, request_id: str, *, owner: str | None = None) -> requests.Rejection | requests.Assignment:
        """Withdraw a request that may still be in the queue.

        Returns:
            The final answer to the request: the rejection `withdrawn`; the assignment, if it was already granted (its
            lease continues until it is released); or its earlier rejection.

        Raises:
            NotOwner: the request belongs to another owner.
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
        line = QueuedRequest(
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

    async def _withdraw_in_time(self, *asked: requests.WorkRequest) -> None:
        """Withdraw requests, for at most 3 s; errors are ignored."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WITHDRAW_SECONDS):
                await asyncio.gather(
                    *(self._withdraw_and_release(request) for request in asked), return_exceptions=True
                )

    async def _withdraw_and_release(self, request: requests.WorkRequest) -> None:
        assert request.request_id is not None
        answer = await self.withdraw(request.request_id, owner=request.owner)
        if not isinstance(answer, requests.Assignment) or answer.lease.state is not requests.LeaseState.ACTIVE:
            return
        # If the request id was used before, another process may be working under this lease.
        if not may_have_other_holder(answer.lease, request.holder):
            await self.release(answer.lease.lease_id, owner=request.owner)


def _may_be_granted(error: Exception, request: requests.WorkRequest) -> bool:
    """True if a request that failed with this error may nevertheless have been granted, or may still be granted."""
    if isinstance(error, TooManyRequests) and error.retry_after_seconds is not None:
        # The request may already have been in the queue when it was sent again.
        return request.wait_seconds > 0
    return isinstance(error, TimedOut | Unavailable | codec.DecodeError) and not isinstance(error, NoService)


def _with_id(request: requests.WorkRequest) -> requests.WorkRequest:
    return replace(request, request_id=uuid.uuid4().hex)
