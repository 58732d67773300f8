"""`corral top`: a live view of the fleet, or a single report for scripts."""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.text import Text

from ...client.fleet_view import FleetSnapshot, FleetView, take_snapshot
from .. import render
from ..exits import USAGE, CommandError
from ..options import Hosts, Models, NatsUrl, connected, console, print_json, run
from .rows import HISTORY, SORTS, filter_and_sort, summary_line


def top(
    host: Hosts = None,
    model: Models = None,
    sort: Annotated[str, typer.Option("--sort", "-s", help=f"Sort by {', '.join(SORTS)}.")] = "host",
    filter: Annotated[
        str, typer.Option("--filter", "-f", metavar="WORDS", help="Only devices that match all words: 'h100 free'.")
    ] = "",
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="SECONDS", help="Refresh interval.", min=0.2, max=3600)
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print a report once.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a report once, as JSON.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="A live table without key bindings.")] = False,
    nats: NatsUrl = None,
) -> None:
    """Show the fleet live: devices, hosts, leases, the queue, and processes with their leases.

    Keys: s and r sort, / filters, Enter opens a device, d drains it, x ends a lease (releases your own, evicts that of
    another owner) after confirmation, Tab or 1 to 5 changes the view, q quits. In a pipe, a report is printed once.

    Examples:
      corral top
      corral top --model H100 --sort util
      corral top --filter 'node-7 leased'
      corral top --json | jq '[.devices[].power_watts] | add'
    """
    if sort not in SORTS:
        raise CommandError(f"--sort {sort!r}: use one of {', '.join(SORTS)}", USAGE)

    async def work() -> None:
        async with connected(nats) as client:
            if json or once or not sys.stdout.isatty():
                seen = await take_snapshot(client, host or (), model or ())
                seen.devices = filter_and_sort(seen.devices, sort, False, filter, seen.holders)
                if json:
                    print_json({"time": seen.time, "fleet": seen.fleet, "devices": seen.devices,
                                "leases": seen.leases, "queue": seen.queue})  # fmt: skip
                else:
                    console().print(page(seen))
                return
            view = FleetView(client, host or (), model or (), history=HISTORY)
            await view.refresh()
            if plain or not find_spec("textual"):
                await _live(view, sort, filter, interval)
            else:
                from .app import TopApp

                await TopApp(view, sort=sort, words=filter, interval=interval).run_async()

    run(work())


def page(seen: FleetSnapshot, most: int | None = None) -> Group:
    """Tables of one snapshot of the fleet, with at most `most` devices."""
    devices = seen.devices if most is None else seen.devices[:most]
    parts: list[Any] = [summary_line(seen), Text(), render.devices_table(devices, seen.holders, console().width)]
    if len(devices) < len(seen.devices):
        parts.append(Text(f"… and {len(seen.devices) - len(devices)} more devices", "dim"))
    if seen.leases:
        parts += [Text(), render.leases_table(seen.leases if most is None else seen.leases[:10], console().width)]
    for entry in seen.queue[:5]:
        parts.append(
            Text.from_markup(
                f"[yellow]queued[/] {entry.position}. {escape(entry.owner)} {escape(entry.name)} "
                f"({entry.gpus} GPUs, {render.duration(entry.waiting_seconds)}): {escape(entry.message)}"
            )
        )
    return Group(*parts)


async def _live(view: FleetView, sort: str, words: str, interval: float) -> None:
    from rich.live import Live

    out = console()
    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            await view.refresh()
            if view.last is not None:
                view.last.devices = filter_and_sort(view.last.devices, sort, False, words, view.last.holders)
                shown = page(view.last, most=max(5, out.height - 18))
                live.update(Group(Text(str(view.error), "red"), shown) if view.error else shown, refresh=True)
            await asyncio.sleep(view.pause_seconds(interval))
