"""Rollups of one partition, written by its owner from the samples that it has just committed.

Each commit leaves its samples in memory (`unwritten.py`). Every minute those of closed minutes are aggregated in numpy
and inserted as rollups of 10 s and 1 min, in one transaction with the partition's progress (`progress.py`). A minute
that has a rollup already, or that was committed by an earlier owner, is read from the lake and replaced. All of it is
computed before the transaction. So that is short, and one that conflicts with another writer's is soon repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import duckdb
import numpy as np
from duckdb import DuckDBPyConnection

from ..bucketing import Samples
from ..errors import Deposed, StorageError, StoragePaused
from ..protocol import ArrowTable
from ..statements import transaction
from . import hours, progress, writing
from .lake import RENEW_COMMITS, LakePart, as_storage_error, attach, current_snapshot, with_retries
from .progress import Progress
from .unwritten import MINUTE_US, NO_KEYS, Closed, Numbers, Stored, Unwritten, minute_keys, minutes_of, series_of
from .writing import Devices, Fold, known_keys

log = logging.getLogger("corral.lake")

SECONDS: Final = 60.0
AFTER_MINUTE_SECONDS: Final = 15.0
"""Rollups are written this long after each full minute: by then most devices have a sample in the next one."""
HOURS_SECONDS: Final = 600.0
BEHIND_SECONDS: Final = 900.0
REPORTED_AFTER_ROUNDS: Final = 2
MEMORY_BYTES: Final = 256 * 2**20
"""Samples in memory beyond which rollups are written before the minute ends. Beyond twice as many, only the names of
minutes are kept, and their samples are read from the lake."""
KEYS_AT_ONCE: Final = 20_000
"""Minutes of devices that are read from the lake at once: 1.2 million samples at one a second."""
OLD_US: Final = 86_400_000_000
"""A minute older than this may have had a rollup that retention has deleted: its samples are read from the lake."""
_HOUR: Final = 60
_CONFLICT_TRIES: Final = 10


class PartRollups:
    """Rollups of one partition, for the owner of its part.

    Args:
        part: whose commits it follows.
        kept_minutes: retention of rollups of 1 min in seconds: hours before it are not computed again.

    Attributes:
        failing: why no rollups are written at the moment; empty while they are.
    """

    def __init__(self, part: LakePart, kept_minutes: float | None = None) -> None:
        number = progress.number_of(part.part)
        if number is None:
            raise ValueError(f"{part.part} has no samples")
        self._part = part
        self._number = number
        self._kept_minutes = kept_minutes
        self._partitions = 0
        self._fence = 0
        self._running = threading.Lock()
        self._connection: DuckDBPyConnection | None = None
        self._rounds = 0
        self._unwritten = Unwritten()
        self._stored = Stored()
        self._fold = Fold()
        self._devices = Devices(part.series)
        self._progress = Progress(0, 0)
        self._started = False
        self._hours = NO_KEYS
        self._hours_at = 0.0
        self._begun: int | None = None
        self._limit = MEMORY_BYTES if part.lake.memory_bytes is None else min(MEMORY_BYTES, part.lake.memory_bytes // 4)
        self._full: Callable[[], object] = lambda: None
        self._failed_rounds = 0
        self._done_at = time.monotonic()
        self.failing = ""
        part.follower = self

    @property
    def behind_seconds(self) -> float:
        """Seconds since rollups were up to date, if that is too long; else 0."""
        waited = time.monotonic() - self._done_at
        return waited if waited > BEHIND_SECONDS else 0.0

    def taken_over(self, fence: int) -> None:
        """Begin again, as the part's new owner: what is in the lake is all that counts."""
        with self._running:
            self._fence, self._started, self._begun = fence, False, None
            self._forget()
            self._done_at = time.monotonic()
        # At once: what is committed before it has looked would be read from the lake.
        self._full()

    def committing(self, snapshot: int) -> None:
        """Note that samples are committed by a transaction that has begun with a snapshot, and may be tried again."""
        if self._begun is None:
            self._begun = snapshot

    def committed(self, samples: ArrowTable | None) -> None:
        """Take over samples that are committed."""
        begun = self._begun
        if samples is not None and samples.num_rows and begun is not None:
            self._unwritten.add(samples, begun, time.monotonic())
            size = self._unwritten.bytes
            if size > 2 * self._limit:
                self._unwritten.forget_samples()
            elif size > self._limit:
                self._full()
        self._begun = None

    async def run(self) -> None:
        """Write rollups every minute, until cancelled.

        Raises:
            Deposed: the part has another owner.
        """
        loop, full = asyncio.get_running_loop(), asyncio.Event()
        self._full = lambda: loop.call_soon_threadsafe(full.set)
        # Not all parts at the same moment: the catalog accepts one commit after the other.
        after = AFTER_MINUTE_SECONDS + 20 * self._number / max(1, self._partitions or 8) % 20
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SECONDS - (time.time() - after) % SECONDS):
                        await full.wait()
                full.clear()
                await asyncio.to_thread(self._report, self.refresh)
        finally:
            self._full = lambda: None

    def _report(self, work: Callable[[], int]) -> None:
        try:
            work()
        except Deposed:
            raise
        except Exception as error:  # whatever it is, it must not stop ingest
            self._failed_rounds += 1
            expected = isinstance(error, StorageError | StoragePaused)
            log.warning(
                "rollups of %s: tried again in a minute: %s",
                self._part.part,
                error,
                exc_info=None if expected else error,
            )
            if self._failed_rounds >= REPORTED_AFTER_ROUNDS:
                self.failing = str(error) or type(error).__name__
        else:
            self._failed_rounds, self.failing = 0, ""

    def refresh(self, everything: bool = False) -> int:
        """Write the rollups of closed minutes, and every ten minutes those of hours.

        Args:
            everything: also the minutes that are not closed, and hours at once.

        Returns:
            Number of minutes of devices written.

        Raises:
            Deposed: the part has another owner; nothing was written since.
            StorageError, StoragePaused: see `attach`; nothing is lost.
        """
        with self._running:
            if not self._fence:
                return 0
            try:
                return self._refresh(self._open(), everything)
            except duckdb.Error as error:
                self._forget()
                raise as_storage_error(error) from error
            except BaseException:
                self._forget()
                raise
            finally:
                self._rounds += 1
                if self._rounds % RENEW_COMMITS == 0:
                    self._abandon()

    def close(self) -> None:
        """Close the connection, once a refresh in progress has ended. What is not written the next owner finds."""
        with self._running:
            self._abandon()

    def _refresh(self, cursor: DuckDBPyConnection, everything: bool) -> int:
        if not self._started:
            self._start(cursor)
        newest = current_snapshot(cursor)
        written = 0
        if not self._progress.samples:
            written += self._recompute(cursor)
            self._advance(newest, NO_KEYS, 0)
            self._write_step(cursor, None, replace=False)
        closed = self._unwritten.closed(time.monotonic(), everything)
        if len(closed.keys):
            written += self._write(cursor, closed, newest)
        if everything or time.monotonic() - self._hours_at >= HOURS_SECONDS:
            self._write_hours(cursor, newest)
            self._hours_at = time.monotonic()
        self._done_at = time.monotonic()
        return written

    def _start(self, cursor: DuckDBPyConnection) -> None:
        """Find what earlier owners have committed, and written no rollup of."""
        row = cursor.execute("SELECT value FROM corral_meta WHERE key = 'partitions'").fetchone()
        self._partitions = int(row[0]) if row else 1
        self._progress = progress.read(cursor, self._number)
        newest = current_snapshot(cursor)
        samples, minutes = self._progress.samples, self._progress.minutes
        if 0 < samples < newest:
            feed = writing.feed("main", "samples", samples + 1, newest)
            self._unwritten.note(self._keys(cursor, feed, MINUTE_US), samples, time.monotonic())
        if samples:
            feed = writing.feed("store", "rollup_1m", minutes + 1, newest) if minutes else "lake.store.rollup_1m"
            if minutes < newest:
                self._hours = self._keys(cursor, feed, _HOUR * MINUTE_US)
        self._hours_at = time.monotonic()
        self._started = True

    def _keys(self, cursor: DuckDBPyConnection, source: str, width: int) -> Numbers:
        """Keys of this partition's rows in a table, or in a part of it."""
        found = cursor.execute(
            f"SELECT host, device, epoch_us(time) // {width} AS number FROM {source} GROUP BY ALL"
        ).fetchnumpy()
        mine = {
            host: progress.partition_of(host, self._partitions) == self._number for host in set(found["host"].tolist())
        }
        return known_keys(
            self._part.series,
            [
                (host, device, number)
                for host, device, number in zip(*(column.tolist() for column in found.values()), strict=True)
                if mine[host]
            ],
        )

    def _recompute(self, cursor: DuckDBPyConnection) -> int:
        """Write all rollups anew, hour by hour from the oldest on."""
        written, since = 0, 0
        while True:
            row = cursor.execute(
                f"SELECT min(epoch_us(time)) FROM lake.main.samples WHERE time >= make_timestamptz({since})"
            ).fetchone()
            if row is None or row[0] is None:
                return written
            first = int(row[0]) // (_HOUR * MINUTE_US) * _HOUR * MINUTE_US
            since = first + _HOUR * MINUTE_US
            window = writing.between(first, since)
            keys = self._keys(cursor, f"(SELECT * FROM lake.main.samples WHERE {window})", MINUTE_US)
            self._look_up(cursor, keys)
            written += self._write_from_lake(cursor, keys)

    def _write(self, cursor: DuckDBPyConnection, closed: Closed, newest: int) -> int:
        """Write closed minutes, and then the progress without them."""
        keys = closed.keys
        self._look_up(cursor, keys)
        old = minutes_of(keys) < (time.time_ns() // 1000 - OLD_US) // MINUTE_US
        from_lake = old | self._stored.among(keys) | np.isin(keys, closed.noted)
        written = self._write_from_lake(cursor, keys[from_lake])
        self._unwritten.written(keys[from_lake], closed.upto)
        fresh = keys[~from_lake]
        self._advance(newest, fresh, closed.upto)
        table = self._unwritten.samples(fresh, closed.upto)
        self._write_step(cursor, Samples(table) if table is not None else None, replace=False)
        self._unwritten.written(fresh, closed.upto)
        return written + len(fresh)

    def _advance(self, newest: int, keys: Numbers, upto: int) -> None:
        """Set the progress that is reached once some minutes are written.

        Args:
            newest: snapshot that was the newest before they were chosen.
            keys: of the minutes.
            upto: see `Closed`.
        """
        # In this order: a commit in progress is among the unwritten before it is no longer begun.
        begun = self._begun
        left = self._unwritten.snapshot_without(keys, upto)
        done = min(each for each in (newest, begun, left) if each is not None)
        self._progress = Progress(max(self._progress.samples, done), self._progress.minutes)

    def _write_from_lake(self, cursor: DuckDBPyConnection, keys: Numbers) -> int:
        """Write minutes from all their samples in the lake, and replace what is stored of them."""
        keys = keys[np.argsort(minutes_of(keys), kind="stable")]
        for begin in range(0, len(keys), KEYS_AT_ONCE):
            samples = writing.read(cursor, self._devices, np.sort(keys[begin : begin + KEYS_AT_ONCE]))
            if samples is not None:
                self._write_step(cursor, samples, replace=True)
        return len(keys)

    def _write_step(self, cursor: DuckDBPyConnection, samples: Samples | None, *, replace: bool) -> None:
        self._devices.know(cursor)
        keys = NO_KEYS
        rows: list[writing.Rows] = []
        if samples is not None:
            keys = np.unique(minute_keys(samples.series, samples.times // MINUTE_US))
            newest = self._stored.newest(len(self._part.series.names))
            rows = self._fold.rows(cursor, self._devices, samples, newest)

        def write() -> None:
            with transaction(cursor):
                progress.write(cursor, self._number, self._fence, self._progress)
                for each in rows:
                    writing.write(cursor, self._devices, each, replace=replace)

        with_retries(write)
        self._stored.add(keys)
        changed = [hours_of(keys), *(each.corrected_hours for each in rows)]
        self._hours = np.unique(np.concatenate([self._hours, *changed]))

    def _look_up(self, cursor: DuckDBPyConnection, keys: Numbers) -> None:
        """Find out which minutes are stored of the devices of which it is not known."""
        unknown = self._stored.unknown(keys)
        if not len(unknown):
            return
        self._devices.know(cursor)
        first = int(minutes_of(unknown).min())
        self._stored.learn(unknown, first, writing.stored(cursor, np.unique(series_of(unknown)), first))

    def _write_hours(self, cursor: DuckDBPyConnection, newest: int) -> None:
        """Write the hours whose minutes have changed, and the progress."""
        self._devices.know(cursor)
        limit = None if self._kept_minutes is None else time.time() - self._kept_minutes
        due, self._hours = self._hours, NO_KEYS
        try:
            for keys in hours.steps(due):
                staged = hours.stage(cursor, self._devices, keys, limit)

                def write(staged: hours.Staged = staged) -> None:
                    with transaction(cursor):
                        progress.write(cursor, self._number, self._fence, self._progress)
                        hours.write(cursor, staged)

                with_retries(write, _CONFLICT_TRIES)
            self._advance(newest, NO_KEYS, 0)
            self._progress = Progress(self._progress.samples, newest)
            self._write_step(cursor, None, replace=False)
        except BaseException:
            self._hours = np.unique(np.concatenate([self._hours, due]))
            raise

    def _open(self) -> DuckDBPyConnection:
        if self._connection is None:
            # Deletions in the catalog would need a flush without a conflicting writer, which a large table never gets.
            self._connection = attach(self._part.lake, inline_rows=0)
            self._devices.forget()
        return self._connection

    def _forget(self) -> None:
        """Forget all, since a transaction may or may not have been committed: it is found again from the progress."""
        self._unwritten.clear()
        self._hours = NO_KEYS
        self._stored.forget()
        self._fold.forget()
        self._abandon()
        self._started = False

    def _abandon(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(duckdb.Error):
                connection.close()


def hours_of(keys: Numbers) -> Numbers:
    """Keys of the hours of minutes."""
    return np.unique(minute_keys(series_of(keys), minutes_of(keys) // _HOUR))
