"""Recovery of a damaged database file: detect it at the start, move it aside, and rebuild it.

It is rebuilt from what is left of it, from the archive, and from what the streams still hold.

DuckDB checks a block when it reads it, and so may find damage months later. Here every block is checked at the start,
at the speed of the disk: its first 8 bytes are the checksum of the rest (`Checksum` in DuckDB's `checksum.cpp`). A bad
block that no table uses any more is harmless. So if one is found, DuckDB reads all tables before the file is called
damaged.

What can still be read is copied, row group by row group. If rows of a stream are missing, the streams are read again
from their start, and `Database` then stores only what is not there yet: a sample is identified by its device and time.
The damaged file is kept under another name, for inspection.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from pathlib import Path
from typing import Any, Final, TypeAlias

import duckdb
import msgspec
import numpy as np
from duckdb import DuckDBPyConnection
from msgspec import Struct

from ....schemas.metrics import METRICS
from .. import schema
from ..errors import StorageError
from ..protocol import ROW_GROUP_ROWS
from ..rollup_columns import LEVELS
from ..schema import sql_text
from . import migrations

log = logging.getLogger("corral.storage")

DAMAGED: Final = re.compile(r"corrupt|checksum", re.I)
"""DuckDB's errors for a block that differs from what was written."""

UNREADABLE: Final = re.compile(
    r"corrupt|checksum|Serialization Error|deserializ|INTERNAL Error|WAL file|read enough|out of range|beyond the end",
    re.I,
)
"""DuckDB's errors for a file that it can't interpret when it opens it."""

REPLAY_KEYS: Final = {
    "processes": ("time", "device", "pid"),
    "store.without_processes": ("time", "host"),
    "agents": ("time", "agent"),
    "events": ("time", "host", "agent", "sequence"),
}
"""Columns that identify a replayed row, in tables that are only appended to."""

TO_ROLL_UP: Final = "recovery_rollups"
"""Key in `corral_meta`: archived days whose rollups are to be recomputed, by comma."""
THROUGH: Final = "recovered_through"
"""Key in `corral_meta`: microseconds since the epoch; older rows may be stored already, and are looked up."""

_PRESENT: Final = (
    *("hosts", "devices", "host_facts", "links", "lease_events", "leases", "lease_devices", "requests"),
    *("store.waiting_requests", "drains", "jobs", "job_tasks", "store.lease_peaks"),
)
"""Tables that take a message again without harm."""
_HEADERS_BYTES: Final = 3 * 4096
_MAGIC: Final = b"DUCK"
_BLOCK_BYTES: Final = 262_144
_MULTIPLIER: Final = np.uint64(0xBF58476D1CE4E5B9)
_SEED: Final = np.uint64(5381)


Settings: TypeAlias = dict[str, str | bool | int | float | list[str]]
"""Settings of a DuckDB instance, as `duckdb.connect` takes them."""


class Recovery(Struct, kw_only=True):
    """Report of a recovery: what was done, and what was lost; kept as JSON next to the database.

    Attributes:
        damage: how it was found.
        aside: the damaged file.
        at: when, seconds since the epoch.
        copied: rows that could be read, by table.
        unreadable: rows that could not be read, by table; -1 if their number is not known.
        replay: the streams are read again from their start.
        archive_files: that hold samples of this history.
        lost: samples that were there and neither the archive nor the streams had, by day; None until it is known.
    """

    damage: str
    aside: str
    at: float
    copied: dict[str, int] = {}
    unreadable: dict[str, int] = {}
    replay: bool = False
    archive_files: int = 0
    lost: dict[str, int] | None = None


class Identity(Struct, frozen=True):
    """Identity of a history, in a file next to the database: one without its header can't tell what it was.

    Attributes:
        program: `corral`.
        processor: id of the history.
    """

    program: str
    processor: str


def identity_file(path: Path) -> Path:
    """Path of the file with the identity of a database."""
    return path.with_name(path.name + ".identity")


def sign(path: Path, processor: str) -> None:
    """Write the identity of a database next to it. Errors are ignored."""
    with contextlib.suppress(OSError):  # a disk that is full, say: it is written at the next start
        file = identity_file(path)
        text = msgspec.json.encode(Identity(schema.PROGRAM, processor))
        if not file.exists() or file.read_bytes() != text:
            file.write_bytes(text)


