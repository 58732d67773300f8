"""`corral export`: the whole fleet for Prometheus, and over OTLP."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ...bus.tasks import cancel_all
from ...schemas.values.units import parse_seconds
from ..exits import FAILED, USAGE, CommandError
from ..options import NatsUrl, say
from .listening import host_and_port
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds

if TYPE_CHECKING:
    from ...exporter import Exporter, Family
    from ...exporter.otlp.settings import OtlpSettings
    from ...exporter.processes import Shown

log = logging.getLogger("corral.exporter")

OTLP_PANEL: Final = "OTLP"
OtlpUrl = Annotated[
    str | None,
    typer.Option(
        "--otlp",
        envvar="CORRAL_OTLP",
        metavar="URL",
        help="Send the metrics to an OTLP receiver, too, such as http://collector:4317. "
        "Without it OTEL_EXPORTER_OTLP_ENDPOINT, if set.",
        rich_help_panel=OTLP_PANEL,
    ),
]
OtlpProtocol = Annotated[
    str | None,
    typer.Option(
        "--otlp-protocol",
        envvar="CORRAL_OTLP_PROTOCOL",
        metavar="PROTOCOL",
        help="grpc or http/protobuf. Without it OTEL_EXPORTER_OTLP_PROTOCOL; else grpc for port 4317.",
        rich_help_panel=OTLP_PANEL,
    ),
]
OtlpHeaders = Annotated[
    list[str] | None,
    typer.Option(
        "--otlp-header",
        metavar="KEY=VALUE",
        help="Header of each request; may be repeated. Put secrets into OTEL_EXPORTER_OTLP_HEADERS instead.",
        rich_help_panel=OTLP_PANEL,
    ),
]
OtlpInterval = Annotated[
    str | None,
    typer.Option(
        "--otlp-interval",
        envvar="CORRAL_OTLP_INTERVAL",
        metavar="TIME",
        help="Time between two sendings. Without it OTEL_METRIC_EXPORT_INTERVAL; else 60s.",
        rich_help_panel=OTLP_PANEL,
    ),
]
OtlpMetrics = Annotated[
    str,
    typer.Option(
        "--otlp-metrics",
        envvar="CORRAL_OTLP_METRICS",
        metavar="NAMES",
        help="Device metrics to send: all, default, or a comma-separated list of globs.",
        rich_help_panel=OTLP_PANEL,
    ),
]
OtlpLeaseIds = Annotated[
    bool,
    typer.Option(
        "--otlp-lease-ids",
        envvar="CORRAL_OTLP_LEASE_IDS",
        help="Add ids of leases and jobs to corral.device.lease.*: a new series for each.",
        rich_help_panel=OTLP_PANEL,
    ),
]


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
    processes: Annotated[
        str,
        typer.Option(
            "--processes",
            envvar="CORRAL_EXPORT_PROCESSES",
            metavar="WHICH",
            help="Use of devices by processes: leases sums it up by lease, all adds the largest processes, none.",
        ),
    ] = "leases",
    otlp: OtlpUrl = None,
    otlp_protocol: OtlpProtocol = None,
    otlp_header: OtlpHeaders = None,
    otlp_interval: OtlpInterval = None,
    otlp_metrics: OtlpMetrics = "default",
    otlp_lease_ids: OtlpLeaseIds = False,
    nats: NatsUrl = None,
    stop_within: StopWithin = STOP_WITHIN,
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    verbose: Verbose = False,
) -> None:
    """Serve the metrics of the whole fleet for Prometheus, and send them over OTLP, until stopped.

    Examples:
      corral export
      corral export --listen 0.0.0.0:9400 --metrics default
      corral export --metrics 'default,DCGM_FI_DEV_ECC_*,corral_nvlink_*'
      corral export --otlp http://127.0.0.1:4317 --otlp-interval 15s

    Names and labels of devices' series are dcgm-exporter's: boards and alerts made for it work as they are.
    """
    from ...exporter import choose
    from ...exporter.otlp import settings as otlp_settings
    from ...exporter.processes import Shown

    identity = configure("exporter", log_format, log_level, verbose=verbose)
    within = stop_seconds(stop_within)
    host, port = host_and_port(listen, "127.0.0.1:9400")
    try:
        families = choose([word for word in (part.strip() for part in metrics.split(",")) if word])
        seconds = parse_seconds(forget)
        if otlp_protocol not in (None, *otlp_settings.Protocol):
            raise ValueError(f"--otlp-protocol is grpc or http/protobuf, not {otlp_protocol}")
        sending = otlp_settings.read(
            otlp,
            None if otlp_protocol is None else otlp_settings.Protocol(otlp_protocol),
            otlp_header or (),
            otlp_interval,
            otlp_metrics,
            os.environ,
            lease_ids=otlp_lease_ids,
        )
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    if sending is not None and otlp is None and not _has_otlp():
        # The variable may be there for other programs.
        log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but OTLP needs pip install 'corral[otlp]': nothing is sent")
        sending = None
    if processes not in tuple(Shown):
        raise CommandError(f"--processes is leases, all or none, not {processes}", USAGE)
    if seconds <= 0:
        raise CommandError("--forget wants a time above 0, such as 60s", USAGE)
    stop = asyncio.Event()
    shown = Shown(processes)
    work = _serve(nats, host or "0.0.0.0", port, families, seconds, sending, shown, stop, identity.named)
    run_service(work, within, stop)


def _has_otlp() -> bool:
    """True if the libraries of the extra `otlp` are installed."""
    try:
        return all(metadata.version(f"opentelemetry-exporter-otlp-proto-{way}") for way in ("grpc", "http"))
    except metadata.PackageNotFoundError:
        return False


async def _serve(
    nats: str | None,
    host: str,
    port: int,
    families: Sequence[Family],
    forget_seconds: float,
    otlp: OtlpSettings | None,
    processes: Shown,
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
        try:
            exporter = Exporter(client, families, forget_seconds=forget_seconds, otlp=otlp, processes=processes)
        except ValueError as error:  # the library's own reading of its variables
            raise CommandError(
                f"OTLP can't be set up from the variables OTEL_EXPORTER_OTLP_…: {error}", USAGE
            ) from error
        exporters.append(exporter)
        named(exporter.instance)
        try:
            port = await exporter.start(host, port)
        except OSError as error:
            raise CommandError(f"can't listen on {host}:{port}: {error.strerror or error}", FAILED) from error
        shown = f"[{host}]" if ":" in host else host
        say(f"metrics are at http://{shown}:{port}/metrics")
        if otlp is not None:
            say(f"metrics go to {otlp.shown} over {otlp.protocol.value}, every {otlp.interval_seconds:g} s")

        async def after_outages() -> None:
            while True:
                await again.wait()
                again.clear()
                await exporter.live.catch_up()

        catching_up = asyncio.create_task(after_outages())
        await stopped.wait()
        await cancel_all([catching_up])
        await exporter.stop()
