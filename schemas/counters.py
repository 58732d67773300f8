"""Counters as they are shown and used at once, before it is known what comes next.

Rollups tell a reset from a value that was wrong by what was read after it (docs/counters.md). Whoever needs a number
now holds on to the one before: a value that a counter can't have is believed once it has stood for two minutes, or
after a silence as long.
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
        value: the reading that is believed.
        read: when it was read last, in seconds.
        doubtful: since when the readings are others, in seconds; None while they are not.
    """

    value: float
    read: float
    doubtful: float | None = None


def hold(before: Held | None, metric: Metric, value: float, now: float) -> Held:
    """What to believe of a counter after one more reading.

    Args:
        before: what was believed; None before the first reading.
        metric: the counter.
        value: the reading.
        now: when it was read, in seconds.
    """
    if before is None or follows(metric, before.value, value, now - before.read):
        return Held(value, now)
    since = now if before.doubtful is None else before.doubtful
    # After a silence the counter may have been set back meanwhile: a new process of the driver begins at 0.
    silent = before.doubtful is None and now - before.read > PASSING_SECONDS
    if silent or now - since > PASSING_SECONDS:
        return Held(value, now)
    return Held(before.value, before.read, since)


def follows(metric: Metric, before: float, value: float, seconds: float) -> bool:
    """Whether a counter can have grown from one reading to the next without a reset."""
    most = metric.row.unit.per_second
    return value >= before and (most is None or value - before <= most * max(seconds, MINUTE_SECONDS))
