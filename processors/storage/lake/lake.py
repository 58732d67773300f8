"""Shared storage: one DuckLake that many processors write to, each the parts of the streams that it owns.

The tables are Parquet files in a folder or bucket that all can reach. A catalog in PostgreSQL lists the files, and
makes a transaction over several tables atomic. A `LakePart` is the storage of one part of a stream. A separate table
holds its watermark together with the fence of its owner. Every batch rewrites that one row in the transaction of its
rows. So if two processors both act as the owner of a part, one of them always fails: either it reads the other's fence,
or its transaction conflicts with the other's, is repeated, and then reads that fence.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import random
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import duckdb
import pyarrow as pa
from duckdb import DuckDBPyConnection
from msgspec import Struct

from ....schemas.metrics import METRICS
from .. import facts, peaks, schema
from ..errors import NOT_A_VALUE, Deposed, StorageError, StoragePaused, Unstorable
from ..peaks import Peaks
from ..protocol import Arrival, ArrowTable, Batch, HostClock, Series
from ..requests import write_requests, write_waiting
from ..rollup_columns import LEVELS
from ..statements import add_missing, columns_of, registered, transaction
from . import facts as lake_facts
from . import object_storage, progress, rollups
from .progress import Progress

log = logging.getLogger("corral.lake")

VERSION: Final = 5
"""Version of the tables: an older lake is upgraded. 2 counts throttled samples, and keeps the idle minutes of hours; 3
has `agents.samples` and `devices.mig_instance`; 4 has peaks of the memory of leases; 5
has rollups by partition."""
EXTENSIONS: Final = ("ducklake", "postgres_scanner")
URL_EXTENSION: Final = "httpfs"
INLINE_ROWS: Final = 256
"""Smaller inserts go into the catalog instead of a separate file, until maintenance flushes them."""
FEW_ROWS: Final = 1000
"""The same for a table with a handful of rows that change again and again: they always stay in the catalog."""
RENEW_COMMITS: Final = 200
"""Number of commits after which a part attaches the lake again: DuckLake keeps what it has read of each snapshot for as
long as it is attached, 30 to 200 KB a commit (of DuckDB 1.5.5)."""
OPTIONS: Final = "2"
"""Version of what `_set_options` sets."""
CONFLICT_TRIES: Final = 8
CONFLICT_SECONDS: Final = 0.05

CONFLICT: Final = re.compile(
    r"conflict|could not serialize|duplicate key value|deadlock detected|delete flushed inlined data", re.I
)
_SLUG: Final = re.compile(r"[^a-z0-9]+")
_KEYS: Final = re.compile(r", PRIMARY KEY \(.*\)| PRIMARY KEY| NOT NULL")
_T = TypeVar("_T")

APPENDED: Final = ("processes", "agents", "events", "lease_events", "requests")
STATE: Final = (
    *("devices", "hosts", "host_facts", "device_conflicts", "links"),
    *("leases", "lease_devices", "drains", "jobs", "job_tasks"),
)
TABLES: Final[dict[str, str]] = {
    "samples": "time TIMESTAMPTZ, host VARCHAR, device VARCHAR, "
    + ", ".join(f"{name} {metric.row.unit.sql}" for name, metric in METRICS.items()),
    # DuckLake has no keys: what is unique is so because its part has one owner.
    **{name: _KEYS.sub("", schema.TABLES[name]) for name in (*APPENDED, *STATE)},
    "store.arrivals": "stream VARCHAR, agent VARCHAR, high UBIGINT, seen UBIGINT, batch UBIGINT",
    "store.without_processes": schema.TABLES["store.without_processes"],
    **{name: schema.TABLES[name] for name in ("store.lease_peaks", "store.lease_totals")},
    "store.clocks": _KEYS.sub("", schema.TABLES["store.clocks"]),
    "store.waiting_requests": schema.TABLES["store.waiting_requests"],
    "store.refused": "time TIMESTAMPTZ, stream VARCHAR, code VARCHAR, messages BIGINT",
    "corral_meta": "key VARCHAR, value VARCHAR",
}


class Lake(Struct, frozen=True):
    """Location of a lake, and limits of the instances that use it.

    Attributes:
        catalog: of DuckLake, such as `postgres:dbname=corral host=db.example`.
        data: folder of the Parquet files, which all processors reach by this path, or `s3://bucket/prefix` (see
            `object_storage.py`); that of a lake never changes.
        memory_bytes: that each part may use; None leaves DuckDB's own limit.
        threads: that each part may use.
    """

    catalog: str
    data: str
    memory_bytes: int | None = None
    threads: int | None = None


def load(connection: DuckDBPyConnection, data: str = "") -> None:
    """Load the extensions into an instance, from their Python packages, so that no network is needed.

    Args:
        connection: to the instance.
        data: where the files are: for a URL the extension and the credentials to reach it are loaded, too.

    Raises:
        StorageError: they are not installed, or are made for another version of DuckDB.
    """
    for name in (*EXTENSIONS, URL_EXTENSION) if object_storage.is_url(data) else EXTENSIONS:
        spec = importlib.util.find_spec(f"duckdb_extension_{name}")
        if spec is None or spec.origin is None:
            raise StorageError(f"DuckDB's extension {name} is not installed: pip install 'corral[lake]'")
        file = Path(spec.origin).parent / "extensions" / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        if not file.exists():
            raise StorageError(
                f"DuckDB is {duckdb.__version__}, and its extension {name} was made for another: "
                "pip install 'corral[lake]' brings versions that fit"
            )
        connection.execute(f"LOAD {schema.sql_text(str(file))}")
    if object_storage.is_url(data):
        connection.execute(object_storage.secret(data))


def attach(lake: Lake, *, read_only: bool = False, inline_rows: int = INLINE_ROWS) -> DuckDBPyConnection:
    """Open a separate DuckDB instance with the lake as its default database.

    Args:
        lake: to attach.
        read_only: refuse to write.
        inline_rows: number of rows up to which an insert or a deletion goes into the catalog.

    Raises:
        StorageError: the catalog is no lake's, or can't be used.
        StoragePaused: the catalog does not answer.
    """
    connection = duckdb.connect()
    try:
        load(connection, lake.data)
        connection.execute("SET TimeZone = 'UTC'")
        if lake.memory_bytes is not None:
            connection.execute(f"SET memory_limit = '{lake.memory_bytes}B'")
        if lake.threads is not None:
            connection.execute(f"SET threads = {lake.threads}")
        options = f"DATA_PATH {schema.sql_text(lake.data)}, DATA_INLINING_ROW_LIMIT {inline_rows}"
        if read_only:
            options += ", READ_ONLY"
        connection.execute(f"ATTACH {schema.sql_text('ducklake:' + lake.catalog)} AS lake ({options})")
        connection.execute("USE lake")
    except duckdb.Error as error:
        connection.close()
        raise as_storage_error(error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def prepare(lake: Lake, partitions: int) -> str:
    """Create what is missing in a lake, and upgrade an older one. Several processors may do so at once.

    Args:
        lake: to prepare.
        partitions: number of partitions of the samples; it must be the one that the lake was created with.

    Returns:
        Id of the history.

    Raises:
        StorageError: it is another program's or another version's, or has another number of partitions.
        StoragePaused: the catalog does not answer.
    """
    if not object_storage.is_url(lake.data):
        try:
            Path(lake.data).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{lake.data} can't be made: {error.strerror}") from error
    connection = attach_retrying(lake)
    try:
        if object_storage.is_url(lake.data):
            _check_reachable(connection, lake.data)

        def make() -> dict[str, str]:
            with transaction(connection):
                return _create_or_upgrade(connection, partitions)

        meta = with_retries(make)
        if meta.get("options") != OPTIONS:
            with_retries(lambda: _set_options(connection, meta))
    except duckdb.Error as error:
        raise as_storage_error(error) from error
    finally:
        connection.close()
    if meta.get("program") != schema.PROGRAM:
        raise StorageError(f"the lake belongs to {meta.get('program')!r}. Nothing was changed; name another catalog.")
    if int(meta["lake_version"]) > VERSION:
        raise StorageError("the lake was written by a newer Corral: upgrade this one. Nothing was changed.")
    if int(meta["partitions"]) != partitions:
        raise StorageError(
            f"the lake has {meta['partitions']} partitions of the samples, not {partitions}: a host's messages have "
            f"their place in one of them. Use --partitions {meta['partitions']}, or another lake."
        )
    return meta["processor"]


def _check_reachable(connection: DuckDBPyConnection, data: str) -> None:
    """Check at the start that the files can be reached, rather than fail with the first batch."""
    try:
        connection.execute("SELECT count(*) FROM glob(?)", [data.rstrip("/") + "/none*"]).fetchall()
    except duckdb.Error as error:
        line = str(error).strip().partition("\n")[0]
        raise StorageError(f"{data} can't be read: {line}. Is the bucket there, and may these keys list it?") from error


def attach_retrying(lake: Lake) -> DuckDBPyConnection:
    """Call `attach`, and retry while another processor creates the same lake."""
    for left in range(CONFLICT_TRIES, -1, -1):
        try:
            return attach(lake)
        except (StorageError, StoragePaused) as error:
            # Two that make the catalog's tables at once: the second finds them there.
            if not left or not re.search(r"already exists|duplicate key|concurrently", str(error)):
                raise
        time.sleep(0.2)
    raise AssertionError


def _create_or_upgrade(connection: DuckDBPyConnection, partitions: int) -> dict[str, str]:
    found = connection.execute("SELECT table_name FROM duckdb_tables() WHERE database_name = 'lake'").fetchall()
    names = {name for (name,) in found}
    if "corral_meta" in names:
        meta = dict(connection.execute("SELECT key, value FROM corral_meta").fetchall())
        if meta.get("program") == schema.PROGRAM and int(meta["lake_version"]) <= VERSION:
            _upgrade(connection, meta)
        return meta
    if names:
        raise StorageError(
            f"the lake is not a history of Corral: it holds {', '.join(sorted(names)[:3])}. Name another catalog."
        )
    connection.execute("CREATE SCHEMA IF NOT EXISTS store")
    for name, columns in TABLES.items():
        connection.execute(f"CREATE TABLE IF NOT EXISTS {name} ({columns})")
    # Not partitioned by day: files know their first and last time, and to write partitions takes four times as long.
    connection.execute("CALL lake.set_option('parquet_compression', 'zstd')")
    meta = {
        "program": schema.PROGRAM,
        "lake_version": str(VERSION),
        "partitions": str(partitions),
        "processor": uuid.uuid4().hex[:12],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    for key, value in meta.items():
        connection.execute("INSERT INTO corral_meta VALUES (?, ?)", [key, value])
    rollups.create(connection)
    # Whatever is committed after this transaction is to be rolled up.
    began = current_snapshot(connection) + 1
    progress.create(connection, partitions, Progress(began, began))
    _upgrade(connection, meta)
    return meta


def _set_options(connection: DuckDBPyConnection, meta: dict[str, str]) -> None:
    """Set DuckLake's options of single tables, outside of the transaction that creates these."""
    for number in range(int(meta["partitions"])):
        table = progress.table_of(number).removeprefix("store.")
        connection.execute(
            f"CALL lake.set_option('data_inlining_row_limit', {FEW_ROWS}, schema => 'store', table_name => '{table}')"
        )
    with transaction(connection):
        _put_meta(connection, meta, "options", OPTIONS)


