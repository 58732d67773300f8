"""Errors of queries, as clients get them."""

from __future__ import annotations

import logging

import duckdb

log = logging.getLogger("corral.query")


class QueryError(Exception):
    """Failure of a query, with the error code for its client.

    Attributes:
        code: `invalid` (the SQL is wrong), `refused` (the SQL is not for readers), `timeout`, `cancelled`,
            `too_large` (memory, spill or answer), `busy` (the queue is full), `unavailable` (the processor stops,
            can't keep the answer, or serves no SQL with this DuckDB), `internal` (the processor's log says why).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def as_query_error(error: Exception) -> QueryError:
    """Convert a failure to the client's error. Errors of files and DuckDB itself are only logged: they name paths."""
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


class TooLarge(QueryError):
    """A statement takes too much time or memory to plan."""

    def __init__(self, cpu_seconds: float, memory_bytes: int) -> None:
        super().__init__(
            "refused",
            f"the SQL becomes too large to plan ({cpu_seconds:g} s, {memory_bytes >> 20} MiB) once its names are "
            "replaced by what they stand for: mention each view, CTE, alias and * less often",
        )


class UnexpectedResult(Exception):
    """The guard does not see a known statement as it should, so it can't be trusted with others."""

    def __init__(self, sql: str, expected: str, seen: str) -> None:
        super().__init__(
            f"no SQL is served: the guard was written for another DuckDB than {duckdb.__version__}. "
            f"Expected of {sql!r}: {expected}; seen: {seen}. Install the DuckDB that Corral pins"
        )
