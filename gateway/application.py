"""The ASGI application: finds the path, the caller and the body of a request, and sends its answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from ..bus.tasks import cancel_all
from ..client.errors import CorralError
from ..schemas import codec
from ..schemas.instruments import SECONDS, Histogram
from . import guard, openapi, streams
from .answers import Answer, Failed, answer_of, error_answer, error_of
from .callers import UNKNOWN, Caller, Callers
from .calls import Passing, passed, subject_of
from .guard import Gone, Sender
from .routes import ROUTES, JobEventsFilter, Kind, LeaseEventsFilter, LogsFilter, Route, message_of
from .settings import Settings
from .streams import EVENT_STREAM, Pieces
from .waiting import WaitingRequest, answer_of_outcome, wait_seconds, waiting_request

log = logging.getLogger("corral.gateway")

T = TypeVar("T")

OPENAPI_PATH: Final = "/openapi.json"
_TEXT: Final = {"Content-Type": "text/plain; charset=utf-8"}
Ready = Callable[[], list[str]]
"""Returns the reasons why the gateway is not ready."""


class Application:
    """Answers requests.

    Args:
        settings: limits and host names.
        callers: connections of callers.
        ready: see `Ready`.

    Attributes:
        statuses: answered requests by status.
        seconds: times to the begin of an answer, without requests that wait in the queue.
        running: requests that are not answered yet, and streams.
        stopping: set once the gateway is stopping: streams end, and new requests are refused.
    """

    def __init__(self, settings: Settings, callers: Callers, ready: Ready) -> None:
        self.statuses: Counter[str] = Counter()
        self.seconds = Histogram(SECONDS)
        self.running = 0
        self.stopping = asyncio.Event()
        self._settings = settings
        self._callers = callers
        self._ready = ready
        self._document = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        said = _Said()

        def started(status: int) -> None:
            self.statuses[str(status)] += 1
            if not said.waits:
                self.seconds.observe(time.perf_counter() - began)

        sender = Sender(
            scope,
            send,
            seconds=self._settings.send_seconds,
            secure=self._settings.certificate is not None,
            started=started,
        )
        self.running += 1
        try:
            await self._answer(scope, receive, sender, said)
        except Gone:
            log.debug("a client has gone away")
        except Exception:
            log.exception("a request failed")
            if sender.status:
                sender.abort()
            else:
                error = Failed("internal", "The gateway failed: its log says why").error
                await _send(sender, error_answer(error), close=True)
        finally:
            self.running -= 1
            known = scope["path"] if scope["path"] in ROUTES else "another path"
            level = logging.INFO if scope["path"] in ROUTES else logging.DEBUG
            took = time.perf_counter() - began
            method = scope["method"] if scope["method"] in _METHODS else "?"
            # Method and path are in the text, since the log limits records of one text.
            log.log(level, f"{method} {known}: %d for %s in %.3f s", sender.status, said.user or "-", took)

    async def _answer(self, scope: Scope, receive: Receive, sender: Sender, said: _Said) -> None:
        headers = Headers(scope=scope)
        method, path = scope["method"], scope["path"]
        if path in ("/-/healthy", "/-/ready") and method in ("GET", "HEAD"):
            # Asked by supervisors, under whatever name.
            reasons = self._ready() if path == "/-/ready" else []
            text = "".join(f"{reason}\n" for reason in reasons) or "ok\n"
            await sender.whole(503 if reasons else 200, _TEXT, text.encode())
            return
        try:
            guard.check_place(scope, headers, self._settings.allowed_names)
            if path == OPENAPI_PATH and method in ("GET", "HEAD"):
                self._document = self._document or openapi.document()
                await sender.whole(200, {"Content-Type": codec.JSON}, self._document)
                return
            route = _route(path, method)
            async with self._callers.calling(guard.token_of(headers), _address(scope)) as caller:
                said.user = caller.identity.user
                await self._for_caller(route, scope, headers, receive, sender, caller, said)
        except (Failed, CorralError, codec.DecodeError) as error:
            if sender.status:
                sender.abort()
                return
            answer = error_answer(error_of(error), _allowed(path) if answer_is(error, "method_not_allowed") else None)
            # A body that was not read would be taken for the next request.
            await _send(sender, answer, close=not said.read)

    async def _for_caller(
        self,
        route: Route,
        scope: Scope,
        headers: Headers,
        receive: Receive,
        sender: Sender,
        caller: Caller,
        said: _Said,
    ) -> None:
        if route.method == "POST":
            guard.check_body(headers)
            body = await guard.body_of(receive, self._settings.body_seconds)
        else:
            if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
                raise Failed("invalid", "A GET has no body: what it asks for goes into parameters")
            body = message_of(scope["query_string"], route.parameters) if route.parameters else b""
            if route.parameters is None and scope["query_string"]:
                raise Failed("invalid", "This path has no parameters")
        said.read = True
        events = EVENT_STREAM in headers.get("accept", "")
        said.waits = route.kind is Kind.REQUEST
        working = self._found(route, headers, body, caller, events, said)
        # What only waits is ended at once, so that its client can go on at the next gateway.
        try:
            found = await _until_gone(working, receive, caller, self.stopping if said.waits else None, untold=True)
        except Gone:
            if said.waiting is not None:
                await said.waiting.leave()
            raise
        if isinstance(found, Answer):
            await _send(sender, found)
        else:
            await self._stream(found, receive, sender, caller)

    async def _found(
        self, route: Route, headers: Headers, body: bytes, caller: Caller, events: bool, said: _Said
    ) -> Answer | Pieces:
        match route.kind:
            case Kind.QUERY:
                return await streams.query(caller, body)
            case Kind.EVENTS if route.name == "lease_events":
                wanted, _ = codec.decode_request(body, LeaseEventsFilter)
                return streams.lease_events(caller, wanted)
            case Kind.EVENTS:
                of_jobs, _ = codec.decode_request(body, JobEventsFilter)
                return streams.job_events(caller, of_jobs)
            case Kind.LOGS:
                of_task, _ = codec.decode_request(body, LogsFilter)
                return await streams.logs(caller, of_task)
            case Kind.REQUEST:
                waiting = said.waiting = waiting_request(caller, route, body)
                if waiting is None:
                    subject = subject_of(route, caller, body)
                    return answer_of(await Passing(caller).reply(subject, body), rejections_fail=True)
                if events:
                    return streams.request_events(waiting)
                prefer = wait_seconds(headers.get("prefer"))
                if prefer is None or not waiting.may_wait:
                    return answer_of_outcome(await waiting.outcome())
                return answer_of_outcome(await waiting.outcome_within(prefer))
            case Kind.MESSAGE:
                return await passed(caller, route, body)

    async def _stream(self, found: Pieces, receive: Receive, sender: Sender, caller: Caller) -> None:
        async def send() -> None:
            async with contextlib.aclosing(found.pieces) as pieces:
                await sender.begin(200, found.headers)
                async for piece in pieces:
                    await sender.piece(piece)
                await sender.piece(b"", last=True)

        try:
            await _until_gone(send(), receive, caller, self.stopping)
        except (Gone, Failed):
            sender.abort()
            raise Gone from None
        except CorralError as error:
            log.info("an answer to %s was broken off: %s", caller.identity.user, type(error).__name__)
            sender.abort()


class _Said:
    """Facts about a request, for its error and the log.

    Attributes:
        user: of the caller.
        read: true once the body was read.
        waits: true if it may wait in the queue.
        waiting: the work request that it is.
    """

    __slots__ = ("read", "user", "waiting", "waits")

    def __init__(self) -> None:
        self.user = ""
        self.read = False
        self.waits = False
        self.waiting: WaitingRequest | None = None


_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def _route(path: str, method: str) -> Route:
    route = ROUTES.get(path)
    if route is None:
        raise Failed("not_found", f"There is no such path: {OPENAPI_PATH} has them all")
    if method != route.method:
        raise Failed("method_not_allowed", f"Use {route.method}")
    return route


def _allowed(path: str) -> dict[str, str]:
    return {"Allow": ROUTES[path].method}


def answer_is(error: Exception, code: str) -> bool:
    """True if an exception stands for an error with this code."""
    return isinstance(error, Failed) and error.error.code == code


def _address(scope: Scope) -> str:
    client: Any = scope.get("client")
    return str(client[0]) if client else ""


async def _send(sender: Sender, answer: Answer, *, close: bool = False) -> None:
    await sender.whole(answer.status, answer.headers, answer.body, close=close)


async def _until_gone(
    work: Coroutine[Any, Any, T],
    receive: Receive,
    caller: Caller,
    stop: asyncio.Event | None = None,
    *,
    untold: bool = False,
) -> T:
    """Do some work, and cancel it if the client goes away, its token is revoked, or `stop` is set.

    Args:
        work: to do.
        receive: of ASGI.
        caller: who has asked.
        stop: ends it, too.
        untold: the result is dropped if the client has gone away when it comes.

    Raises:
        Gone: it went away.
        Failed: the server has closed the caller's connection for good, or `stop` was set.
    """
    working = asyncio.ensure_future(work)
    others: list[asyncio.Future[Any]] = [asyncio.ensure_future(each) for each in (_gone(receive), caller.closed.wait())]
    if stop is not None:
        others.append(asyncio.ensure_future(stop.wait()))
    try:
        await asyncio.wait({working, *others}, return_when=asyncio.FIRST_COMPLETED)
        if working.done() and not (others[0].done() and untold):
            return working.result()
        if others[0].done():
            raise Gone
        if others[1].done():
            raise Failed("unauthenticated", UNKNOWN)
        raise Failed("unavailable", "The gateway is stopping: ask again, with the same request_id if it had one")
    finally:
        await cancel_all([working, *others])


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
