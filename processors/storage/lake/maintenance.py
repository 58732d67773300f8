"""Maintenance of a lake by one of its processors: merging of small files, and retention.

Each step is a transaction of DuckLake, or several that may be repeated. A crash leaves every row once, and at most
orphaned files, which a later step deletes. Writers commit in between all the time, and DuckLake then refuses a
transaction that touches the same data. So each table has a separate transaction, which is retried at once, and one that
fails does not stop the others. Files are merged in tiers, so that a byte is rewritten a few times and not every minute.
Files with deleted rows are rewritten first, since DuckLake only merges files without.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

import duckdb
from duckdb import DuckDBPyConnection
from msgspec import Struct

from .. import retention
from ..errors import StorageError, StoragePaused
from ..retention import Horizon, Retention
from ..rollup_columns import HOUR, MINUTE, TEN_SECONDS
from ..schema import sql_text
from . import progress
from .lake import CONFLICT, STATE, Lake, attach, without_password

log = logging.getLogger("corral.lake")

_T = TypeVar("_T")
_NEEDED: Final = {
    "ducklake_rewrite_data_files": "delete_file_count > 0",
    "ducklake_merge_adjacent_files": "file_count > 1",
}
"""Condition for the tables that a call has something to do for."""
_ENDS_INSTANCE: Final = (duckdb.InternalException, duckdb.FatalException)

FLUSH: Final = "ducklake_flush_inlined_data"
REWRITE: Final = "ducklake_rewrite_data_files"
_NAMED: Final = "table_name => {}, schema_name => {}"
_CHANGED: Final = frozenset({*STATE, "clocks", "corral_meta"})

SECONDS: Final = 60.0
BEHIND_SECONDS: Final = 900.0
"""A round that takes longer is behind."""
SNAPSHOTS_KEPT: Final = timedelta(hours=1)
"""How far back a reader may go by DuckLake's time travel; longer than any query runs."""
ORPHANS_KEPT: Final = timedelta(days=1)
"""A file that is not committed yet may belong to a transaction in progress."""
ROWS_AT_ONCE: Final = 5_000_000
"""Approximate number of rows deleted by one transaction: it takes 28 bytes of memory for each."""
TRIES: Final = 40
"""Attempts of a transaction that conflicts with writers; each takes some 50 ms."""
PIECE_TRIES: Final = 4
"""Attempts of a deletion before it is split into smaller ones: any insert meanwhile makes it fail."""
MIN_PIECE: Final = timedelta(seconds=1)
INTERNAL_TRIES: Final = 3
REPORTED_AFTER_ROUNDS: Final = 2
PAUSE_SECONDS: Final = 0.05
REASON_CHARACTERS: Final = 300
MAX_REPORTED: Final = 3
"""Number of tables whose reasons are reported."""


class Unfinished(Exception):
    """Some tables failed; the message says which, and why."""


class Attached:
    """DuckDB instance with the lake attached. It is replaced by `renew` after an internal error of DuckLake.

    Its deletions are written to files at once. Deletions in the catalog would need a flush without a conflicting writer
    (see `_repeated_whole`), which a large table never gets.

    Args:
        lake: to attach.

    Raises:
        StorageError, StoragePaused: see `attach`.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self.connection = attach(lake, inline_rows=0)

    def renew(self) -> None:
        """Close the instance, and attach the lake to a new one."""
        self.close()
        self.connection = attach(self._lake, inline_rows=0)

    def close(self) -> None:
        """Close the instance."""
        with contextlib.suppress(duckdb.Error):
            self.connection.close()


class Step(Struct, frozen=True):
    """A step of maintenance.

    Attributes:
        name: of it.
        seconds: interval between two runs.
        work: to run.
        by_time: true if it deletes by age; it is then skipped while the clocks are not known.
    """

    name: str
    seconds: float
    work: Callable[[Attached, Retention, Horizon], object]
    by_time: bool = False


def _sql(text: str) -> Callable[[Attached, Retention, Horizon], object]:
    return lambda at, _, __: repeated(lambda: at.connection.execute(text).fetchall())


def _call(call: str, options: str = "") -> Callable[[Attached, Retention, Horizon], object]:
    """Work that runs one of DuckLake's calls on each table."""

    def work(at: Attached, _: Retention, __: Horizon) -> None:
        # Most tables have nothing to merge or to rewrite, and asking each takes its time.
        tables = at.connection.execute(
            "SELECT schema_name, table_name FROM duckdb_tables() JOIN ducklake_table_info('lake') USING (table_name) "
            f"WHERE database_name = 'lake' AND {_NEEDED.get(call, 'true')} ORDER BY ALL"
        ).fetchall()
        # Merging and rewriting take the table as a positional argument, flushing as a named one.
        named = _NAMED if call == FLUSH else "{}, schema => {}"

        def one(schema: str, table: str) -> None:
            which = named.format(sql_text(table), sql_text(schema))
            statement = f"CALL {call}('lake', {which}{options})"
            for left in range(INTERNAL_TRIES - 1, -1, -1):
                try:
                    if not _changed_by_parts(table):
                        repeated(lambda: at.connection.execute(statement).fetchall())
                        return
                    if call == REWRITE:
                        # A rewrite ignores what a part has deleted since the last flush.
                        flush = _NAMED.format(sql_text(table), sql_text(schema))
                        _repeated_whole(at.connection, f"CALL {FLUSH}('lake', {flush})")
                    _repeated_whole(at.connection, statement)
                    return
                except _ENDS_INSTANCE:
                    if not left:
                        raise
                    at.renew()

        _each(
            at,
            {
                f"{schema}.{table}".removeprefix("main."): lambda schema=str(schema), table=str(table): one(
                    schema, table
                )
                for schema, table in tables
            },
        )

    return work


