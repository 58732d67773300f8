"""`corral reserve`: book devices for a time, list what is booked, and cancel it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import typer
from rich.markup import escape

from ...schemas.values.units import parse_seconds
from ...schemas.work.windows import LEAD_SECONDS, Repeat, Window, Windows, WindowState, WindowStatus, format_gpus
from ..clock_times import FORMS, Zone, parse_last_day, parse_time, zone_of
from ..exits import USAGE, CommandError
from ..fitting import Heading, fitted
from ..options import AsJson, Models, NatsUrl, Timeout, connected, console, print_json, run

reserve = typer.Typer(rich_markup_mode="rich", add_completion=False)

ZoneName = Annotated[
    str | None, typer.Option("--zone", metavar="ZONE", help="Time zone, such as Europe/Berlin. Default: this host's.")
]
From = Annotated[str | None, typer.Option("--from", metavar="TIME", help=f"Begin: {FORMS}.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be booked.")]
Lead = Annotated[
    str, typer.Option("--lead", metavar="TIME", help="Leases of before have ended so long ahead of each begin.")
]
DEFAULT_LEAD: Final = f"{LEAD_SECONDS:g}s"


@reserve.callback(invoke_without_command=True)
def book(
    ctx: typer.Context,
    gpus: Annotated[int, typer.Option("--gpus", "-g", help="Number of GPUs.")] = 1,
    begin: From = None,
    length: Annotated[str | None, typer.Option("--for", metavar="TIME", help="Duration: 4h, 30m.")] = None,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="TIME", help="End, instead of --for; with --repeat, the last day."),
    ] = None,
    owner: Annotated[
        list[str] | None, typer.Option("--owner", metavar="NAME", help="Owner whom it is for. Repeatable.")
    ] = None,
    group: Annotated[str | None, typer.Option("--group", metavar="NAME", help="Group whom it is for.")] = None,
    model: Models = None,
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="GLOB", help="Hosts to choose from. Repeatable.")
    ] = None,
    repeat: Annotated[Repeat, typer.Option("--repeat", help="Repeat it by the clocks of the zone.")] = Repeat.NONE,
    lead: Lead = DEFAULT_LEAD,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Reason, which users see.")] = "",
    zone: ZoneName = None,
    dry_run: DryRun = False,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Book GPUs for a time. They are free when it begins, and for its owners alone until it ends.

    The planner chooses the GPUs now. Until the begin they take only leases that end in time, by their time limit
    (--max). Without enough GPUs the booking is rejected, and the answer says when there are.

    Examples:
      corral reserve --gpus 8 --model H100 --from 'mon 08:00' --for 4h --group lab/vision --reason course
      corral reserve --gpus 2 --from +1h --for 30m --owner ann --reason demo --dry-run
      corral reserve --gpus 8 --from 'mon 08:00' --for 4h --owner ann --repeat weekly --until 2027-01-31 --reason course
      corral reserve list
    """
    if ctx.invoked_subcommand is not None:
        return
    if begin is None or not (owner or group):
        raise CommandError("say from when, and for whom: --from, and --owner or --group", USAGE)
    here, now = zone_of(zone), datetime.now(UTC)
    starts_at = parse_time(begin, here, now, "--from")
    repeats = repeat is not Repeat.NONE
    if repeats and (until is None or length is None):
        raise CommandError("a window that repeats needs --for, and --until with its last day", USAGE)
    window = Window(
        starts_at=starts_at,
        ends_at=_end(starts_at, length, None if repeats else until, here),
        repeat=repeat,
        repeat_until=parse_last_day(until, here, now, "--until") if repeats and until else None,
        zone=here.name if repeats else "UTC",
        gpus=gpus,
        models=model or [],
        hosts=host or [],
        owners=owner or [],
        group=group,
        lead_seconds=_seconds(lead, "--lead"),
        reason=reason,
    )
    show([_booked(window, dry_run, nats, timeout)], here, json)


