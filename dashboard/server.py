"""The server: guard, login, assets and pages put together, and served until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import uvicorn
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ..client.request import default_owner
from .exports import Exports
from .fleet import Fleet
from .security.accounts import Accounts, write_secret
from .security.guard import Guard
from .security.login import Doorman
from .security.proxies import behind
from .security.sessions import Session, Sessions
from .settings import DEFAULT_PORT, Settings, is_loopback

if TYPE_CHECKING:
    from .frame import Frame

log = logging.getLogger("corral.dashboard")

URL_FILE: Final = "url"
"""In the state folder: where the dashboard is, without any secret."""
_GONE_SECONDS: Final = 30.0
"""A browser that was away for so long (a phone in a pocket) goes on where it was."""


class PortTaken(OSError):
    """Something else listens there."""


def listen(settings: Settings) -> socket.socket:
    """A socket that listens where the settings say; the default port gives way to a free one.

    Raises:
        PortTaken: the port that was asked for is taken, or the address is not of this machine.
    """
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (DEFAULT_PORT, 0) if settings.port is None else (settings.port,):
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, port))
            made.listen(256)
        except OSError as error:
            made.close()
            if settings.port is None and port:
                continue
            raise PortTaken(f"can't listen on {settings.host}:{port}: {error.strerror or error}") from error
        made.set_inheritable(False)
        return made
    raise AssertionError("unreachable")


def address(settings: Settings, listening: socket.socket) -> str:
    """The URL by which a browser on this machine comes."""
    host = settings.host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"


class Dashboard:
    """The pages over one connection to the bus.

    Attributes:
        settings: as given.
        accounts: who may log in.
        sessions: who has.
        fleet: what all browsers share.
        app: to be served.
    """

    def __init__(self, settings: Settings) -> None:
        settings.check()
        settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.settings = settings
        self.accounts = Accounts(settings.state, default_owner(), settings.role)
        self.sessions = Sessions(settings.state, self.accounts, settings.session_seconds, login=settings.login)
        self.fleet = Fleet(settings.url, settings.interval_seconds)
        self.app: ASGIApp = self._assemble()

    def link(self, url: str) -> str:
        """A URL that logs in whoever opens it first; the plain one where no login is asked for."""
        return f"{url}login?token={self.accounts.new_link()}" if self.settings.login else url

    def _assemble(self) -> ASGIApp:
        # NiceGUI is one app for the whole process, and reads this when it is imported.
        os.environ.setdefault("NICEGUI_STORAGE_PATH", str(self.settings.state / "nicegui"))
        from fastapi import FastAPI
        from nicegui import Client as Page
        from nicegui import app as inner
        from nicegui import core, ui

        from .frame import SESSION_OF_PAGE

        def owns(page: str, session: Session) -> bool:
            opened = Page.instances.get(page)
            # A page of an earlier run is not known: NiceGUI then has the browser load it anew.
            return opened is None or opened.storage.get(SESSION_OF_PAGE) in (None, session.id)

        def ended(session: Session) -> None:
            for page in list(Page.instances.values()):
                if page.storage.get(SESSION_OF_PAGE) == session.id:
                    page.open("/login")

        doorman = Doorman(
            self.accounts,
            self.sessions,
            seconds=self.settings.session_seconds,
            secure=self.settings.secure,
            proxied=bool(self.settings.trusted_proxies),
            ended=ended,
        )

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
            async with self.fleet.running():
                yield

        outer = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
        outer.router.routes.extend(doorman.routes())
        outer.add_route("/health", _health)
        outer.add_route("/favicon.ico", _icon)
        outer.mount("/assets", StaticFiles(directory=Path(__file__).parent / "assets"))
        exports = Exports(self.fleet)
        outer.router.routes.append(exports.route())
        self._pages(exports)
        ui.run_with(
            outer,
            title="Corral",
            favicon=Path(__file__).parent / "assets" / "icon.svg",
            dark=None,
            language="en-US",
            binding_refresh_interval=None,
            reconnect_timeout=_GONE_SECONDS,
            gzip_middleware_factory=None,
            tailwind=False,
            show_welcome_message=False,
        )
        inner.config.socket_io_js_transports = ["websocket"]
        core.sio.eio.cors_allowed_origins = []
        local = is_loopback(self.settings.host)
        hosts = {"localhost", "127.0.0.1", "::1", self.settings.host.strip("[]")} if local else set[str]()
        guard = Guard(
            outer,
            self.sessions,
            hosts=hosts | set(self.settings.names) if local or self.settings.names else (),
            secure=self.settings.secure,
            owns=owns,
        )
        return behind(GZipMiddleware(guard, minimum_size=1024, compresslevel=5), self.settings.trusted_proxies)

    def _pages(self, exports: Exports) -> None:
        from .pages import analytics, device, fleet, leases, missing, request

        def frame(request: Request, title: str) -> Frame:
            from .frame import Frame

            return Frame(self.fleet, self.sessions, request, title)

        for page in (fleet, device, leases, request):
            page.register(frame)
        analytics.register(frame, exports)
        missing.register(frame)  # the last: it answers for all other addresses


async def _icon(_: Request) -> Response:
    return FileResponse(Path(__file__).parent / "assets" / "icon.svg", media_type="image/svg+xml")


async def _health(_: Request) -> Response:
    return PlainTextResponse("ok\n")


async def serve(
    settings: Settings,
    started: Callable[[str, str], None],
    stop: asyncio.Event | None = None,
    named: Callable[[str], None] | None = None,
) -> None:
    """Serve until it is told to stop: by `stop` where that is given, else by SIGINT or SIGTERM.

    Args:
        settings: how and to whom.
        started: told the URL, and the link that logs in once.
        stop: ends it when set.
        named: told the instance as its health answers name it.

    Raises:
        SettingsError: it would be open to strangers.
        PortTaken: it can't listen there.
    """
    dashboard = Dashboard(settings)
    if named is not None:
        named(dashboard.fleet.instance)
    listening = listen(settings)
    url = address(settings, listening)
    config = uvicorn.Config(
        dashboard.app,
        # What proxies add is read where they are trusted (`security/proxies.py`), and nowhere else.
        proxy_headers=False,
        access_log=False,
        server_header=False,
        log_config=None,
        ws_max_size=2**20,
        timeout_graceful_shutdown=2,
        lifespan="on",
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            """Stop in order; uvicorn's own would raise the signal again at the end, and with it end the process."""
            loop = asyncio.get_running_loop()
            if stop is not None:
                waiting = loop.create_task(stop.wait())
                waiting.add_done_callback(lambda task: None if task.cancelled() else self._stop())
                try:
                    yield
                finally:
                    waiting.cancel()
                return
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._stop)
            yield

        def _stop(self) -> None:
            # Who asks twice does not wait for browsers.
            self.force_exit = self.should_exit
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # A look makes many objects that soon go; without this, collections walk over the whole framework's too.
            gc.collect()
            gc.freeze()
            link = dashboard.link(url)
            write_secret(settings.state / URL_FILE, url)
            started(url, link)

    try:
        await Server(config).serve(sockets=[listening])
    finally:
        with contextlib.suppress(FileNotFoundError):
            (settings.state / URL_FILE).unlink()