def _changed_by_parts(table: str) -> bool:
    """True if parts change rows of a table, and do not only append. Such tables are few and small."""
    return table.startswith(("watermark_", progress.PREFIX)) or table in _CHANGED


def _repeated_whole(connection: DuckDBPyConnection, statement: str) -> None:
    """Run a call on a table in which parts delete rows. DuckLake's retries are off: a conflict repeats all of the call.

    Otherwise DuckLake retries the commit of what it has prepared, and leaves deletions in the catalog that are in a
    file by then. They are counted twice from then on, and each rewrite of the table ends in an internal error (DuckLake
    of DuckDB 1.5.5, `FlushInlinedFileDeletions`).
    """
    connection.execute("SET ducklake_max_retry_count = 0")
    try:
        repeated(lambda: connection.execute(statement).fetchall())
    finally:
        with contextlib.suppress(duckdb.Error):  # an internal error ended the instance
            connection.execute("RESET ducklake_max_retry_count")


def _each(at: Attached, works: Mapping[str, Callable[[], object]]) -> None:
    """Run all works, even if some fail. After an error that ends the instance, it is renewed.

    Raises:
        Unfinished: some failed.
    """
    failed: list[str] = []
    for name, work in works.items():
        try:
            work()
        except (duckdb.Error, Unfinished) as error:
            failed.append(f"{name}: {_reason(error)}")
            if isinstance(error, _ENDS_INSTANCE):
                at.renew()
    if failed:
        more = f"; and {len(failed) - MAX_REPORTED} more" if len(failed) > MAX_REPORTED else ""
        raise Unfinished("; ".join(failed[:MAX_REPORTED]) + more)


def repeated(work: Callable[[], _T], tries: int = TRIES) -> _T:
    """Run a transaction, and retry it at once if it conflicts with a writer."""
    for left in range(tries - 1, -1, -1):
        try:
            return work()
        except duckdb.Error as error:
            if not left or not CONFLICT.search(str(error)):
                raise
        time.sleep(PAUSE_SECONDS * random.random())
    raise AssertionError


def _reason(error: Exception) -> str:
    """An error as one line, with passwords masked. DuckLake's first line says what failed, and a later one why."""
    text = " ".join(without_password(str(error)).split())
    if len(text) <= REASON_CHARACTERS:
        return text
    # The failed statement is in the middle, and may be long.
    return f"{text[: REASON_CHARACTERS // 2]} … {text[-REASON_CHARACTERS // 2 :]}"


def _older(call: str, kept: timedelta) -> Callable[[Attached, Retention, Horizon], object]:
    """Work that runs one of DuckLake's calls on what is older than a time."""

    def work(at: Attached, _: Retention, horizon: Horizon) -> None:
        before = [horizon.clocks - kept]
        repeated(lambda: at.connection.execute(f"CALL {call}('lake', older_than => ?)", before).fetchall())

    return work