def identity(path: Path) -> Identity | None:
    """Identity of a database from the file next to it; None if that is missing, unreadable, or another program's."""
    try:
        found = msgspec.json.decode(identity_file(path).read_bytes(), type=Identity)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.program == schema.PROGRAM else None


def examine(path: Path, settings: Settings | None = None) -> str:
    """Reason why a database is damaged; empty if it is sound, is missing, or is not known to be Corral's.

    First it finishes a recovery that a crash interrupted before its last step.

    Args:
        path: of the file.
        settings: for DuckDB, if it has to read the file.
    """
    rebuilt = _rebuilt(path)
    if not path.exists() and rebuilt.exists():
        rebuilt.rename(path)  # a crash came between the two last steps of a recovery
    if not path.exists():
        return ""
    with path.open("rb") as file:
        head = file.read(_HEADERS_BYTES)
    if head[8:12] != _MAGIC:
        return "its head is gone" if identity(path) is not None else ""
    bad = bad_blocks(path)
    if not bad:
        return ""
    shown = ", ".join(map(str, bad[:5]))
    log.warning("%s: %d blocks fail their checksum (%s): reading all tables", path, len(bad), shown)
    try:
        with duckdb.connect(str(path), read_only=True, config=settings or {}) as connection:
            for table in _tables(connection, ""):
                _read(connection, table)
    except duckdb.Error as error:
        text = str(error).strip().partition("\n")[0]
        return f"blocks {shown} fail their checksum: {text}" if UNREADABLE.search(text) else ""
    log.info("%s: no table uses them", path)
    return ""


