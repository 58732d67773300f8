"""Checks of every request before it is read, and headers of every response.

The host name must be one of the server's, the path must be written plainly, and a body must be JSON of bounded size
that comes in time. A token is in a header and never in a URL, which others log.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from ..schemas import codec
from .answers import Failed
from .protocol import ABORT_KEY, MAX_HEADER_BYTES

MAX_BODY_BYTES: Final = 2**20
"""Limit on a body: that of a message of the bus."""
_MAX_QUERY_BYTES: Final = 64 * 1024
_FIXED_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_HSTS: Final = (b"strict-transport-security", b"max-age=31536000")
_BEARER: Final = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +(\S+) *")
_SECRET_PARAMETERS: Final = re.compile(rb"(?:^|&)(?:access_token|token|authorization|api_?key)=", re.IGNORECASE)


class Gone(Exception):
    """The client has gone away."""


def check_place(scope: Scope, headers: Headers, names: Iterable[str]) -> None:
    """Refuse a request to another host, or with a path or parameters that may mean different things to a proxy.

    Raises:
        Failed: it is one.
    """
    hosts = headers.getlist("host")
    allowed = frozenset(names)
    if len(hosts) != 1 and scope["http_version"] != "1.0":
        raise Failed("invalid", "A request has one Host")
    if allowed and (not hosts or hostname(hosts[0]) not in allowed):
        raise Failed("misdirected", "This server has another name: to allow this one, start it with --name")
    if scope.get("raw_path", b"") != scope["path"].encode():
        raise Failed("not_found", "Paths have no escapes")
    if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
        raise Failed("too_large", f"The headers are longer than {MAX_HEADER_BYTES} bytes")
    if len(scope.get("query_string", b"")) > _MAX_QUERY_BYTES:
        raise Failed("too_large", f"The parameters are longer than {_MAX_QUERY_BYTES} bytes")
    if _SECRET_PARAMETERS.search(scope.get("query_string", b"")):
        raise Failed("invalid", "A token does not go into a URL, which others log: send Authorization: Bearer TOKEN")


def token_of(headers: Headers) -> str:
    """The bearer token of a request.

    Raises:
        Failed: it has none.
    """
    given = headers.getlist("authorization")
    found = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        raise Failed("unauthenticated", "Send `Authorization: Bearer TOKEN`, with a token of `corral auth token`")
    return found[1]


def check_body(headers: Headers) -> None:
    """Refuse a body that is no JSON, or too large, before it is read.

    Raises:
        Failed: it is.
    """
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != codec.JSON:
        raise Failed("unsupported", f"The body must be JSON: send `Content-Type: {codec.JSON}`, or use curl --json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Failed("unsupported", "A body must not be compressed")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or len(length) > 15 or int(length) > MAX_BODY_BYTES:
        raise Failed("too_large", _TOO_LARGE)


async def body_of(receive: Receive, seconds: float) -> bytes:
    """Read a body.

    Args:
        receive: of ASGI.
        seconds: time limit.

    Raises:
        Failed: it is too large, or comes too slowly.
        Gone: the client has gone away.
    """
    found = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Gone
                found += message.get("body", b"")
                if len(found) > MAX_BODY_BYTES:
                    raise Failed("too_large", _TOO_LARGE)
                if not message.get("more_body"):
                    return bytes(found)
    except TimeoutError:
        raise Failed("slow", f"The body did not come within {seconds:g} s") from None


_TOO_LARGE: Final = f"The body is larger than {MAX_BODY_BYTES} bytes, the limit of a message"


def hostname(host: str) -> str:
    """Name of a `Host` header, without its port, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


class Sender:
    """`send` of ASGI that adds headers, and aborts a connection whose client takes nothing.

    Args:
        scope: of the request.
        send: of ASGI.
        seconds: time limit for each piece.
        secure: the server speaks TLS.
        started: called with the status of the response.

    Attributes:
        status: of the response; 0 before it has begun.
    """

    def __init__(
        self, scope: Scope, send: Send, *, seconds: float, secure: bool, started: Callable[[int], None]
    ) -> None:
        self.status = 0
        self._scope = scope
        self._send = send
        self._seconds = seconds
        self._headers = [*_FIXED_HEADERS, *([_HSTS] if secure else [])]
        self._started = started

    async def whole(self, status: int, headers: Mapping[str, str], body: bytes, *, close: bool = False) -> None:
        """Send a response of one piece.

        Args:
            status: of HTTP.
            headers: of it.
            body: of it; a HEAD has none.
            close: close the connection after it, since the request was not read to its end.
        """
        await self.begin(status, {**headers, "Content-Length": str(len(body))}, close=close)
        await self.piece(b"" if self._scope["method"] == "HEAD" else body, last=True)

    async def begin(self, status: int, headers: Mapping[str, str], *, close: bool = False) -> None:
        """Send status and headers."""
        self.status = status
        self._started(status)
        found = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        if close:
            found.append((b"connection", b"close"))
        start: Message = {"type": "http.response.start", "status": status, "headers": [*found, *self._headers]}
        await self._in_time(start)

    async def piece(self, body: bytes, *, last: bool = False) -> None:
        """Send a piece of the body."""
        await self._in_time({"type": "http.response.body", "body": body, "more_body": not last})

    def abort(self, *, reset: bool = False) -> None:
        """End the connection, so that the client knows that the response is not whole.

        Args:
            reset: the client takes nothing: forget what was not sent.
        """
        abort: Any = self._scope.get(ABORT_KEY)
        if abort is not None:
            abort(reset)

    async def _in_time(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            self.abort(reset=True)
            raise Gone from None
