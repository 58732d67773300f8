"""What one of a lake's processors does for all: rollups, small files into large ones, and what is old away.

Each step is a transaction of DuckLake, or several that may be repeated: a crash leaves every row once, and at most
files that nobody knows, which a later step finds. Files are merged in tiers, so that a byte is written again a few
times and not every minute; those of which rows were deleted are written anew first, since DuckLake merges no others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Final

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

from . import lake_rollups, retention
from .errors import StorageError, StoragePaused
from .lake import Lake, attach
from .retention import Horizon, Retention
from .rollup_columns import HOUR, LEVELS, MINUTE, TEN_SECONDS

log = logging.getLogger("corral.lake")

SECONDS: Final = 60.0
SNAPSHOTS_KEPT: Final = timedelta(hours=1)
"""How far back a reader may go by DuckLake's time travel; longer than any query runs."""
ORPHANS_KEPT: Final = timedelta(days=1)
"""A file that no transaction has entered yet may belong to one that goes on."""
ROWS_AT_ONCE: Final = 5_000_000
"""Deleted by one transaction, about: it holds 28 bytes of memory for each."""


class Step(Struct, frozen=True):
    """A step of upkeep.

    Attributes:
        name: of it.
        seconds: between two.
        work: what is done.
        by_time: by what is old: not while the clocks are not known.
    """

    name: str
    seconds: float
    work: Callable[[DuckDBPyConnection, Retention, Horizon], object]
    by_time: bool = False


def _sql(text: str) -> Callable[[DuckDBPyConnection, Retention, Horizon], object]:
    return lambda connection, _, __: connection.execute(text).fetchall()


def _older(call: str, kept: timedelta) -> Callable[[DuckDBPyConnection, Retention, Horizon], object]:
    """One of DuckLake's calls on what is older than a time."""

    def work(connection: DuckDBPyConnection, _: Retention, horizon: Horizon) -> None:
        connection.execute(f"CALL {call}('lake', older_than => ?)", [horizon.clocks - kept]).fetchall()

    return work


def _expire(connection: DuckDBPyConnection, _: Retention, horizon: Horizon) -> None:
    """Forget old snapshots, but none that a rollup has not seen: its feed is what came since."""
    kept = horizon.clocks - SNAPSHOTS_KEPT
    row = connection.execute(
        "SELECT min(snapshot_time) FROM lake.snapshots() "
        "WHERE snapshot_id >= (SELECT min(snapshot) FROM store.rolled WHERE snapshot > 0)"
    ).fetchone()
    if row is not None and row[0] is not None:
        kept = min(kept, row[0])
    connection.execute("CALL ducklake_expire_snapshots('lake', older_than => ?)", [kept]).fetchall()


def let_go(connection: DuckDBPyConnection, kept: Retention, horizon: Horizon) -> None:
    """Delete what is older than its retention, by whole UTC days. Files without other rows go whole."""
    samples = None if kept.archive is None else max(kept.archive, kept.raw)
    for seconds, tables in (
        (samples, ("samples",)),
        (kept.ten_seconds, (TEN_SECONDS.table,)),
        (kept.minutes, (MINUTE.table, f"{MINUTE.table}_bins")),
        (kept.hours, (HOUR.table, f"{HOUR.table}_bins")),
        (kept.processes, ("processes", "store.without_processes", "agents")),
    ):
        if seconds is not None:
            limit = retention.end_of_day(horizon.before(seconds)) - timedelta(days=1)
            for table in tables:
                _delete(connection, table, limit, horizon)


