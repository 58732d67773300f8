"""Text tables of leases, devices and reasons for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..client.fleet_view import DeviceState
from ..client.fleet_view import device_state as state_of
from ..client.notebook import short_model
from ..schemas import operations, requests
from ..schemas.values import units
from ..schemas.values.units import format_bytes
from .clock_times import zone_of
from .exits import CommandError
from .fitting import Heading, fitted

_BAR = " ▏▎▍▌▋▊▉█"


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An unboxed table; `right` names the columns of numbers."""
    made = Table(box=None, header_style="bold dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", no_wrap=True, overflow="ellipsis")
    return made


def bar(percent: float | None, width: int = 8) -> Text:
    """A percentage as a bar, colored from green to red; dots if it is None."""
    if percent is None:
        return Text("·" * width, style="dim")
    share = max(0.0, min(percent, 100.0)) / 100 * width
    full, part = int(share), int((share % 1) * 8)
    filled = ("█" * full + (_BAR[part] if full < width and part else "")).ljust(width)
    style = "red" if percent >= 90 else "yellow" if percent >= 70 else "green"
    return Text(filled, style=f"{style} on grey23")


def gib(value: int) -> str:
    """A number of bytes in GiB, for columns that name the unit."""
    return f"{value / 2**30:.1f}"


def number(value: float | None, unit: str = "", digits: int = 0) -> str:
    """A measured value, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Format seconds as `45s`, `12m`, `3h05m` or `2d4h`."""
    return units.format_seconds(seconds)


def starts(entry: operations.QueueEntry, now: datetime | None = None) -> str:
    """Expected start of a queued request and the interval that holds 80 % of such starts, as `12m (3m to 40m)`.

    `–` if no forecast was made yet, or nothing can be said.
    """
    forecast = entry.forecast
    if forecast is None or forecast.expected_start is None:
        return "–"
    now = now or datetime.now(UTC)
    times = (forecast.expected_start, forecast.earliest_start, forecast.latest_start)
    expected, first, last = ("?" if at is None else duration((at - now).total_seconds()) for at in times)
    return f"{expected} ({first} to {last})"


def left(lease: requests.Lease, now: datetime | None = None) -> str:
    """Time until a lease expires, or ends by preemption, formatted by `duration`."""
    ends_at = lease.expires_at if lease.preemption is None else min(lease.expires_at, lease.preemption.ends_at)
    return duration((ends_at - (now or datetime.now(UTC))).total_seconds())


def device_state(device: operations.DeviceStatus) -> Text:
    """State of a device, colored: its availability, or the reason why it takes no work."""
    if device.usable:
        throttled = ", throttled" if device.throttled else ""
        if device.leases:
            share = "leased" if device.share_free <= 0 else f"{1 - device.share_free:.0%} leased"
            return Text(share + throttled, style="cyan")
        if device.in_use:
            return Text("in use" + throttled, style="magenta")
        if state_of(device) is DeviceState.RESERVED:
            return Text(local_times(device.booked).replace("booked", "reserved", 1), style="blue")
        return Text("free" + throttled, style="yellow" if device.throttled else "green")
    why = device.drain_reason and f"drained: {device.drain_reason}"
    return Text(why or device.health or ", ".join(device.why_not) or "unusable", style="red")


def held_by(device: operations.DeviceStatus, holders: Mapping[str, str]) -> str:
    """Users of a device: the holders of its leases; else what uses it without one, or for whom it is booked next.

    Args:
        device: the device.
        holders: holder of each active lease, by lease id.
    """
    if device.leases:
        return ", ".join(holders.get(lease, lease) for lease in device.leases)
    if device.in_use:
        return device.in_use_reason
    return local_times(device.booked.partition(": before")[0])


_UTC_TIME: Final = re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def local_times(text: str) -> str:
    """Replace the UTC times in a text of a service by those of the reader's zone, with its abbreviation."""
    return _UTC_TIME.sub(lambda found: local_time(datetime.fromisoformat(found[0])), text)


def local_time(at: datetime, form: str = "%Y-%m-%d %H:%M:%S %Z") -> str:
    """A time in the reader's zone: that of `TZ`, else this machine's. By default with the zone's abbreviation."""
    try:
        return at.astimezone(zone_of(None).rules).strftime(form)
    except CommandError:  # a POSIX rule such as CET-1CEST, which the C library knows
        return at.astimezone().strftime(form)


