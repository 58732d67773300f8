"""`corral export`: the whole fleet for Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ...schemas.units import parse_seconds
from ..exits import FAILED, USAGE, CommandError
from ..options import NatsUrl, say
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

if TYPE_CHECKING:
    from ...exporter import Exporter, Family


def export(
    listen: Annotated[
        str,
        typer.Option(
            "--listen", envvar="CORRAL_LISTEN", metavar="HOST:PORT", help="Address and port to serve /metrics on."
        ),
    ] = "127.0.0.1:9400",
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            envvar="CORRAL_METRICS",
            metavar="NAMES",
            help="Device metrics: all, default (dcgm-exporter's), or a comma-separated list of globs.",
        ),
    ] = "all",
    forget: Annotated[
        str,
        typer.Option(
            "--forget",
            envvar="CORRAL_FORGET",
            metavar="TIME",
            help="Drop a host's series after this time without samples.",
        ),
    ] = "60s",
    nats: NatsUrl = None,
    stop_within: StopWithin = STOP_WITHIN,
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    verbose: Verbose = False,
) -> None:
    """Serve the metrics of the whole fleet for Prometheus, until stopped.

    Examples:
      corral export
      corral export --listen 0.0.0.0:9400 --metrics default
      corral export --metrics 'default,DCGM_FI_DEV_ECC_*,corral_nvlink_*'

    Names and labels of devices' series are dcgm-exporter's: boards and alerts made for it work as they are.
    """
    from ...exporter import choose

    identity = configure("exporter", log_format, log_level, verbose=verbose)
    within = stop_seconds(stop_within)
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise CommandError(f"--listen wants HOST:PORT, such as 127.0.0.1:9400, not {listen!r}", USAGE)
    try:
        families = choose([word for word in (part.strip() for part in metrics.split(",")) if word])
        seconds = parse_seconds(forget)
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    if seconds <= 0:
        raise CommandError("--forget wants a time above 0, such as 60s", USAGE)
    stop = asyncio.Event()
    work = _serve(nats, host.strip("[]") or "0.0.0.0", int(port), families, seconds, stop, identity.named)
    run_service(work, within, stop)


async def _serve(
    nats: str | None,
    host: str,
    port: int,
    families: Sequence[Family],
    forget_seconds: float,
    stopped: asyncio.Event,
    named: Callable[[str], None],
) -> None:
    from ...client import connect
    from ...exporter import Exporter

    again = asyncio.Event()

    async def reconnected() -> None:
        again.set()

    exporters: list[Exporter] = []

    async def disconnected() -> None:
        for exporter in exporters:
            exporter.live.away()

    async with connect(
        nats, name="corral-exporter", timeout=3, patience=0, reconnected_cb=reconnected, disconnected_cb=disconnected
    ) as client:
        exporter = Exporter(client, families, forget_seconds=forget_seconds)
        exporters.append(exporter)
        named(exporter.instance)
        try:
            port = await exporter.start(host, port)
        except OSError as error:
            raise CommandError(f"can't listen on {host}:{port}: {error.strerror or error}", FAILED) from error
        shown = f"[{host}]" if ":" in host else host
        say(f"metrics are at http://{shown}:{port}/metrics")

        async def after_outages() -> None:
            while True:
                await again.wait()
                again.clear()
                await exporter.live.catch_up()

        catching_up = asyncio.create_task(after_outages())
        await stopped.wait()
        catching_up.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await catching_up
        await exporter.stop()
