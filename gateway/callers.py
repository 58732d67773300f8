"""Callers: for each token in use, a connection to the bus with the credentials that the token is.

The server thus decides what a caller may do, and nothing of one caller can reach another. A connection that the server
closes, say since its key was revoked, is never used again: the next request of that token has to log in anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Final

from nats.aio.client import Client as NatsClient
from nats.errors import Error as NatsError

from ..bus.access.tokens import TokenError, identity_of_token
from ..bus.connect import BusRefused, BusUnavailable
from ..bus.connect import connect as bus_connect
from ..bus.credentials import Identity
from ..client import Client
from .answers import Failed
from .attempts import Attempts
from .settings import Settings

log = logging.getLogger("corral.gateway")

PEOPLE: Final = ("requester", "viewer", "operator")
UNKNOWN: Final = (
    "The bus does not know this token: it was revoked, or is of another bus. `corral auth token` makes a new one"
)
_REFUSED_SECONDS: Final = 5.0
"""Time for which a token that the server has refused is refused without asking it again."""
_CONNECT_SECONDS: Final = 3.0
_CONNECTING: Final = 16
"""Logins on the bus at a time."""
_SWEEP_SECONDS: Final = 5.0
_MAX_KNOWN: Final = 10_000
"""Tokens of which is known that they were taken or refused lately."""


class Caller:
    """A token in use.

    Args:
        identity: user, owner and seed of the token; the server has taken the seed, and the user as its name.
        client: client on the connection.
        closed: set once the server has closed the connection for good.

    Attributes:
        running: requests and streams.
        used_at: when it was last used, on the event loop's clock.
        gone: true once the connection was lost; requests on it may finish, and none is added.
    """

    def __init__(self, identity: Identity, client: Client, closed: asyncio.Event) -> None:
        self.identity = identity
        self.client = client
        self.closed = closed
        self.running = 0
        self.used_at = asyncio.get_running_loop().time()
        self.gone = False

    @property
    def nc(self) -> NatsClient:
        """Connection to the bus."""
        return self.client.nc


class Callers:
    """Connections by token.

    Args:
        settings: limits, and the URL of the bus.
        trust: certificates for TLS to the bus; its seed is not used.
    """

    def __init__(self, settings: Settings, trust: Identity) -> None:
        self._settings = settings
        self._trust = trust
        self._callers: OrderedDict[bytes, Caller] = OrderedDict()
        self._logins: dict[bytes, asyncio.Task[Caller]] = {}
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        self._proven: OrderedDict[bytes, None] = OrderedDict()
        self._connecting = asyncio.Semaphore(_CONNECTING)
        self._attempts = Attempts()
        self._closing: set[asyncio.Task[None]] = set()
        self.refused_tokens = 0

    def __len__(self) -> int:
        return len(self._callers)

    @contextlib.asynccontextmanager
    async def calling(self, token: str, address: str) -> AsyncGenerator[Caller]:
        """The caller of a token, for one request.

        Args:
            token: as the request has it.
            address: of the client, for the limit of refused tokens.

        Raises:
            Failed: the token is none, the bus does not know it, or it has too many requests already.
        """
        caller = await self._find(token, address)
        if caller.running >= self._settings.requests_per_caller:
            most = self._settings.requests_per_caller
            raise Failed("too_many_requests", f"This token has {most} requests open, which is the limit")
        caller.running += 1
        try:
            yield caller
        finally:
            caller.running -= 1
            caller.used_at = asyncio.get_running_loop().time()
            if caller.gone and not caller.running:
                self._close(caller)

    async def keep_tidy(self) -> None:
        """Close connections that are not used, for ever."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = asyncio.get_running_loop().time()
            for key, caller in list(self._callers.items()):
                if not caller.running and now - caller.used_at >= self._settings.idle_seconds:
                    self._drop(key, caller)

    async def close(self) -> None:
        """Close all connections."""
        for key, caller in list(self._callers.items()):
            self._drop(key, caller)
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _find(self, token: str, address: str) -> Caller:
        key = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        if (found := self._known(key)) is not None:
            return found
        now = asyncio.get_running_loop().time()
        # Whoever is or was logged in is not kept out by others behind the same address.
        if key not in self._proven and (wait := self._attempts.wait_seconds(address, now)) > 0:
            raise Failed("too_many_requests", "Too many wrong tokens came from this address", retry_after_seconds=wait)
        try:
            identity = identity_of_token(token)
        except TokenError as error:
            raise self._refusal(key, address, f"The token can't be used: {error}") from None
        if identity.role and identity.role not in PEOPLE:
            raise Failed("refused", f"The token of a {identity.role} has no use here: it is for people and programs")
        if now < self._refused.get(key, 0.0):
            raise self._refusal(key, address, UNKNOWN)
        login = self._logins.get(key)
        if login is None:
            login = self._logins[key] = asyncio.create_task(self._log_in(key, identity, address))
            login.add_done_callback(lambda _: self._logins.pop(key, None))
        # Others may wait for the same login, which goes on if this request ends.
        return await asyncio.shield(login)

    async def _log_in(self, key: bytes, identity: Identity, address: str) -> Caller:
        async with self._connecting:
            self._make_room()
            caller = await self._connect(key, identity, address)
        self._callers[key] = caller
        self._proven[key] = None
        self._proven.move_to_end(key)
        while len(self._proven) > _MAX_KNOWN:
            self._proven.popitem(last=False)
        return caller

    def _known(self, key: bytes) -> Caller | None:
        caller = self._callers.get(key)
        if caller is None or caller.gone or not caller.nc.is_connected:
            return None
        self._callers.move_to_end(key)
        return caller

    async def _connect(self, key: bytes, identity: Identity, address: str) -> Caller:
        closed = asyncio.Event()
        made: list[Caller] = []

        async def lost() -> None:
            for caller in made:
                caller.gone = True
                if self._callers.get(key) is caller:
                    del self._callers[key]
                if not caller.running:
                    self._close(caller)

        login = Identity(
            user=identity.user,
            role=identity.role,
            owner=identity.owner,
            inbox=identity.inbox,
            seed=identity.seed,
            ca=self._trust.ca,
            certificate=self._trust.certificate,
            key=self._trust.key,
        )
        try:
            nc = await bus_connect(
                self._settings.url,
                name="corral-gateway-caller",
                identity=login,
                wait_seconds=_CONNECT_SECONDS,
                closed=closed,
                disconnected_cb=lost,
            )
        except BusRefused:
            raise self._refusal(key, address, UNKNOWN) from None
        except BusUnavailable as error:
            log.warning("a caller could not log in: %s", error)
            raise Failed("unavailable", "The bus can't be reached now") from None
        except NatsError as error:
            log.warning("a caller could not log in: %s: %s", type(error).__name__, error)
            raise Failed("unavailable", "The bus can't be reached now") from None
        try:
            await self._check_server(nc, key, identity, address)
        except BaseException:
            await nc.close()
            raise
        client = Client(
            nc,
            owner=identity.owner or identity.user,
            timeout=self._settings.answer_seconds,
            patience=self._settings.patience_seconds,
            owned_subjects=True,
        )
        made.append(Caller(identity, client, closed))
        return made[0]

    async def _check_server(self, nc: NatsClient, key: bytes, identity: Identity, address: str) -> None:
        """Refuse a server that checks no credentials, and a token with another name than the server has for its key."""
        if not nc._server_info.get("auth_required"):  # pyright: ignore[reportPrivateUsage]
            log.error("the bus asks for no credentials, so that tokens prove nothing: no request is passed on")
            raise Failed("unavailable", "The bus behind this gateway asks for no credentials, so tokens prove nothing")
        refused = False
        usual = nc._error_cb  # pyright: ignore[reportPrivateUsage]

        async def on_error(error: Exception) -> None:
            nonlocal refused
            refused = refused or "permissions violation for subscription" in str(error).lower()
            await usual(error)

        nc._error_cb = on_error  # pyright: ignore[reportPrivateUsage]
        # Only the user of that name may subscribe to this.
        subscription = await nc.subscribe(f"{identity.inbox}.gateway")
        try:
            await nc.flush(int(_CONNECT_SECONDS))
            await asyncio.sleep(0)
            if not refused:
                await subscription.unsubscribe()
        except (NatsError, OSError):
            raise Failed("unavailable", "The bus does not answer now") from None
        finally:
            nc._error_cb = usual  # pyright: ignore[reportPrivateUsage]
        if refused:
            raise self._refusal(key, address, UNKNOWN)

    def _refusal(self, key: bytes, address: str, message: str) -> Failed:
        now = asyncio.get_running_loop().time()
        self.refused_tokens += 1
        self._attempts.failed(address, now)
        self._proven.pop(key, None)
        if self._refused.get(key, 0.0) < now:
            self._refused[key] = now + _REFUSED_SECONDS
        while len(self._refused) > _MAX_KNOWN:
            self._refused.popitem(last=False)
        return Failed("unauthenticated", message)

    def _make_room(self) -> None:
        """Close the connection that was not used for longest, if there are as many as there may be."""
        if len(self._callers) < self._settings.callers:
            return
        for key, caller in self._callers.items():
            if not caller.running:
                self._drop(key, caller)
                return
        raise Failed("busy", "All connections to the bus are in use: try again soon")

    def _drop(self, key: bytes, caller: Caller) -> None:
        if self._callers.get(key) is caller:
            del self._callers[key]
        caller.gone = True
        self._close(caller)

    def _close(self, caller: Caller) -> None:
        async def close() -> None:
            with contextlib.suppress(NatsError, OSError, RuntimeError):
                await caller.nc.close()

        task = asyncio.ensure_future(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
