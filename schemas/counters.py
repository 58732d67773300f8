"""Counters as they are shown and used at once, before it is known what comes next.

Rollups tell a reset from a value that was wrong by what was read after it (docs/counters.md). Whoever needs a number
now holds on to the one before: a value that a counter can't have is believed once it has stood for two minutes, or
after a silence as long, and counts then what it counts there: from 0 after a reset, and nothing after any other step.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from .metrics import Metric

PASSING_SECONDS: Final = 120.0
"""A value that is seen no longer than this may pass. Metrics are read every 10 s at the slowest, and samples may be a
minute apart."""


MINUTE_SECONDS: Final = 60.0
"""A counter may have grown by as much as in a minute at least, since readings come late and at once."""


class Held(Struct, frozen=True):
    """What is believed of a counter.

    Attributes:
        value: what it counts, as it is to be shown: it falls where the counter was reset, and nowhere else.
        read: when it was read last, in seconds.
        doubtful: since when the readings are others, in seconds; None while they are not.
        odd: the first of these.
        ahead: by how much `value` is more than the reading: what a wobble took off that nobody has counted anew, less
            what a counter had too much.
    """

    value: float
    read: float
    doubtful: float | None = None
    odd: float = 0
    ahead: float = 0


def hold(before: Held | None, metric: Metric, reading: float, now: float) -> Held:
    """What to believe of a counter after one more reading.

    Args:
        before: what was believed; None before the first reading.
        metric: the counter.
        reading: as the driver says it.
        now: when it was read, in seconds.
    """
    if before is None:
        return Held(reading, now)
    last = before.value - before.ahead
    if follows(metric, last, reading, now - before.read):
        return Held(reading + before.ahead, now, ahead=before.ahead)
    first = before.doubtful is None
    since, odd = (now, reading) if first or before.doubtful is None else (before.doubtful, before.odd)
    # After a silence the counter may have been set back meanwhile: a new process of the driver begins at 0.
    silent = first and now - before.read > PASSING_SECONDS
    if not silent and now - since <= PASSING_SECONDS:
        return Held(before.value, before.read, since, odd, before.ahead)
    if _is_reset(metric, last, odd, since - before.read, silent=silent):
        return Held(reading, now)
    # A wobble, or more than it can have counted: nothing was counted then, and it goes on from there.
    value = before.value + max(0, reading - odd)
    return Held(value, now, ahead=value - reading)


def _is_reset(metric: Metric, before: float, reading: float, seconds: float, *, silent: bool) -> bool:
    """Whether a reading that does not follow counts from 0 (docs/counters.md)."""
    most = metric.row.unit.per_second
    small = reading * 100 <= before * (99 if silent else 50)
    return small and (most is None or reading <= most * max(seconds, MINUTE_SECONDS))


def follows(metric: Metric, before: float, value: float, seconds: float) -> bool:
    """Whether a counter can have grown from one reading to the next without a reset."""
    most = metric.row.unit.per_second
    return value >= before and (most is None or value - before <= most * max(seconds, MINUTE_SECONDS))
