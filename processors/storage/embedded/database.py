"""The embedded storage: one DuckDB file that one processor writes and many cursors read."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from duckdb import DuckDBPyConnection

from ....schemas.metrics import METRICS
from ... import views
from .. import facts, hardening, rollup_columns, schema
from ..drains import write_drains
from ..errors import NOT_A_VALUE, StorageDamaged, StorageError, StoragePaused, Unstorable
from ..jobs import write_jobs
from ..peaks import Peaks
from ..protocol import ROW_GROUP_ROWS, Arrival, ArrowTable, Batch, HostClock, Series
from ..requests import write_requests, write_waiting
from ..statements import registered, transaction
from . import migrations, recovery, rollups

log = logging.getLogger("corral.storage")

CHECKPOINT_BYTES: Final = 64 * 2**20
"""Size of the write-ahead log at which DuckDB checkpoints it: seldom enough to be cheap, and in under a second."""

_FULL: Final = re.compile(r"No space left|disk quota|File too large|Could not write|Cannot write|fsync failed", re.I)
_INVALIDATED: Final = re.compile(r"database has been invalidated|FATAL Error", re.I)
_LOCKED: Final = re.compile(r"Conflicting lock is held in (.*?)\. ", re.S)


class Database:
    """A history in one DuckDB file.

    Args:
        path: of the file; created, with its folder, if it is missing.
        archive: folder for the Parquet files; `archive` next to the file by default.
        memory_bytes: that DuckDB may take; None leaves its own limit.
        threads: that DuckDB may use; None for one per core.
        adaptive: use one thread except between `more_threads` and `one_thread`.
        prepare: called with each instance that is opened, before its settings are locked. After a fatal error the file
            is reopened, and it is called again.

    Raises:
        StorageError: the file is another program's, another version's, in use, or not to be written.

    Attributes:
        path: of the file.
        archive: folder of the archive.
        snapshots: folder of copies that wait to be fetched.
        processor: id of this history.
        series: numbers of its devices.
        days: that have a table of samples, and parts of days, such as `20261124_sorted`.
    """

    def __init__(
        self,
        path: Path,
        *,
        archive: Path | None = None,
        memory_bytes: int | None = None,
        threads: int | None = None,
        adaptive: bool = False,
        prepare: Callable[[DuckDBPyConnection], Callable[[], None] | None] | None = None,
    ) -> None:
        self.path = path.absolute()
        self.archive = (archive or self.path.parent / "archive").absolute()
        self.snapshots = self.path.with_name(self.path.name + ".snapshots")
        self._threads = threads
        self._adaptive = adaptive
        self._parallel = False
        """True between `more_threads` and `one_thread`."""
        self._settings = _settings(memory_bytes, 1 if adaptive else threads)
        self._prepare = prepare
        self._release: Callable[[], None] | None = None
        self.writing = threading.RLock()
        """Held during a write, and by maintenance for short steps that must not overlap with a write."""
        self._root: DuckDBPyConnection | None = None
        self._writer: DuckDBPyConnection | None = None
        self._opened = False
        self.days: set[str] = set()
        self._new_days: set[str] = set()
        """Days whose table other cursors do not see until the transaction that creates it is committed."""
        self._metrics: dict[str, set[str]] = {}
        self._watermarks: dict[str, tuple[str, int, int]] = {}
        self._marks: dict[str, tuple[int, int]] = {}
        self.series = Series()
        self._series_stored = 0
        self._peaks = Peaks()
        self.processor = ""
        self.damaged = ""
        """Damage found while the file was open; empty if none. Once it is set, nothing is stored any more."""
        self._recovered_through = 0
        self._start()

    def _start(self) -> None:
        """Open the file. A damaged one is first moved aside, and replaced by one with all that can be recovered."""
        damage = recovery.examine(self.path, self._settings)
        if not damage:
            try:
                self._open()
            except StorageDamaged as error:
                damage = str(error)
            else:
                return
        recovery.recover(self.path, self.archive, damage, self._settings)
        self._open()

    def _open(self) -> None:
        root = _connect(self.path, self._settings)
        try:
            identify(root, self.path)
            with transaction(root):
                migrations.migrate(root)
            found = root.execute("SELECT value FROM corral_meta WHERE key = 'processor'").fetchone()
            if found is None:
                found = (uuid.uuid4().hex[:12],)
                root.execute("INSERT INTO corral_meta VALUES ('processor', ?)", found)
        except duckdb.Error as error:
            root.close()
            raise _opening_error(error, self.path) from error
        except BaseException:
            root.close()
            raise
        self.processor = str(found[0])
        recovery.sign(self.path, self.processor)
        through = root.execute("SELECT value FROM corral_meta WHERE key = ?", [recovery.THROUGH]).fetchone()
        self._recovered_through = int(through[0]) if through else 0
        self._root = root
        self._writer = root.cursor()
        self._load(self._writer)
        try:
            views.bring_up(root, _tables())
            if self._prepare is not None:
                self._release = self._prepare(root)
            # From here on no code in this process can open a file outside these folders or change a setting.
            changeable = ("threads",) if self._adaptive else ()
            hardening.lock(root, directories=[self.archive, self.snapshots], changeable=changeable)
            if self._parallel:  # a new instance begins with one
                self.more_threads()
        except BaseException:
            self._abandon()
            raise
        self._opened = True

    def _load(self, cursor: DuckDBPyConnection) -> None:
        """Load the state that is kept in memory, and recreate the view `samples`, since the folder may have moved."""
        known = cursor.execute("SELECT host, device FROM store.series ORDER BY series").fetchall()
        # After a failure the numbers that were assigned since are kept: batches in progress use them.
        if not self._opened:
            self.series = Series(known)
        self._series_stored = len(known)
        rows = cursor.execute("SELECT stream, created, sequence, batch FROM store.watermarks").fetchall()
        self._watermarks = {stream: (created, sequence, batch) for stream, created, sequence, batch in rows}
        marks = cursor.execute("SELECT stream, sequence, stored_ns FROM store.marks").fetchall()
        self._marks = {stream: (sequence, stored_ns) for stream, sequence, stored_ns in marks}
        self.days = set(migrations.stored_days(cursor))
        self._metrics = {}
        self.refresh_view(cursor, self.days)

    def refresh_view(self, cursor: DuckDBPyConnection, days: Iterable[str]) -> None:
        """Recreate the view `samples` over these days and the registered files of the archive."""
        rows = cursor.execute("SELECT path FROM store.archive_files ORDER BY path").fetchall()
        cursor.execute(schema.samples_view(days, [self.archive / path for (path,) in rows]))

    def resume(self, stream: str, created: str, last_sequence: int | None = None) -> int:
        """Sequence of the last stored message of a stream; 0 if none is, or if it was created again or set back."""
        with self.writing:
            known, sequence, batch = self._watermarks.get(stream, (created, 0, 0))
            if known != created:
                log.warning("%s was created again at %s: reading it from its start", stream, created)
                sequence = 0
            elif last_sequence is not None and sequence > last_sequence:
                log.warning(
                    "%s was rolled back from %d to %d: reading it from its start", stream, sequence, last_sequence
                )
                sequence = 0
            self._watermarks[stream] = (created, sequence, batch)
            return sequence

    def marked_ns(self, stream: str) -> int:
        """Time when the bus stored the message at a stream's watermark, nanoseconds since the epoch; 0 if not known."""
        with self.writing:
            sequence, stored_ns = self._marks.get(stream, (0, 0))
            return stored_ns if sequence == self._watermarks.get(stream, ("", 0, 0))[1] else 0

    def watermarks(self) -> dict[str, int]:
        """The last stored sequence of each stream."""
        return {stream: sequence for stream, (_, sequence, _) in self._watermarks.items()}

    def arrivals(self, stream: str) -> list[Arrival]:
        """Stored deduplication state of each agent's run."""
        rows = (
            self.cursor()
            .execute(
                "SELECT agent, arg_max(high, batch), arg_max(seen, batch) FROM store.arrivals "
                "WHERE stream = ? GROUP BY agent",
                [stream],
            )
            .fetchall()
        )
        return [Arrival(agent, high, seen) for agent, high, seen in rows]

    def clocks(self) -> list[HostClock]:
        """Stored state of hosts' clocks."""
        return facts.read_clocks(self.cursor())

    def cursor(self) -> DuckDBPyConnection:
        """New cursor on the database."""
        if self._root is None:
            raise StoragePaused("the database is closed")
        return self._root.cursor()

    def commit(self, batch: Batch) -> None:
        """Store a batch and its watermark in one transaction. A batch that is stored already changes nothing."""
        with self.writing:
            if self.damaged:
                raise StorageDamaged(f"{self.path} is damaged: {self.damaged}")
            if self._writer is None:
                self._reopen()
            created, sequence, _ = self._watermarks.get(batch.stream, ("", 0, 0))
            if batch.sequence <= sequence:
                return
            # Counted over all streams, so that a single number says how far a rollup is.
            number = 1 + max((number for _, _, number in self._watermarks.values()), default=0)
            metrics = dict(self._metrics)
            self._new_days = set()
            # The next batch is decoded meanwhile, and may add more: those are stored with it.
            series = len(self.series.names)
            try:
                cursor = self._cursor_for_writing()
                with transaction(cursor):
                    self._write_series(cursor, series)
                    self._write(cursor, batch, created, number)
            except duckdb.Error as error:
                self._metrics = metrics
                if _INVALIDATED.search(str(error)):
                    self._abandon()
                raise as_storage_error(error, self.path) from error
            except NOT_A_VALUE as error:
                self._metrics = metrics
                raise Unstorable(f"a value fits no column: {error}") from error
            except BaseException:
                self._metrics = metrics
                raise
            self.days = self.days | self._new_days
            self._series_stored = max(self._series_stored, series)
            self._peaks.committed()
            self._watermarks[batch.stream] = (created, batch.sequence, number)
            self._marks[batch.stream] = (batch.sequence, batch.stored_ns)

    def _cursor_for_writing(self) -> DuckDBPyConnection:
        if self._writer is None:
            raise StoragePaused("the database is closed")
        return self._writer

    def _write(self, cursor: DuckDBPyConnection, batch: Batch, created: str, number: int) -> None:
        self._peaks.begin()
        if batch.samples is not None:
            self._write_samples(cursor, batch.samples, number)
        for name, table in batch.tables.items():
            with registered(cursor, "incoming", table):
                unless = self._unless_there(name, table)
                cursor.execute(f"INSERT INTO {name} BY NAME SELECT * FROM incoming{unless}")
                if name == "processes":
                    self._peaks.write(cursor, "incoming")
        facts.write_inventories(cursor, batch.inventories)
        facts.write_leases(cursor, batch.leases)
        write_requests(cursor, batch.requests)
        write_waiting(cursor, batch.request_events)
        write_drains(cursor, batch.request_events)
        write_jobs(cursor, batch.jobs)
        if batch.arrivals:
            runs = pa.table(
                {
                    "agent": [run.agent for run in batch.arrivals],
                    "high": pa.array([run.high for run in batch.arrivals], pa.uint64()),
                    "seen": pa.array([run.seen for run in batch.arrivals], pa.uint64()),
                }
            )
            with registered(cursor, "incoming", runs):
                cursor.execute("INSERT INTO store.arrivals SELECT ?, *, ? FROM incoming", [batch.stream, number])
        facts.write_clocks(cursor, batch.clocks)
        for code, messages in batch.refused.items():
            cursor.execute("INSERT INTO store.refused VALUES (now(), ?, ?, ?)", [batch.stream, code, messages])
        # Not an update: see `statements.put`.
        cursor.execute("DELETE FROM store.watermarks WHERE stream = ?", [batch.stream])
        cursor.execute(
            "INSERT INTO store.watermarks VALUES (?, ?, ?, ?)", [batch.stream, created, batch.sequence, number]
        )
        cursor.execute("DELETE FROM store.marks WHERE stream = ?", [batch.stream])
        cursor.execute("INSERT INTO store.marks VALUES (?, ?, ?)", [batch.stream, batch.sequence, batch.stored_ns])

    def _write_series(self, cursor: DuckDBPyConnection, count: int) -> None:
        names = self.series.names[self._series_stored : count]
        if not names:
            return
        first = self._series_stored
        table = pa.table(
            {
                "series": pa.array(range(first, first + len(names)), pa.int32()),
                "host": [host for host, _ in names],
                "device": [device for _, device in names],
            }
        )
        with registered(cursor, "incoming", table):
            cursor.execute("INSERT INTO store.series SELECT * FROM incoming")

    def _write_samples(self, cursor: DuckDBPyConnection, samples: ArrowTable, number: int) -> None:
        times = samples["time"].cast(pa.int64())
        limits = pc.min_max(times).as_py()  # pyright: ignore[reportAttributeAccessIssue]
        first, last = schema.day_of(limits["min"]), schema.day_of(limits["max"])
        if first == last:
            self._append(cursor, first, samples, number)
            return
        numbers = pc.divide(times, schema.MICROSECONDS_PER_DAY)  # pyright: ignore[reportAttributeAccessIssue]
        for day in sorted(pc.unique(numbers).to_pylist()):  # pyright: ignore[reportAttributeAccessIssue]
            chosen = samples.filter(pc.equal(numbers, day))  # pyright: ignore[reportAttributeAccessIssue]
            self._append(cursor, schema.day_of(day * schema.MICROSECONDS_PER_DAY), chosen, number)

    def _append(self, cursor: DuckDBPyConnection, day: str, samples: ArrowTable, number: int) -> None:
        table = schema.day_table(day)
        metrics = [name for name in METRICS if samples[name].null_count < samples.num_rows]
        if day not in self.days | self._new_days:
            cursor.execute(schema.create_day(table, metrics))
            self._new_days.add(day)
            self._metrics[day] = set(metrics)
            self.refresh_view(cursor, self.days | self._new_days)
        have = self._metrics.get(day, set())
        if not have.issuperset(metrics):
            migrations.add_metrics(cursor, table, metrics)
            self._metrics[day] = have | set(metrics)
        names = ", ".join(("time", "series", "batch", *metrics))
        values = ", ".join(("time", "series", f"{number}::BIGINT", *metrics))
        # A reader, not a table: DuckDB would split a table over its threads, which then wait for each other. One
        # thread takes half the CPU time, and leaves the other cores to decoding and to queries.
        with registered(cursor, "incoming", samples.to_reader(max_chunksize=ROW_GROUP_ROWS)):
            unless = ""
            if self._may_be_there(samples):
                unless = recovery.unless_there(cursor, self.archive, day)
            cursor.execute(f"INSERT INTO {table} ({names}) SELECT {values} FROM incoming{unless}")

    def _may_be_there(self, rows: ArrowTable) -> bool:
        """True if some of the rows may be stored already, since the streams are read again after a recovery."""
        if not self._recovered_through:
            return False
        first = pc.min(rows["time"].cast(pa.int64())).as_py()  # pyright: ignore[reportAttributeAccessIssue]
        return first is not None and first <= self._recovered_through

    def _unless_there(self, name: str, rows: ArrowTable) -> str:
        keys = recovery.REPLAY_KEYS.get(name) if self._may_be_there(rows) else None
        return f" ANTI JOIN {name} USING ({', '.join(keys)})" if keys else ""

    def more_threads(self) -> None:
        """Let DuckDB use all of its threads."""
        self._parallel = True
        if self._adaptive:
            all_cores = self._threads is None
            self._set_threads("RESET GLOBAL threads" if all_cores else f"SET GLOBAL threads = {self._threads}")

    def one_thread(self) -> None:
        """Let DuckDB use one thread. Waits for the tasks that run in others: call it when no query runs."""
        self._parallel = False
        if self._adaptive:
            self._set_threads("SET GLOBAL threads = 1")

    def _set_threads(self, statement: str) -> None:
        with contextlib.suppress(StoragePaused, duckdb.Error):
            cursor = self.cursor()
            try:
                cursor.execute(statement)
            finally:
                cursor.close()

    def settle_recovery(self) -> None:
        """Report what could not be recovered, once the streams have been read again."""
        with self.writing:
            cursor = self.cursor()
            try:
                recovery.settle(cursor, self.path)
            finally:
                cursor.close()

    def size_bytes(self) -> int:
        """Size of the file and its write-ahead log."""
        total = 0
        for path in (self.path, self.path.with_name(self.path.name + ".wal")):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def _abandon(self) -> None:
        """Close all connections: after a fatal error DuckDB refuses everything until the file is reopened."""
        root, writer, release = self._root, self._writer, self._release
        self._root = self._writer = self._release = None
        if release is not None:
            release()
        for connection in (writer, root):
            if connection is not None:
                with contextlib.suppress(duckdb.Error):
                    connection.close()

    def _reopen(self) -> None:
        try:
            self._open()
        except StorageDamaged:
            raise
        except StorageError as error:
            raise StoragePaused(str(error)) from error

    def close(self) -> None:
        """Checkpoint the write-ahead log, and close the file."""
        with self.writing:
            root = self._root
            if root is not None:
                with contextlib.suppress(duckdb.Error):
                    root.execute("CHECKPOINT")
            self._abandon()