def _upgrade(connection: DuckDBPyConnection, meta: dict[str, str]) -> None:
    """Upgrade the tables of an older lake to this version, and replace its views by those of this Corral."""
    if int(meta["lake_version"]) < 5:
        partitions = int(meta["partitions"])
        progress.create(connection, partitions, rollups.take_progress(connection))
        if int(meta["lake_version"]) < 2:
            rollups.add_columns(connection)
            progress.reset(connection, partitions)
    rolled = [rollups.shape(level) for level in LEVELS]
    shape = hashlib.sha256(repr((TABLES, rolled)).encode()).hexdigest()[:16]
    if meta.get("tables") != shape:  # those of an older version, or of another catalog of metrics
        has_peaks = connection.execute(
            "SELECT 1 FROM duckdb_tables() WHERE database_name = 'lake' AND table_name = 'lease_peaks'"
        ).fetchone()
        for name, columns in TABLES.items():
            connection.execute(f"CREATE TABLE IF NOT EXISTS {name} ({columns})")
            add_missing(connection, name, columns_of(connection, columns))
        for level, columns in zip(LEVELS, rolled, strict=True):
            add_missing(connection, level.table, columns)
        if not has_peaks:
            peaks.fill(connection)
        _put_meta(connection, meta, "tables", shape)
        meta.pop("views", None)  # a view remembers which columns it saw
    if meta["lake_version"] != str(VERSION):
        _put_meta(connection, meta, "lake_version", str(VERSION))
    statements = [
        "CREATE OR REPLACE VIEW dead_letters AS SELECT stream, code, sum(messages)::BIGINT AS messages, "
        "min(time) AS first_time, max(time) AS last_time FROM store.refused GROUP BY stream, code",
        *rollups.view_statements(),
    ]
    digest = hashlib.sha256("\n".join(statements).encode()).hexdigest()[:16]
    if meta.get("views") == digest:
        return
    for statement in statements:
        connection.execute(statement)
    _put_meta(connection, meta, "views", digest)


