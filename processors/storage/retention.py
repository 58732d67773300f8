"""How long things are kept, and by which time: never by one clock alone.

A processor whose clock is ahead, if only once, must not take the whole history for old. What is let go of is older than
its retention by the clock of this machine, by that of the bus's server, and by the newest sample. Of each table no more
than its oldest day goes in one run, so that whoever sets all clocks wrong has time to see it; a processor that was off
for a week catches up in as many runs. Of days that have gone before there may be more again, as from a host whose clock
is far behind: that is let go of beside, and keeps no other day from its turn.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from msgspec import Struct

EVER: Final = datetime(1, 1, 1, tzinfo=UTC)
APART: Final = timedelta(minutes=10)
"""Clocks that differ by more are told."""


class Retention(Struct, frozen=True, kw_only=True):
    """How long things are kept, in seconds; None for ever.

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
    """By which time a run lets go of what is old.

    Attributes:
        now: no clock says that it is earlier, nor the newest sample.
        clocks: the same without the samples: for files and snapshots, which are made without any, too.
        all_at_once: what is old goes in this run; else of each table the oldest day.
        gone: up to where runs have come by now, by table; each run takes it further.
    """

    now: datetime
    clocks: datetime
    all_at_once: bool = False
    gone: dict[str, datetime] = {}

    def before(self, seconds: float) -> datetime:
        """What is older is beyond a retention."""
        try:
            return self.now - timedelta(seconds=seconds)
        except OverflowError:
            return EVER

    def since(self, table: str, limit: datetime) -> datetime:
        """Up to where earlier runs have come, of what is older than a limit: what is before it has come since."""
        return min(self.gone.get(table, EVER), limit)

    def upto(self, limit: datetime, oldest: datetime) -> datetime:
        """How far a run goes in a table, of what is older than a limit."""
        return limit if self.all_at_once else min(limit, end_of_day(oldest))


def forced(now: datetime) -> Horizon:
    """All that is old by one clock, at once: somebody asks for it."""
    return Horizon(now, now, all_at_once=True)


def agreed(
    now: datetime, server: datetime | None, newest: datetime | None, gone: dict[str, datetime] | None = None
) -> Horizon | None:
    """What this machine's clock, the server's and the newest sample agree on; None while one of them is not known."""
    if server is None or newest is None:
        return None
    clocks = min(now, server)
    return Horizon(min(clocks, newest), clocks, gone={} if gone is None else gone)


def disagreement(now: datetime, server: datetime | None) -> str:
    """What to say where this machine's clock and the server's differ; empty where they agree."""
    if server is None or abs(now - server) <= APART:
        return ""
    apart, ahead = abs(now - server), now > server
    days, seconds = divmod(int(apart.total_seconds()), 86400)
    text = f"{days} days" if days else f"{seconds // 60} minutes"
    return (
        f"the clock of this machine is {text} {'ahead of' if ahead else 'behind'} that of the bus: what is old is let "
        "go of by the earlier one; set it right (chrony, systemd-timesyncd), or use --force-retention"
    )


def end_of_day(time: datetime) -> datetime:
    """Midnight after a time, UTC."""
    return time.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
