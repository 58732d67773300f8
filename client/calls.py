"""How the client asks: with patience for a service that restarts, again over a new connection, and in line."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator
from typing import Final, TypeVar

import nats.aio.client
import nats.errors
from nats.aio.msg import Msg

from ..schemas import bus, codec, operations, requests
from ..schemas.bus import PlanSubject
from ..schemas.permitted import NotAllowed
from ..schemas.permitted import request as ask
from .errors import CorralError, NoService, Refused, TimedOut, Unavailable, error_of

T = TypeVar("T")

Waiting = Callable[[operations.QueueEntry], None]
"""Told every few seconds where a request that waits stands."""

_WAIT_POLL_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 0.1
_LOOK_SECONDS: Final = 0.25
"""A call that waits for its answer looks so often whether its connection is still the same."""


class Calls:
    """Questions over a connection.

    Attributes:
        nc: the connection.
        timeout: seconds to wait for an answer.
        patience: seconds to wait for a service that is not there (one that restarts, say).
    """

    nc: nats.aio.client.Client
    timeout: float
    patience: float

    def _patiently(self) -> Generator[Callable[[], bool]]:
        loop = asyncio.get_running_loop()
        end = loop.time() + self.patience
        while True:
            yield lambda: loop.time() < end

    async def _plan(self, subject: str, body: object, type: type[T]) -> T:
        reply = await self._call(subject, body)
        answer = codec.decode(reply, type | requests.Error, codec.JSON)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
        if isinstance(answer, requests.Error):
            raise error_of(answer)
        return answer  # pyright: ignore[reportReturnType]

    async def _call(self, subject: str, body: object) -> bytes:
        """Ask and give back the body of the answer."""
        payload = b"" if body is None else codec.encode(body, codec.JSON)
        headers = {codec.CONTENT_TYPE_HEADER: codec.JSON}
        for attempt in self._patiently():
            try:
                reply = await self._ask(subject, payload, headers)
                raise_error(reply)
                return reply.data
            except nats.errors.NoRespondersError as error:
                if not attempt():
                    raise self._bus_error(error, subject) from None
            except CorralError as error:
                # One that stops says so: the next one may be there at once.
                if not isinstance(error, NoService) or not attempt():
                    raise
            except (nats.errors.Error, OSError) as error:
                raise self._bus_error(error, subject) from error
            await asyncio.sleep(RETRY_SECONDS)
        raise AssertionError("unreachable")

    async def _ask(self, subject: str, payload: bytes, headers: dict[str, str]) -> Msg:
        """Ask, and again over each new connection: with the old one the question may be lost, or its answer. All that
        is asked may be asked twice."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.timeout
        while True:
            connection = self.nc.stats["reconnects"]
            left = max(RETRY_SECONDS, end - loop.time())
            asking = asyncio.ensure_future(ask(self.nc, subject, payload, timeout=left, headers=headers))
            try:
                while not asking.done() and self.nc.stats["reconnects"] == connection:
                    await asyncio.wait({asking}, timeout=_LOOK_SECONDS)
                if asking.done():
                    return asking.result()
            finally:
                asking.cancel()

    def _bus_error(self, error: Exception, subject: str) -> CorralError:
        if isinstance(error, NotAllowed):
            return Refused(str(error), "refused")
        if isinstance(error, nats.errors.NoRespondersError):
            return no_service(subject)
        if isinstance(error, nats.errors.MaxPayloadError):
            return TimedOut(f"the message is larger than the bus takes ({self.nc.max_payload} bytes)")
        if not self.nc.is_connected:
            return Unavailable(f"the connection to the bus is lost ({type(error).__name__}); it is being retried")
        if isinstance(error, nats.errors.TimeoutError):
            return TimedOut(f"no answer on {subject} within {self.timeout:g} s")
        return Unavailable(f"the bus failed: {type(error).__name__}: {error}")

    async def _request_waiting(
        self, subject: str, request: requests.WorkRequest, on_wait: Waiting | None
    ) -> requests.Assignment | requests.Rejection:
        """Ask, and stay in line: whoever is no longer in the queue without an answer asks again under the same id."""
        assert request.request_id is not None
        loop = asyncio.get_running_loop()
        inbox = self.nc.new_inbox()
        answers = await self.nc.subscribe(inbox)
        payload = codec.encode(request, codec.JSON)
        headers = {codec.CONTENT_TYPE_HEADER: codec.JSON}
        give_up = loop.time() + request.wait_seconds + self.timeout
        try:
            await self.nc.publish(subject, payload, reply=inbox, headers=headers)
            unseen, absent_since = 0, None
            while loop.time() < give_up:
                try:
                    reply = await answers.next_msg(timeout=_WAIT_POLL_SECONDS)
                except nats.errors.TimeoutError:
                    try:
                        queue = await self._plan(PlanSubject.QUEUE, None, operations.Queue)
                        entry = next((e for e in queue.entries if e.request_id == request.request_id), None)
                    except (Unavailable, TimedOut):  # the planner restarts: it is asked again once it is back
                        unseen = 2
                        continue
                    if entry is not None:
                        unseen, absent_since = 0, None
                        if on_wait is not None:
                            on_wait(entry)
                        continue
                    unseen += 1
                    if unseen > 1:
                        await self.nc.publish(subject, payload, reply=inbox, headers=headers)
                        unseen = 0
                    continue
                try:
                    if _no_responders(reply):
                        raise no_service(subject)
                    raise_error(reply)
                except NoService:  # the planner stops, or has stopped: the next one does not know who waits
                    absent_since = absent_since or loop.time()
                    if loop.time() - absent_since > max(self.patience, _WAIT_POLL_SECONDS):
                        raise
                    await asyncio.sleep(RETRY_SECONDS)
                    await self.nc.publish(subject, payload, reply=inbox, headers=headers)
                    continue
                answer = codec.decode(reply.data, requests.PlanReply, codec.JSON)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
                if isinstance(answer, requests.Error):
                    raise error_of(answer)
                return answer  # pyright: ignore[reportReturnType]
            raise TimedOut(f"no answer on {subject} within {request.wait_seconds + self.timeout:g} s")
        except nats.errors.Error as error:
            raise self._bus_error(error, subject) from error
        finally:
            await _quietly(answers.unsubscribe())


def raise_error(reply: Msg) -> None:
    """Raise what an error reply says: the body of Corral's own, or the headers of the Services API."""
    code = (reply.headers or {}).get("Nats-Service-Error-Code")
    if code is None and not reply.data.startswith(b'{"type":"error"'):
        return
    try:
        error = codec.decode(reply.data, requests.Error, codec.JSON)
    except codec.DecodeError:
        text = (reply.headers or {}).get("Nats-Service-Error", "")
        error = requests.Error(code="unavailable" if code == "503" else "failed", message=text or f"error {code}")
    raise error_of(error)


def no_service(subject: str) -> NoService:
    """The exception where nobody listens on a subject, with what to do about it."""
    part, command = ("planner", "corral plan") if subject.startswith(bus.PLAN) else ("processor", "corral process")
    return NoService(f"the bus is there, but no {part} answers: start one with `{command}` (or all with `corral up`)")


def _no_responders(reply: Msg) -> bool:
    return (reply.headers or {}).get("Status") == "503" and not reply.data


async def _quietly(ending: Awaitable[None]) -> None:
    with contextlib.suppress(nats.errors.Error):
        await ending