def _expire(at: Attached, _: Retention, horizon: Horizon) -> None:
    """Expire old snapshots, but none that the rollups of a partition still have to read the changes since."""
    kept = horizon.clocks - SNAPSHOTS_KEPT
    needed = progress.oldest_needed(at.connection)
    if needed is not None:
        row = at.connection.execute(
            "SELECT min(snapshot_time) FROM lake.snapshots() WHERE snapshot_id >= ?", [needed]
        ).fetchone()
        if row is not None and row[0] is not None:
            kept = min(kept, row[0])
    call = "CALL ducklake_expire_snapshots('lake', older_than => ?)"
    repeated(lambda: at.connection.execute(call, [kept]).fetchall())


def apply_retention(at: Attached, kept: Retention, horizon: Horizon) -> None:
    """Delete what is past its retention, by whole UTC days. Files without other rows are dropped whole."""
    samples = None if kept.archive is None else max(kept.archive, kept.raw)
    works: dict[str, Callable[[], object]] = {}
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
                works[table] = lambda table=table, limit=limit: _delete(at.connection, table, limit, horizon)
    _each(at, works)


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
    first = first or before
    # To the microsecond: what is left by rounding would be one piece more.
    piece = (before - first) // max(1, -(-int(rows) // ROWS_AT_ONCE)) + timedelta(microseconds=1)
    while first < before:
        upto = min(before, first + piece)
        try:
            repeated(lambda upto=upto: connection.execute(f"DELETE FROM {table} WHERE time < ?", [upto]), PIECE_TRIES)
        except duckdb.Error as error:
            # A smaller piece takes less time, in which less is inserted.
            if piece <= MIN_PIECE or not CONFLICT.search(str(error)):
                raise
            piece /= 2
        else:
            first = upto
    horizon.deleted_until[table] = before
    log.info("retention: deleted %d rows of %s from before %s", rows, table, before)


STEPS: Final = (
    Step(
        "arrivals",
        300.0,
        _sql(
            "DELETE FROM store.arrivals a USING (SELECT stream, agent, max(batch) AS newest FROM store.arrivals "
            "GROUP BY ALL) n WHERE a.stream = n.stream AND a.agent = n.agent AND a.batch < n.newest"
        ),
    ),
    Step("retention", 300.0, apply_retention, by_time=True),
    Step("inlined rows", 120.0, _call(FLUSH)),
    Step("files with deleted rows", 600.0, _call(REWRITE, ", delete_threshold => 0.05")),
    Step("small files", 60.0, _call("ducklake_merge_adjacent_files", f", max_file_size => {4 * 2**20}")),
    Step("files", 1800.0, _call("ducklake_merge_adjacent_files", f", max_file_size => {64 * 2**20}")),
    Step("large files", 43200.0, _call("ducklake_merge_adjacent_files")),
    Step("old snapshots", 600.0, _expire, by_time=True),
    Step("old files", 600.0, _older("ducklake_cleanup_old_files", SNAPSHOTS_KEPT), by_time=True),
    Step("orphaned files", 86400.0, _older("ducklake_delete_orphaned_files", ORPHANS_KEPT), by_time=True),
)


