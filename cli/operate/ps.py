"""`corral ps`: the processes on GPUs, with their leases."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer
from rich.text import Text

from .. import render
from ..fitting import Heading, fitted
from ..options import AsJson, Hosts, NatsUrl, Timeout, connected, console, print_json, run

_COLUMNS = (
    "host, gpu, model, device, pid, user, process, kind, container, memory_used_bytes, sm_utilization_percent, "
    "lease_id, owner, name, memory_granted_bytes, concern, time"
)


def ps(
    host: Hosts = None,
    lease: Annotated[str | None, typer.Option("--lease", metavar="ID", help="Only processes under this lease.")] = None,
    concern: Annotated[
        bool,
        typer.Option("--concern", "-c", help="Only lease violations: without a lease, or more memory than granted."),
    ] = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """List the processes on GPUs, the lease of each, and lease violations.

    Reads the view processes_now, so a processor must be running. The view lease_violations has past violations.

    Examples:
      corral ps
      corral ps --host 'node-7*' --concern
      corral ps --json
    """
    wanted = ["true"]
    if host:
        wanted.append("(" + " OR ".join(f"host GLOB {_text(one)}" for one in host) + ")")
    if lease:
        wanted.append(f"lease_id = {_text(lease)}")
    if concern:
        wanted.append("concern <> ''")
    sql = f"SELECT {_COLUMNS} FROM processes_now WHERE {' AND '.join(wanted)} ORDER BY host, gpu, device, pid"

    async def work() -> list[dict[str, Any]]:
        async with connected(nats, timeout=timeout) as client:
            return (await client.query(sql, timeout=timeout, format="json")).dicts()

    found = run(work())
    if json:
        print_json({"processes": found})
    elif found:
        console().print(fitted(_HEADINGS, map(_cells, found), console().width))
    else:
        console().print("[dim]no processes[/]")


_HEADINGS: Final = (
    Heading(title="HOST"),
    Heading(title="GPU", right=True),
    Heading(title="OWNER", text=True, ample=16),
    Heading(title="NAME", text=True, last=2, ample=20),
    Heading(title="USER", text=True, ample=16),
    Heading(title="PROCESS", text=True),
    Heading(title="PID", right=True, spare=1),
    Heading(title="GiB", right=True),
    Heading(title="SM %", right=True, last=3),
    Heading(title="CONCERN", text=True),
    Heading(title="LEASE", spare=2),
)


def _cells(row: dict[str, Any]) -> list[Text | str]:
    memory = row["memory_used_bytes"]
    return [
        row["host"],
        "" if row["gpu"] is None else str(row["gpu"]),
        row["owner"] or "–",
        row["name"] or "",
        row["user"] or "",
        row["process"] or "",
        str(row["pid"]),
        "–" if memory is None else render.gib(memory),
        render.number(row["sm_utilization_percent"]),
        Text(row["concern"], "yellow"),
        row["lease_id"] or "–",
    ]


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
