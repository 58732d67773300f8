"""Order of a host's messages: by the time when NATS stored them, not by the host's clock.

A host's clock may be hours off, and may be corrected at any moment, forwards or back. Later messages must be accepted
nevertheless: a fault that was reported with a wrong time must be cleared by an event with a right one. A message that
is a little older than the last was read from the stream a second time, and is ignored. One that is much older was
stored after the server's clock was set back, and is new.
"""

from __future__ import annotations

from typing import Final

from ...schemas.values.clocks import REREAD_SECONDS

REREAD_NS: Final = int(REREAD_SECONDS * 1e9)


def told_ns(stored_at: float | None, time_ns: int) -> int:
    """Time of an event in nanoseconds: when NATS stored it (seconds since the epoch), or else the event's own time."""
    return time_ns if stored_at is None else int(stored_at * 1e9)


def is_past(time_ns: int, known: int) -> bool:
    """True if a message of this time is a repetition: a little older than the last, `known`; both in nanoseconds."""
    return known - REREAD_NS <= time_ns < known
