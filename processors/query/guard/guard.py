"""Guard for readers' SQL: one SELECT over the history's tables and views, with functions that only compute.

Four barriers, each sufficient against most attempts:

1. the statement is checked node by node against an allow-list, and planned over an empty copy of the schema, in a
   process of its own with limits of time and memory (`SqlGuard.check`, `sandbox.py`, `statement.py`);
2. the instance has no access to files outside of the storage's folders, loads no extension, and its settings are locked
   (`storage/hardening.py`);
3. the statement runs in a read-only transaction (`begin`), on a separate cursor;
4. time, rows, memory and spill are bounded (`service.py`, `storage/hardening.py`).

DuckDB expands names while it plans: of views, CTEs, aliases of the same SELECT, `*`, arguments of macros. If each level
of a short statement mentions the level below twice, its size doubles with each level, and neither timeouts nor
cancellations have an effect meanwhile. Hence the process of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from duckdb import DuckDBPyConnection

from . import mirror
from .errors import QueryError, TooLarge
from .sandbox import Bounds
from .sandbox_client import SANDBOX, Schema
from .statement import Statement

log = logging.getLogger("corral.query")

STALE_SECONDS: Final = 1.0
"""The schema is read again after a refusal, but not more often than this."""

RENEW_SECONDS: Final = 600.0
"""The schema is read again after this time in any case: each day has a table of its own."""


class SqlGuard:
    """Checks statements against one database. Any thread may call it.

    Args:
        connect: gives a new cursor on the database.
        private: tables that readers should not see.
        bounds: on the check of one statement.
    """

    def __init__(
        self, connect: Callable[[], DuckDBPyConnection], private: Sequence[str] = (), bounds: Bounds | None = None
    ) -> None:
        self._connect = connect
        self._private = tuple(private)
        self._bounds = bounds or Bounds()
        self._renewing = threading.Lock()
        self._schema: Schema | None = None
        self._read_at = 0.0

    def start(self) -> None:
        """Prepare the first check, which otherwise takes a second longer. A failure is logged; `check` raises it."""
        try:
            self._current(RENEW_SECONDS)
        except Exception as error:
            log.warning("SQL can't be checked yet: %s", error)

    def close(self) -> None:
        """Let go of the process that holds the schema; it ends after the checks that run."""
        self._schema = None

    def check(self, sql: str, limit: int, seconds: float | None = None) -> Statement:
        """Check a statement, and plan it once over the empty schema.

        Args:
            sql: as the reader sent it.
            limit: rows that will be read at most.
            seconds: that the check may take, if less than the bound.

        Raises:
            QueryError: `invalid` or `refused`, with what to do; `timeout`; `unavailable` or `internal` if nothing can
                be checked.
        """
        bounds = self._bounds
        if seconds is not None and seconds < bounds.wall_seconds:
            bounds = msgspec.structs.replace(bounds, wall_seconds=seconds)
        schema = self._current(RENEW_SECONDS)
        try:
            return schema.check(sql, limit, bounds)
        except ConnectionError:
            renewed = self._current(RENEW_SECONDS)
        except QueryError as error:
            # A table may be newer than the schema; but a flood of refusals must not read the schema each time.
            if isinstance(error, TooLarge):
                log.info("refused, too large to plan: %.200s", sql)
                raise
            if error.code not in ("invalid", "refused"):
                raise
            renewed = self._current(STALE_SECONDS)
            if renewed is schema:
                raise
        try:
            return renewed.check(sql, limit, bounds)
        except ConnectionError:
            log.error("SQL can't be checked: the process that does so ends again and again")
            raise QueryError("internal", "the SQL could not be checked; the processor's log says why") from None

    def _current(self, max_age_seconds: float) -> Schema:
        """The schema, read again if it was read longer ago than this."""
        fresh = self._fresh(max_age_seconds)
        if fresh is not None:
            return fresh
        known = self._schema
        if not self._renewing.acquire(blocking=known is None or max_age_seconds < RENEW_SECONDS):
            assert known is not None
            return known  # another thread reads it, and this one needs not wait
        try:
            fresh = self._fresh(max_age_seconds)
            return fresh if fresh is not None else self._renewed()
        finally:
            self._renewing.release()

    def _fresh(self, max_age_seconds: float) -> Schema | None:
        """The schema, if it is not older than this and its process lives."""
        known = self._schema
        if known is None or time.monotonic() - self._read_at >= max_age_seconds or not known.is_open:
            return None
        return known

    def _renewed(self) -> Schema:
        mirrored = self._read()
        known = self._schema
        if known is None or mirrored != known.mirrored or not known.is_open:
            known = self._schema = SANDBOX.schema(mirrored)
        return known

    def _read(self) -> mirror.Mirror:
        cursor = self._connect()
        try:
            mirrored = mirror.read(cursor, self._private)
        finally:
            cursor.close()
        self._read_at = time.monotonic()
        return mirrored


def begin(cursor: DuckDBPyConnection) -> None:
    """Start the read-only transaction that a reader's statement runs in: any write fails in it."""
    cursor.execute("BEGIN TRANSACTION READ ONLY")
