"""Assembles guard, login, assets and pages into one application, and serves it until it is stopped."""

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
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import uvicorn
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ..bus.addresses import is_loopback
from ..client.request import default_owner
from .downloads import Exports
from .fleet import Fleet
from .jobs import JobBoard
from .security.accounts import Accounts, write_secret
from .security.guard import Guard
from .security.login import LoginPages
from .security.proxies import with_proxy_headers
from .security.sessions import Session, Sessions
from .settings import DEFAULT_PORT, Settings
from .usage_reports import ReportFiles

if TYPE_CHECKING:
    from .page_frame import Frame

log = logging.getLogger("corral.dashboard")

URL_FILE: Final = "url"
"""File in the state folder with the URL of the dashboard, without a token."""
_GONE_SECONDS: Final = 30.0
"""Time within which a browser that lost its connection can resume its page."""


class PortTaken(OSError):
    """The server can't listen on the requested address and port."""


def listen(settings: Settings) -> socket.socket:
    """Open the listening socket; if no port was given and the default port is taken, use a free one.

    Raises:
        PortTaken: the requested port is taken, or the address isn't one of this machine.
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
    """URL of the dashboard for a browser on this machine."""
    host = settings.host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"


class Dashboard:
    """The application, with one connection to the bus.

    Attributes:
        settings: the settings.
        accounts: accounts of the users.
        sessions: sessions of the users.
        fleet: state that all browsers share.
        jobs: jobs, as all browsers share them.
        app: the ASGI application.
    """

    def __init__(self, settings: Settings) -> None:
        settings.check()
        settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.settings = settings
        self.accounts = Accounts(settings.state, default_owner(), settings.role)
        self.sessions = Sessions(settings.state, self.accounts, settings.session_seconds, login=settings.login)
        self.fleet = Fleet(settings.url, settings.interval_seconds)
        self.jobs = JobBoard(self.fleet)
        self.app: ASGIApp = self._assemble()

    def link(self, url: str) -> str:
        """Login link that works once; the URL itself if no login is required."""
        return f"{url}login?token={self.accounts.new_link()}" if self.settings.login else url

    def _assemble(self) -> ASGIApp:
        # NiceGUI has one global app per process, and reads this variable when it is imported.
        os.environ.setdefault("NICEGUI_STORAGE_PATH", str(self.settings.state / "nicegui"))
        from fastapi import FastAPI
        from nicegui import Client as Page
        from nicegui import app as inner
        from nicegui import core, ui

        from .page_frame import SESSION_OF_PAGE

        def owns(page: str, session: Session) -> bool:
            opened = Page.instances.get(page)
            # A page of an earlier run is unknown: NiceGUI then makes the browser reload it.
            return opened is None or opened.storage.get(SESSION_OF_PAGE) in (None, session.id)

        def ended(session: Session) -> None:
            for page in list(Page.instances.values()):
                if page.storage.get(SESSION_OF_PAGE) == session.id:
                    page.open("/login")

        doorman = LoginPages(
            self.accounts,
            self.sessions,
            seconds=self.settings.session_seconds,
            secure=self.settings.secure,
            proxied=bool(self.settings.trusted_proxies),
            rules=self.settings.openid,
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
        reports = ReportFiles(self.fleet, self.settings.prices, lambda: datetime.now(UTC))
        outer.router.routes.extend((exports.route(), reports.route()))
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
        return with_proxy_headers(
            GZipMiddleware(guard, minimum_size=1024, compresslevel=5), self.settings.trusted_proxies
        )

    def _pages(self, exports: Exports) -> None:
        from .pages import (
            analytics,
            device,
            events,
            fit,
            fleet,
            groups,
            host,
            job,
            jobs,
            leases,
            not_found,
            reports,
            request,
        )

        def frame(request: Request, title: str) -> Frame:
            from .page_frame import Frame

            return Frame(self.fleet, self.jobs, self.sessions, request, title)

        for page in (fleet, device, host, events, jobs, job, leases, groups, request, fit):
            page.register(frame)
        analytics.register(frame, exports)
        reports.register(frame, self.settings.prices)
        not_found.register(frame)  # registered last, because it matches all other URLs


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
    """Serve the dashboard until `stop` is set, or, without it, until SIGINT or SIGTERM.

    Args:
        settings: settings of the dashboard.
        started: called with the URL and a login link once the server has started.
        stop: event that stops the server.
        named: called with the instance name that is used in health checks.

    Raises:
        SettingsError: the settings would give access to anyone.
        PortTaken: the server can't listen on the address and port.
    """
    dashboard = Dashboard(settings)
    if named is not None:
        named(dashboard.fleet.instance)
    listening = listen(settings)
    url = address(settings, listening)
    config = uvicorn.Config(
        dashboard.app,
        # Headers of proxies are read only in `security/proxies.py`, where the proxies are trusted.
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
            """Shut down in order. uvicorn's implementation would raise the signal again, which ends the process."""
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
            # A second signal doesn't wait for the connections of browsers.
            self.force_exit = self.should_exit
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # Refreshes create many short-lived objects; collections needn't traverse the framework's objects too.
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
