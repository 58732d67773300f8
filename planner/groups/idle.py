"""Idle leases: how long all devices of a lease have been idle, and what a rule does about it.

`advance` folds readings into an `IdleCount`, which exists while a lease is idle. A lease that is active at any moment
has none, so that each count starts after the last activity. Time in which the activity is unknown does not count. After
`GAP_SECONDS` of it in a row the count ends, since the lease may have been active meanwhile. Counts are in memory alone:
after a change of leader they start anew.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from ...schemas.requests import IdleNotice
from ...schemas.work.idle import IdleAction, IdleRule, format_rule
from ..fleet.device import Device

GAP_SECONDS: Final = 60.0
"""Longest time with unknown activity in a row that does not end a count."""
READ_SECONDS: Final = 15.0
"""Longest time between two readings that counts as observed."""


class Reading(NamedTuple):
    """Activity of a lease's devices since the reading before.

    Attributes:
        idle: true if all are idle, false if any is active; None if that is unknown.
        percent: mean of the last samples of their GPU utilization; None if unknown.
        peak_percent: maximum of all samples; None likewise.
    """

    idle: bool | None
    percent: float | None = None
    peak_percent: float | None = None


UNKNOWN: Final = Reading(None)
ACTIVE: Final = Reading(False)


class IdleCount:
    """Time for which a lease has been idle without a break.

    Args:
        rule: by which it is idle.
        now: time of its first idle reading, by a clock that is never set.
        since: the same, in seconds since the epoch.

    Attributes:
        rule: as given.
        since: as given.
        at: time of the last reading.
        seconds: observed idle time.
        gap: seconds of unknown activity since the last idle reading.
        percent: sum of the mean utilization, times the seconds for which it was read.
        percent_seconds: sum of those seconds.
        peak: maximum of the samples; None if unknown.
    """

    __slots__ = ("at", "gap", "peak", "percent", "percent_seconds", "rule", "seconds", "since")

    def __init__(self, rule: IdleRule, now: float, since: float) -> None:
        self.rule, self.at, self.since = rule, now, since
        self.seconds = self.gap = self.percent = self.percent_seconds = 0.0
        self.peak: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean utilization in percent; None if unknown."""
        return self.percent / self.percent_seconds if self.percent_seconds else None


def advance(count: IdleCount | None, rule: IdleRule, reading: Reading, now: float, clock: float) -> IdleCount | None:
    """Fold a reading into a count.

    Args:
        count: so far; None if the lease was not idle. It is changed.
        rule: for the lease at present.
        reading: since the last one.
        now: seconds, by a clock that is never set.
        clock: seconds since the epoch.

    Returns:
        The count after the reading; None if the lease is not idle, or not certainly.
    """
    if reading.idle is False:
        return None
    if count is not None and count.rule is not rule and count.rule != rule:
        return None
    if count is None:
        return IdleCount(rule, now, clock) if reading.idle else None
    passed, count.at = now - count.at, now
    if reading.idle is None or passed > READ_SECONDS:
        count.gap += passed
        if count.gap > GAP_SECONDS:
            return None
    if reading.idle:
        if passed <= READ_SECONDS:
            count.seconds += passed
            count.gap = 0.0
        _note_load(count, reading, min(passed, READ_SECONDS))
    return count


def _note_load(count: IdleCount, reading: Reading, seconds: float) -> None:
    if reading.percent is not None:
        count.percent += reading.percent * seconds
        count.percent_seconds += seconds
    if reading.peak_percent is not None and (count.peak is None or reading.peak_percent > count.peak):
        count.peak = reading.peak_percent


class Step(Enum):
    """Next step with a lease."""

    NOTHING = 0
    WARN = 1
    """Warn its holder."""
    ACT = 2
    """Do what the rule says."""
    WITHDRAW = 3
    """Withdraw the warning."""


def next_step(count: IdleCount | None, notice: IdleNotice | None) -> Step:
    """Next step with a lease.

    Args:
        count: of the lease; None if it is not idle.
        notice: the warning that its holder has; None without one.
    """
    if notice is not None and notice.acted_at is not None:  # it is preemptible now, and stays so
        return Step.NOTHING
    if count is None:
        return Step.NOTHING if notice is None else Step.WITHDRAW
    rule = count.rule
    if notice is None:
        return Step.WARN if count.seconds >= rule.after_seconds else Step.NOTHING
    # A warning of an earlier leader is withdrawn: its count is not known here.
    if notice.rule != format_rule(rule) or count.seconds < rule.after_seconds:
        return Step.WITHDRAW
    acts = rule.action in (IdleAction.PREEMPTIBLE, IdleAction.END)
    return Step.ACT if acts and count.seconds >= rule.after_seconds + rule.warn_seconds else Step.NOTHING


def read(
    devices: list[Device | None],
    lease_id: str,
    rule: IdleRule,
    now: float,
    stale_after: float,
    peaks: dict[Device, float],
) -> Reading:
    """Activity of a lease's devices since their peaks were last read; they are set to 0.

    Args:
        devices: of the lease; None for one that is not in the fleet.
        lease_id: id of the lease.
        rule: says what is idle.
        now: seconds since the epoch.
        stale_after: age in seconds from which on a sample counts no more.
        peaks: of the devices of several leases that were read at this time already.
    """
    oldest, below = now - stale_after, rule.below_percent
    total = peak = 0.0
    known, loads, active = bool(devices), 0, False
    for device in devices:
        if device is None:
            known = False
            continue
        most = device.peak_percent
        device.peak_percent = 0.0
        if len(device.holders) > 1:
            most = peaks[device] = max(most, peaks.get(device, 0.0))
        percent = device.utilization
        fresh = percent is not None and device.load_seen_at >= oldest
        if fresh and percent is not None:
            loads += 1
            total += percent
            most = percent if percent > most else most
            peak = most if most > peak else peak
        if rule.no_process:
            there = device.occupancy.may_have_process_of(lease_id) if device.seen_at >= oldest else None
            active = active or there is True
            known = known and there is not None
        else:
            active = active or (most > 0.0 and most >= below)
            known = known and fresh
    if active or not known:
        return ACTIVE if active else UNKNOWN
    return Reading(True, total / loads, peak) if loads == len(devices) else Reading(True)