def identify(connection: DuckDBPyConnection, path: Path) -> None:
    """Check that a database is a history of Corral, and mark an empty one as such.

    Raises:
        StorageError: it holds another program's tables, or those of a newer Corral.
    """
    tables = connection.execute(
        "SELECT schema_name || '.' || table_name FROM duckdb_tables() WHERE NOT internal "
        "UNION ALL SELECT schema_name || '.' || view_name FROM duckdb_views() WHERE NOT internal"
    ).fetchall()
    names = {name for (name,) in tables}
    if "main.corral_meta" not in names:
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise StorageError(
                f"{path} is not a history of Corral: it holds {shown}. Nothing in it was changed; name another file."
            )
        with transaction(connection):
            connection.execute(schema.META_TABLE)
            for key, value in (
                ("program", schema.PROGRAM),
                ("version", "0"),
                ("created", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())),
            ):
                connection.execute("INSERT INTO corral_meta VALUES (?, ?)", [key, value])
        return
    meta: dict[str, str] = dict(connection.execute("SELECT key, value FROM corral_meta").fetchall())
    if meta.get("program") != schema.PROGRAM:
        raise StorageError(f"{path} belongs to {meta.get('program')!r}. Nothing was changed.")
    version = int(meta.get("version", "0"))
    if version > schema.VERSION:
        raise StorageError(
            f"{path} was written by a newer Corral (its tables have version {version}, this one knows "
            f"{schema.VERSION}). Upgrade Corral, or name another file. Nothing was changed."
        )


