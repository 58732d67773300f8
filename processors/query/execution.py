"""One query in a thread of its own: check, run, and hand out its parts.

Parts are put aside for their reader, and where there is no room the thread waits: what is held of a result is bounded
(`spool.py`), however many rows there are.
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
from .guard.guard import Fence, QueryError, begin

log = logging.getLogger("corral.query")

SET_BACK: Final = "set_back"
"""Code of what ends a query that was tried, and is to run later."""
BATCH_ROWS: Final = 2048
"""One DuckDB vector: the least that can be fetched, so the least that is held where values are large."""

Send = Callable[[bytes, QueryEnd | None], None]
"""Takes a part, and with the last one the end; returns once the next may follow."""


class Execution:
    """A query from its arrival to its end. `run` belongs to one thread, `stop` to any.

    Attributes:
        request: what is asked.
        asker: who asks, for the queue.
        reply: where the answer goes.
        arrived: when, on the monotonic clock.
        started: when it began to run; 0 while it waits.
        resident_bytes: memory that the process held then.
        express: it is being tried, and may be set back.
        blocked_seconds: that its thread has waited for its reader.
        warnings: about the request.
        content_type: of the request, and so of an error.
        format: of the rows: MessagePack where a question in MessagePack asks for no other than the default.
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
        self._guard = threading.Lock()

    def again(self) -> Execution:
        """The same query, to be run anew."""
        made = Execution(self.request, self.asker, self.reply, self.content_type)
        made.arrived, made.warnings = self.arrived, self.warnings
        return made

    @property
    def deadline(self) -> float:
        """When it must have ended, on the monotonic clock; waiting in line counts."""
        return self.arrived + self.request.timeout_seconds

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped is not None

    def stop(self, code: str, message: str) -> None:
        """End it with an error. The first one counts; but what was only to be set back may yet end for good."""
        with self._guard:
            if self._stopped is None or self._stopped.code == SET_BACK:
                self._stopped = QueryError(code, message)
        self.interrupt()

    def interrupt(self) -> None:
        """Have it see that it was stopped; again and again until it has ended.

        An interrupt between two calls of DuckDB is forgotten by DuckDB, hence the repetition.
        """
        with self._guard:
            if self._cursor is not None:
                self._cursor.interrupt()

    def check_stopped(self) -> None:
        """Raise what `stop` was called with."""
        if self._stopped is not None:
            raise self._stopped

    def run(self, connect: Callable[[], DuckDBPyConnection], fence: Fence, send: Send, part_bytes: int) -> QueryEnd:
        """Run it and hand out its answer.

        Args:
            connect: gives a new cursor.
            fence: that checks the SQL.
            send: takes each part.
            part_bytes: size of a part.

        Raises:
            QueryError: it failed; parts may have been sent.
        """
        self.started = time.monotonic()
        try:
            self.check_stopped()
            statement = fence.check(self.request.sql, self.request.limit)
            cursor = connect()
            try:
                with self._guard:
                    self._cursor = cursor
                begin(cursor)
                cursor.execute(statement.limited)
                return self._answer(cursor, send, part_bytes)
            finally:
                with self._guard:
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
    """What the asker of a query is told that took too long."""
    seconds = f"{execution.request.timeout_seconds:g} s"
    where = "running" if execution.started else "waiting in line"
    return QueryError("timeout", f"the query was still {where} after {seconds}: filter more, or allow more time")


def as_query_error(error: Exception) -> QueryError:
    """What the asker is told of a failure. Errors of files and of DuckDB itself go to the log: they name paths."""
    text = str(error)
    if isinstance(error, duckdb.OutOfMemoryException | MemoryError) or "Out of Memory" in text:
        return QueryError("too_large", "the query needs more memory than it may have: filter or aggregate more")
    if isinstance(error, duckdb.InterruptException) or "INTERRUPT" in text:
        return QueryError("cancelled", "the query was interrupted")
    if isinstance(error, duckdb.PermissionException) or "Permission Error" in text or "read-only mode" in text:
        return QueryError("refused", "the history is read-only, and opens no files")
    if isinstance(error, duckdb.IOException | duckdb.FatalException | duckdb.InternalException) or any(
        text.startswith(kind) for kind in ("IO Error", "FATAL Error", "INTERNAL Error")
    ):
        log.error("a query failed: %s", text)
        return QueryError("internal", "the history could not be read; the processor's log says why")
    return QueryError("invalid", text)
