"""Clocks that differ: what every reader makes of a time that lies ahead, and how far a host's clock is off.

The server that stores a message says when, and that time stays with the message however often it is delivered. A host
can't have read what it publishes later than that: a time that lies further ahead is its clock's fault, and is set right
by as much as the newest time of its message is ahead. Nothing is refused for its clock's sake, and the same message is
always set right by the same. A clock that is behind can't be told from a message that has waited, so that its times
stay as they are; it shows in that all messages of the host are as late.
"""

from __future__ import annotations

from typing import Final

AHEAD_SECONDS: Final = 10.0
"""A clock that is off by no more is left alone: readers bear it, and messages take a while."""
REREAD_SECONDS: Final = 60.0
"""Where messages count in the order in which the server stored them, one that is older by less was read once more; one
that is older by more was stored by a clock that has been set back since, and is news."""
_AHEAD_NS: Final = int(AHEAD_SECONDS * 1e9)


def ahead_ns(newest_ns: int, stored_ns: int) -> int:
    """By how much a message's times are to be set back: nanoseconds, 0 for one that is right.

    Args:
        newest_ns: of the message, by its host's clock.
        stored_ns: when the server stored it.
    """
    ahead = newest_ns - stored_ns
    return ahead if ahead > _AHEAD_NS else 0


def set_right(time_ns: int, stored_ns: int) -> int:
    """The time of a message that has one only."""
    return time_ns - ahead_ns(time_ns, stored_ns)


def offset_seconds(times_ns: bytes, heard_ns: int) -> float | None:
    """By how much a host's clock is ahead at least, by samples that have just come; None without samples."""
    times = memoryview(times_ns).cast("q")
    return (max(times) - heard_ns) * 1e-9 if len(times) else None
