"""Details of one device in `corral top`."""

from __future__ import annotations

from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from ...client.fleet_view import FleetView, holder
from ...schemas.values.units import format_bytes
from .. import render
from ..fitting import Heading, fitted
from .rows import HISTORY, ProcessRow, ProcessTable, sparkline


def device_page(view: FleetView, uuid: str, width: int) -> RenderableType:
    """Details of a device for a given width: metrics, state, leases and processes."""
    seen = view.last
    device = next((one for one in seen.devices if one.uuid == uuid), None) if seen else None
    if device is None or seen is None:
        return Text(f"{uuid} is no longer in the fleet", "red")
    past = view.past.get(uuid, ())
    throttled = " (throttled)" if device.throttled else ""
    used = device.memory_used_bytes
    facts = render.table("", "")
    facts.show_header = False
    for name, value in (
        ("device", Text(f"{device.host} #{device.index}  {device.model}", "bold")),
        ("uuid", device.uuid),
        ("state", render.device_state(device)),
        ("held by", render.held_by(device, seen.holders) or "nobody"),
        ("utilization", Text(f"{render.number(device.utilization_percent, ' %', 1)}  ").append(
            sparkline(past, min(width - 10, HISTORY)).strip(), "green")),
        ("memory", f"{'–' if used is None else format_bytes(used)} of {format_bytes(device.memory_total_bytes)}, "
         f"{format_bytes(device.memory_free_bytes)} available, {device.share_free:.0%} not leased"),
        ("temperature", render.number(device.temperature_celsius, " °C") + throttled),
        ("power", render.number(device.power_watts, " W")),
        ("last sample", "never" if device.sample_age_seconds is None else f"{device.sample_age_seconds:.1f} s ago"),
        ("health", device.health or "healthy"),
    ):  # fmt: skip
        facts.add_row(Text(name, "dim"), value)
    parts: list[RenderableType] = [facts, Text()]
    held = [lease for lease in seen.leases if lease.lease_id in device.leases]
    parts += [render.leases_table(held, width + 20), Text()] if held else []
    processes = ProcessTable(view).on(device)
    if processes:
        parts.append(fitted(_PROCESSES, map(_process_cells, processes), width + 20))
    else:
        parts.append(Text("no processes", "dim"))
    return Group(*parts)


_PROCESSES: Final = (
    Heading(title="HELD BY", text=True),
    Heading(title="USER", text=True),
    Heading(title="PROCESS", text=True),
    Heading(title="PID", right=True),
    Heading(title="GiB", right=True),
    Heading(title="SM %", right=True, spare=2),
    Heading(title="CONCERN"),
    Heading(title="LEASE", spare=1),
)


def _process_cells(row: ProcessRow) -> list[Text | str]:
    process, memory = row.process, row.process.memory_used_bytes
    return [
        holder(row.lease) if row.lease else "–",
        process.user,
        process.name,
        str(process.pid),
        "–" if memory is None else render.gib(memory),
        render.number(process.sm_utilization_percent),
        Text(row.concern, "yellow"),
        process.lease or "–",
    ]
