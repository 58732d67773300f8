"""Background maintenance in a thread, with separate cursors: rollups, archive, retention.

Each job pauses for at least as long as it took, so that it uses at most half of a core. As a fleet grows, rollups are
delayed, and ingest is not. While nobody reads the history, rollups are refreshed seldom: a refresh costs nearly the
same for one bucket as for many.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

from ....bus.process import release_memory
from .. import retention
from ..errors import StoragePaused
from ..retention import Horizon, Retention
from ..statements import put_meta, transaction
from . import archive, recovery, rollups, sorting, totals
from .database import Database

log = logging.getLogger("corral.storage")


TOGETHER: Final = ((rollups.TEN_SECONDS, rollups.MINUTE), (rollups.HOUR,))
"""Rollups that are refreshed at once: those of 10 s and 1 min read the same samples."""
ROLLUP_SECONDS: Final = (6.0, 20.0)
"""Pause between two refreshes of a small fleet's rollups. A refresh takes as long for one row as for a thousand, nearly
all of it to plan its statements of hundreds of columns."""
UNREAD_FACTORS: Final = (1, 2)
"""How many times as long the pauses are while nobody reads: all minutes of an hour are read again for its rollup."""
CHEAP_SECONDS: Final = 0.7
"""CPU time of a refresh beyond which the pauses while nobody reads are shortened: the next reader waits for it."""
LARGE_SECONDS: Final = (60.0, 300.0)
"""Pauses then at least."""
READ_SECONDS: Final = 60.0
"""How long the history counts as read after a query."""
BEHIND_SECONDS: Final = 900.0
"""A job that should have been begun this long ago, and has not ended since, is behind."""
HOUSEKEEPING_SECONDS: Final = 60.0
TOTALS_SECONDS: Final = 300.0
"""A lease has totals an hour after its end at the earliest, so there is no hurry."""
RECOVERY_SECONDS: Final = 1.0
SORTING_SECONDS: Final = 600.0
SWEEP_SECONDS: Final = 86400.0
MINUTES_FROM: Final = "minutes_from"
"""Key in `corral_meta`: rollups of 1 min before this time have been deleted."""


FINISHED: Final = "finished"
"""Result of a job that need not be repeated."""


class _Job(Struct):
    """Work that is repeated.

    Attributes:
        name: in the log.
        work: what to do.
        seconds: pause after it.
        unread_seconds: the same while nobody reads the history.
        large_seconds: the same at least, if it takes long.
        due: when it is to be done next, on the monotonic clock; never before the thread is started.
        began: when it was begun last, on that clock.
        asked: when the first reader after a while came, who waits until it was begun after that.
    """

    name: str
    work: Callable[[], object]
    seconds: float
    unread_seconds: float
    large_seconds: float = math.inf
    due: float = math.inf
    began: float = -math.inf
    asked: float = -math.inf


class Maintenance:
    """Runs the jobs of one database until stopped.

    Args:
        database: to look after.
        kept: see `Retention`.
        server_now: the time by the bus's clock; None while it is not known.
        force: delete all that is old by this machine's clock alone, once.
        unread_seconds: pause between two refreshes of rollups while nobody calls `read`; None for no longer one than
            otherwise.

    Attributes:
        failing: jobs that fail at the moment, each with the reason.
        held_back: why retention is held back, if something is wrong; empty otherwise.
    """

    def __init__(
        self,
        database: Database,
        kept: Retention | None = None,
        *,
        server_now: Callable[[], datetime | None] = lambda: None,
        force: bool = False,
        unread_seconds: float | None = None,
    ) -> None:
        self._database = database
        self._unread_seconds = unread_seconds
        self._retention = kept or Retention()
        self._server_now = server_now
        self._force = force
        self._deleted_until: dict[str, datetime] = {}
        self.held_back = ""
        self._rollups = rollups.Rollups()
        self._jobs = self._all_jobs()
        self._stopping = False
        self._read_at = -math.inf
        self._changed = threading.Condition()
        """Notified when a job ends, a reader comes, or the thread is to stop."""
        self._thread: threading.Thread | None = None
        self.failing: dict[str, str] = {}

    @property
    def behind(self) -> dict[str, float]:
        """Jobs that are behind, each with the seconds since it was due."""
        with self._changed:
            now = time.monotonic()
            late = {job.name: now - (job.due if job.due > -math.inf else job.asked) for job in self._jobs}
        return {name: seconds for name, seconds in late.items() if seconds > BEHIND_SECONDS}

    def start(self) -> None:
        """Start the thread."""
        for job in self._jobs:
            job.due = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the job that runs now."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def read(self, timeout_seconds: float) -> None:
        """Have rollups refreshed as often as for readers. The first reader after a while waits until they are.

        Args:
            timeout_seconds: how long to wait at most.
        """
        with self._changed:
            now = time.monotonic()
            if now - self._read_at > READ_SECONDS:
                for job in self._jobs:
                    if job.unread_seconds > job.seconds:
                        job.asked = now
                        # All at once, so that they run in their order: hours are made from minutes.
                        job.due = -math.inf
                self._changed.notify_all()
            self._read_at = now
            self._changed.wait_for(self._are_refreshed, timeout_seconds)

    def _are_refreshed(self) -> bool:
        return self._stopping or all(job.began >= job.asked for job in self._jobs)

    def _all_jobs(self) -> list[_Job]:
        def rollup(at: int) -> _Job:
            levels, seconds = TOGETHER[at], ROLLUP_SECONDS[at]
            name = "rollups of " + " and ".join(level.name for level in levels)
            unread_seconds = max(seconds, UNREAD_FACTORS[at] * (self._unread_seconds or 0.0))
            return _Job(name, lambda: self.roll_up(*levels), seconds, unread_seconds, LARGE_SECONDS[at])

        def every(seconds: float, name: str, work: Callable[[], object]) -> _Job:
            return _Job(name, work, seconds, seconds)

        return [
            *(rollup(at) for at in range(len(TOGETHER))),
            every(RECOVERY_SECONDS, "rollups of a lost database", self.roll_up_archived),
            every(HOUSEKEEPING_SECONDS, "housekeeping", self.housekeeping),
            every(TOTALS_SECONDS, "totals of leases", self.total_leases),
            every(SORTING_SECONDS, "order of samples", lambda: sorting.sort_days(self._database)),
            every(SWEEP_SECONDS, "orphaned files", lambda: archive.delete_orphaned_files(self._database)),
        ]

    def _next(self) -> _Job | None:
        """Wait until a job is due and return it; None if the thread is to stop."""
        with self._changed:
            while not self._stopping:
                job = min(self._jobs, key=lambda job: job.due)
                left = job.due - time.monotonic()
                if left <= 0:
                    return job
                self._changed.wait(left)
        return None

    def _run(self) -> None:
        while (job := self._next()) is not None:
            began, began_cpu = time.monotonic(), time.thread_time()
            done: object = None
            try:
                done = job.work()
                self.failing.pop(job.name, None)
            except (duckdb.Error, StoragePaused, OSError) as error:
                text = str(error).strip().partition("\n")[0]
                if recovery.DAMAGED.search(text):
                    self._database.damaged = text
                if self.failing.get(job.name) != text:
                    log.error("%s failed, and is retried: %s", job.name, text)
                self.failing[job.name] = text
            except Exception:
                # One job that fails must not end the others.
                log.exception("%s failed, and is retried", job.name)
                self.failing[job.name] = "the log says why"
            if began - self._read_at > READ_SECONDS and job.unread_seconds > job.seconds:
                release_memory()
            with self._changed:
                ended = time.monotonic()
                is_read = ended - self._read_at < READ_SECONDS
                took = ended - began
                unread_seconds = _unread_seconds(job, began - job.began, time.thread_time() - began_cpu)
                job.began = began
                pause = max(job.seconds, took) if is_read else max(unread_seconds, took)
                if began < job.asked:
                    pause = 0.0  # the reader came meanwhile
                job.due = math.inf if done is FINISHED else ended + pause
                self._changed.notify_all()

    def roll_up(self, *levels: rollups.Level) -> int:
        """Bring rollups up to date; return the number of buckets written."""
        cursor = self._database.cursor()
        try:
            return self._rollups.refresh(
                cursor,
                levels,
                sorted(self._database.days),
                archive.files_by_day(cursor, self._database.archive),
                self._minutes_from(cursor),
            )
        finally:
            cursor.close()

    def total_leases(self) -> int:
        """Add the totals of leases that have ended; return the number of spans added."""
        cursor = self._database.cursor()
        try:
            return totals.refresh(cursor)
        finally:
            cursor.close()

    def roll_up_archived(self) -> str:
        """After a recovery, recompute the rollups of one more archived day, the newest first.

        Returns:
            `FINISHED` if there are none left.
        """
        cursor = self._database.cursor()
        try:
            found = cursor.execute("SELECT value FROM corral_meta WHERE key = ?", [recovery.TO_ROLL_UP]).fetchone()
            days = [day for day in str(found[0]).split(",") if day] if found else []
            if not days:
                return FINISHED
            day = days.pop().replace("-", "")
            files = archive.files_by_day(cursor, self._database.archive).get(day)
            if files:
                self._rollups.refresh_archived(cursor, day, files)
                log.info("recomputed the rollups of %s", day)
            with transaction(cursor):
                put_meta(cursor, recovery.TO_ROLL_UP, ",".join(days))
            return ""
        finally:
            cursor.close()

    def _minutes_from(self, cursor: DuckDBPyConnection) -> datetime | None:
        """Time before which rollups of 1 min are deleted; None if they are kept forever, or without any samples."""
        if self._retention.minutes is None:
            return None
        row = cursor.execute("SELECT value FROM corral_meta WHERE key = ?", [MINUTES_FROM]).fetchone()
        if row is not None:
            return datetime.fromisoformat(row[0])
        # An older Corral did not record how far it had deleted: estimate it from the newest sample.
        newest = self._newest(cursor)
        return None if newest is None else retention.forced(newest).before(self._retention.minutes)

    def _newest(self, cursor: DuckDBPyConnection) -> datetime | None:
        """Time of the newest sample; None if there is none."""
        found = sorting.newest(cursor, self._database.days)
        if found is not None:
            return found
        row = cursor.execute("SELECT max(last) FROM store.archive_files").fetchone()
        return row[0] if row else None

    def _horizon(self) -> Horizon | None:
        now = datetime.now(UTC)
        if self._force:
            return retention.forced(now)
        server = self._server_now()
        apart = retention.disagreement(now, server)
        if apart and not self.held_back:
            log.warning("%s", apart)
        self.held_back = apart
        cursor = self._database.cursor()
        try:
            return retention.agreed(now, server, self._newest(cursor), self._deleted_until)
        finally:
            cursor.close()

    def housekeeping(self, now: datetime | None = None) -> None:
        """Archive old days, and delete what is past its retention.

        Args:
            now: time to use instead of all clocks, by which all that is old goes at once; by default as `retention`
                decides.
        """
        horizon = self._horizon() if now is None else retention.forced(now)
        if horizon is not None:
            self._apply_retention(horizon)
            if now is None and self._force:
                log.warning(
                    "deleted all expired data by this machine's clock alone; from now on all clocks decide again"
                )
                self._force = False
        cursor = self._database.cursor()
        try:
            # Of each run only the newest row counts.
            cursor.execute(
                "DELETE FROM store.arrivals a USING (SELECT stream, agent, max(batch) AS newest FROM store.arrivals "
                "GROUP BY ALL) n WHERE a.stream = n.stream AND a.agent = n.agent AND a.batch < n.newest"
            )
        finally:
            cursor.close()

    def _apply_retention(self, horizon: Horizon) -> None:
        kept = self._retention
        archive.archive_days(self._database, horizon, kept.raw)
        if kept.archive is not None:
            archive.drop_archived(self._database, horizon, kept.archive)
        cursor = self._database.cursor()
        try:
            for seconds, level in (
                (kept.ten_seconds, rollups.TEN_SECONDS),
                (kept.minutes, rollups.MINUTE),
                (kept.hours, rollups.HOUR),
            ):
                if seconds is not None:
                    tables = (level.table, f"{level.table}_bins") if level.bins else (level.table,)
                    record_key = MINUTES_FROM if level is rollups.MINUTE else ""
                    _delete(cursor, tables, horizon, horizon.before(seconds), record_key)
            if kept.processes is not None:
                for table in ("processes", "store.without_processes", "agents"):
                    _delete(cursor, (table,), horizon, horizon.before(kept.processes))
        finally:
            cursor.close()


def _unread_seconds(job: _Job, span_seconds: float, cpu_seconds: float) -> float:
    """Pause after a job while nobody reads the history: for as much new data as takes `CHEAP_SECONDS`.

    Args:
        job: the job.
        span_seconds: time since it was begun before; infinite the first time.
        cpu_seconds: that it took.
    """
    if cpu_seconds < CHEAP_SECONDS:
        return job.unread_seconds
    if span_seconds == math.inf:
        return min(job.large_seconds, job.unread_seconds)
    return min(job.unread_seconds, max(job.large_seconds, span_seconds * CHEAP_SECONDS / cpu_seconds))


def _delete(
    cursor: DuckDBPyConnection, tables: Sequence[str], horizon: Horizon, limit: datetime, record_key: str = ""
) -> None:
    """Delete rows before a limit, as many as the run may; first record in `corral_meta` how far that goes."""
    since = horizon.since(tables[0], limit)
    row = cursor.execute(f"SELECT min(time) FROM {tables[0]} WHERE time >= ? AND time < ?", [since, limit]).fetchone()
    upto = since if row is None or row[0] is None else horizon.upto(limit, row[0])
    if upto == retention.EVER:
        return
    if record_key:
        until = upto.astimezone(UTC).isoformat(timespec="microseconds")
        known = cursor.execute("SELECT value FROM corral_meta WHERE key = ?", [record_key]).fetchone()
        if known is None or known[0] < until:
            with transaction(cursor):
                put_meta(cursor, record_key, until)
    for table in tables:
        cursor.execute(f"DELETE FROM {table} WHERE time < ?", [upto])
    horizon.deleted_until[tables[0]] = upto