def bad_blocks(path: Path) -> list[int]:
    """Numbers of the blocks with a wrong checksum; empty if all are wrong, since the file then has another layout."""
    size = path.stat().st_size - _HEADERS_BYTES
    if size < _BLOCK_BYTES:
        return []
    words = np.memmap(
        path, dtype="<u8", mode="r", offset=_HEADERS_BYTES, shape=(size // _BLOCK_BYTES, _BLOCK_BYTES // 8)
    )
    bad: list[int] = []
    with np.errstate(over="ignore"):
        for number in range(words.shape[0]):
            block: Any = words[number]
            if np.bitwise_xor.reduce(block[1:] * _MULTIPLIER) ^ _SEED != block[0]:
                bad.append(number)
    return bad if len(bad) < words.shape[0] else []


def recover(path: Path, archive: Path, damage: str, settings: Settings | None = None) -> Recovery:
    """Move a damaged database aside, and put one with all that can be recovered in its place.

    Args:
        path: of the file.
        archive: folder of its Parquet files.
        damage: as `examine` describes it.
        settings: for DuckDB, such as its memory limit.

    Raises:
        StorageError: the file may not be Corral's, or there is no room; nothing was changed.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    log.error("%s is damaged: %s", path, damage)
    wal = path.with_name(path.name + ".wal")
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    found = Recovery(damage=damage, aside=str(aside), at=time.time())
    if wal.exists() and not bad_blocks(path) and _opens_without(path, wal, settings):
        # What was committed since the last checkpoint was only in the log; the watermarks in the file say so.
        wal.rename(aside.with_name(aside.name + ".wal"))
        found.aside = str(aside) + ".wal"
        log.warning("%s was moved aside: its contents are read again from the streams", wal)
        _write_report(path, found)
        return found
    building = path.with_name(path.name + ".rebuilding")
    for left in (building, building.with_name(building.name + ".wal"), _rebuilt(path)):
        left.unlink(missing_ok=True)
    try:
        _rebuild(path, building, archive, found, settings)
    except OSError as error:
        building.unlink(missing_ok=True)
        raise StorageError(f"{path} is damaged, and can't be rebuilt: {error}") from error
    building.rename(_rebuilt(path))
    if wal.exists():
        wal.rename(aside.with_name(aside.name + ".wal"))
    path.rename(aside)
    _rebuilt(path).rename(path)
    _write_report(path, found)
    return found


def _write_report(path: Path, found: Recovery) -> None:
    report_file(path).write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2))
    log.warning(
        "%s was rebuilt: %d rows copied, unreadable: %s; %d files of the archive; the damaged file is %s%s",
        path,
        sum(found.copied.values()),
        found.unreadable or "none",
        found.archive_files,
        found.aside,
        "; the streams are read again" if found.replay else "",
    )


def report_file(path: Path) -> Path:
    """Path of the report of the last recovery."""
    return path.with_name(path.name + ".recovery.json")


def _rebuilt(path: Path) -> Path:
    return path.with_name(path.name + ".rebuilt")


def _opens_without(path: Path, wal: Path, settings: Settings | None) -> bool:
    hidden = wal.with_name(wal.name + ".hidden")
    wal.rename(hidden)
    try:
        with duckdb.connect(str(path), read_only=True, config=settings or {}) as connection:
            return bool(_tables(connection, ""))
    except duckdb.Error:
        return False
    finally:
        hidden.rename(wal)


def _rebuild(path: Path, target: Path, archive: Path, found: Recovery, settings: Settings | None) -> None:
    with duckdb.connect(str(target), config=settings or {}) as new:
        new.execute("SET TimeZone = 'UTC'")
        new.execute(schema.META_TABLE)
        new.execute(
            "INSERT INTO corral_meta VALUES ('program', ?), ('version', ?), ('created', ?)",
            [schema.PROGRAM, str(schema.VERSION), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())],
        )
        migrations.migrate(new)
        old = _attach(new, path)
        known = identity(path)
        meta = _rows(new, f"SELECT key, value FROM {old}.corral_meta") if old else None
        named = dict(meta or ())
        if named.get("program", known.program if known else "") != schema.PROGRAM:
            raise StorageError(
                f"{path} is damaged ({found.damage}), and may not be a history of Corral. Nothing in "
                "it was changed; move it away, or name another file."
            )
        processor = named.get("processor") or (known.processor if known else "")
        new.execute("INSERT INTO corral_meta VALUES ('processor', ?)", [processor])
        if old:
            _copy_all(new, old, found)
        _archive(new, archive, processor, whole=bool(old) and "store.archive_files" not in found.unreadable)
        counted = new.execute("SELECT count(*) FROM store.archive_files").fetchone()
        found.archive_files = int(counted[0]) if counted else 0
        _where_to_read_on(new, old, found)
        if not any(table.startswith(LEVELS[0].table) for table in found.copied):
            days = _rows(new, "SELECT DISTINCT day::VARCHAR FROM store.archive_files ORDER BY 1") or []
            new.execute("INSERT INTO corral_meta VALUES (?, ?)", [TO_ROLL_UP, ",".join(day for (day,) in days)])
        if old:
            new.execute(f"DETACH {old}")
        new.execute("CHECKPOINT")


def _attach(new: DuckDBPyConnection, path: Path) -> str:
    """Attach the damaged database as another catalog, and return its name; empty if it can't be read at all."""
    try:
        new.execute(f"ATTACH {sql_text(str(path))} AS damaged (READ_ONLY)")
        _tables(new, "damaged")
    except duckdb.Error as error:
        log.warning("nothing in it can be read: %s", str(error).strip().partition("\n")[0])
        return ""
    return "damaged"


def _copy_all(new: DuckDBPyConnection, old: str, found: Recovery) -> None:
    expected: dict[str, int] = {}
    there = set(_tables(new, old))
    if not _copy(new, old, "store.series", found):
        # Samples name their device by it: without it they are numbers.
        found.unreadable["samples"] = -1
        there = {table for table in there if not _is_day(table) and "rollup_" not in table}
    rollups = sorted(table for table in there if "rollup_" in table and not table.endswith("rollup_none"))
    if "store.metrics" in there and _rows(new, f"FROM {old}.store.metrics") is not None:
        new.execute("DELETE FROM store.metrics")
        new.execute(f"INSERT INTO store.metrics BY NAME FROM {old}.store.metrics")
        for table in rollups:
            if not _copy(new, old, table, found, replace=True):
                break
    if any(table in found.unreadable for table in rollups) or not rollups:
        # An incomplete rollup is of no use: all of them are recomputed.
        for table in rollups:
            found.copied.pop(table, None)
            with contextlib.suppress(duckdb.Error):
                new.execute(f"DELETE FROM {table}")
    else:
        # If it can't be read, they are recomputed, from the earliest raw samples on.
        for level, batch in _rows(new, f"SELECT level, batch FROM {old}.store.rolled") or ():
            new.execute("UPDATE store.rolled SET batch = ? WHERE level = ?", [batch, level])
    for table in sorted(table for table in there if _is_day(table)):
        rows = _rows(new, f"SELECT count(*) FROM {old}.{table}")
        if rows:
            day = table.removeprefix(schema.day_table(""))[:8]
            expected[day] = expected.get(day, 0) + int(rows[0][0])
        metrics = [name for name in METRICS if name in _columns(new, f"{old}.{table}")]
        new.execute(schema.create_day(table, metrics))
        _copy(new, old, table, found)
    for table in (*_PRESENT, *REPLAY_KEYS, "store.refused", "store.archive_files"):
        if table in there:
            _copy(new, old, table, found)
    new.execute("INSERT INTO corral_meta VALUES ('recovery_expected', ?)", [msgspec.json.encode(expected).decode()])


def _copy(new: DuckDBPyConnection, old: str, table: str, found: Recovery, replace: bool = False) -> bool:
    """Copy what can be read of a table; True if that is all of it."""
    name = f"{old}.{table}"
    try:
        if replace:
            new.execute(f"CREATE OR REPLACE TABLE {table} AS FROM {name}")
        else:
            new.execute(f"INSERT INTO {table} BY NAME FROM {name}")
    except duckdb.Error as error:
        log.warning("%s can't be read as a whole: %s", table, str(error).strip().partition("\n")[0])
    else:
        found.copied[table] = _count(new, table)
        return True
    counted = _rows(new, f"SELECT count(*), max(rowid) FROM {name}")
    if counted is None or replace:
        found.unreadable[table] = -1
        return False
    rows, last = int(counted[0][0]), int(counted[0][1] or 0)
    for first in range(0, last + 1, ROW_GROUP_ROWS):
        with contextlib.suppress(duckdb.Error):
            within = f"rowid >= {first} AND rowid < {first + ROW_GROUP_ROWS}"
            new.execute(f"INSERT INTO {table} BY NAME SELECT * FROM {name} WHERE {within}")
    found.copied[table] = _count(new, table)
    found.unreadable[table] = rows - found.copied[table]
    return False


def _archive(new: DuckDBPyConnection, archive: Path, processor: str, *, whole: bool) -> None:
    """Register the files of the archive: those in the damaged database, else all that this history wrote."""
    if whole:
        return
    new.execute("DELETE FROM store.archive_files")
    days: set[str] = set()
    for file in sorted(archive.glob(f"day=*/part-{processor}-*.parquet") if processor else ()):
        rows = _rows(new, f"SELECT count(*), min(time), max(time) FROM read_parquet({sql_text(str(file))})")
        if not rows or not rows[0][0]:
            log.warning("%s can't be read, and is left out", file)
            continue
        day = file.parent.name.removeprefix("day=")
        new.execute(
            "INSERT INTO store.archive_files VALUES (?, ?, ?, ?, ?, ?, now())",
            [str(file.relative_to(archive)), day, rows[0][0], file.stat().st_size, rows[0][1], rows[0][2]],
        )
        days.add(day)
        # Rollups and replayed samples name their devices by number.
        new.execute(
            "INSERT INTO store.series SELECT (SELECT coalesce(max(series) + 1, 0) FROM store.series) + row_number() "
            f"OVER () - 1, host, device FROM (SELECT DISTINCT host, device FROM read_parquet({sql_text(str(file))})) p "
            "ANTI JOIN store.series s USING (host, device)"
        )
    stored = migrations.stored_days(new)
    for day in days:
        for part in schema.parts_of(day.replace("-", ""), stored):
            # A crash may have come between the file and its entry: the day's tables then have its samples too.
            table = schema.day_table(part)
            new.execute(
                f"DELETE FROM {table} t USING {archived_keys(new, archive, day)} a WHERE {same_sample('t', 'a')}"
            )


def archived_keys(cursor: DuckDBPyConnection, archive: Path, day: str) -> str:
    """Subquery over the devices (by number) and times of an archived day (`2026-11-24`); empty if it has no files."""
    rows = cursor.execute("SELECT path FROM store.archive_files WHERE day = ?::DATE ORDER BY path", [day]).fetchall()
    files = ", ".join(sql_text(str(archive / path)) for (path,) in rows)
    if not files:
        return ""
    return (
        f"(SELECT s.series, p.time FROM read_parquet([{files}], hive_partitioning = false) p "
        "JOIN store.series s USING (host, device))"
    )


def unless_there(cursor: DuckDBPyConnection, archive: Path, day: str) -> str:
    """End of a query over `incoming` samples that leaves out those that a day's tables or archive have."""
    archived = archived_keys(cursor, archive, f"{day[:4]}-{day[4:6]}-{day[6:]}")
    found = " i"
    for part in sorted(schema.parts_of(day, migrations.stored_days(cursor))):
        found += f" ANTI JOIN {schema.day_table(part)} t{part} ON {same_sample(f't{part}', 'i')}"
    return found + (f" ANTI JOIN {archived} a ON {same_sample('a', 'i')}" if archived else "")


def same_sample(one: str, other: str) -> str:
    """SQL condition that two rows are the same sample."""
    return f"{one}.series = {other}.series AND {one}.time = {other}.time"


def _where_to_read_on(new: DuckDBPyConnection, old: str, found: Recovery) -> None:
    """Set the watermarks: after what is stored, or to the start of the streams if any of their rows are missing."""
    marks = _rows(new, f"SELECT stream, created, sequence, batch FROM {old}.store.watermarks") if old else None
    fed = {"samples", "store.series", "store.archive_files", *_PRESENT, *REPLAY_KEYS}
    missing = [table for table in found.unreadable if table in fed or _is_day(table)]
    whole = marks is not None and not missing and _copy(new, old, "store.arrivals", found)
    newest = max(
        [0, *(int(batch) for *_, batch in marks or ())]
        + [_most(new, f"SELECT max(batch) FROM {schema.day_table(day)}") for day in migrations.stored_days(new)]
    )
    for stream, created, sequence, batch in marks or (("recovered", "", 0, newest),):
        new.execute(
            "INSERT INTO store.watermarks VALUES (?, ?, ?, ?)", [stream, created, sequence if whole else 0, batch]
        )
    if whole:
        return
    found.replay = True
    new.execute("DELETE FROM store.arrivals")
    new.execute("INSERT INTO corral_meta VALUES (?, epoch_us(now())::VARCHAR)", [THROUGH])


def settle(cursor: DuckDBPyConnection, path: Path) -> None:
    """Report what could not be recovered once the streams have been read again, and delete the expected counts."""
    expected = dict(_rows(cursor, "SELECT key, value FROM corral_meta WHERE key LIKE 'recover%'") or ())
    if "recovery_expected" not in expected:
        return
    lost: dict[str, int] = {}
    for day, rows in msgspec.json.decode(expected["recovery_expected"], type=dict[str, int]).items():
        start = f"TIMESTAMPTZ '{day[:4]}-{day[4:6]}-{day[6:]} 00:00:00+00'"
        there = _most(cursor, f"SELECT count(*) FROM samples WHERE time >= {start} AND time < {start} + INTERVAL 1 DAY")
        if there < rows:
            lost[day] = rows - there
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        found = msgspec.json.decode(report_file(path).read_bytes(), type=Recovery)
        found.lost = lost
        report_file(path).write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2))
    if lost:
        log.error("lost with the damaged file: %s samples, by day: %s", sum(lost.values()), lost)
    else:
        log.info("nothing was lost with the damaged file")
    cursor.execute("DELETE FROM corral_meta WHERE key = 'recovery_expected'")


