"""Rows of a table of booked windows: for whom and when each is, and which of its GPUs are missing or replaced."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from ...schemas.work.windows import Repeat, Window, WindowState, WindowStatus, format_gpus
from ..html import tag
from ..zones import local

HEADS: Final = ("Window", "For", "GPUs", "On", "From", "Until", "Repeats", "State", "Why")
NUMERIC: Final = (2,)
"""Columns of numbers."""
_HOSTS: Final = 3


def row(status: WindowStatus) -> tuple[object, ...]:
    """Cells of a window."""
    window = status.window
    starts, ends = status.starts_at or window.starts_at, status.ends_at or window.ends_at
    return (
        window.window_id or "",
        _who(window),
        format_gpus(status) or "–",
        _hosts(status),
        _time(starts),
        _time(ends) if local(ends, "%j") != local(starts, "%j") else local(ends, "%H:%M"),
        _repeats(status),
        lambda: _state(status),
        window.reason,
    )


def _who(window: Window) -> str:
    if window.maintenance:
        return "maintenance"
    return ", ".join([*([window.group] if window.group else []), *window.owners])


def _hosts(status: WindowStatus) -> str:
    found = status.hosts
    return ", ".join(found[:_HOSTS]) + (f" and {len(found) - _HOSTS} more" if len(found) > _HOSTS else "")


def _repeats(status: WindowStatus) -> str:
    if status.window.repeat is Repeat.NONE:
        return "–"
    return f"{status.window.repeat.value}, {status.occurrences} left"


def _state(status: WindowStatus) -> None:
    tag("div", "", "now" if status.state is WindowState.RUNNING else status.state.value)
    for one in status.missing:
        where = f" on {one.host}" if one.host else ""
        tag("div", "note wrap", f"short of {one.device}{where}: {one.reason}")
    for one in status.replaced:
        tag("div", "note wrap", f"{one.by_device} on {one.by_host} in place of {one.device}: {one.reason}")
    for lease in status.leases:
        tag("div", "note wrap", f"{lease.owner} may still run ({lease.lease_id})")


def _time(time: datetime) -> str:
    return local(time, "%a %d %b %H:%M %Z")
