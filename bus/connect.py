"""Connect to the bus: URL, credentials, TLS, and waiting for a server that is not there yet."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import ssl
from typing import Any, Final

from nats.aio.client import Client
from nats.errors import AuthorizationError

from . import credentials as who
from . import permissions, websockets
from .connection import Connection
from .credentials import CREDENTIALS_VARIABLE
from .tasks import heed_cancellation

log = logging.getLogger("corral.bus")
DEFAULT_URL: Final = "nats://127.0.0.1:4222"
URL_VARIABLE: Final = "CORRAL_NATS_URL"


class WrongSetting(ValueError):
    """Environment variable with an invalid value; the message says which values are valid."""


class BusUnavailable(ConnectionError):
    """No server answered."""


class BusRefused(BusUnavailable):
    """The server does not take the credentials."""


class BusClosed(BusUnavailable):
    """The server has closed a connection for good. The process that depends on it ends; its supervisor restarts it."""


async def connect(
    url: str | None = None,
    *,
    name: str = "corral",
    credentials: str | None = None,
    ca: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    inbox_prefix: str | None = None,
    identity: who.Identity | None = None,
    wait_seconds: float | None = 5.0,
    closed: asyncio.Event | None = None,
    **options: Any,
) -> Client:
    """Connect to the bus, and reconnect for ever if the connection is lost.

    A server that refuses the client, say since its key was revoked, closes the connection for good. It can't be used
    any more.

    Args:
        url: one server or several by comma; `CORRAL_NATS_URL`, then the local default.
        name: shown in the server's connection list.
        credentials: path of a credentials file; `CORRAL_NATS_CREDS` by default. The facts in it fill in the rest.
        ca: path of the certificate that the server's must be signed by; `CORRAL_NATS_CA` by default. With it, a
            server without TLS is refused.
        certificate: path of the client's, if the server asks for one; `CORRAL_NATS_CERT` by default.
        key: path of the certificate's key; `CORRAL_NATS_KEY` by default.
        inbox_prefix: of the subjects that answers come to; `CORRAL_INBOX_PREFIX` by default.
        identity: in place of all of these and of the environment.
        wait_seconds: give up after this time if no server answers at the start; None tries for ever.
        closed: set once the connection is closed for good, by either side.
        options: further ones of `nats.connect`.

    Raises:
        BusUnavailable: no server answered in time; the message says what to do.
        BusRefused: it refuses the credentials.
    """
    servers = [part.strip() for part in (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).split(",") if part.strip()]
    if websockets.wanted(servers):
        try:
            websockets.bring_in()
        except ImportError:
            raise BusUnavailable("a WebSocket to the bus needs aiohttp: pip install aiohttp") from None
    try:
        if identity is None:
            identity = who.identify(credentials, ca=ca, certificate=certificate, key=key, inbox=inbox_prefix)
        proofs = who.options(identity)
    except who.CredentialsError as error:
        raise BusUnavailable(str(error)) from None
    settings: dict[str, Any] = {
        "name": name,
        "connect_timeout": 2,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.5,
        # A server that vanishes silently is detected within 15 s.
        "ping_interval": 5,
        "max_outstanding_pings": 2,
        "error_cb": _log_error,
        **proofs,
        **options,
    }
    if closed is not None:
        settings["closed_cb"] = functools.partial(_set, closed)
    return await _Connecting(servers, identity, settings, wait_seconds, closed).run()


class _Connecting:
    """Attempts to connect, one after the other, and the errors of the connection that they lead to.

    Args:
        servers: URLs.
        identity: of the client.
        settings: arguments of nats-py's `connect`; every error is passed on to their `error_cb`.
        wait_seconds: give up after this time; None never does.
        closed: set once the server has refused the client for good.
    """

    def __init__(
        self,
        servers: list[str],
        identity: who.Identity,
        settings: dict[str, Any],
        wait_seconds: float | None,
        closed: asyncio.Event | None,
    ) -> None:
        self._servers = servers
        self._identity = identity
        self._report = settings["error_cb"]
        self._settings: dict[str, Any] = {**settings, "error_cb": self._on_error}
        self._now = asyncio.get_running_loop().time
        self._deadline = None if wait_seconds is None else self._now() + wait_seconds
        self._closed = closed
        self._client = Client()
        self._connected = False
        self._last_error: Exception | None = None
        self._refused_at: list[float] = []

    async def run(self) -> Client:
        """Connect.

        Raises:
            BusUnavailable: no server answered in time, or it refuses the credentials.
        """
        pause = 0.1
        while True:
            try:
                return await self._attempt()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # nats-py raises many kinds, and some as bare OSError
                failure = self._failure(self._last_error or error, pause)
                if failure is not None:
                    raise failure from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)

    async def _attempt(self) -> Client:
        # nats-py retries the first connection for ever, too, hence the deadline; one attempt is never cut short.
        timeout = self._settings["connect_timeout"]
        end = None if self._deadline is None else max(self._deadline, self._now() + timeout)
        async with asyncio.timeout_at(end):
            client = self._client = who.TlsClient() if self._identity.ca else Connection()
            permissions.admit(client, self._identity)
            await client.connect(self._servers, **self._settings)
        self._connected = True
        try:
            heed_cancellation()
        except asyncio.CancelledError:
            await client.close()
            raise
        return client

    def _failure(self, error: Exception, pause_seconds: float) -> BusUnavailable | None:
        """Reason to give up after an error; None if another attempt is to follow."""
        if self._deadline is None:
            return None
        servers = ", ".join(self._servers)
        if refusal := _refusal(error, self._identity):
            kind = BusRefused if _is_authorization(error) else BusUnavailable
            return kind(f"the NATS server at {servers} {refusal}")
        if self._now() + pause_seconds <= self._deadline:
            return None
        return BusUnavailable(
            f"no NATS server answers at {servers} ({type(error).__name__}: {error}). "
            f"Start one with `corral up`, or name yours with --nats or {URL_VARIABLE}."
        )

    async def _on_error(self, error: Exception) -> None:
        """Take note of an error of the connection. Raising one ends the attempt to connect, which nats-py repeats."""
        self._last_error = error
        if self._connected:
            self._count_refusal(error)
        permissions.refused(self._client, error)
        await self._report(error)
        if self._connected:
            return
        heed_cancellation()
        over = self._deadline is not None and self._now() >= self._deadline
        if over or (self._deadline is not None and _refusal(error, self._identity)):
            raise error

    def _count_refusal(self, error: Exception) -> None:
        """Set `closed` once the server refuses a client for long: keys may be rotating, so that one does not count."""
        if self._closed is None or not _refusal(error, self._identity):
            return
        now = self._now()
        self._refused_at = [at for at in self._refused_at if now - at < 2 * REFUSED_SECONDS] + [now]
        if now - self._refused_at[0] > REFUSED_SECONDS:
            self._closed.set()


REFUSED_SECONDS: Final = 3.0
"""Refusals of a client that was connected count as permanent once they go on for longer than this."""


def first_of(group: BaseExceptionGroup[Any]) -> BaseException:
    """The first error in a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]  # pyright: ignore[reportUnknownVariableType]
    return error