_DEVICES: Final = (
    Heading(title="HOST"),
    Heading(title="GPU", right=True),
    Heading(title="MODEL", spare=2, text=True),
    Heading(title="STATE", text=True, ample=20),
    Heading(title="HELD BY", text=True, ample=24),
    Heading(title="UTIL %", right=True, last=1),
    Heading(title="USED GiB", right=True, spare=1),
    Heading(title="OF GiB", right=True, spare=5),
    Heading(title="AVAIL GiB", right=True),
    Heading(title="TEMP °C", right=True, spare=4),
    Heading(title="POWER W", right=True, spare=3),
    Heading(title="LEASES", spare=6),
)


def devices_table(devices: Iterable[operations.DeviceStatus], holders: Mapping[str, str], width: int) -> Table:
    """Table of devices, one per line.

    Args:
        devices: the devices.
        holders: holder of each active lease, by lease id.
        width: of the terminal, in characters.
    """

    def cells(device: operations.DeviceStatus) -> list[Text | str]:
        used = device.memory_used_bytes
        return [
            device.host,
            str(device.index),
            short_model(device.model),
            device_state(device),
            held_by(device, holders),
            number(device.utilization_percent),
            "–" if used is None else gib(used),
            gib(device.memory_total_bytes),
            gib(device.memory_free_bytes),
            number(device.temperature_celsius),
            number(device.power_watts),
            " ".join(device.leases),
        ]

    return fitted(_DEVICES, map(cells, devices), width)


def grants_table(grants: Iterable[requests.Grant]) -> Table:
    """Table of a lease's grants, one device per line."""
    grants = list(grants)
    items = any(grant.items for grant in grants)
    names = ["HOST", "GPU", "MODEL", "UUID", "MEMORY", "SHARE", "SCORE", "SCORE PARTS"] + (["ITEMS"] if items else [])
    made = table(*names, right=("GPU", "MEMORY", "SHARE", "SCORE"))
    for grant in grants:
        row = [
            escape(grant.host),
            str(grant.index) if grant.device else "",
            escape(grant.model),
            escape(grant.device),
            format_bytes(grant.memory_bytes) if grant.memory_bytes else "–",
            (f"{grant.share:.0%}" + (", in use" if grant.in_use else "")) if grant.device else f"{grant.cpus:g} cpu",
            f"{grant.score:.3f}",
            score_parts(grant.score_parts),
        ]
        made.add_row(*row, *([items_text(grant.items)] if items else []))
    return made


def score_parts(parts: Mapping[str, float]) -> str:
    """Parts of a score with two digits; none is minus zero."""
    return " ".join(f"{name} {round(value, 2) + 0.0:.2f}" for name, value in parts.items())


def items_text(items: Sequence[str | int], most: int = 4) -> str:
    """Summary of a device's work items: their number, with their range or the first few."""
    if not items:
        return "0"
    numbers = [item for item in items if isinstance(item, int)]
    if len(numbers) == len(items) and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{len(items)} ({numbers[0]}…{numbers[-1]})" if len(items) > 1 else f"1 ({numbers[0]})"
    first = " ".join(escape(str(item)) for item in items[:most])
    return f"{len(items)} ({first}{' …' if len(items) > most else ''})"


def _state(lease: requests.Lease) -> Text:
    """State of a lease: with the reason of its end, or its notice: of a preemption, of a resize, or that it is idle."""
    if lease.state is not requests.LeaseState.ACTIVE:
        return Text(f"{lease.state.value}: {lease.reason}".rstrip(": "), style="dim")
    if lease.preemption is None:
        if lease.resize is not None:
            return Text(resize_text(lease.resize), style="yellow")
        if lease.idle is None:
            return Text(lease.state.value, style="green")
        return Text(
            f"idle for {duration((datetime.now(UTC) - lease.idle.since).total_seconds())}{idle_outcome(lease.idle)}",
            style="yellow",
        )
    seconds = (lease.preemption.ends_at - datetime.now(UTC)).total_seconds()
    who = f" for {lease.preemption.claimant_owner}" if lease.preemption.claimant_owner else ""
    return Text(f"preempted in {duration(seconds)}{who}: {lease.preemption.reason}", style="yellow")


def resize_text(notice: requests.Resize) -> str:
    """Notice to the holder of an elastic lease, in words."""
    left = duration((notice.ends_at - datetime.now(UTC)).total_seconds())
    if notice.kind is requests.ResizeKind.OFFER:
        return f"offered {len(notice.grants)} more GPUs, for {left}"
    return f"asked to give back {len(notice.grants)} GPUs for {notice.claimant_owner}, within {left}"


