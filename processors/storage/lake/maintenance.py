"""What one of a lake's processors does for all: rollups, small files into large ones, and what is old away.

Each step is a transaction of DuckLake, or several that may be repeated: a crash leaves every row once, and at most
files that nobody knows, which a later step finds. Writers come in between all the time, and DuckLake then refuses what
both have touched. So each table is a transaction of its own, repeated at once, and one that does not get through stops
none of the others. Files are merged in tiers, so that a byte is written again a few times and not every minute; those
of which rows were deleted are written anew first, since DuckLake merges no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
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
from ..rollup_columns import HOUR, LEVELS, MINUTE, TEN_SECONDS
from ..schema import sql_text
from . import rollups
from .lake import CONFLICT, STATE, Lake, attach, without_password

log = logging.getLogger("corral.lake")

_T = TypeVar("_T")
_WORTH: Final = {
    "ducklake_rewrite_data_files": "delete_file_count > 0",
    "ducklake_merge_adjacent_files": "file_count > 1",
}
"""Which tables a call has something to do for."""
_ENDS_INSTANCE: Final = (duckdb.InternalException, duckdb.FatalException)

FLUSH: Final = "ducklake_flush_inlined_data"
REWRITE: Final = "ducklake_rewrite_data_files"
_NAMED: Final = "table_name => {}, schema_name => {}"
_CHANGED: Final = frozenset({*STATE, "clocks", "corral_meta", "rolled"})

SECONDS: Final = 60.0
SNAPSHOTS_KEPT: Final = timedelta(hours=1)
"""How far back a reader may go by DuckLake's time travel; longer than any query runs."""
ORPHANS_KEPT: Final = timedelta(days=1)
"""A file that no transaction has entered yet may belong to one that goes on."""
ROWS_AT_ONCE: Final = 5_000_000
"""Deleted by one transaction, about: it holds 28 bytes of memory for each."""
TRIES: Final = 40
"""Of a transaction that writers come in between; each takes some 50 ms."""
PIECE_TRIES: Final = 4
"""Of a deletion, before it is cut into smaller ones: whatever is inserted meanwhile ends it."""
PIECE_AT_LEAST: Final = timedelta(seconds=1)
INTERNAL_TRIES: Final = 3
ROUNDS_TOLD: Final = 2
PAUSE_SECONDS: Final = 0.05
REASON_CHARACTERS: Final = 300
TOLD: Final = 3
"""Tables whose reasons are told."""


class Unfinished(Exception):
    """Some tables did not get through; the message says which, and why."""


class Attached:
    """An instance with the lake. An internal error of DuckLake ends it: the next statement has a new one.

    What it deletes from a file goes into a file at once: deletions that lie in the catalog need a flush that no writer
    comes between (see `_repeated_whole`), and a large table has none.

    Args:
        lake: which.

    Raises:
        StorageError, StoragePaused: see `attach`.
    """

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self.connection = attach(lake, inline_rows=0)

    def renew(self) -> None:
        """Attach anew."""
        self.close()
        self.connection = attach(self._lake, inline_rows=0)

    def close(self) -> None:
        """Let go of it."""
        with contextlib.suppress(duckdb.Error):
            self.connection.close()


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
    work: Callable[[Attached, Retention, Horizon], object]
    by_time: bool = False


def _sql(text: str) -> Callable[[Attached, Retention, Horizon], object]:
    return lambda at, _, __: repeated(lambda: at.connection.execute(text).fetchall())


def _call(call: str, options: str = "") -> Callable[[Attached, Retention, Horizon], object]:
    """One of DuckLake's calls on each table."""

    def work(at: Attached, _: Retention, __: Horizon) -> None:
        # Most tables have nothing to merge or to rewrite, and asking each takes its time.
        tables = at.connection.execute(
            "SELECT schema_name, table_name FROM duckdb_tables() JOIN ducklake_table_info('lake') USING (table_name) "
            f"WHERE database_name = 'lake' AND {_WORTH.get(call, 'true')} ORDER BY ALL"
        ).fetchall()
        # Merging and rewriting take the table by its place, flushing by its name.
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
                        # A rewriting does not count what a part has deleted since the last flush.
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
    """Whether parts change rows of a table, and do not only append: few tables, and small ones."""
    return table.startswith("watermark_") or table in _CHANGED