def _is_day(table: str) -> bool:
    return re.fullmatch(rf"store\.samples_\d{{8}}({schema.CLOSED}|{schema.SORTED})?", table) is not None


def _tables(connection: DuckDBPyConnection, database: str) -> list[str]:
    where = f"database_name = {sql_text(database)}" if database else "database_name = current_database()"
    rows = connection.execute(
        f"SELECT schema_name, table_name FROM duckdb_tables() WHERE {where} AND NOT internal AND NOT temporary"
    ).fetchall()
    return [table if folder == "main" else f"{folder}.{table}" for folder, table in rows]


def _columns(connection: DuckDBPyConnection, table: str) -> set[str]:
    return {row[0] for row in _rows(connection, f"DESCRIBE {table}") or ()}


def _read(connection: DuckDBPyConnection, table: str) -> None:
    """Read every value of a table."""
    connection.execute(f"SELECT count(*) FROM {table} t WHERE hash(t) = 0").fetchall()


def _rows(connection: DuckDBPyConnection, sql: str) -> list[tuple[Any, ...]] | None:
    """Rows of a query; None if it fails."""
    try:
        return connection.execute(sql).fetchall()
    except duckdb.Error:
        return None


def _most(connection: DuckDBPyConnection, sql: str) -> int:
    rows = _rows(connection, sql)
    return int(rows[0][0] or 0) if rows else 0


def _count(connection: DuckDBPyConnection, table: str) -> int:
    return _most(connection, f"SELECT count(*) FROM {table}")