def idle_outcome(notice: requests.IdleNotice) -> str:
    """Action of the rule for idle devices on a lease, after a comma; empty if it only warns."""
    if notice.acted_at is not None:
        return ", preemptible by the rule"
    if notice.acts_at is None:
        return ""
    return f", the rule acts in {duration((notice.acts_at - datetime.now(UTC)).total_seconds())}"


def gpus_text(lease: requests.Lease, *, shares: bool = False) -> str:
    """Number of a lease's GPUs; with the fewest and most of an elastic one, as `4 (2-8)`.

    Args:
        lease: the lease.
        shares: count a share of a GPU as a part, not as one.
    """
    count = f"{sum(grant.share if shares else 1 for grant in lease.grants if grant.device):g}"
    return count if lease.elastic is None else f"{count} ({lease.elastic})"


_LEASES: Final = (
    Heading(title="OWNER", text=True, ample=16),
    Heading(title="GROUP", spare=1, text=True, ample=16),
    Heading(title="NAME", text=True, ample=24),
    Heading(title="STATE", text=True),
    Heading(title="LEFT", right=True),
    Heading(title="GPUS", right=True),
    Heading(title="WHERE", text=True, last=1),
    Heading(title="LEASE"),
)
_QUEUE: Final = (
    Heading(title="#", right=True),
    Heading(title="OWNER", text=True, ample=16),
    Heading(title="GROUP", spare=2, text=True, ample=16),
    Heading(title="NAME", text=True, ample=16),
    Heading(title="GPUS", right=True),
    Heading(title="WAITS", right=True),
    Heading(title="STARTS IN", last=1),
    Heading(title="HEARD", right=True, spare=3),
    Heading(title="WHY", text=True, ample=40),
    Heading(title="REQUEST", text=True, ample=10),
)


def leases_table(leases: Iterable[requests.Lease], width: int) -> Table:
    """Table of leases, one per line; with their groups, if there are any.

    Args:
        leases: the leases.
        width: of the terminal, in characters.
    """
    leases = list(leases)

    def cells(lease: requests.Lease) -> list[Text | str]:
        active = lease.state is requests.LeaseState.ACTIVE
        hosts: dict[str, list[str]] = {}
        for grant in lease.grants:
            hosts.setdefault(grant.host, []).append(str(grant.index) if grant.device else "cpu")
        return [
            lease.owner,
            lease.group,
            lease.name,
            _state(lease),
            left(lease) if active else "",
            gpus_text(lease),
            " ".join(f"{host}:{','.join(indices)}" for host, indices in hosts.items()),
            lease.lease_id,
        ]

    grouped = any(lease.group for lease in leases)
    shown = [at for at, heading in enumerate(_LEASES) if grouped or heading.title != "GROUP"]
    rows = ([row[at] for at in shown] for row in map(cells, leases))
    return fitted([_LEASES[at] for at in shown], rows, width)


def queue_table(entries: Iterable[operations.QueueEntry], width: int) -> Table:
    """Table of queued requests, one per line; with their groups, if there are any.

    Args:
        entries: the requests.
        width: of the terminal, in characters.
    """
    entries = list(entries)
    grouped = any(entry.group for entry in entries)
    shown = [at for at, heading in enumerate(_QUEUE) if grouped or heading.title != "GROUP"]

    def cells(entry: operations.QueueEntry) -> list[Text | str]:
        return [
            str(entry.position),
            entry.owner,
            entry.group,
            entry.name,
            f"{entry.gpus}-{entry.gpus_max}" if entry.gpus_max else str(entry.gpus),
            duration(entry.waiting_seconds),
            starts(entry),
            duration(entry.heard_seconds),
            local_times(entry.message),
            entry.request_id,
        ]

    return fitted([_QUEUE[at] for at in shown], ([row[at] for at in shown] for row in map(cells, entries)), width)


def rejection_lines(rejection: requests.Rejection) -> list[str]:
    """Lines of markup for a rejection: the code, each reason with its number of devices, and a hint."""
    lines = [f"[bold red]Rejected[/] ({rejection.code.value}): {escape(local_times(rejection.message))}"]
    for reason in rejection.reasons:
        text = local_times(reason.detail or reason.code)
        lines.append(f"  [bold]{reason.devices:>4}[/] × {escape(text)}")
    if rejection.nearest:
        lines.append(f"  nearest: {escape(local_times(rejection.nearest))}")
    if rejection.code not in (requests.RejectionCode.WITHDRAWN, requests.RejectionCode.NO_DEVICES):
        lines.append(
            "  The fleet could hold it when idle: add --wait 10m."
            if rejection.could_ever_fit
            else "  This fleet could never hold it."
        )
    return lines