def _tables() -> str:
    """Description of all tables and columns that views may read."""
    metrics = list(METRICS.values())
    return repr((schema.VERSION, schema.TABLES, [rollup_columns.columns(metrics, level) for level in rollups.LEVELS]))


def _settings(memory_bytes: int | None, threads: int | None) -> recovery.Settings:
    """Settings to open an instance with: settings made later do not apply while it replays its log."""
    found: recovery.Settings = {"checkpoint_threshold": f"{CHECKPOINT_BYTES}B"}
    if memory_bytes is not None:
        found["memory_limit"] = f"{memory_bytes}B"
    if threads is not None:
        found["threads"] = threads
    return found


def _connect(path: Path, settings: recovery.Settings) -> DuckDBPyConnection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent} can't be made: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise StorageError(f"{path} can't be written by user {os.geteuid()}: allow it, or name another path with --db")
    try:
        connection = duckdb.connect(str(path), config=settings)
    except duckdb.Error as error:
        raise _opening_error(error, path) from error
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def _opening_error(error: duckdb.Error, path: Path) -> StorageError | StoragePaused:
    """Convert an error of opening a file: more kinds of errors mean damage than later on."""
    found = as_storage_error(error, path)
    if type(found) is StorageError and recovery.UNREADABLE.search(str(error)):
        return StorageDamaged(f"{path} is damaged: {_first_line(str(error))}")
    return found


def as_storage_error(error: duckdb.Error, path: Path) -> StorageError | StoragePaused:
    """Convert DuckDB's error to one whose message says what to do."""
    text = str(error)
    locked = _LOCKED.search(text)
    if locked or "Could not set lock" in text:
        who = locked[1] if locked else "another process"
        return StorageError(f"{path} is in use by {who}: a history has one processor. Stop that one, or name another.")
    if "not a valid DuckDB database file" in text:
        return StorageError(f"{path} is not a DuckDB database. Nothing in it was changed; name another file.")
    if "database file with version number" in text:
        return StorageError(f"{path} was written by another version of DuckDB: {text}")
    if "Permission denied" in text or "Read-only file system" in text:
        return StorageError(f"{path} can't be written: {text}")
    if recovery.DAMAGED.search(text):
        return StorageDamaged(f"{path} is damaged: {_first_line(text)}")
    if _FULL.search(text):
        return StoragePaused(f"nothing can be written to {path.parent}: {_first_line(text)}")
    if _INVALIDATED.search(text):
        return StoragePaused(_first_line(text))
    if isinstance(error, duckdb.DataError | duckdb.IntegrityError):
        return Unstorable(_first_line(text))
    return StorageError(f"{path}: {_first_line(text)}")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