@reserve.command("list")
def listing(
    owner: Annotated[str | None, typer.Option("--owner", metavar="NAME", help="Only windows for this owner.")] = None,
    zone: ZoneName = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """List what is booked, soonest first: GPUs for owners or groups, and maintenance.

    GPUs that failed, were drained or lost since are listed with those in their place, or as missing.

    Examples:
      corral reserve list
      corral reserve list --owner ann --json
    """

    async def work() -> list[WindowStatus]:
        async with connected(nats, timeout=timeout) as client:
            return await client.windows(owner=owner)

    show(run(work()), zone_of(zone), json)


@reserve.command()
def cancel(
    window_id: Annotated[str, typer.Argument(metavar="WINDOW", help="Id of the window.")],
    zone: ZoneName = None,
    json: AsJson = False,
    nats: NatsUrl = None,
    timeout: Timeout = 10.0,
) -> None:
    """Cancel a booked window, or maintenance, with all times at which it repeats.

    Examples:
      corral reserve cancel 4f1c09aa
    """

    async def work() -> WindowStatus:
        async with connected(nats, timeout=timeout) as client:
            return await client.cancel_window(window_id)

    show([run(work())], zone_of(zone), json, canceled=True)


def maintain(
    hosts: Sequence[str],
    devices: Sequence[str],
    labels: dict[str, str],
    *,
    begin: str | None,
    until: str | None,
    reason: str,
    zone: str | None,
    json: bool,
    nats: str | None,
    timeout: float,
) -> None:
    """Book maintenance: a time with nobody on some hosts or devices."""
    if until is None:
        raise CommandError("say until when: --until", USAGE)
    here, now = zone_of(zone), datetime.now(UTC)
    starts_at = parse_time(begin or "now", here, now, "--from")
    window = Window(
        starts_at=starts_at,
        ends_at=_end(starts_at, None, until, here),
        hosts=list(hosts),
        devices=list(devices),
        host_labels=labels,
        maintenance=True,
        reason=reason,
    )
    show([_booked(window, False, nats, timeout)], here, json)


def _booked(window: Window, dry_run: bool, nats: str | None, timeout: float) -> WindowStatus:
    async def work() -> WindowStatus:
        async with connected(nats, timeout=timeout) as client:
            return await client.book(window, dry_run=dry_run)

    return run(work())


def _end(starts_at: datetime, length: str | None, until: str | None, zone: Zone) -> datetime:
    """End of a window, from its duration or its end."""
    if (length is None) == (until is None):
        raise CommandError("say either how long, or until when: --for, or --until", USAGE)
    if length is not None:
        return starts_at + timedelta(seconds=_seconds(length, "--for"))
    # A time of day is the next one after the begin.
    return parse_time(until or "", zone, starts_at, "--until")


def _seconds(text: str, option: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise CommandError(f"{option}: {error}", USAGE) from None


def show(found: Sequence[WindowStatus], zone: Zone, json: bool, *, canceled: bool = False) -> None:
    """Print windows, with the leases that may reach into them."""
    if json:
        print_json(Windows(windows=list(found)))
        return
    if not found:
        console().print("[dim]nothing is booked[/]")
        return
    rows: list[Sequence[str]] = []
    for status in found:
        window = status.window
        starts_at, ends_at = status.starts_at or window.starts_at, status.ends_at or window.ends_at
        rows.append(
            (
                _who(window),
                format_gpus(status),
                " ".join(status.hosts),
                zone.words(starts_at),
                _later(starts_at, ends_at, zone),
                _repeats(window, status, zone),
                "canceled" if canceled else status.state.value,
                window.reason,
                window.window_id or "",
            )
        )
    console().print(fitted(_WINDOWS, rows, console().width))
    for status in [] if canceled else found:
        _print_changes(status, zone)
    for status in found:
        for lease in status.leases if not canceled and status.state is not WindowState.OVER else ():
            ends = f"ends {zone.words(lease.ends_at)}" if lease.ends_at else "has no time limit"
            after = "it is preempted before" if lease.preempted else ends
            console().print(
                f"[yellow]{escape(lease.lease_id)}[/] of {escape(lease.owner)}"
                f"{f' ({escape(lease.name)})' if lease.name else ''} on {escape(' '.join(lease.hosts))} may still run "
                f"when {escape(status.window.window_id or '')} begins: {after}"
            )


_WINDOWS: Final = (
    Heading(title="FOR", text=True, ample=16),
    Heading(title="GPUS", right=True),
    Heading(title="HOSTS", text=True, spare=2, ample=24),
    Heading(title="FROM"),
    Heading(title="UNTIL", last=2),
    Heading(title="REPEATS", text=True, spare=1, ample=24),
    Heading(title="STATE"),
    Heading(title="REASON", text=True, last=1, ample=16),
    Heading(title="WINDOW"),
)


def _later(starts_at: datetime, ends_at: datetime, zone: Zone) -> str:
    """The end of a window: on the day on which it begins, the time of day alone."""
    days = [at.astimezone(zone.rules).date() for at in (starts_at, ends_at)]
    words = zone.words(ends_at)
    return words if days[0] != days[1] else words.split(" ", 2)[2]


def _print_changes(status: WindowStatus, zone: Zone) -> None:
    """Print which GPUs of a window are missing, and which were replaced."""
    name = escape(status.window.window_id or "")
    for one in status.replaced:
        console().print(
            f"[cyan]{name}[/] has {escape(one.by_device)} on {escape(one.by_host)} in place of {escape(one.device)}"
            f"{_on(one.host)}, since {zone.words(one.time)}: {escape(one.reason)}"
        )
    for one in status.missing:
        console().print(
            f"[red]{name}[/] is short of {escape(one.device)}{_on(one.host)}: {escape(one.reason)}. "
            "It gets another as soon as one is free"
        )


def _on(host: str) -> str:
    return f" on {escape(host)}" if host else ""


def _who(window: Window) -> str:
    if window.maintenance:
        return "maintenance"
    return " ".join([*([window.group] if window.group else []), *window.owners])


def _repeats(window: Window, status: WindowStatus, zone: Zone) -> str:
    if window.repeat is Repeat.NONE or window.repeat_until is None:
        return ""
    return f"{window.repeat.value}, {status.occurrences} left, to {zone.words(window.repeat_until)}"
