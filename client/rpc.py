"""Request-reply calls over the bus, retried while a service restarts and after a reconnection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from typing import Final, TypeVar

import nats.aio.client
import nats.errors
from nats.aio.msg import Msg

from ..bus.permissions import NotAllowed
from ..bus.permissions import request as ask
from ..schemas import codec, operations, requests, subjects
from ..schemas.instruments import ServiceKind
from .errors import CorralError, Forked, InvalidRequest, NoService, Refused, TimedOut, Unavailable, error_of

T = TypeVar("T")

Waiting = Callable[[operations.QueueEntry], None]
"""Callback that gets the queue entry of a waiting request every few seconds."""

RETRY_SECONDS: Final = 0.1
_COMMANDS: Final = {
    ServiceKind.PLANNER: "corral plan",
    ServiceKind.PROCESSOR: "corral process",
    ServiceKind.NOTIFIER: "corral notifier",
}
"""Commands that start the services which answer requests."""
_POLL_SECONDS: Final = 0.25
"""Interval in which a pending call checks whether the client has reconnected."""


class Calls:
    """Request-reply calls over a connection.

    Args:
        nc: the connection.

    Attributes:
        timeout: seconds to wait for an answer.
        patience: seconds to keep retrying while a service is absent (during a restart, for example).
    """

    timeout: float
    patience: float

    def __init__(self, nc: nats.aio.client.Client) -> None:
        self._nc = nc
        self._made_in = os.getpid()

    @property
    def nc(self) -> nats.aio.client.Client:
        """The connection to the bus.

        Raises:
            Forked: the connection belongs to the parent process; writing to it would corrupt the parent's stream.
        """
        if self.forked:
            raise Forked(self._made_in)
        return self._nc

    @property
    def forked(self) -> bool:
        """True if this process is a fork of the one that opened the connection."""
        return os.getpid() != self._made_in

    def _patiently(self) -> Generator[Callable[[], bool]]:
        _ = self.nc  # checked first: a fork has no running event loop either
        loop = asyncio.get_running_loop()
        end = loop.time() + self.patience
        while True:
            yield lambda: loop.time() < end

    async def _plan(self, subject: str, body: object, type: type[T]) -> T:
        reply = await self._call(subject, body)
        answer = codec.decode(reply, type | requests.Error, codec.JSON)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
        if isinstance(answer, requests.Error):
            raise error_of(answer, service_of(subject))
        return answer  # pyright: ignore[reportReturnType]

    async def _call(self, subject: str, body: object) -> bytes:
        """Send a request, with retries while the service is absent, and return the body of the answer."""
        payload = b"" if body is None else codec.encode(body, codec.JSON)
        headers = {codec.CONTENT_TYPE_HEADER: codec.JSON}
        for attempt in self._patiently():
            try:
                reply = await self._ask(subject, payload, headers)
                raise_error(reply, subject)
                return reply.data
            except nats.errors.NoRespondersError as error:
                if not attempt():
                    raise self._bus_error(error, subject) from None
            except CorralError as error:
                # A service that is stopping answers with an error; its successor may be ready immediately.
                if not isinstance(error, NoService) or not attempt():
                    raise
            except (nats.errors.Error, OSError) as error:
                raise self._bus_error(error, subject) from error
            await asyncio.sleep(RETRY_SECONDS)
        raise AssertionError("unreachable")

    async def _ask(self, subject: str, payload: bytes, headers: dict[str, str]) -> Msg:
        """Send a request, and send it again after each reconnection.

        The request or its answer may have been lost with the old connection. All requests of the client are idempotent,
        so that they may be sent twice.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.timeout
        while True:
            connection = self.nc.stats["reconnects"]
            left = max(RETRY_SECONDS, end - loop.time())
            asking = asyncio.ensure_future(ask(self.nc, subject, payload, timeout=left, headers=headers))
            try:
                while not asking.done() and self.nc.stats["reconnects"] == connection:
                    await asyncio.wait({asking}, timeout=_POLL_SECONDS)
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
            text = f"the message is larger than the bus allows ({self.nc.max_payload} bytes)"
            return InvalidRequest(text, "too_large")
        if not self.nc.is_connected:
            return Unavailable(f"the connection to the bus is lost ({type(error).__name__}); the client reconnects")
        if isinstance(error, nats.errors.TimeoutError):
            return TimedOut(f"no answer on {subject} within {self.timeout:g} s")
        return Unavailable(f"the bus failed: {type(error).__name__}: {error}")


def raise_error(reply: Msg, subject: str) -> None:
    """Raise the exception for an error reply: from the body of Corral's own errors, or the Services API's headers."""
    code = (reply.headers or {}).get("Nats-Service-Error-Code")
    if code is None and not reply.data.startswith(b'{"type":"error"'):
        return
    try:
        error = codec.decode(reply.data, requests.Error, codec.JSON)
    except codec.DecodeError:
        text = (reply.headers or {}).get("Nats-Service-Error", "")
        error = requests.Error(code="unavailable" if code == "503" else "failed", message=text or f"error {code}")
    raise error_of(error, service_of(subject))


def no_service(subject: str) -> NoService:
    """The exception for a subject without responders, with the command that starts the missing service."""
    service = service_of(subject)
    command = _COMMANDS[service]
    more = "" if service is ServiceKind.NOTIFIER else " (or all with `corral up`)"
    text = f"the bus is available, but no {service} answers: start one with `{command}`{more}"
    return NoService(text, service)


def service_of(subject: str) -> ServiceKind:
    """The service that answers requests on a subject."""
    if subject.startswith(f"{subjects.NOTIFY}."):
        return ServiceKind.NOTIFIER
    return ServiceKind.PLANNER if subject.startswith(subjects.PLAN) else ServiceKind.PROCESSOR
