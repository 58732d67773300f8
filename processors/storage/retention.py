"""Retention: how long data is kept, and by which time. One clock alone never decides.

A processor whose clock is ahead, if only once, must not delete the whole history. So data is deleted only if it is
older than its retention by the clock of this machine, by that of the NATS server, and by the newest sample. One run
deletes at most the oldest day of each table, so that an operator has time to notice if all clocks are wrong. A
processor that was off for a week catches up in seven runs. Days that were deleted may get rows again, such as from a
host whose clock is far behind. These rows are deleted in addition, and do not delay any other day.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from msgspec import Struct

EVER: Final = datetime(1, 1, 1, tzinfo=UTC)
APART: Final = timedelta(minutes=10)
"""A larger difference between the clocks is reported."""


class Retention(Struct, frozen=True, kw_only=True):
    """Retention times in seconds; None keeps data forever.

    Attributes:
        raw: samples in the database. Afterwards their day goes to the archive.
        archive: days in the archive.
        ten_seconds: rollups of 10 s.
        minutes: rollups of 1 min.
        hours: rollups of 1 h.
        processes: rows of `processes` and `agents`.
    """

    raw: float = 2 * 86400.0
    archive: float | None = 365 * 86400.0
    ten_seconds: float | None = 7 * 86400.0
    minutes: float | None = 90 * 86400.0
    hours: float | None = None
    processes: float | None = 30 * 86400.0


class Horizon(Struct, frozen=True):
    """Time by which a run deletes old data.

    Attributes:
        now: the earliest of the clocks and the newest sample.
        clocks: the earliest of the clocks: for files and snapshots, which are also made when no samples come.
        all_at_once: true if the run deletes all that is old; else only the oldest day of each table.
        deleted_until: time up to which runs have deleted so far, by table; each run updates it.
    """

    now: datetime
    clocks: datetime
    all_at_once: bool = False
    deleted_until: dict[str, datetime] = {}

    def before(self, seconds: float) -> datetime:
        """Time before which data is past a retention of so many seconds."""
        try:
            return self.now - timedelta(seconds=seconds)
        except OverflowError:
            return EVER

    def since(self, table: str, limit: datetime) -> datetime:
        """Time up to which earlier runs have deleted in a table, at most a limit. Rows before it have come since."""
        return min(self.deleted_until.get(table, EVER), limit)

    def upto(self, limit: datetime, oldest: datetime) -> datetime:
        """Time up to which a run deletes in a table: a limit, or the end of the oldest day if that is earlier."""
        return limit if self.all_at_once else min(limit, end_of_day(oldest))


def forced(now: datetime) -> Horizon:
    """Horizon by one time alone, which deletes all that is old at once: for an explicit request."""
    return Horizon(now, now, all_at_once=True)


def agreed(
    now: datetime, server: datetime | None, newest: datetime | None, deleted_until: dict[str, datetime] | None = None
) -> Horizon | None:
    """Horizon by this machine's clock, the server's and the newest sample; None while one of them is not known."""
    if server is None or newest is None:
        return None
    clocks = min(now, server)
    return Horizon(min(clocks, newest), clocks, deleted_until={} if deleted_until is None else deleted_until)


def disagreement(now: datetime, server: datetime | None) -> str:
    """Message if this machine's clock and the server's differ by more than `APART`; empty otherwise."""
    if server is None or abs(now - server) <= APART:
        return ""
    apart, ahead = abs(now - server), now > server
    days, seconds = divmod(int(apart.total_seconds()), 86400)
    text = f"{days} days" if days else f"{seconds // 60} minutes"
    return (
        f"the clock of this machine is {text} {'ahead of' if ahead else 'behind'} that of the bus: data is deleted "
        "by the earlier one; set it right (chrony, systemd-timesyncd), or use --force-retention"
    )


def end_of_day(time: datetime) -> datetime:
    """Midnight after a time, UTC."""
    return time.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
