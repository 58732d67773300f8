"""`corral ps`: the processes on GPUs, with their leases."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from ...schemas.units import format_bytes
from .. import render
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
            return (await client.query(sql, limit=100_000, timeout=timeout, format="json")).dicts()

    found = run(work())
    if json:
        print_json({"processes": found})
    elif found:
        console().print(_table(found))
    else:
        console().print("[dim]no processes[/]")


def _table(found: list[dict[str, Any]]) -> Any:
    made = render.table(
        "HOST", "GPU", "PID", "USER", "PROCESS", "MEMORY", "SM", "LEASE", "OWNER", "CONCERN",
        right=("GPU", "PID", "MEMORY", "SM"),
    )  # fmt: skip
    for row in found:
        memory = row["memory_used_bytes"]
        made.add_row(
            escape(row["host"]), "" if row["gpu"] is None else str(row["gpu"]), str(row["pid"]),
            escape(row["user"] or ""), escape(row["process"] or ""), "–" if memory is None else format_bytes(memory),
            render.number(row["sm_utilization_percent"], "%"), escape(row["lease_id"] or "–"),
            escape(row["owner"] or ""), Text(row["concern"], "yellow"),
        )  # fmt: skip
    return made


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
