"""Serves a gateway until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Generator
from typing import Any, Final

import uvicorn
from nats.aio.client import Client as NatsClient
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from ..bus import credentials as who
from ..bus.connect import connect as bus_connect
from ..bus.connect import until_closed
from ..bus.credentials import Identity
from ..bus.health import HealthEndpoint
from ..bus.tasks import cancel_all
from ..schemas.health import HealthStatus
from ..schemas.instruments import ServiceKind
from .application import Application
from .callers import Callers
from .protocol import MAX_HEADER_BYTES, protocol_of
from .settings import Settings, SettingsError

log = logging.getLogger("corral.gateway")

ROLE: Final = "gateway"
_GRACEFUL_SECONDS: Final = 5


class PortTaken(OSError):
    """The server can't listen on the requested address and port."""


class Gateway:
    """A gateway, with an own connection to the bus only for its health checks.

    Args:
        settings: see `Settings`.
        identity: own credentials. Those of another role than `gateway` are not used, but for the certificates in them.
    """

    def __init__(self, settings: Settings, identity: Identity) -> None:
        settings.check()
        self.settings = settings
        self.callers = Callers(settings, identity)
        self.application = Application(settings, self.callers, self._reasons)
        self.door = HealthEndpoint(ServiceKind.GATEWAY, f"{socket.gethostname()}-{os.getpid()}", self._judge)
        self._identity = identity
        self._own: NatsClient | None = None

    @property
    def app(self) -> ASGIApp:
        """The ASGI application."""
        if not self.settings.trusted_proxies:
            return self.application
        inner: Any = self.application
        made: Any = ProxyHeadersMiddleware(inner, list(self.settings.trusted_proxies))
        return made

    async def run(self, server: uvicorn.Server, listening: socket.socket) -> None:
        """Serve until the server is told to stop.

        Raises:
            BusClosed: the bus has closed its own connection for good.
        """
        tidying = asyncio.create_task(self.callers.keep_tidy())
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        ending = asyncio.create_task(self._answer_health_checks()) if self._reports else None
        if ending is None:
            log.warning(
                "no health checks are answered on the bus: `corral auth add gateway NAME` makes credentials for that"
            )
        try:
            await asyncio.wait({serving, *([ending] if ending else ())}, return_when=asyncio.FIRST_COMPLETED)
            if ending is not None and ending.done():
                await ending
        finally:
            server.should_exit = True
            self.begin_to_stop()
            await cancel_all([task for task in (tidying, ending) if task is not None])
            await asyncio.wait({serving})
            await self.callers.close()
            await self.door.close()
            if self._own is not None:
                await self._own.close()
        serving.result()

    @property
    def _reports(self) -> bool:
        """True if it has a connection of its own, or will have one."""
        return self._identity.role == ROLE

    async def _answer_health_checks(self) -> None:
        """Connect once the bus is there, and answer until the connection is closed for good."""
        closed = asyncio.Event()
        self._own = await bus_connect(
            self.settings.url, name="corral-gateway", identity=self._identity, wait_seconds=None, closed=closed
        )
        await self.door.open(self._own)
        await until_closed(self._own, closed)

    def begin_to_stop(self) -> None:
        """End streams, so that connections can be closed."""
        self.door.stopping = True
        self.application.stopping.set()

    def _reasons(self) -> list[str]:
        reasons = ["it is stopping"] if self.door.stopping else []
        if self._reports and (self._own is None or not self._own.is_connected):
            reasons.append("the bus is not reachable")
        return reasons

    def _judge(self) -> HealthStatus:
        application = self.application
        return HealthStatus(
            [],
            {
                "requests": {status: float(count) for status, count in application.statuses.items()},
                "answer_seconds": application.seconds,
                "requests_running": float(application.running),
                "callers": float(len(self.callers)),
                "refused_tokens": float(self.callers.refused_tokens),
            },
        )


def listen(settings: Settings) -> socket.socket:
    """Open the listening socket.

    Raises:
        PortTaken: the port is taken, or the address isn't one of this machine.
    """
    host = settings.host.strip("[]")
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, settings.port))
        made.listen(256)
    except OSError as error:
        made.close()
        raise PortTaken(f"can't listen on {settings.host}:{settings.port}: {error.strerror or error}") from error
    made.set_inheritable(False)
    return made


def address(settings: Settings, listening: socket.socket) -> str:
    """URL of the gateway on this machine."""
    host = settings.host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "http" if settings.certificate is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


async def serve(
    settings: Settings,
    started: Callable[[str], None],
    stop: asyncio.Event,
    named: Callable[[str], None] | None = None,
    identity: Identity | None = None,
) -> None:
    """Serve a gateway until `stop` is set.

    Args:
        settings: settings of the gateway.
        started: called with its URL once it has started.
        stop: event that stops it.
        named: called with the instance name that is used in health checks.
        identity: own credentials; those that the environment names by default.

    Raises:
        SettingsError: the settings would send tokens in the clear, or a certificate can't be used.
        PortTaken: it can't listen on the address and port.
    """
    gateway = Gateway(settings, identity or who.identify())
    if named is not None:
        named(gateway.door.instance)
    listening = listen(settings)
    url = address(settings, listening)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            """Stop with the event; uvicorn's implementation would raise a signal again, which ends the process."""

            async def stopping() -> None:
                await stop.wait()
                self.should_exit = True
                gateway.begin_to_stop()

            waiting = asyncio.get_running_loop().create_task(stopping())
            try:
                yield
            finally:
                waiting.cancel()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started(url)

    try:
        config = uvicorn.Config(
            gateway.app,
            http=protocol_of(settings),
            ws="none",
            lifespan="off",
            # Headers of proxies are read only where these are trusted.
            proxy_headers=False,
            access_log=False,
            server_header=False,
            date_header=True,
            log_config=None,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=_GRACEFUL_SECONDS,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
        )
        config.load()
    except OSError as error:  # ssl.SSLError is one
        listening.close()
        raise SettingsError(f"the certificate {settings.certificate} or its key can't be used: {error}") from None
    await gateway.run(Server(config), listening)