async def until_closed(nc: Client, closed: asyncio.Event) -> None:
    """Wait for the end of a connection that was made with `closed`.

    Raises:
        BusClosed: always, once the connection has ended.
    """
    await closed.wait()
    why = f" ({nc.last_error})" if nc.last_error else ""
    raise BusClosed(f"the NATS server has closed the connection for good{why}: this process ends, to be restarted")


async def _set(event: asyncio.Event) -> None:
    event.set()


def _refusal(error: Exception, identity: who.Identity) -> str:
    """Message for a refusal that retries can't change: of credentials, or of TLS trust. Empty for any other error."""
    if _is_authorization(error):
        if identity.login:
            return f"does not take your login, which was until {identity.expires}: corral login {identity.login}"
        refused = f"does not take the credentials in {identity.file}" if identity.file else "wants credentials"
        return (
            f"{refused}: `corral auth add` makes them; name them with `corral context add`, --creds or "
            f"{CREDENTIALS_VARIABLE}"
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"and this client do not trust each other ({error.reason or error}): keep ca.crt next to the credentials, "
            f"or name the CA's certificate in {who.CA_VARIABLE}"
        )
    return ""


def _is_authorization(error: Exception) -> bool:
    return "authorization violation" in str(error).lower() or isinstance(error, AuthorizationError)


async def _log_error(error: Exception) -> None:
    log.warning("bus: %s: %s", type(error).__name__, error)
