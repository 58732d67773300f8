"""HTTP server of `/metrics`. The bus is on one event loop; each scrape has a thread, and one writes at a time."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import ThreadingWSGIServer

from ..bus.health import HealthEndpoint
from ..client.client import Client
from ..schemas.health import HealthStatus
from ..schemas.instruments import SECONDS, Histogram, ServiceKind
from ..schemas.values.globs import matches_any
from .families import Family
from .live import FORGET_SECONDS, LiveFleet
from .page import DEVICE_INFO, write
from .pipeline import SERVICE_SECONDS, ServiceAnswers, ServiceSeries, ask
from .processes import Shown, by_lease

if TYPE_CHECKING:
    from .otlp.push import Fleet, OtlpPush
    from .otlp.settings import OtlpSettings

log = logging.getLogger("corral.exporter")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_INDEX: Final = b"""<!doctype html><title>Corral exporter</title><h1>Corral exporter</h1>
<p><a href="/metrics">/metrics</a>; parts of it: <code>?host[]=node-*</code>, <code>?name[]=DCGM_FI_DEV_*</code></p>
"""
# Most of what gzip can save, it saves at once; a scrape of a large fleet must not wait for the rest.
_GZIP_LEVEL: Final = 1

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class Exporter:
    """Serves the fleet's metrics.

    Args:
        client: client of the bus.
        families: families of the devices' series; see `families.choose`.
        forget_seconds: see `LiveFleet`.
        otlp: where to send the same over OTLP, too; None for nowhere.
        processes: processes to show.
    """

    def __init__(
        self,
        client: Client,
        families: Sequence[Family],
        *,
        forget_seconds: float = FORGET_SECONDS,
        otlp: OtlpSettings | None = None,
        processes: Shown = Shown.LEASES,
    ) -> None:
        self.client = client
        self.families = families
        self.live = LiveFleet(client.nc, forget_seconds=forget_seconds, processes=processes is not Shown.NONE)
        self.processes = processes
        self._door = HealthEndpoint(ServiceKind.EXPORTER, f"{socket.gethostname()}-{os.getpid()}", self._judge)
        self._known: list[tuple[str, str]] = []
        self._scrapes = Histogram(SECONDS)
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        self._one_at_a_time = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: ThreadingWSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._push: OtlpPush | None = None
        if otlp is not None:
            from .otlp.push import OtlpPush

            self._push = OtlpPush(otlp, self._fleet, self.instance)

    async def start(self, host: str = "127.0.0.1", port: int = 9400) -> int:
        """Read the state of the fleet, and start to serve it.

        Returns:
            The port, chosen by the system for port 0.

        Raises:
            OSError: the address can't be bound.
        """
        self._loop = asyncio.get_running_loop()
        server = make_server(host, port, self.answer, _Server6 if ":" in host else _Server, handler_class=_Quiet)
        try:
            await self.live.start()
        except BaseException:
            server.server_close()
            raise
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="exporter", daemon=True)
        self._thread.start()
        await self._door.open(self.client.nc)
        if self._push is not None:
            self._push.start()
        return int(server.server_port)

    async def stop(self) -> None:
        """Stop serving; a page that is being written is finished."""
        self._door.stopping = True
        if self._push is not None:
            await asyncio.to_thread(self._push.stop)
        if self._server is not None:
            await asyncio.to_thread(self._server.shutdown)
            self._server.server_close()
        await self.live.stop()

    @property
    def instance(self) -> str:
        """Id of this exporter among exporters."""
        return self._door.instance

    def unready(self) -> list[str]:
        """Reasons why it does not serve the whole state yet; empty if it does."""
        reasons: list[str] = []
        if not self.client.nc.is_connected:
            reasons.append("the bus is not reachable")
        if self.live.reads:
            reasons.append("still reading stored inventories and events")
        return reasons

    def _judge(self) -> HealthStatus:
        serves = self._thread is not None and self._thread.is_alive()
        values: dict[str, Any] = {"scrapes": float(sum(self._scrapes.counts)), "scrape_seconds": self._scrapes}
        if self._push is not None:
            sent = self._push.sent
            values |= {
                "otlp_points": sent.points,
                "otlp_success_timestamp_seconds": sent.success_at,
                "otlp_seconds": sent.seconds,
            }
        return HealthStatus([] if serves else ["its HTTP server is not running"], values)

    def metrics(self, *, names: Sequence[str] = (), hosts: Sequence[str] = ()) -> bytes:
        """Write the page; may be called from any thread but the event loop's.

        Args:
            names: globs over the names of series; empty for all.
            hosts: globs over host names; empty for all.
        """
        answers = self._ask(names)
        with self._one_at_a_time:
            started = time.perf_counter()
            shown = [host for host in self.live.hosts() if not hosts or matches_any(host.name, hosts)]
            known = [host for host in self.live.known() if not hosts or matches_any(host.name, hosts)]
            families = [family for family in self.families if not names or matches_any(family.name, names)]
            info = not names or matches_any(DEVICE_INFO, names)
            parts = write(shown, families, info=info, silent=known)
            took = time.perf_counter() - started
            registry = CollectorRegistry()
            series = ServiceSeries(
                answers, shown, known, self.live, names=names, scrape_seconds=took, processes=self.processes
            )
            registry.register(series)  # pyright: ignore[reportArgumentType]
            parts.append(generate_latest(registry))
            self._scrapes.observe(time.perf_counter() - started)
        if not names:
            parts.append(generate_latest(self._process))
        return b"".join(parts)

    def _fleet(self) -> Fleet:
        """The fleet of the moment for OTLP; may be called from any thread but the event loop's."""
        from .otlp.devices import snapshot
        from .otlp.push import Fleet

        answers = self._ask(())
        with self._one_at_a_time:
            shown, known = self.live.hosts(), self.live.known()
            series = list(ServiceSeries(answers, shown, known, self.live, processes=self.processes).collect())
            uses = by_lease(shown, answers.leases or ())
            return Fleet(snapshot(shown), self.live.missing(), series, answers.leases, uses)

    def _ask(self, names: Sequence[str]) -> ServiceAnswers:
        """Query the services, unless only DCGM series are wanted."""
        assert self._loop is not None
        if names and all(name.startswith("DCGM_") for name in names):
            return ServiceAnswers()
        try:
            return asyncio.run_coroutine_threadsafe(self._ask_all(), self._loop).result(SERVICE_SECONDS + 1)
        except (TimeoutError, OSError) as error:
            log.warning("the services could not be queried: %s", error)
            return ServiceAnswers()

    async def _ask_all(self) -> ServiceAnswers:
        answers = await ask(self.client, self._known)
        self._known = [(each.service.value, each.instance) for each in answers.services]
        answers.services.append(self._door.health())
        return answers

    def answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """WSGI application: serves `/metrics`, `/-/healthy`, `/-/ready` and an index page."""
        path, method = environ.get("PATH_INFO", "/"), environ.get("REQUEST_METHOD", "GET")
        status, body, kind = "200 OK", b"", CONTENT_TYPE
        if method not in ("GET", "HEAD"):
            status, body = "405 Method Not Allowed", b"only GET and HEAD\n"
        elif path == "/metrics":
            wanted = parse_qs(environ.get("QUERY_STRING", ""))
            try:
                body = self.metrics(names=wanted.get("name[]", ()), hosts=wanted.get("host[]", ()))
            except Exception:
                # A scrape that fails is an error to Prometheus, never an empty fleet.
                log.exception("a scrape failed")
                status, body = "500 Internal Server Error", b"the scrape failed: see the exporter's log\n"
        elif path == "/-/healthy":
            if not self.client.nc.is_connected:
                status, body = "503 Service Unavailable", b"the bus is away\n"
            else:
                body = b"well\n"
        elif path == "/-/ready":
            reasons = self.unready()
            status, body = (
                ("503 Service Unavailable", "\n".join([*reasons, ""]).encode()) if reasons else (status, b"ready\n")
            )
        elif path == "/":
            body, kind = _INDEX, "text/html; charset=utf-8"
        else:
            status, body = "404 Not Found", b"there is /metrics\n"
        headers = [("Content-Type", kind)]
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", "") and len(body) > 1024:
            packer = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31)
            body = packer.compress(body) + packer.flush()
            headers.append(("Content-Encoding", "gzip"))
        headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return [] if method == "HEAD" else [body]


class _Server(ThreadingWSGIServer):
    """HTTP server whose threads end with the process."""

    daemon_threads = True


class _Server6(_Server):
    """HTTP server on an IPv6 address."""

    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    """Request handler that logs requests only at debug level: a scrape every few seconds is no news."""

    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request at debug level."""
        log.debug(format, *args)