def _repeated_whole(connection: DuckDBPyConnection, statement: str) -> None:
    """Do a call on a table of which parts delete rows, and let a conflict come out, so that all of it is repeated.

    DuckLake otherwise commits again what it had prepared, and leaves those deletions in the catalog which are in a file
    by then: they are counted twice from there on, and each rewriting of the table ends in an internal error (DuckLake
    of DuckDB 1.5.5, `FlushInlinedFileDeletions`).
    """
    connection.execute("SET ducklake_max_retry_count = 0")
    try:
        repeated(lambda: connection.execute(statement).fetchall())
    finally:
        with contextlib.suppress(duckdb.Error):  # an internal error ended the instance
            connection.execute("RESET ducklake_max_retry_count")


def _each(at: Attached, works: Mapping[str, Callable[[], object]]) -> None:
    """Do all, whatever becomes of one.

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
        more = f"; and {len(failed) - TOLD} more" if len(failed) > TOLD else ""
        raise Unfinished("; ".join(failed[:TOLD]) + more)


def repeated(work: Callable[[], _T], tries: int = TRIES) -> _T:
    """Do a transaction, and again at once where a writer came in between."""
    for left in range(tries - 1, -1, -1):
        try:
            return work()
        except duckdb.Error as error:
            if not left or not CONFLICT.search(str(error)):
                raise
        time.sleep(PAUSE_SECONDS * random.random())
    raise AssertionError


def _reason(error: Exception) -> str:
    """All of it in one line: the first of DuckLake's says what failed, and a later one why."""
    text = " ".join(without_password(str(error)).split())
    if len(text) <= REASON_CHARACTERS:
        return text
    # The statement that failed stands in the middle, and may be long.
    return f"{text[: REASON_CHARACTERS // 2]} … {text[-REASON_CHARACTERS // 2 :]}"


def _older(call: str, kept: timedelta) -> Callable[[Attached, Retention, Horizon], object]:
    """One of DuckLake's calls on what is older than a time."""

    def work(at: Attached, _: Retention, horizon: Horizon) -> None:
        before = [horizon.clocks - kept]
        repeated(lambda: at.connection.execute(f"CALL {call}('lake', older_than => ?)", before).fetchall())

    return work


def _expire(at: Attached, _: Retention, horizon: Horizon) -> None:
    """Forget old snapshots, but none that a rollup has not seen: its feed is what came since."""
    kept = horizon.clocks - SNAPSHOTS_KEPT
    row = at.connection.execute(
        "SELECT min(snapshot_time) FROM lake.snapshots() "
        "WHERE snapshot_id >= (SELECT min(snapshot) FROM store.rolled WHERE snapshot > 0)"
    ).fetchone()
    if row is not None and row[0] is not None:
        kept = min(kept, row[0])
    call = "CALL ducklake_expire_snapshots('lake', older_than => ?)"
    repeated(lambda: at.connection.execute(call, [kept]).fetchall())


def let_go(at: Attached, kept: Retention, horizon: Horizon) -> None:
    """Delete what is older than its retention, by whole UTC days. Files without other rows go whole."""
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
            if piece <= PIECE_AT_LEAST or not CONFLICT.search(str(error)):
                raise
            piece /= 2
        else:
            first = upto
    horizon.gone[table] = before
    log.info("let go of %d rows of %s from before %s", rows, table, before)


