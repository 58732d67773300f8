"""`corral health`: whether a part is well, by the exit code; for containers, units and scripts."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..client import Client, NoService, Unavailable
from ..schemas import bus
from .options import AsJson, NatsUrl, connected, print_json, run


class PartName(StrEnum):
    """What can be asked after."""

    BUS = "bus"
    COLLECTOR = "collector"
    PROCESSOR = "processor"
    PLANNER = "planner"


AGENT_SECONDS = 35.0
"""A collector reports on itself every 10 s: it is not well when three reports in a row are missing."""


def health(
    part: Annotated[PartName, typer.Argument(help="Which part.")],
    host: Annotated[
        str | None,
        typer.Option("--host", envvar="CORRAL_HOST", metavar="NAME", help="Of the collector; any by default."),
    ] = None,
    json: AsJson = False,
    nats: NatsUrl = None,
) -> None:
    """Whether a part is well: exit code 0, else 3 (no bus) or 6 (the part does not answer).

    Examples:
      corral health bus
      corral health planner
      corral health collector --host node-7
    """

    async def work() -> dict[str, Any]:
        async with connected(nats, timeout=3) as client:
            match part:
                case PartName.BUS:
                    await client.nc.jetstream().account_info()
                    return {"server": client.nc.connected_url.netloc if client.nc.connected_url else ""}
                case PartName.PLANNER:
                    summary = await client.fleet()
                    return {"planner": summary.planner, "devices": summary.devices}
                case PartName.PROCESSOR:
                    status = await client.history()
                    if status.paused:
                        raise NoService(f"the processor is paused: {status.paused}")
                    return {"processor": status.processor, "lag_messages": status.lag_messages}
                case PartName.COLLECTOR:
                    return await _collector(client, host)

    found = run(work())
    if json:
        print_json({"part": part.value, "well": True, **found})
    else:
        typer.echo(f"{part.value}: well ({', '.join(f'{name} {value}' for name, value in found.items())})")


async def _collector(client: Client, host: str | None) -> dict[str, Any]:
    """A collector is well when its last report is young."""
    from nats.js.errors import NotFoundError

    from ..schemas import codec
    from ..schemas.telemetry import AgentReport

    subject = bus.agent_subject(bus.host_token(host) if host else "*")
    try:
        message = await client.nc.jetstream().get_last_msg(bus.TELEMETRY_STREAM, subject)
    except NotFoundError:
        raise NoService(f"no collector{f' of {host}' if host else ''} has reported yet") from None
    except TimeoutError as error:
        raise Unavailable("the bus keeps no streams: is JetStream on?") from error
    report = codec.decode(message.data or b"", AgentReport)
    age = time.time() - report.time_ns / 1e9
    if age > AGENT_SECONDS:
        raise NoService(f"the collector of {report.host} has not reported for {age:.0f} s")
    return {"host": report.host, "source": report.source, "age_seconds": round(age, 1)}
