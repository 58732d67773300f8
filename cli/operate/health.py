"""`corral health`: a health check of services, with the result as exit code, for containers, units and scripts."""

from __future__ import annotations

import socket
import time
from enum import StrEnum
from typing import Annotated

import typer
from rich.markup import escape

from ...client import Client, NoService, Unavailable
from ...client.health import ask_health
from ...schemas import subjects
from ...schemas.health import ServiceHealth
from ..exits import NO_SERVICE
from ..options import AsJson, NatsUrl, connected, console, print_json, run


class PartName(StrEnum):
    """Parts whose health can be checked."""

    BUS = "bus"
    COLLECTOR = "collector"
    RUNNER = "runner"
    PROCESSOR = "processor"
    PLANNER = "planner"
    EXPORTER = "exporter"
    DASHBOARD = "dashboard"
    NOTIFIER = "notifier"
    GATEWAY = "gateway"
    LOGIN = "login"


AGENT_SECONDS = 35.0
"""Maximum age of a collector's last report. It reports every 10 s, so three missing reports mean it is unhealthy."""


def health(
    part: Annotated[PartName | None, typer.Argument(help="Service to check. Default: all that answer.")] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", envvar="CORRAL_HOST", metavar="NAME", help="Host of the collector or runner. Default: any."
        ),
    ] = None,
    here: Annotated[
        bool,
        typer.Option("--here", help="Only services on this machine or in this container; all of them must be ready."),
    ] = False,
    json: AsJson = False,
    nats: NatsUrl = None,
) -> None:
    """Run health checks: exit code 0 if healthy, 3 without a bus, 6 without an answer or if not ready (with reasons).

    One planner must lead. Of other services, one must be ready, or the collector or runner of --host.

    Examples:
      corral health                              everything that answers
      corral health planner
      corral health planner --here               in a container: this one leads or stands by
      corral health collector --host node-7
    """
    if part is PartName.BUS:
        server = run(_bus(nats))
        print_json({"part": "bus", "well": True, "server": server}) if json else typer.echo(f"bus: well ({server})")
        return
    found = run(_ask(part, host, here, nats))
    if part is None:
        if json:
            print_json({"well": all(each.ready for each in found), "services": found})
        else:
            _show(found)
        if not all(each.ready for each in found):
            raise typer.Exit(NO_SERVICE)
        return
    ready = [each for each in found if each.ready]
    if here and len(ready) < len(found):
        ready = []
    if part is PartName.PLANNER and not here:
        ready = [each for each in ready if each.role == "leader"]
    if not ready:
        raise NoService(f"{part.value}: not ready: " + "; ".join(_words(each) for each in found))
    if json:
        print_json({"part": part.value, "well": True, "services": found})
    else:
        typer.echo(f"{part.value}: well ({', '.join(_words(each) for each in ready)})")


def _words(health: ServiceHealth) -> str:
    """Description of an instance in one line: name, role, host and the reasons why it isn't ready."""
    role = f" {health.role}" if health.role else ""
    why = f": {', '.join(health.reasons)}" if health.reasons else ""
    return f"{health.instance}{role} on {health.host}{why}"


def _show(found: list[ServiceHealth]) -> None:
    from ..render import duration, table

    shown = table("service", "instance", "role", "host", "version", "up for", "state")
    now = time.time()
    for each in found:
        up = duration(now - each.started_at.timestamp()) if each.started_at else "–"
        state = "[green]ready[/green]" if each.ready else f"[red]{escape('; '.join(each.reasons))}[/red]"
        cells = (each.service.value, each.instance, each.role, each.host, each.corral_version, up)
        shown.add_row(*(escape(cell) for cell in cells), state)
    console().print(shown)


async def _bus(nats: str | None) -> str:
    async with connected(nats, timeout=3) as client:
        await client.nc.jetstream().account_info()
        return client.nc.connected_url.netloc if client.nc.connected_url else ""


async def _ask(part: PartName | None, host: str | None, here: bool, nats: str | None) -> list[ServiceHealth]:
    async with connected(nats, timeout=3) as client:
        if part is PartName.COLLECTOR:
            found = await ask_health(client.nc, part.value, host and subjects.host_token(host))
            if not found and not here:
                return [await _reported(client, host)]
        else:
            instance = subjects.host_token(host) if part is PartName.RUNNER and host else None
            found = await ask_health(client.nc, None if part is None else part.value, instance)
    if here:
        found = [each for each in found if each.host == socket.gethostname()]
    if not found:
        what = "no service" if part is None else f"no {part.value}"
        raise NoService(f"{what}{f' of {host}' if host else ''} answers{' on this machine' if here else ''}")
    return found


async def _reported(client: Client, host: str | None) -> ServiceHealth:
    """Health of a collector that doesn't answer (an older version, for example), by the age of its last report."""
    from nats.js.errors import NotFoundError

    from ...bus import stream_reader
    from ...schemas import codec
    from ...schemas.instruments import ServiceKind
    from ...schemas.telemetry import AgentReport

    subject = subjects.agent_subject(subjects.host_token(host) if host else "*")
    try:
        message = await stream_reader.last(client.nc, subjects.TELEMETRY_STREAM, subject)
    except (NotFoundError, TimeoutError) as error:
        raise Unavailable("the bus keeps no streams: is JetStream enabled?") from error
    if message is None:
        raise NoService(f"no collector{f' of {host}' if host else ''} has reported yet")
    report = codec.decode(message.data, AgentReport)
    # The later of the collector's time and the bus's time, since one of the clocks may be wrong.
    age = time.time() - max(report.time_ns / 1e9, message.stored_at)
    reasons = [f"it has not reported for {age:.0f} s"] if age > AGENT_SECONDS else []
    return ServiceHealth(
        service=ServiceKind.COLLECTOR,
        instance=report.host,
        host=report.host,
        ready=not reasons,
        reasons=reasons,
        corral_version=report.corral_version,
    )
