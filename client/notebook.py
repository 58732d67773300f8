"""Tables of devices, leases and rejections for Jupyter, enabled by `import corral.client` or `%load_ext`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from ..schemas import operations, requests
from ..schemas.values.units import format_bytes


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> str:
    """An HTML table with an optional note below it; every value is escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{'' if value is None else html.escape(str(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    made = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return made + (f"<p>{html.escape(note)}</p>" if note else "")


def short_model(model: str) -> str:
    """Name of a device model without the vendor's prefix."""
    for prefix in ("NVIDIA GeForce ", "NVIDIA ", "AMD Instinct ", "AMD Radeon ", "AMD "):
        if model.startswith(prefix):
            return model[len(prefix) :]
    return model


def lease_html(lease: requests.Lease) -> str:
    """HTML table of a lease's devices, with its state in a note."""
    items = any(grant.items for grant in lease.grants)
    rows = [
        (
            grant.host,
            grant.index if grant.device else "",
            grant.model,
            grant.device,
            format_bytes(grant.memory_bytes) if grant.memory_bytes else "",
            f"{grant.share:.0%}",
            f"{grant.score:.3f}",
            *([len(grant.items)] if items else []),
        )
        for grant in lease.grants
    ]
    columns = ["host", "gpu", "model", "uuid", "memory", "share", "score", *(["items"] if items else [])]
    until = f"until {lease.expires_at:%Y-%m-%d %H:%M:%S %Z}" if lease.ended_at is None else lease.reason
    named = f" ({lease.name})" if lease.name else ""
    return table(columns, rows, f"Lease {lease.lease_id} of {lease.owner}{named}: {lease.state.value} {until}".rstrip())


def assignment_html(assignment: requests.Assignment) -> str:
    """HTML table of an assignment's lease."""
    return lease_html(assignment.lease)


def rejection_html(rejection: requests.Rejection) -> str:
    """HTML table of the reasons for a rejection, each with its number of devices."""
    rows = [(reason.devices, reason.code, reason.detail) for reason in rejection.reasons]
    return table(["devices", "reason", "detail"], rows, rejection.message)


def devices_html(devices: Sequence[operations.DeviceStatus]) -> str:
    """HTML table of devices, one per row; at most 200."""
    rows = [
        (
            device.host,
            device.index,
            device.model,
            None if device.utilization_percent is None else f"{device.utilization_percent:.0f} %",
            None if device.memory_used_bytes is None else format_bytes(device.memory_used_bytes),
            format_bytes(device.memory_free_bytes),
            None if device.temperature_celsius is None else f"{device.temperature_celsius:.0f} °C",
            "free" if device.usable and not device.leases else ", ".join(device.leases or device.why_not),
        )
        for device in devices[:200]
    ]
    more = f"{len(devices)} devices" + (", the first 200 shown" if len(devices) > 200 else "")
    return table(["host", "gpu", "model", "utilization", "used", "available", "temperature", "state"], rows, more)


def fleet_html(fleet: operations.FleetSummary) -> str:
    """HTML table of a fleet's totals and its models."""
    rows = [
        ("devices", f"{fleet.devices} on {fleet.hosts} hosts, {fleet.usable_devices} usable"),
        ("leased", f"{fleet.leased_devices} devices by {fleet.active_leases} leases"),
        ("memory", f"{format_bytes(fleet.memory_used_bytes)} of {format_bytes(fleet.memory_total_bytes)} used"),
        ("available", format_bytes(fleet.memory_free_bytes)),
        ("waiting", fleet.waiting_requests),
        *((model, count) for model, count in sorted(fleet.models.items())),
    ]
    return table(["fleet", ""], rows)


class DeviceList(list[operations.DeviceStatus]):
    """List of devices, shown as a table in a notebook."""

    def _repr_html_(self) -> str:
        return devices_html(self)


def load_ipython_extension(ipython: Any) -> None:
    """Register the HTML tables with IPython; called by `%load_ext corral.client`, and by its import in IPython."""
    formatter = ipython.display_formatter.formatters["text/html"]
    formatter.for_type(requests.Lease, lease_html)
    formatter.for_type(requests.Assignment, assignment_html)
    formatter.for_type(requests.Rejection, rejection_html)
    formatter.for_type(operations.FleetSummary, fleet_html)
