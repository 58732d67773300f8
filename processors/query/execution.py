"""Execution of one query in a thread: check it, run it, and pass on the parts of its answer.

Parts are kept for their reader, and the thread waits if there is no room. So the memory and disk for a result are
bounded (`spool.py`), however many rows there are.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import duckdb
import pyarrow as pa
from duckdb import DuckDBPyConnection

from ...schemas import codec
from ...schemas.query import QueryEnd, QueryRequest, ResultFormat
from . import results
from .guard.errors import QueryError, as_query_error
from .guard.guard import SqlGuard, begin

log = logging.getLogger("corral.query")

SET_BACK: Final = "set_back"
"""Error code of a query that is preempted in an express slot, and requeued."""
BATCH_ROWS: Final = 2048
"""One DuckDB vector: the smallest batch that can be fetched, and so the least memory if values are large."""

Send = Callable[[bytes, QueryEnd | None], None]
"""Takes a part, and with the last one the end; returns once the next may follow."""


class Execution:
    """A query from its arrival to its end. `run` is called by one thread, `stop` by any.

    Attributes:
        request: of the client.
        asker: user or connection that the query counts for in the queue.
        reply: where the answer goes.
        arrived: when, on the monotonic clock.
        started: when it began to run; 0 while it waits.
        resident_bytes: resident memory of the process at that time.
        express: true while it runs in an express slot, and may be requeued.
        blocked_seconds: time that its thread has waited for its reader.
        warnings: about the request.
        content_type: of the request, and so of an error.
        format: of the rows: MessagePack if a request in MessagePack leaves the default format.
    """

    def __init__(self, request: QueryRequest, asker: str, reply: str, content_type: str = codec.JSON) -> None:
        self.request = request
        self.asker = asker
        self.reply = reply
        self.arrived = time.monotonic()
        self.started = 0.0
        self.resident_bytes = 0
        self.express = False
        self.blocked_seconds = 0.0
        self.warnings: list[str] = []
        self.content_type = content_type
        packed = content_type == codec.MSGPACK and request.format is ResultFormat.JSON
        self.format = ResultFormat.MSGPACK if packed else request.format
        self._cursor: DuckDBPyConnection | None = None
        self._stopped: QueryError | None = None
        self._lock = threading.Lock()

    def again(self) -> Execution:
        """New execution of the same query, with its arrival time and warnings."""
        made = Execution(self.request, self.asker, self.reply, self.content_type)
        made.arrived, made.warnings = self.arrived, self.warnings
        return made

    @property
    def deadline(self) -> float:
        """Time by which it must have ended, on the monotonic clock; time in the queue counts."""
        return self.arrived + self.request.timeout_seconds

    @property
    def stopped(self) -> bool:
        """True if `stop` was called."""
        return self._stopped is not None

    def stop(self, code: str, message: str) -> None:
        """Stop the query with an error. The first error counts, but any later one replaces `SET_BACK`."""
        with self._lock:
            if self._stopped is None or self._stopped.code == SET_BACK:
                self._stopped = QueryError(code, message)
        self.interrupt()

    def interrupt(self) -> None:
        """Interrupt DuckDB, so that the query notices that it was stopped. Repeat it until the query has ended.

        DuckDB drops an interrupt that comes between two calls, hence the repetition.
        """
        with self._lock:
            if self._cursor is not None:
                self._cursor.interrupt()

    def check_stopped(self) -> None:
        """Raise what `stop` was called with."""
        if self._stopped is not None:
            raise self._stopped

    def run(self, connect: Callable[[], DuckDBPyConnection], guard: SqlGuard, send: Send, part_bytes: int) -> QueryEnd:
        """Run the query and pass on its answer.

        Args:
            connect: gives a new cursor.
            guard: checks the SQL.
            send: takes each part.
            part_bytes: size of a part.

        Raises:
            QueryError: it failed; parts may have been sent.
        """
        self.started = time.monotonic()
        try:
            self.check_stopped()
            statement = guard.check(self.request.sql, self.request.limit, max(0.1, self.deadline - time.monotonic()))
            cursor = connect()
            try:
                with self._lock:
                    self._cursor = cursor
                begin(cursor)
                cursor.execute(statement.limited)
                return self._answer(cursor, send, part_bytes)
            finally:
                with self._lock:
                    self._cursor = None
                with contextlib.suppress(duckdb.Error):
                    cursor.rollback()
                cursor.close()
        except (duckdb.Error, pa.ArrowException, OSError, MemoryError, RuntimeError) as error:
            self.check_stopped()
            raise as_query_error(error) from error
        finally:
            log.debug("query ended after %.3f s: %.200s", time.monotonic() - self.started, self.request.sql)

    def _answer(self, cursor: DuckDBPyConnection, send: Send, part_bytes: int) -> QueryEnd:
        description = cursor.description or []
        columns = [str(column[0]) for column in description]
        types = [str(column[1]) for column in description]
        results.check_types(types, self.format)
        reader = cursor.to_arrow_reader(BATCH_ROWS)
        writer = results.writer(self.format)
        rows, truncated = 0, False
        waiting = bytearray(writer.start(columns, types, reader.schema))
        for batch, more in results.cut(reader, self.request.limit):
            self.check_stopped()
            waiting += writer.write(batch)
            rows += batch.num_rows
            truncated = more
            while len(waiting) > part_bytes:
                send(bytes(memoryview(waiting)[:part_bytes]), None)
                del waiting[:part_bytes]
                self.check_stopped()
        waiting += writer.end(truncated, self.warnings)
        seconds = round(time.monotonic() - self.started - self.blocked_seconds, 6)
        end = QueryEnd(rows=rows, truncated=truncated, seconds=seconds, warnings=self.warnings)
        while len(waiting) > part_bytes:
            send(bytes(memoryview(waiting)[:part_bytes]), None)
            del waiting[:part_bytes]
        send(bytes(waiting), end)
        return end


def timed_out(execution: Execution) -> QueryError:
    """Error for a query that took too long, while running or in the queue."""
    seconds = f"{execution.request.timeout_seconds:g} s"
    where = "running" if execution.started else "waiting in line"
    return QueryError("timeout", f"the query was still {where} after {seconds}: filter more, or allow more time")
