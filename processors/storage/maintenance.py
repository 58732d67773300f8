"""What goes on beside ingest, in a thread and with a cursor of its own: rollups, archive, retention.

Each job paces itself: it pauses for at least as long as it took, so that half of a core is the most it asks for, and a
fleet that grows makes rollups later and never ingest.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

import duckdb
from msgspec import Struct

from . import archive, recovery, rollups
from .database import Database
from .errors import StoragePaused

log = logging.getLogger("corral.storage")


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


ROLLUP_SECONDS: Final = {"10s": 2.0, "1m": 5.0, "1h": 10.0}
HOUSEKEEPING_SECONDS: Final = 60.0
RECOVERY_SECONDS: Final = 1.0
SWEEP_SECONDS: Final = 86400.0


class _Job(Struct):
    name: str
    work: Callable[[], object]
    seconds: float
    due: float = 0.0


class Maintenance:
    """Runs the jobs of one database until stopped.

    Args:
        database: to look after.
        retention: see `Retention`.

    Attributes:
        failing: what fails at the moment, by job.
    """

    def __init__(self, database: Database, retention: Retention | None = None) -> None:
        self._database = database
        self._retention = retention or Retention()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.failing: dict[str, str] = {}

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop after the job that runs now."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        jobs = [
            *(
                _Job(f"rollup {level.name}", lambda level=level: self.roll_up(level), ROLLUP_SECONDS[level.name])
                for level in rollups.LEVELS
            ),
            _Job("rollups of a lost database", self.roll_up_archived, RECOVERY_SECONDS),
            _Job("housekeeping", self.keep_house, HOUSEKEEPING_SECONDS),
            _Job("files of nobody", lambda: archive.sweep(self._database), SWEEP_SECONDS),
        ]
        while not self._stop.is_set():
            job = min(jobs, key=lambda job: job.due)
            if self._stop.wait(max(0.0, job.due - time.monotonic())):
                return
            began = time.monotonic()
            try:
                job.work()
                self.failing.pop(job.name, None)
            except (duckdb.Error, StoragePaused, OSError) as error:
                text = str(error).strip().partition("\n")[0]
                if recovery.DAMAGED.search(text):
                    self._database.damaged = text
                if self.failing.get(job.name) != text:
                    log.error("%s failed, and is tried again: %s", job.name, text)
                self.failing[job.name] = text
            except Exception:
                # One job that fails must not end the others.
                log.exception("%s failed, and is tried again", job.name)
                self.failing[job.name] = "the log says why"
            ended = time.monotonic()
            job.due = ended + max(job.seconds, ended - began)

    def roll_up(self, level: rollups.Level) -> int:
        """Bring one rollup up to date."""
        cursor = self._database.cursor()
        minutes = self._retention.minutes
        try:
            return rollups.refresh(
                cursor,
                level,
                sorted(self._database.days),
                archive.files_by_day(cursor, self._database.archive),
                None if minutes is None else datetime.now(UTC) - timedelta(seconds=minutes),
            )
        finally:
            cursor.close()

    def roll_up_archived(self) -> None:
        """After a recovery: compute the rollups of one more archived day anew, the newest first."""
        cursor = self._database.cursor()
        try:
            found = cursor.execute("SELECT value FROM corral_meta WHERE key = ?", [recovery.TO_ROLL_UP]).fetchone()
            days = [day for day in str(found[0]).split(",") if day] if found else []
            if not days:
                return
            day = days.pop().replace("-", "")
            files = archive.files_by_day(cursor, self._database.archive).get(day)
            if files:
                rollups.refresh_archived(cursor, day, files)
                log.info("the rollups of %s were computed anew", day)
            cursor.execute("UPDATE corral_meta SET value = ? WHERE key = ?", [",".join(days), recovery.TO_ROLL_UP])
        finally:
            cursor.close()

    def keep_house(self, now: datetime | None = None) -> None:
        """Give old days to the archive, and let go of what is older than its retention."""
        now = now or datetime.now(UTC)
        kept = self._retention
        archive.archive_days(self._database, now - timedelta(seconds=kept.raw))
        if kept.archive is not None:
            archive.drop_archived(self._database, now - timedelta(seconds=kept.archive))
        cursor = self._database.cursor()
        try:
            for seconds, level in (
                (kept.ten_seconds, rollups.TEN_SECONDS),
                (kept.minutes, rollups.MINUTE),
                (kept.hours, rollups.HOUR),
            ):
                if seconds is not None:
                    tables = (level.table, f"{level.table}_bins") if level.bins else (level.table,)
                    for table in tables:
                        cursor.execute(f"DELETE FROM {table} WHERE time < ?", [now - timedelta(seconds=seconds)])
            if kept.processes is not None:
                for table in ("processes", "agents"):
                    cursor.execute(f"DELETE FROM {table} WHERE time < ?", [now - timedelta(seconds=kept.processes)])
            # Of each run only the newest row counts.
            cursor.execute(
                "DELETE FROM store.arrivals a USING (SELECT stream, agent, max(batch) AS newest FROM store.arrivals "
                "GROUP BY ALL) n WHERE a.stream = n.stream AND a.agent = n.agent AND a.batch < n.newest"
            )
        finally:
            cursor.close()
