"""Order of samples in the database: a part of a day is rewritten by device and time, in half of the space.

Samples arrive a tick of all devices at a time, so that neighbors in a column are of different devices, and hardly
compress. Once there are enough of them, the day's table is closed: it is renamed, and the next sample creates a new
one. When rollups include all of a closed part, it is sorted into the day's sorted table and dropped in one transaction.
So a crash at any point leaves each sample in the view `samples` once. A late sample is in a new table like any other.

Rows keep the highest batch of their part, so that rollups that are lost are recomputed from all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Final

from duckdb import DuckDBPyConnection

from ....schemas.metrics import METRICS
from .. import schema
from ..protocol import ROW_GROUP_ROWS
from ..retention import end_of_day
from ..statements import column_names, transaction
from . import archive, migrations
from .database import Database

log = logging.getLogger("corral.storage")

ROWS: Final = 1_000_000
"""Rows that a part has at least, unless its day is over: fewer are not worth the transaction."""
ROWS_A_DEVICE: Final = 10_000
"""Rows of each device that a part has at least, unless its day is over. With 3,600 of them (an hour at 1 Hz) a sample
takes 21 bytes, with 7,200 18, with 14,400 17, with a day 13: DuckDB encodes 2,048 values of a column together."""
ROWS_AT_ONCE: Final = 1_500_000
"""Approximate number of rows that are sorted at once: they take some 400 MB of memory."""
STEPS: Final = 8
"""Number of steps of a part at most, since each reads the whole part."""
LATE: Final = timedelta(hours=1)
"""How long after a day's end it is over: nearly all of its samples have arrived by then."""


class _DaysChanged(Exception):
    """The first sample of another day came meanwhile: the view names its table, and can't be replaced."""


def sort_days(database: Database) -> None:
    """Close parts of days that have enough rows, and sort closed ones that rollups include."""
    cursor = database.cursor()
    try:
        now = newest(cursor, database.days)
        for part in sorted(database.days):
            if now is not None and len(part) == len("20261124") and _is_complete(cursor, part, now):
                close(database, cursor, part)
        for part in sorted(database.days):
            if part.endswith(schema.CLOSED):
                sort(database, cursor, part[:8])
    finally:
        cursor.close()


def newest(cursor: DuckDBPyConnection, days: Iterable[str]) -> datetime | None:
    """Time of the newest sample in the tables of days and their parts; None if there is none."""
    days = set(days)
    for day in sorted({part[:8] for part in days}, reverse=True):
        tables = [schema.day_table(part) for part in schema.parts_of(day, days)]
        found = [cursor.execute(f"SELECT max(time) FROM {table}").fetchall()[0][0] for table in tables]
        if times := [time for time in found if time is not None]:
            return max(times)
    return None


def _is_complete(cursor: DuckDBPyConnection, day: str, now: datetime) -> bool:
    """True if the rows that have arrived for a day are enough to be sorted."""
    table = schema.day_table(day)
    row = cursor.execute(f"SELECT count(*) FROM {table}").fetchone()
    rows = int(row[0]) if row else 0
    if rows < ROW_GROUP_ROWS:
        return False
    if now - end_of_day(datetime.strptime(day, "%Y%m%d").replace(tzinfo=UTC)) > LATE:
        return True
    if rows < ROWS:
        return False
    row = cursor.execute(f"SELECT count(DISTINCT series) FROM {table}").fetchone()
    return row is not None and rows >= ROWS_A_DEVICE * int(row[0])


def close(database: Database, cursor: DuckDBPyConnection, day: str) -> bool:
    """Let a day's table get no more rows; False if an earlier part of the day is not sorted yet."""
    closed = day + schema.CLOSED
    with database.writing:
        if closed in database.days:
            return False
        days = database.days - {day} | {closed}
        with transaction(cursor):
            cursor.execute(f"ALTER TABLE {schema.day_table(day)} RENAME TO samples_{closed}")
            database.refresh_view(cursor, days)
        database.days = days
    return True


def sort(database: Database, cursor: DuckDBPyConnection, day: str) -> bool:
    """Move a day's closed part to its sorted table; False if it can't be done yet."""
    closed = schema.day_table(day + schema.CLOSED)
    rows, batch = cursor.execute(f"SELECT count(*), coalesce(max(batch), 0) FROM {closed}").fetchall()[0]
    if not archive.rolled_up(cursor, batch):
        return False
    days = database.days
    try:
        with ExitStack() as held:
            with transaction(cursor):
                _insert_sorted(cursor, day, batch)
                # From here on no write may change the days, or the view.
                held.enter_context(database.writing)
                if database.days != days:
                    raise _DaysChanged
                cursor.execute(f"DROP TABLE {closed}")
                days = days - {day + schema.CLOSED} | {day + schema.SORTED}
                database.refresh_view(cursor, days)
            database.days = days
    except _DaysChanged:
        return False
    log.info("sorted %d samples of %s", rows, day)
    return True


def _insert_sorted(cursor: DuckDBPyConnection, day: str, batch: int) -> None:
    closed, target = schema.day_table(day + schema.CLOSED), schema.day_table(day + schema.SORTED)
    have = column_names(cursor, closed)
    metrics = [name for name in METRICS if name in have]
    cursor.execute(schema.create_day(target, metrics))
    migrations.add_metrics(cursor, target, metrics)
    names = ", ".join(("time", "series", "batch", *metrics))
    values = ", ".join(("time", "series", f"{batch}::BIGINT", *metrics))
    for first, last in _steps(cursor, closed):
        cursor.execute(
            f"INSERT INTO {target} ({names}) SELECT {values} FROM {closed} WHERE series BETWEEN {first} AND {last} "
            "ORDER BY series, time"
        )


def _steps(cursor: DuckDBPyConnection, table: str) -> list[tuple[int, int]]:
    """First and last device of each step."""
    counts = cursor.execute(f"SELECT series, count(*) FROM {table} GROUP BY ALL ORDER BY ALL").fetchall()
    at_once = max(ROWS_AT_ONCE, sum(rows for _, rows in counts) // STEPS)
    found: list[tuple[int, int]] = []
    size = 0
    for series, rows in counts:
        if found and size + rows <= at_once:
            found[-1] = (found[-1][0], series)
            size += rows
        else:
            found.append((series, series))
            size = rows
    return found
