"""Table of events, with links to hosts, devices and leases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from ..event_log import Happened
from ..html import table, tag, url
from ..zones import local
from .host_links import place_links

_NAME: Final = 28
"""Length of a name of a lease above which it is broken into lines, so that there is room for what happened."""
_BAD: Final = ("reset", "hardware")
_WARN: Final = ("warning", "application")


def events_table(events: Sequence[Happened], *, places: bool = True) -> None:
    """Show events.

    Args:
        events: newest first.
        places: whether to name the hosts; false on the page of a host, where only the device is named.
    """

    def what(one: Happened) -> Callable[[], Any]:
        tone = "bad" if one.severity in _BAD else "warn" if one.severity in _WARN else ""
        return lambda: tag("span", f"chip {tone}", one.what, title=one.severity)

    def place(one: Happened) -> Callable[[], Any]:
        return lambda: place_links(one.hosts if places else [], one.device, one.index)

    def who(one: Happened) -> Callable[[], Any]:
        words = f"{one.owner}: {one.name}" if one.owner and one.name else one.owner or "–"
        link = url("/leases", q=one.lease_id) if one.lease_id else None
        return lambda: tag("a", "name" if len(words) > _NAME else "", words, href=link, title=one.lease_id or None)

    rows = [(local(one.time_ms / 1000), what(one), place(one), who(one), one.message or "–") for one in events]
    table(("Time", "What", "Where" if places else "Device", "Lease", "In words"), rows)
