"""What one of a lake's processors does for all: small files into large ones, and what nobody reads any more away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Final

import duckdb
from duckdb import DuckDBPyConnection

from . import lake_rollups
from .errors import StorageError, StoragePaused
from .lake import Lake, attach
from .rollup_columns import LEVELS

log = logging.getLogger("corral.lake")

SECONDS: Final = 60.0
SNAPSHOTS_KEPT: Final = "1 hour"
"""How far back a reader may go by DuckLake's time travel; longer than any query runs."""

_STEPS: Final = {
    "arrivals": (
        "DELETE FROM store.arrivals a USING (SELECT stream, agent, max(batch) AS newest FROM store.arrivals "
        "GROUP BY ALL) n WHERE a.stream = n.stream AND a.agent = n.agent AND a.batch < n.newest"
    ),
    "inlined rows": "CALL ducklake_flush_inlined_data('lake')",
    "small files": "CALL ducklake_merge_adjacent_files('lake')",
    "old snapshots": f"CALL ducklake_expire_snapshots('lake', older_than => now() - INTERVAL '{SNAPSHOTS_KEPT}')",
    "old files": f"CALL ducklake_cleanup_old_files('lake', older_than => now() - INTERVAL '{SNAPSHOTS_KEPT}')",
}


async def run(lake: Lake) -> None:
    """Look after a lake until cancelled. Each step may be repeated, and be done by two at once."""
    due = dict.fromkeys((level.name for level in LEVELS), 0.0)
    while True:
        await asyncio.sleep(SECONDS)
        now = time.monotonic()
        names = [name for name, at in due.items() if at <= now]
        due.update({name: now + lake_rollups.REFRESH_SECONDS[name] for name in names})
        try:
            await asyncio.to_thread(once, lake, names)
        except (StorageError, StoragePaused) as error:
            log.error("upkeep: tried again in %g s: %s", SECONDS, error)


def once(lake: Lake, levels: Collection[str] = ("10s", "1m", "1h")) -> None:
    """Every step once; one that fails is logged and stops none of the others.

    Args:
        lake: which.
        levels: rollups to bring up to date.
    """
    connection = attach(lake)
    try:
        for level in LEVELS:
            if level.name in levels:
                _step(connection, f"rollup {level.name}", lambda level=level: lake_rollups.refresh(connection, level))
        for name, sql in _STEPS.items():
            _step(connection, name, lambda sql=sql: connection.execute(sql).fetchall())
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