class LakeMaintenance:
    """Maintains one lake. Each step may be repeated, and may be run by two processors at once.

    Args:
        lake: to maintain.
        kept: how long data is kept.
        server_now: the time by the NATS server's clock; None while it is not known.
        force: delete all that is old by this machine's clock alone, once.

    Attributes:
        held_back: why retention is held back, if something is wrong; empty otherwise.
        failing: steps that fail at the moment, each with the reason.
    """

    def __init__(
        self, lake: Lake, kept: Retention, *, server_now: Callable[[], datetime | None], force: bool = False
    ) -> None:
        self._lake = lake
        self._kept = kept
        self._server_now = server_now
        self._force = force
        self._deleted_until: dict[str, datetime] = {}
        self.held_back = ""
        self.failing: dict[str, str] = {}
        self._rounds: dict[str, int] = {}
        self._began = math.inf
        """When the round that runs now was begun, on the monotonic clock."""

    @property
    def behind(self) -> dict[str, float]:
        """Seconds that the present round has taken, if it takes too long."""
        seconds = time.monotonic() - self._began
        return {"maintenance": seconds} if seconds > BEHIND_SECONDS else {}

    async def run(self) -> None:
        """Run the steps that are due, every `SECONDS`, until cancelled."""
        every = {step.name: step.seconds for step in STEPS}
        due = dict.fromkeys(every, 0.0)
        try:
            while True:
                await asyncio.sleep(SECONDS)
                now = time.monotonic()
                names = [name for name, at in due.items() if at <= now]
                due.update({name: now + every[name] for name in names})
                self._began = now
                try:
                    failed = await asyncio.to_thread(self._once, names)
                    # What fails is tried again with the next round, not when it would be due.
                    due.update(dict.fromkeys((name for name in names if name in failed), 0.0))
                    self._report(failed, ("maintenance", *names))
                except (StorageError, StoragePaused) as error:
                    log.error("maintenance: retried in %g s: %s", SECONDS, error)
                    due.update(dict.fromkeys(names, 0.0))
                    self._report({"maintenance": str(error)}, ())
                self._began = math.inf
        finally:
            self._began = math.inf
            # Another processor maintains the lake from here on.
            self.held_back = ""
            self.failing.clear()
            self._rounds.clear()

    def _report(self, failed: Mapping[str, str], done: Collection[str]) -> None:
        """Report steps that failed in two rounds in a row: a single failure may just be a conflict with a writer."""
        for name in done:
            self.failing.pop(name, None)
        self._rounds = {
            name: self._rounds.get(name, 0) + 1 if name in failed else rounds
            for name, rounds in {**dict.fromkeys(failed, 0), **self._rounds}.items()
            if name in failed or name not in done
        }
        self.failing.update({name: why for name, why in failed.items() if self._rounds[name] >= REPORTED_AFTER_ROUNDS})

    def _once(self, names: Collection[str]) -> dict[str, str]:
        now = datetime.now(UTC)
        if self._force:
            failed = once(self._lake, names, self._kept, now)
            self._force = False
            return failed
        server = self._server_now()
        apart = retention.disagreement(now, server)
        if apart and not self.held_back:
            log.warning("%s", apart)
        self.held_back = apart
        return once(
            self._lake,
            names,
            self._kept,
            agree=lambda newest: retention.agreed(now, server, newest, self._deleted_until),
        )


def once(
    lake: Lake,
    names: Collection[str] | None = None,
    kept: Retention | None = None,
    now: datetime | None = None,
    *,
    agree: Callable[[datetime | None], Horizon | None] | None = None,
) -> dict[str, str]:
    """Run steps once; one that fails is logged and does not stop the others.

    Args:
        lake: to maintain.
        names: of `STEPS`; all by default.
        kept: how long data is kept.
        now: time by which all that is old goes at once; by this machine's clock by default.
        agree: in its place, a function from the time of the newest sample to the horizon.

    Returns:
        Reason of each step that failed, by name.
    """
    failed: dict[str, str] = {}
    kept = kept or Retention()
    at = Attached(lake)
    try:
        horizon = retention.forced(now or datetime.now(UTC)) if agree is None else agree(_newest(at.connection))
        for step in STEPS:
            if names is None or step.name in names:
                # Steps that delete by age are skipped while the time is not known.
                given = horizon or (None if step.by_time else retention.forced(datetime.now(UTC)))
                if given is not None:
                    _step(at, failed, step.name, lambda step=step, given=given: step.work(at, kept, given))
    finally:
        at.close()
    return failed


def _newest(connection: DuckDBPyConnection) -> datetime | None:
    """Time of the newest sample that has a rollup of 10 s: reading all samples would take long."""
    try:
        row = connection.execute(f"SELECT max(time) FROM {TEN_SECONDS.table}").fetchone()
    except duckdb.Error as error:
        log.warning("maintenance: the newest sample: %s", str(error).strip().partition("\n")[0])
        return None
    return row[0] if row else None


def _step(at: Attached, failed: dict[str, str], name: str, work: Callable[[], object]) -> None:
    began = time.monotonic()
    try:
        work()
        log.debug("maintenance: %s in %.1f s", name, time.monotonic() - began)
    except (duckdb.Error, Unfinished) as error:
        failed[name] = str(error) if isinstance(error, Unfinished) else _reason(error)
        if isinstance(error, _ENDS_INSTANCE):
            at.renew()
        log.warning("maintenance: %s failed after %.1f s: %s", name, time.monotonic() - began, failed[name])
