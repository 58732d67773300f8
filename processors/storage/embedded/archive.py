"""Archive of old days of raw samples in Parquet: `archive/day=2026-11-24/part-….parquet`, sorted by device and time.

A day is copied while ingest goes on, since only late samples are still written to it. Then ingest is held for a moment,
and one transaction registers the file, drops the day's tables, and makes the view `samples` name the file in place of
them. The file is complete and on disk before that, and not read until then. So a crash at any point leaves each
sample in the view once, and at most an orphaned file, which `delete_orphaned_files` deletes. A sample that comes for an
archived day creates a new table for the day, and later a further part.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from duckdb import DuckDBPyConnection

from .. import schema
from ..retention import Horizon, end_of_day
from ..statements import transaction
from . import hours, rollups
from .database import Database

log = logging.getLogger("corral.storage")

ENCODING: Final = (
    "ROW_GROUP_SIZE 737280, COMPRESSION zstd, COMPRESSION_LEVEL 6, PARQUET_VERSION V2, DICTIONARY_SIZE_LIMIT 1000"
)
"""Options of `COPY`. Columns of more values than the limit in a row group have no dictionary: times and counters are
deltas of each other, floats are split by byte. A row group has a day of a host's eight devices at 1 Hz: they are read
at the same times, which are found again by zstd."""


def files_by_day(cursor: DuckDBPyConnection, folder: Path) -> dict[str, list[Path]]:
    """Registered files of each archived day."""
    found: dict[str, list[Path]] = {}
    for day, path in cursor.execute(
        "SELECT strftime(day, '%Y%m%d'), path FROM store.archive_files ORDER BY path"
    ).fetchall():
        found.setdefault(day, []).append(folder / path)
    return found


def delete_orphaned_files(database: Database) -> None:
    """Delete files that are not registered: a crash came before they were, or after they had expired.

    Only files that this history wrote are deleted: others may share the folder, or have used it before.
    """
    cursor = database.cursor()
    known = {path for (path,) in cursor.execute("SELECT path FROM store.archive_files").fetchall()}
    for file in database.archive.glob(f"day=*/part-{database.processor}-*.parquet*"):
        if str(file.relative_to(database.archive)) not in known:
            log.info("deleting the orphaned file %s", file)
            file.unlink(missing_ok=True)


def archive_days(database: Database, horizon: Horizon, seconds: float) -> None:
    """Archive days that are past the retention of raw samples, the oldest first: as many as the horizon allows."""
    before = horizon.before(seconds)
    since = horizon.since("days", before)
    for day in sorted({part[:8] for part in database.days}):
        ended = end_of_day(datetime.strptime(day, "%Y%m%d").replace(tzinfo=UTC))
        if ended > before or not archive_day(database, day) or ended <= since:
            continue
        horizon.deleted_until["days"] = ended
        if not horizon.all_at_once:
            return


def archive_day(database: Database, day: str) -> bool:
    """Move one day from its tables to a Parquet file; False if it can't be done yet."""
    cursor = database.cursor()
    try:
        parts = schema.parts_of(day, database.days)
        table = schema.all_days(parts, "time, batch")
        found = cursor.execute(f"SELECT count(*), min(time), max(time), max(batch) FROM {table}").fetchone()
        rows, first, last, batch = found or (0, None, None, None)
        if rows and not rolled_up(cursor, batch):
            return False
        relative = (
            Path(f"day={day[:4]}-{day[4:6]}-{day[6:]}") / f"part-{database.processor}-{uuid.uuid4().hex[:16]}.parquet"
        )
        final = database.archive / relative
        if rows:
            _write(cursor, parts, final)
        # From here on no write may come between the count and the drop.
        with database.writing:
            again = cursor.execute(f"SELECT count(*) FROM {table}").fetchone()
            if again is None or again[0] != rows or schema.parts_of(day, database.days) != parts:
                final.unlink(missing_ok=True)
                return False
            with transaction(cursor):
                if rows:
                    cursor.execute(
                        "INSERT INTO store.archive_files VALUES (?, ?, ?, ?, ?, ?, now())",
                        [
                            str(relative), f"{day[:4]}-{day[4:6]}-{day[6:]}", rows, final.stat().st_size, first, last,
                        ],
                    )  # fmt: skip
                for part in parts:
                    cursor.execute(f"DROP TABLE {schema.day_table(part)}")
                database.refresh_view(cursor, database.days - parts)
            database.days = database.days - parts
        log.info("archived %s: %d samples in %s", day, rows, relative)
        return True
    finally:
        cursor.close()


def drop_archived(database: Database, horizon: Horizon, seconds: float) -> None:
    """Delete archived days that are past their retention, the oldest first: as many as the horizon allows."""
    before = horizon.before(seconds)
    since = horizon.since("archive", before)
    cursor = database.cursor()
    try:
        with database.writing, transaction(cursor):
            oldest = cursor.execute(
                "SELECT min(day)::TIMESTAMPTZ FROM store.archive_files WHERE day >= ? AND day < ?",
                [since.date(), before.astimezone(UTC).date()],
            ).fetchone()
            upto = since if oldest is None or oldest[0] is None else horizon.upto(before, oldest[0])
            rows = cursor.execute(
                "DELETE FROM store.archive_files WHERE day < ? RETURNING path", [upto.astimezone(UTC).date()]
            ).fetchall()
            if rows:
                database.refresh_view(cursor, database.days)
        horizon.deleted_until["archive"] = upto
        for (path,) in rows:
            (database.archive / path).unlink(missing_ok=True)
    finally:
        cursor.close()


def rolled_up(cursor: DuckDBPyConnection, batch: Any) -> bool:
    """True if the rollups from raw samples include a batch."""
    levels = ", ".join(f"'{level.name}'" for level in (rollups.TEN_SECONDS, rollups.MINUTE))
    row = cursor.execute(f"SELECT min(batch) FROM store.rolled WHERE level IN ({levels})").fetchone()
    return row is not None and int(row[0]) >= batch


def _write(cursor: DuckDBPyConnection, parts: Collection[str], final: Path) -> None:
    """Write a day's file, and sync it and its folder to disk before it is used."""
    final.parent.mkdir(parents=True, exist_ok=True)
    writing = final.with_name(final.name + ".tmp")
    # Only metrics that the history has had: to write a column of nulls takes as long as one of values.
    metrics = hours.metrics_with_data(cursor, rollups.TEN_SECONDS, [schema.day_table(part) for part in parts])
    names = [metric.name for metric in metrics]
    source = schema.all_days(parts, ", ".join(("time", "series", *names)))
    columns = ", ".join(("time", "s.host", "s.device", *names))
    cursor.execute(
        f"COPY (SELECT {columns} FROM {source} r JOIN store.series s USING (series) "
        f"ORDER BY s.host, s.device, time) TO {schema.sql_text(str(writing))} "
        f"(FORMAT parquet, {ENCODING})"
    )
    for path in (writing, final.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    writing.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
