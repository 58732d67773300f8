"""Which of two messages of a host is the later one: the bus says so, and not the host's clock.

A host's clock may be hours off, and may be set right at any moment, forwards or back. What it says afterwards has to be
heard, and a fault that it told with a wrong time has to be cleared by what it tells with a right one. So messages count
by when the bus stored them. What is a little older than what is known was read from a stream once more; what is a lot
older was stored by a clock that has been set back since, and is news.
"""

from __future__ import annotations

from typing import Final

from ...schemas.clocks import REREAD_SECONDS

REREAD_NS: Final = int(REREAD_SECONDS * 1e9)


def told_ns(stored_at: float | None, time_ns: int) -> int:
    """When an event was told: stored by the bus, seconds since the epoch; its own time where that is not known."""
    return time_ns if stored_at is None else int(stored_at * 1e9)


def is_past(told: int, known: int) -> bool:
    """Whether what was told at a time is older than what is known, both in nanoseconds."""
    return known - REREAD_NS <= told < known
