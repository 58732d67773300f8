"""`corral serve-http`: the bus over HTTP."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer

from ...bus.addresses import network
from ..exits import FAILED, USAGE, CommandError
from ..options import NatsUrl, say
from .listening import TrustedProxy, host_and_port
from .logs import LogFormat, LogFormatOption, LogLevel, LogLevelOption, Verbose, configure
from .run_service import STOP_WITHIN, StopWithin, run_service, stop_seconds


def serve_http(
    listen: Annotated[
        str,
        typer.Option("--listen", envvar="CORRAL_LISTEN", metavar="HOST:PORT", help="Address and port to serve on."),
    ] = "127.0.0.1:8700",
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert", envvar="CORRAL_TLS_CERT", metavar="FILE", help="Certificate with its chain, for HTTPS."
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", envvar="CORRAL_TLS_KEY", metavar="FILE", help="Key of the certificate.")
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="Serve plain HTTP on an address that others can reach: behind a proxy that speaks TLS."
        ),
    ] = False,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="HOST", help="Host name that clients use; others are refused then. Repeatable."),
    ] = None,
    trusted_proxy: TrustedProxy = None,
    connections: Annotated[int, typer.Option("--connections", help="HTTP connections at a time.", min=8)] = 1000,
    callers: Annotated[
        int, typer.Option("--callers", help="Connections to the bus at a time, one for each token in use.", min=1)
    ] = 500,
    nats: NatsUrl = None,
    stop_within: StopWithin = STOP_WITHIN,
    log_format: LogFormatOption = LogFormat.AUTO,
    log_level: LogLevelOption = LogLevel.INFO,
    verbose: Verbose = False,
) -> None:
    """Serve the bus over HTTP, for those who can't speak NATS, until stopped.

    A caller's token is its credentials: `corral auth token NAME` prints it. The gateway has no rights of its own.

    Examples:
      corral serve-http
      corral serve-http --listen 0.0.0.0:8700 --tls-cert gate.crt --tls-key gate.key
      corral serve-http --listen 0.0.0.0:8700 --plain --name corral.example --trusted-proxy 10.0.0.5
    """
    identity = configure("gateway", log_format, log_level, verbose=verbose)
    within = stop_seconds(stop_within)
    host, port = host_and_port(listen, "127.0.0.1:8700")
    try:
        from ...gateway import server
        from ...gateway.settings import Settings, SettingsError

        proxies = tuple(network(text) for text in trusted_proxy or ())
    except ValueError as error:
        raise CommandError(str(error), USAGE) from error
    # At any level: uvicorn repeats parts of requests, where secrets could be.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    settings = Settings(
        host=host or "0.0.0.0",
        port=port,
        url=nats,
        names=tuple(name or ()),
        certificate=tls_cert,
        key=tls_key,
        plain=plain,
        trusted_proxies=proxies,
        connections=connections,
        callers=callers,
    )
    stop = asyncio.Event()
    try:
        run_service(
            server.serve(settings, lambda url: say(f"HTTP is served at {url}"), stop, identity.named), within, stop
        )
    except SettingsError as error:
        raise CommandError(str(error), USAGE) from error
    except server.PortTaken as error:
        raise CommandError(str(error), FAILED) from error
