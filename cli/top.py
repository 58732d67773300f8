"""`corral top`: the fleet, live; or one look at it, for scripts."""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.text import Text

from ..schemas.units import format_bytes
from . import render
from .board import SORTS, Board, Look, look, picked, sparkline
from .exits import USAGE, CommandError
from .fleet import Hosts, Models
from .options import NatsUrl, connected, console, print_json, run


def top(
    host: Hosts = None,
    model: Models = None,
    sort: Annotated[str, typer.Option("--sort", "-s", help=f"By {', '.join(SORTS)}.")] = "host",
    filter: Annotated[
        str, typer.Option("--filter", "-f", metavar="WORDS", help="Only devices with all of them: 'h100 free'.")
    ] = "",
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="SECONDS", help="Between looks.", min=0.2, max=3600)
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it once, as JSON.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="A live table without keys.")] = False,
    nats: NatsUrl = None,
) -> None:
    """The fleet, live: devices, hosts, leases, who waits, and processes with their leases.

    Sort with s and r, filter with /, open a device with Enter, drain it with d, end a lease with x (yours is released,
    another's evicted; you are asked first), leave with q. Tab or 1 to 5 changes the view. In a pipe it prints once.

    Examples:
      corral top
      corral top --model '*H100*' --sort util
      corral top --filter 'node-7 leased'
      corral top --json | jq '[.devices[].power_watts] | add'
    """
    if sort not in SORTS:
        raise CommandError(f"--sort {sort!r}: use one of {', '.join(SORTS)}", USAGE)

    async def work() -> None:
        async with connected(nats) as client:
            if json or once or not sys.stdout.isatty():
                seen = await look(client, host or (), model or ())
                seen.devices = picked(seen.devices, sort, False, filter)
                if json:
                    print_json({"time": seen.time, "fleet": seen.fleet, "devices": seen.devices,
                                "leases": seen.leases, "queue": seen.queue})  # fmt: skip
                else:
                    console().print(page(seen))
                return
            board = Board(client, host or (), model or ())
            await board.refresh()
            if plain or not find_spec("textual"):
                await _live(board, sort, filter, interval)
            else:
                from .top_app import TopApp

                await TopApp(board, sort=sort, words=filter, interval=interval).run_async()

    run(work())


def summary_line(seen: Look, past: Any = ()) -> Text:
    """The fleet in one line."""
    fleet = seen.fleet
    line = Text()
    line.append(f"{fleet.devices} GPUs", "bold").append(f" on {fleet.hosts} hosts")
    unusable = fleet.devices - fleet.usable_devices
    line.append(f" · {fleet.leased_devices} leased")
    if fleet.in_use_devices:
        line.append(f" · {fleet.in_use_devices} in use without a lease", "magenta")
    if unusable:
        line.append(f" · {unusable} unusable", "red")
    if fleet.utilization_percent_mean is not None:
        line.append(f" · util {fleet.utilization_percent_mean:.0f}%")
        if past:
            line.append(f" {sparkline(past, min(len(past), 12))}", "green")
    line.append(f" · {format_bytes(fleet.memory_used_bytes)} of {format_bytes(fleet.memory_total_bytes)}")
    if fleet.power_watts_total is not None:
        line.append(f" · {fleet.power_watts_total / 1000:.1f} kW")
    if fleet.waiting_requests:
        line.append(f" · {fleet.waiting_requests} waiting", "yellow")
    return line


def page(seen: Look, most: int | None = None) -> Group:
    """One look as tables; at most so many devices."""
    devices = seen.devices if most is None else seen.devices[:most]
    parts: list[Any] = [summary_line(seen), Text(), render.devices_table(devices)]
    if len(devices) < len(seen.devices):
        parts.append(Text(f"… and {len(seen.devices) - len(devices)} more devices", "dim"))
    if seen.leases:
        parts += [Text(), render.leases_table(seen.leases if most is None else seen.leases[:10])]
    for entry in seen.queue[:5]:
        parts.append(
            Text.from_markup(
                f"[yellow]waits[/] {entry.position}. {escape(entry.owner)} {escape(entry.name)} "
                f"({entry.gpus} GPUs, {render.duration(entry.waiting_seconds)}): {escape(entry.message)}"
            )
        )
    return Group(*parts)


async def _live(board: Board, sort: str, words: str, interval: float) -> None:
    from rich.live import Live

    out = console()
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            await board.refresh()
            if board.last is not None:
                board.last.devices = picked(board.last.devices, sort, False, words)
                shown = page(board.last, most=max(5, out.height - 18))
                live.update(Group(Text(board.error, "red"), shown) if board.error else shown, refresh=True)
            await asyncio.sleep(board.pause(interval))