def _put_meta(connection: DuckDBPyConnection, meta: dict[str, str], key: str, value: str) -> None:
    connection.execute("DELETE FROM corral_meta WHERE key = ?", [key])
    connection.execute("INSERT INTO corral_meta VALUES (?, ?)", [key, value])
    meta[key] = value


class Follower(Protocol):
    """Observer of the commits of a part."""

    def taken_over(self, fence: int) -> None:
        """The part has been taken over with a fence."""
        ...

    def committing(self, snapshot: int) -> None:
        """A transaction begins with a snapshot; it may be repeated."""
        ...

    def committed(self, samples: ArrowTable | None) -> None:
        """Samples are committed, by the last transaction that has begun or by one before it."""
        ...


class LakePart:
    """Storage of one part of a stream. The part has one owner at a time: the one with the greatest fence.

    `resume` makes this object the owner, with a fence one above the last.

    Attributes:
        follower: follows its commits, such as its rollups (`partition.py`).

    Args:
        lake: that holds the part.
        processor: id of the history, as `prepare` gives it.
        part: such as `CORRAL_FACTS`, or `CORRAL_PARTITIONS/2` for one of several partitions.

    Raises:
        StorageError, StoragePaused: see `attach`.
    """

    def __init__(self, lake: Lake, processor: str, part: str) -> None:
        self.lake = lake
        self.processor = processor
        self.part = part
        self.fence = 0
        self.series = Series()
        self._table = "store.watermark_" + _SLUG.sub("_", part.lower())
        self._peaks = Peaks()
        self._sequence = 0
        self._commits = 0
        self._marked_ns = 0
        self.follower: Follower | None = None
        self._connection: DuckDBPyConnection | None = attach_retrying(lake)

    def resume(self, stream: str, created: str, last_sequence: int | None = None) -> int:
        """Take over the part: its previous owner can't store anything from here on.

        Returns:
            Sequence of its last stored message; 0 if none is, or if the stream was created again or set back.
        """
        try:
            sequence = with_retries(lambda: self._take_over(created, last_sequence))
            # By itself: the shorter the first transaction, the sooner it comes between those of an owner that is busy.
            with_retries(self._take_over_rollups)
        except duckdb.Error as error:
            raise as_storage_error(error) from error
        if self.follower is not None:
            self.follower.taken_over(self.fence)
        return sequence

    def _take_over(self, created: str, last_sequence: int | None) -> int:
        cursor = self._open()
        with transaction(cursor):
            cursor.execute(
                f"CREATE TABLE IF NOT EXISTS {self._table} "
                "(part VARCHAR, created VARCHAR, sequence UBIGINT, fence UBIGINT, marked UBIGINT, marked_ns BIGINT)"
            )
            add_missing(cursor, self._table, [("marked", "UBIGINT"), ("marked_ns", "BIGINT")])
            row = cursor.execute(
                f"SELECT created, sequence, fence, CASE WHEN marked = sequence THEN marked_ns END FROM {self._table}"
            ).fetchone()
            fence, sequence, marked_ns = 1, 0, 0
            if row is None:
                cursor.execute(
                    f"INSERT INTO {self._table} BY NAME SELECT ? AS part, ? AS created, 0 AS sequence, ? AS fence",
                    [self.part, created, fence],
                )
            else:
                known, sequence, fence, marked_ns = row[0], int(row[1]), int(row[2]) + 1, int(row[3] or 0)
                if known != created:
                    log.warning("%s was created again at %s: reading it from its start", self.part, created)
                    sequence = 0
                elif last_sequence is not None and sequence > last_sequence:
                    log.warning(
                        "%s was rolled back from %d to %d: reading it from its start",
                        self.part,
                        sequence,
                        last_sequence,
                    )
                    sequence = 0
                cursor.execute(
                    f"UPDATE {self._table} SET created = ?, sequence = ?, fence = ?", [created, sequence, fence]
                )
        self.fence, self._sequence = fence, sequence
        self._marked_ns = marked_ns if sequence else 0
        return sequence

    def _take_over_rollups(self) -> None:
        number = progress.number_of(self.part)
        if number is not None:
            cursor = self._open()
            with transaction(cursor):
                progress.take_over(cursor, number, self.fence)

    def marked_ns(self, stream: str) -> int:
        """Time when the bus stored the message at the watermark, nanoseconds since the epoch; 0 if it is not known."""
        return self._marked_ns

    def watermarks(self) -> dict[str, int]:
        """Last stored sequence of this part."""
        return {self.part: self._sequence}

    def arrivals(self, stream: str) -> list[Arrival]:
        """Stored deduplication state of each agent's run."""
        try:
            rows = (
                self._open()
                .execute(
                    "SELECT agent, arg_max(high, batch), arg_max(seen, batch) FROM store.arrivals "
                    "WHERE stream = ? GROUP BY agent",
                    [self.part],
                )
                .fetchall()
            )
        except duckdb.Error as error:
            raise as_storage_error(error) from error
        return [Arrival(agent, high, seen) for agent, high, seen in rows]

    def clocks(self) -> list[HostClock]:
        """Stored state of hosts' clocks."""
        try:
            return facts.read_clocks(self._open())
        except duckdb.Error as error:
            raise as_storage_error(error) from error

    def commit(self, batch: Batch) -> None:
        """Store a batch and its watermark in one transaction. A batch that is stored already changes nothing.

        Raises:
            Deposed: the part has another owner now; nothing was stored.
            StoragePaused, Unstorable, StorageError: see `Storage.commit`.
        """
        try:
            with_retries(lambda: self._commit(batch))
        except duckdb.Error as error:
            raised = as_storage_error(error)
            if not isinstance(raised, Unstorable):
                # A connection to the catalog that broke does not recover by itself.
                self._abandon()
            raise raised from error
        except NOT_A_VALUE as error:
            raise Unstorable(f"a value fits no column: {error}") from error
        self._peaks.committed()
        is_new = batch.sequence > self._sequence
        if is_new:
            self._sequence, self._marked_ns = batch.sequence, batch.stored_ns
        if self.follower is not None:
            self.follower.committed(batch.samples if is_new else None)
        self._commits += 1
        if self._commits % RENEW_COMMITS == 0:
            self._abandon()

    def _commit(self, batch: Batch) -> None:
        cursor = self._open()
        with transaction(cursor):
            row = cursor.execute(f"SELECT sequence, fence FROM {self._table}").fetchone()
            if row is None:
                raise StorageError(f"{self._table} is empty: another program has written to the lake")
            if row[1] != self.fence:
                raise Deposed(f"{self.part} has another owner (its fence is {row[1]}, this processor's {self.fence})")
            self._peaks.begin()
            if self.follower is not None:
                self.follower.committing(current_snapshot(cursor))
            if batch.sequence <= row[0]:
                return
            if batch.samples is not None:
                with registered(cursor, "incoming", self._named(batch.samples)):
                    cursor.execute("INSERT INTO samples BY NAME FROM incoming")
            for name, table in batch.tables.items():
                with registered(cursor, "incoming", table):
                    cursor.execute(f"INSERT INTO {name} BY NAME FROM incoming")
                    if name == "processes":
                        self._peaks.write(cursor, "incoming")
            lake_facts.write_inventories(cursor, batch.inventories)
            lake_facts.write_leases(cursor, batch.leases)
            write_requests(cursor, batch.requests)
            write_waiting(cursor, batch.request_events)
            lake_facts.write_drains(cursor, batch.request_events)
            lake_facts.write_jobs(cursor, batch.jobs)
            if batch.arrivals:
                runs = pa.table(
                    {
                        "agent": [run.agent for run in batch.arrivals],
                        "high": pa.array([run.high for run in batch.arrivals], pa.uint64()),
                        "seen": pa.array([run.seen for run in batch.arrivals], pa.uint64()),
                    }
                )
                with registered(cursor, "incoming", runs):
                    cursor.execute(
                        "INSERT INTO store.arrivals SELECT ?, *, ? FROM incoming", [self.part, batch.sequence]
                    )
            lake_facts.write_clocks(cursor, batch.clocks)
            for code, messages in batch.refused.items():
                cursor.execute("INSERT INTO store.refused VALUES (now(), ?, ?, ?)", [self.part, code, messages])
            # `marked` names the sequence that `marked_ns` is for: an older Corral moves the watermark without it.
            cursor.execute(
                f"UPDATE {self._table} SET sequence = ?, marked = ?, marked_ns = ?",
                [batch.sequence, batch.sequence, batch.stored_ns],
            )

    def _named(self, samples: ArrowTable) -> ArrowTable:
        """Replace numbers by host and device: parts do not share numbers, and Parquet stores a name once a page."""
        names = list(self.series.names)
        numbers = samples["series"].combine_chunks()
        columns: dict[str, Any] = {"time": samples["time"]}
        for at, column in enumerate(("host", "device")):
            values = pa.array([name[at] for name in names], pa.string())
            columns[column] = pa.DictionaryArray.from_arrays(numbers, values)
        for name in METRICS:
            columns[name] = samples[name]
        return pa.table(columns)

    def cursor(self) -> DuckDBPyConnection:
        """New cursor on the lake."""
        cursor = self._open().cursor()
        cursor.execute("USE lake")
        return cursor

    def _open(self) -> DuckDBPyConnection:
        if self._connection is None:
            self._connection = attach(self.lake)
        return self._connection

    def _abandon(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(duckdb.Error):
                connection.close()

    def close(self) -> None:
        """Close the connection to the lake."""
        self._abandon()


def current_snapshot(cursor: DuckDBPyConnection) -> int:
    """Newest snapshot of the lake; within a transaction the one that it has begun with."""
    row = cursor.execute("SELECT id FROM lake.current_snapshot()").fetchone()
    return int(row[0]) if row else 0


def with_retries(work: Callable[[], _T], tries: int = CONFLICT_TRIES) -> _T:
    """Run a transaction, and retry it with backoff if it conflicts with another one: what it read may be outdated."""
    for left in range(tries, -1, -1):
        try:
            return work()
        except duckdb.Error as error:
            if not left or not CONFLICT.search(str(error)):
                raise
        time.sleep(CONFLICT_SECONDS * (0.5 + random.random()) * 2 ** min(tries - left, CONFLICT_TRIES))
    raise AssertionError


def as_storage_error(error: duckdb.Error) -> StorageError | StoragePaused:
    """Convert DuckDB's error to a storage error, without passwords."""
    text = without_password(str(error).strip())
    line = " ".join(text.split("\n")[:2])
    if CONFLICT.search(text):
        return StoragePaused(f"the lake: too many conflicts with other writers: {line}")
    if "DATA_PATH parameter" in text:
        return StorageError(f"the lake keeps its files in another place: {line}")
    if isinstance(error, duckdb.DataError | duckdb.IntegrityError) and "commit" not in text:
        return Unstorable(line)
    if isinstance(error, duckdb.ProgrammingError | duckdb.NotSupportedError) and "onnect" not in text:
        return StorageError(f"the lake: {line}")
    return StoragePaused(f"the lake: {line}")


def without_password(text: str) -> str:
    """Mask the passwords in a message of the catalog."""
    return re.sub(r"(password\s*=\s*)(\'[^\']*\'|\S+)", r"\1…", re.sub(r"(://[^:/@\s]+):[^@\s]+@", r"\1:…@", text))