def _delete(connection: DuckDBPyConnection, table: str, limit: datetime, horizon: Horizon) -> None:
    old = connection.execute(f"SELECT 1 FROM {table} WHERE time < ? LIMIT 1", [limit]).fetchone()
    if old is None:
        return
    since = horizon.since(table, limit)
    oldest = connection.execute(
        f"SELECT min(time) FROM {table} WHERE time >= ? AND time < ?", [since, limit]
    ).fetchone()
    before = since if oldest is None or oldest[0] is None else horizon.upto(limit, oldest[0])
    row = connection.execute(f"SELECT count(*), min(time) FROM {table} WHERE time < ?", [before]).fetchone()
    rows, first = row or (0, before)
    steps = max(1, -(-int(rows) // ROWS_AT_ONCE))
    for step in range(1, steps + 1):
        upto = before if step == steps else first + (before - first) * step / steps
        connection.execute(f"DELETE FROM {table} WHERE time < ?", [upto])
    horizon.gone[table] = before
    log.info("let go of %d rows of %s from before %s", rows, table, before)


STEPS: Final = (
    Step(
        "arrivals",
        600.0,
        _sql(
            "DELETE FROM store.arrivals a USING (SELECT stream, agent, max(batch) AS newest FROM store.arrivals "
            "GROUP BY ALL) n WHERE a.stream = n.stream AND a.agent = n.agent AND a.batch < n.newest"
        ),
    ),
    Step("retention", 300.0, let_go, by_time=True),
    Step("inlined rows", 600.0, _sql("CALL ducklake_flush_inlined_data('lake')")),
    Step("files with deleted rows", 600.0, _sql("CALL ducklake_rewrite_data_files('lake', delete_threshold => 0.05)")),
    Step("small files", 60.0, _sql(f"CALL ducklake_merge_adjacent_files('lake', max_file_size => {4 * 2**20})")),
    Step("files", 1800.0, _sql(f"CALL ducklake_merge_adjacent_files('lake', max_file_size => {64 * 2**20})")),
    Step("large files", 43200.0, _sql("CALL ducklake_merge_adjacent_files('lake')")),
    Step("old snapshots", 600.0, _expire, by_time=True),
    Step("old files", 600.0, _older("ducklake_cleanup_old_files", SNAPSHOTS_KEPT), by_time=True),
    Step("files of nobody", 86400.0, _older("ducklake_delete_orphaned_files", ORPHANS_KEPT), by_time=True),
)


class Upkeep:
    """Looks after one lake. Each step may be repeated, and be done by two at once.

    Args:
        lake: which.
        kept: how long things are kept.
        server_now: the time by the bus's clock; None while it is not known.
        force: let go of all that is old by this machine's clock alone, once.

    Attributes:
        held_back: why retention is held back, where something is wrong; empty otherwise.
    """

    def __init__(
        self, lake: Lake, kept: Retention, *, server_now: Callable[[], datetime | None], force: bool = False
    ) -> None:
        self._lake = lake
        self._kept = kept
        self._server_now = server_now
        self._force = force
        self._gone: dict[str, datetime] = {}
        self.held_back = ""

    async def run(self) -> None:
        """Until cancelled."""
        every = {level.name: lake_rollups.REFRESH_SECONDS[level.name] for level in LEVELS}
        every |= {step.name: step.seconds for step in STEPS}
        due = dict.fromkeys(every, 0.0)
        try:
            while True:
                await asyncio.sleep(SECONDS)
                now = time.monotonic()
                names = [name for name, at in due.items() if at <= now]
                due.update({name: now + every[name] for name in names})
                try:
                    await asyncio.to_thread(self._once, names)
                except (StorageError, StoragePaused) as error:
                    log.error("upkeep: tried again in %g s: %s", SECONDS, error)
        finally:
            self.held_back = ""

    def _once(self, names: Collection[str]) -> None:
        now = datetime.now(UTC)
        if self._force:
            once(self._lake, names, self._kept, now)
            self._force = False
            return
        server = self._server_now()
        apart = retention.disagreement(now, server)
        if apart and not self.held_back:
            log.warning("%s", apart)
        self.held_back = apart
        once(self._lake, names, self._kept, agree=lambda newest: retention.agreed(now, server, newest, self._gone))


def once(
    lake: Lake,
    names: Collection[str] | None = None,
    kept: Retention | None = None,
    now: datetime | None = None,
    *,
    agree: Callable[[datetime | None], Horizon | None] | None = None,
) -> None:
    """Steps once; one that fails is logged and stops none of the others.

    Args:
        lake: which.
        names: of rollups to bring up to date (`10s`, `1m`, `1h`), and of `STEPS`; all by default.
        kept: how long things are kept.
        now: by which all that is old goes at once; this machine's by default.
        agree: in its place what clocks and the newest sample agree on.
    """
    kept = kept or Retention()
    connection = attach(lake)
    try:
        for level in LEVELS:
            if names is None or level.name in names:
                _step(connection, f"rollup {level.name}", lambda level=level: lake_rollups.refresh(connection, level))
        horizon = retention.forced(now or datetime.now(UTC)) if agree is None else agree(_newest(connection))
        for step in STEPS:
            if names is None or step.name in names:
                # Nothing that goes by time is done while it is not known.
                given = horizon or (None if step.by_time else retention.forced(datetime.now(UTC)))
                if given is not None:
                    _step(connection, step.name, lambda step=step, given=given: step.work(connection, kept, given))
    finally:
        connection.close()


def _newest(connection: DuckDBPyConnection) -> datetime | None:
    """The time of the newest sample, but for the last refresh of the rollup that says so: all samples are many."""
    try:
        row = connection.execute(f"SELECT max(time) FROM {TEN_SECONDS.table}").fetchone()
    except duckdb.Error as error:
        log.warning("upkeep: the newest sample: %s", str(error).strip().partition("\n")[0])
        return None
    return row[0] if row else None


def _step(connection: DuckDBPyConnection, name: str, work: Callable[[], object]) -> None:
    began = time.monotonic()
    try:
        work()
        log.debug("upkeep: %s in %.1f s", name, time.monotonic() - began)
    except duckdb.Error as error:
        # Mostly a conflict with a writer, whose turn it is then.
        log.warning("upkeep: %s: %s", name, str(error).strip().partition("\n")[0])
