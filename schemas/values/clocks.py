"""Clock skew: corrects timestamps that lie in the future, and measures how far a host's clock is ahead.

The server that stores a message records the time, which stays with the message however often it is delivered. A host
can't have read a value later than that. So a later timestamp means that the host's clock is fast, and all times of the
message are set back by as much as its newest one is ahead. No message is refused because of its clock, and the same
message is always corrected by the same amount. A slow clock can't be told from a message that has waited, so such times
stay as they are. It shows in that all messages of the host are equally late.
"""

from __future__ import annotations

from typing import Final

AHEAD_SECONDS: Final = 10.0
"""Tolerance: a clock that is ahead by no more is not corrected. Readers bear it, and messages take time to arrive."""
REREAD_SECONDS: Final = 60.0
"""Limit for readers that take messages in the order in which the server stored them. A message that is older than the
last by less was delivered again. One that is older by more comes after the server's clock was set back, and is new."""
_AHEAD_NS: Final = int(AHEAD_SECONDS * 1e9)


def ahead_ns(newest_ns: int, stored_ns: int) -> int:
    """Nanoseconds by which to set a message's times back; 0 if the newest is at most `AHEAD_SECONDS` ahead.

    Args:
        newest_ns: newest time of the message, by its host's clock.
        stored_ns: when the server stored it.
    """
    ahead = newest_ns - stored_ns
    return ahead if ahead > _AHEAD_NS else 0


def set_right(time_ns: int, stored_ns: int) -> int:
    """Correct the time of a message that has only one, as `ahead_ns` says."""
    return time_ns - ahead_ns(time_ns, stored_ns)


def offset_seconds(times_ns: bytes, heard_ns: int) -> float | None:
    """Least number of seconds that a host's clock is ahead, by samples that have just arrived; None without samples."""
    times = memoryview(times_ns).cast("q")
    return (max(times) - heard_ns) * 1e-9 if len(times) else None
