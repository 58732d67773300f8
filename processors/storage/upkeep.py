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

from . import lake_rollups
from .errors import StorageError, StoragePaused
from .lake import Lake, attach
from .maintenance import Retention
from .rollup_columns import HOUR, LEVELS, MINUTE, TEN_SECONDS

log = logging.getLogger("corral.lake")

SECONDS: Final = 60.0
SNAPSHOTS_KEPT: Final = timedelta(hours=1)
"""How far back a reader may go by DuckLake's time travel; longer than any query runs."""
ORPHANS_KEPT: Final = "1 day"
"""A file that no transaction has entered yet may belong to one that goes on."""
ROWS_AT_ONCE: Final = 5_000_000
"""Deleted by one transaction, about: it holds 28 bytes of memory for each."""


class Step(Struct, frozen=True):
    """A step of upkeep.

    Attributes:
        name: of it.
        seconds: between two.
        work: what is done.
    """

    name: str
    seconds: float
    work: Callable[[DuckDBPyConnection, Retention], object]


def _sql(text: str) -> Callable[[DuckDBPyConnection, Retention], object]:
    return lambda connection, _: connection.execute(text).fetchall()


def _expire(connection: DuckDBPyConnection, _: Retention) -> None:
    """Forget old snapshots, but none that a rollup has not seen: its feed is what came since."""
    kept = datetime.now(UTC) - SNAPSHOTS_KEPT
    row = connection.execute(
        "SELECT min(snapshot_time) FROM lake.snapshots() "
        "WHERE snapshot_id >= (SELECT min(snapshot) FROM store.rolled WHERE snapshot > 0)"
    ).fetchone()
    if row is not None and row[0] is not None:
        kept = min(kept, row[0])
    connection.execute("CALL ducklake_expire_snapshots('lake', older_than => ?)", [kept]).fetchall()


def let_go(connection: DuckDBPyConnection, kept: Retention, now: datetime | None = None) -> None:
    """Delete what is older than its retention, by whole UTC days. Files without other rows go whole."""
    now = now or datetime.now(UTC)
    samples = None if kept.archive is None else max(kept.archive, kept.raw)
    for seconds, tables in (
        (samples, ("samples",)),
        (kept.ten_seconds, (TEN_SECONDS.table,)),
        (kept.minutes, (MINUTE.table, f"{MINUTE.table}_bins")),
        (kept.hours, (HOUR.table, f"{HOUR.table}_bins")),
        (kept.processes, ("processes", "agents")),
    ):
        if seconds is not None:
            before = (now - timedelta(seconds=seconds)).replace(hour=0, minute=0, second=0, microsecond=0)
            for table in tables:
                _delete(connection, table, before)


def _delete(connection: DuckDBPyConnection, table: str, before: datetime) -> None:
    old = connection.execute(f"SELECT 1 FROM {table} WHERE time < ? LIMIT 1", [before]).fetchone()
    if old is None:
        return
    row = connection.execute(f"SELECT count(*), min(time) FROM {table} WHERE time < ?", [before]).fetchone()
    rows, first = row or (0, before)
    steps = max(1, -(-int(rows) // ROWS_AT_ONCE))
    for step in range(1, steps + 1):
        upto = before if step == steps else first + (before - first) * step / steps
        connection.execute(f"DELETE FROM {table} WHERE time < ?", [upto])
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
    Step("retention", 3600.0, let_go),
    Step("inlined rows", 600.0, _sql("CALL ducklake_flush_inlined_data('lake')")),
    Step("files with deleted rows", 600.0, _sql("CALL ducklake_rewrite_data_files('lake', delete_threshold => 0.05)")),
    Step("small files", 60.0, _sql(f"CALL ducklake_merge_adjacent_files('lake', max_file_size => {4 * 2**20})")),
    Step("files", 1800.0, _sql(f"CALL ducklake_merge_adjacent_files('lake', max_file_size => {64 * 2**20})")),
    Step("large files", 43200.0, _sql("CALL ducklake_merge_adjacent_files('lake')")),
    Step("old snapshots", 600.0, _expire),
    Step(
        "old files",
        600.0,
        _sql(
            "CALL ducklake_cleanup_old_files('lake', older_than => now() - "
            f"INTERVAL {int(SNAPSHOTS_KEPT.total_seconds())} SECOND)"
        ),
    ),
    Step(
        "files of nobody",
        86400.0,
        _sql(f"CALL ducklake_delete_orphaned_files('lake', older_than => now() - INTERVAL '{ORPHANS_KEPT}')"),
    ),
)


async def run(lake: Lake, retention: Retention) -> None:
    """Look after a lake until cancelled. Each step may be repeated, and be done by two at once."""
    every = {level.name: lake_rollups.REFRESH_SECONDS[level.name] for level in LEVELS}
    every |= {step.name: step.seconds for step in STEPS}
    due = dict.fromkeys(every, 0.0)
    while True:
        await asyncio.sleep(SECONDS)
        now = time.monotonic()
        names = [name for name, at in due.items() if at <= now]
        due.update({name: now + every[name] for name in names})
        try:
            await asyncio.to_thread(once, lake, names, retention)
        except (StorageError, StoragePaused) as error:
            log.error("upkeep: tried again in %g s: %s", SECONDS, error)


def once(lake: Lake, names: Collection[str] | None = None, retention: Retention | None = None) -> None:
    """Steps once; one that fails is logged and stops none of the others.

    Args:
        lake: which.
        names: of rollups to bring up to date (`10s`, `1m`, `1h`), and of `STEPS`; all by default.
        retention: how long things are kept.
    """
    kept = retention or Retention()
    connection = attach(lake)
    try:
        for level in LEVELS:
            if names is None or level.name in names:
                _step(connection, f"rollup {level.name}", lambda level=level: lake_rollups.refresh(connection, level))
        for step in STEPS:
            if names is None or step.name in names:
                _step(connection, step.name, lambda step=step: step.work(connection, kept))
    finally:
        connection.close()


def _step(connection: DuckDBPyConnection, name: str, work: Callable[[], object]) -> None:
    began = time.monotonic()
    try:
        work()
        log.debug("upkeep: %s in %.1f s", name, time.monotonic() - began)
    except duckdb.Error as error:
        # Mostly a conflict with a writer, whose turn it is then.
        log.warning("upkeep: %s: %s", name, str(error).strip().partition("\n")[0])
