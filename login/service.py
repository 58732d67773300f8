"""HTTP service that logs people in: it runs the device flow, and gives out credentials of the bus for a time.

The client makes a key pair and tells the public key. The service is the client of the provider, so that the provider's
tokens never leave it; what it answers is no secret, since only the seed, which stays with the client, makes it useful.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import uvicorn
from msgspec import Struct
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..bus.access.folder import AuthorityError
from ..bus.tasks import cancel_all
from ..schemas.requests import Error
from ..schemas.values.error_words import in_words
from .health import LoginHealth
from .issuing import Issuer, NoServer
from .messages import LOGOUT_PATH, POLL_PATH, START_PATH, LoggedIn, Logout, Poll, Start, Started, Waiting
from .provider import Denied, DeviceCode, Pending, Provider, ProviderAway, ProviderError
from .rules import LoginRefused, Person, Rules, person

log = logging.getLogger("corral.login")
T = TypeVar("T")

Joined = Callable[[Person], Awaitable[str]]
"""Called with each person who logs in, to bring them into their group; returns a warning, or nothing."""

_BODY_BYTES: Final = 8192
_MOST_SESSIONS: Final = 1000
"""Logins in progress, of all clients."""
_SESSION_SECONDS: Final = 3600.0
_STATUS: Final = {
    "invalid_request": 400,
    "refused": 403,
    "expired": 410,
    "too_many_requests": 429,
    "failed": 500,
    "unavailable": 503,
}


class Session(Struct, kw_only=True):
    """A login in progress.

    Attributes:
        key: public key that the credentials shall be for.
        address: of the client.
        code: device flow.
        ends: time of the event loop after which it is over.
        ask_at: time of the event loop before which the provider is not asked.
        interval_seconds: time between two questions.
        busy: true while the provider is asked.
    """

    key: str
    address: str
    code: DeviceCode
    ends: float
    ask_at: float
    interval_seconds: float
    busy: bool = False


class LoginService:
    """The service.

    Args:
        rules: provider, and rules for its claims.
        issuer: adds users to the authority.
        nats: URL of the bus, for those who log in.
        ca: path of the certificate that the bus's is signed by; None without TLS.
        joined: brings people into their groups; None if there are none.
        most_of_address: logins in progress of one address.

    Attributes:
        health: answers health checks on the bus while it runs.
    """

    def __init__(
        self,
        rules: Rules,
        issuer: Issuer,
        *,
        nats: str = "",
        ca: Path | None = None,
        joined: Joined | None = None,
        most_of_address: int = 20,
    ) -> None:
        self._rules = rules
        self._provider = Provider(rules)
        self._issuer = issuer
        self._nats = nats
        self._ca = ca
        self._joined = joined
        self._most_of_address = most_of_address
        self._sessions: dict[str, Session] = {}
        self.health = LoginHealth(self._provider, issuer, self._running)
        self.app = Starlette(
            routes=[
                Route(START_PATH, self._start, methods=["POST"]),
                Route(POLL_PATH, self._poll, methods=["POST"]),
                Route(LOGOUT_PATH, self._log_out, methods=["POST"]),
                Route("/health", self._health),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        ending = asyncio.create_task(self._issuer.run())
        try:
            yield
        finally:
            await cancel_all([ending])

    async def _start(self, request: Request) -> Response:
        async def start(message: Start) -> Started:
            now = asyncio.get_running_loop().time()
            self._sessions = {key: found for key, found in self._sessions.items() if found.ends > now}
            address = request.client.host if request.client else ""
            if len(self._sessions) >= _MOST_SESSIONS or self._of_address()[address] >= self._most_of_address:
                raise _Refusal("too_many_requests", "too many logins are in progress: try again in a few minutes")
            code = await self._provider.begin_device_flow()
            name = secrets.token_urlsafe(24)
            self._sessions[name] = Session(
                key=message.key,
                address=address,
                code=code,
                ends=now + min(code.expires_seconds, _SESSION_SECONDS),
                ask_at=now + code.interval_seconds,
                interval_seconds=code.interval_seconds,
            )
            return Started(
                session=name,
                user_code=code.user_code,
                verification_uri=code.verification_uri,
                verification_uri_complete=code.verification_uri_complete,
                expires_seconds=code.expires_seconds,
                interval_seconds=code.interval_seconds,
            )

        return await self._answer(request, Start, start)

    def _running(self) -> int:
        now = asyncio.get_running_loop().time()
        return sum(session.ends > now for session in self._sessions.values())

    def _of_address(self) -> Counter[str]:
        return Counter(session.address for session in self._sessions.values())

    async def _poll(self, request: Request) -> Response:
        return await self._answer(request, Poll, self._progress)

    async def _progress(self, message: Poll) -> Waiting | LoggedIn:
        now = asyncio.get_running_loop().time()
        session = self._sessions.get(message.session)
        if session is None or session.ends <= now:
            self._sessions.pop(message.session, None)
            raise _Refusal("expired", "the code was not entered in time: log in again")
        if session.busy or now < session.ask_at:
            return Waiting(interval_seconds=max(1.0, session.ask_at - now))
        session.busy = True
        try:
            found = await self._provider.poll_device_flow(session.code.device_code, session.interval_seconds)
            if isinstance(found, Pending):
                session.interval_seconds = found.interval_seconds
                session.ask_at = asyncio.get_running_loop().time() + found.interval_seconds
                return Waiting(interval_seconds=found.interval_seconds)
            # The provider has spent the code: what fails now, fails for good.
            del self._sessions[message.session]
            answer = await self._logged_in(person(found, self._rules), session.key)
            self.health.outcomes["issued"] += 1
            return answer
        except Denied as error:
            self._sessions.pop(message.session, None)
            self.health.outcomes["refused"] += 1
            raise _Refusal("refused", str(error)) from None
        except LoginRefused:
            self.health.outcomes["refused"] += 1
            raise
        except ProviderAway:
            raise
        except (ProviderError, NoServer, AuthorityError, OSError) as error:
            self._sessions.pop(message.session, None)
            log.warning("a login failed: %s", error)
            self.health.outcomes["failed"] += 1
            raise _Refusal("failed", str(error)) from None
        finally:
            session.busy = False

    async def _logged_in(self, who: Person, key: str) -> LoggedIn:
        user = await self._issuer.issue(who, key)
        warning = await self._joined(who) if self._joined is not None else ""
        return LoggedIn(
            user=user.name,
            owner=user.owner,
            role=user.role,
            group=user.group,
            expires_at=datetime.fromisoformat(user.expires),
            nats=self._nats,
            ca=self._ca.read_text() if self._ca is not None else "",
            warnings=[warning] if warning else [],
        )

    async def _log_out(self, request: Request) -> Response:
        async def end(message: Logout) -> dict[str, bool]:
            return {"ended": await self._issuer.log_out(message)}

        return await self._answer(request, Logout, end)

    async def _health(self, _: Request) -> Response:
        try:
            await self._provider.metadata()
        except ProviderError as error:
            return PlainTextResponse(f"{error}\n", 503)
        return PlainTextResponse("ok\n")

    async def _answer(self, request: Request, kind: type[T], work: Callable[[T], Awaitable[object]]) -> Response:
        """Answer a message with what becomes of it, or with an `Error`."""
        try:
            return _json(await work(await _read(request, kind)))
        except _Refusal as error:
            return _json(Error(code=error.code, message=str(error)), _STATUS[error.code])
        except LoginRefused as error:
            log.info("refused: %s", error)
            return _json(Error(code="refused", message=str(error)), 403)
        except (ProviderError, NoServer, AuthorityError, OSError) as error:
            log.warning("%s", error)
            return _json(Error(code="unavailable", message=str(error)), 503)


class _Refusal(Exception):
    """Answer with an error code.

    Args:
        code: key of `_STATUS`.
        message: for the person.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def _read(request: Request, kind: type[T]) -> T:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_BYTES:
            raise _Refusal("invalid_request", f"the message is longer than {_BODY_BYTES} bytes")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise _Refusal("invalid_request", in_words(str(error))) from None


def _json(message: object, status: int = 200) -> Response:
    return Response(
        msgspec.json.encode(message), status, headers={"Cache-Control": "no-store"}, media_type="application/json"
    )


async def serve(
    service: LoginService,
    listening: socket.socket,
    stop: asyncio.Event,
    *,
    nats_url: str | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve until `stop` is set.

    Args:
        service: the service.
        listening: socket that listens.
        stop: ends the service.
        nats_url: of the bus, for health checks.
        certificate: for HTTPS, with `key`.
        key: of the certificate.
    """
    config = uvicorn.Config(
        service.app,
        proxy_headers=False,
        access_log=False,
        server_header=False,
        log_config=None,
        timeout_keep_alive=5,
        limit_concurrency=200,
        timeout_graceful_shutdown=2,
        ssl_certfile=str(certificate) if certificate else None,
        ssl_keyfile=str(key) if key else None,
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            """Leave signals to the caller."""
            yield

    server = Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    stopping = asyncio.create_task(stop.wait())
    reporting = asyncio.create_task(service.health.run(nats_url))
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        await cancel_all([stopping, reporting])
