"""Live values of counters: filters out misread values before the next readings are known.

Rollups tell a reset from a misread value by the readings that follow (docs/counters.md). A live value can't wait for
them, so the last accepted value is shown meanwhile. A reading that can't follow it is accepted once it has lasted for
two minutes, or if it comes after a gap that is longer. If it is a reset, the counter counts from 0 from then on. Any
other step counts nothing by itself, and the counter goes on from there.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from .metrics import Metric

PASSING_SECONDS: Final = 120.0
"""Time that a misread value may last. Metrics are read every 10 s at the slowest, and samples may be a minute apart."""


MINUTE_SECONDS: Final = 60.0
"""Shortest time by which growth is measured against a counter's limit: readings may come late, and several at once."""


class Held(Struct, frozen=True):
    """Accepted value of a counter, and the readings that contradict it.

    Attributes:
        value: the count to show; it falls only where the counter was reset.
        read: time of the last accepted reading, in seconds.
        doubtful: since when readings contradict the value, in seconds; None while they do not.
        odd: the first of these readings.
        ahead: `value` minus the reading: what wobbles took off without a reset, less what jumps added that the
            counter can't have counted.
    """

    value: float
    read: float
    doubtful: float | None = None
    odd: float = 0
    ahead: float = 0


def hold(before: Held | None, metric: Metric, reading: float, now: float) -> Held:
    """Fold one more reading of a counter into its accepted value.

    Args:
        before: the state so far; None before the first reading.
        metric: the counter.
        reading: the value that the driver gives.
        now: when it was read, in seconds.
    """
    if before is None:
        return Held(reading, now)
    last = before.value - before.ahead
    if follows(metric, last, reading, now - before.read):
        return Held(reading + before.ahead, now, ahead=before.ahead)
    first = before.doubtful is None
    since, odd = (now, reading) if first or before.doubtful is None else (before.doubtful, before.odd)
    # After a gap the counter may have been reset meanwhile: a new driver process begins at 0.
    silent = first and now - before.read > PASSING_SECONDS
    if not silent and now - since <= PASSING_SECONDS:
        return Held(before.value, before.read, since, odd, before.ahead)
    if _is_reset(metric, last, odd, since - before.read, silent=silent):
        return Held(reading, now)
    # A wobble, or more than it can have counted: the step counts nothing, and the counter goes on from there.
    value = before.value + max(0, reading - odd)
    return Held(value, now, ahead=value - reading)


def _is_reset(metric: Metric, before: float, reading: float, seconds: float, *, silent: bool) -> bool:
    """True if a reading that does not follow counts from 0 (docs/counters.md).

    It is then at most half of the value before, or 99 % of it after a gap, and no more than the counter can count in
    the time.
    """
    most = metric.row.unit.per_second
    small = reading * 100 <= before * (99 if silent else 50)
    return small and (most is None or reading <= most * max(seconds, MINUTE_SECONDS))


def follows(metric: Metric, before: float, value: float, seconds: float) -> bool:
    """True if a counter can have grown from one reading to the next without a reset, within the limit of its unit."""
    most = metric.row.unit.per_second
    return value >= before and (most is None or value - before <= most * max(seconds, MINUTE_SECONDS))