STEPS: Final = (
    Step(
        "arrivals",
        300.0,
        _sql(
            "DELETE FROM store.arrivals a USING (SELECT stream, agent, max(batch) AS newest FROM store.arrivals "
            "GROUP BY ALL) n WHERE a.stream = n.stream AND a.agent = n.agent AND a.batch < n.newest"
        ),
    ),
    Step("retention", 300.0, let_go, by_time=True),
    Step("inlined rows", 120.0, _call(FLUSH)),
    Step("files with deleted rows", 600.0, _call(REWRITE, ", delete_threshold => 0.05")),
    Step("small files", 60.0, _call("ducklake_merge_adjacent_files", f", max_file_size => {4 * 2**20}")),
    Step("files", 1800.0, _call("ducklake_merge_adjacent_files", f", max_file_size => {64 * 2**20}")),
    Step("large files", 43200.0, _call("ducklake_merge_adjacent_files")),
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
        failing: what does not get through at the moment, and why, by step.
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
        self.failing: dict[str, str] = {}
        self._rounds: dict[str, int] = {}

    async def run(self) -> None:
        """Until cancelled."""
        every = {level.name: rollups.REFRESH_SECONDS[level.name] for level in LEVELS}
        every |= {step.name: step.seconds for step in STEPS}
        due = dict.fromkeys(every, 0.0)
        try:
            while True:
                await asyncio.sleep(SECONDS)
                now = time.monotonic()
                names = [name for name, at in due.items() if at <= now]
                due.update({name: now + every[name] for name in names})
                try:
                    failed = await asyncio.to_thread(self._once, names)
                    # What fails is tried again with the next round, not when it would be due.
                    due.update(dict.fromkeys((name for name in names if label(name) in failed), 0.0))
                    self._tell(failed, ("upkeep", *map(label, names)))
                except (StorageError, StoragePaused) as error:
                    log.error("upkeep: tried again in %g s: %s", SECONDS, error)
                    due.update(dict.fromkeys(names, 0.0))
                    self._tell({"upkeep": str(error)}, ())
        finally:
            # Another one looks after the lake from here on.
            self.held_back = ""
            self.failing.clear()
            self._rounds.clear()

    def _tell(self, failed: Mapping[str, str], done: Collection[str]) -> None:
        """What failed in one round may have been a writer's turn; in two that follow each other it is told."""
        for name in done:
            self.failing.pop(name, None)
        self._rounds = {
            name: self._rounds.get(name, 0) + 1 if name in failed else rounds
            for name, rounds in {**dict.fromkeys(failed, 0), **self._rounds}.items()
            if name in failed or name not in done
        }
        self.failing.update({name: why for name, why in failed.items() if self._rounds[name] >= ROUNDS_TOLD})

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
            self._lake, names, self._kept, agree=lambda newest: retention.agreed(now, server, newest, self._gone)
        )


def once(
    lake: Lake,
    names: Collection[str] | None = None,
    kept: Retention | None = None,
    now: datetime | None = None,
    *,
    agree: Callable[[datetime | None], Horizon | None] | None = None,
) -> dict[str, str]:
    """Steps once; one that fails is logged and stops none of the others.

    Args:
        lake: which.
        names: of rollups to bring up to date (`10s`, `1m`, `1h`), and of `STEPS`; all by default.
        kept: how long things are kept.
        now: by which all that is old goes at once; this machine's by default.
        agree: in its place what clocks and the newest sample agree on.

    Returns:
        What failed, and why, by step.
    """
    failed: dict[str, str] = {}
    kept = kept or Retention()
    at = Attached(lake)
    try:
        for level in LEVELS:
            if names is None or level.name in names:
                _step(at, failed, label(level.name), lambda level=level: rollups.refresh(at.connection, level))
        horizon = retention.forced(now or datetime.now(UTC)) if agree is None else agree(_newest(at.connection))
        for step in STEPS:
            if names is None or step.name in names:
                # Nothing that goes by time is done while it is not known.
                given = horizon or (None if step.by_time else retention.forced(datetime.now(UTC)))
                if given is not None:
                    _step(at, failed, step.name, lambda step=step, given=given: step.work(at, kept, given))
    finally:
        at.close()
    return failed


def label(name: str) -> str:
    """What a step or rollup is called where it is told."""
    return f"rollup {name}" if name in rollups.REFRESH_SECONDS else name


def _newest(connection: DuckDBPyConnection) -> datetime | None:
    """The time of the newest sample, but for the last refresh of the rollup that says so: all samples are many."""
    try:
        row = connection.execute(f"SELECT max(time) FROM {TEN_SECONDS.table}").fetchone()
    except duckdb.Error as error:
        log.warning("upkeep: the newest sample: %s", str(error).strip().partition("\n")[0])
        return None
    return row[0] if row else None


def _step(at: Attached, failed: dict[str, str], name: str, work: Callable[[], object]) -> None:
    began = time.monotonic()
    try:
        work()
        log.debug("upkeep: %s in %.1f s", name, time.monotonic() - began)
    except (duckdb.Error, Unfinished) as error:
        failed[name] = str(error) if isinstance(error, Unfinished) else _reason(error)
        if isinstance(error, _ENDS_INSTANCE):
            at.renew()
        log.warning("upkeep: %s did not get through in %.1f s: %s", name, time.monotonic() - began, failed[name])
