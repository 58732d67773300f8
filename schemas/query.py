"""SQL over the bus: queries to a processor, and the form of their answers.

The answer to a query is one or more messages to the reply subject. Each has the header `Corral-Part` (from 0); the last
has `Corral-End` with a `QueryEnd` as JSON. Parts joined in order are the result: one JSON or CSV document, or one Arrow
IPC stream. A small result is one message with both headers, so a plain request/reply client needs to know none of this.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from .values import names

PART_HEADER: Final = "Corral-Part"
END_HEADER: Final = "Corral-End"
MAX_ROWS: Final = 100_000_000
"""Rows that one answer may have."""


class ResultFormat(StrEnum):
    """Format of the rows in an answer."""

    JSON = "json"
    """`{"type": "result", "columns": [...], "types": [...], "rows": [[...]], "truncated": false}`"""
    CSV = "csv"
    ARROW = "arrow"
    """An Arrow IPC stream."""
    MSGPACK = "msgpack"
    """As `json`, in MessagePack. A query sent in MessagePack gets it where it names no format, or `json`."""


class QueryRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One read-only SQL statement.

    Attributes:
        sql: a SELECT (or WITH, FROM, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN).
        format: format of the result.
        limit: at most this many rows; a result that is cut there has `truncated`.
        timeout_seconds: time after which the statement is cancelled.
        query_id: id by which it can be cancelled; null if it can't be.
        window: number of parts that may be in flight at a time, for answers of any size. Each part then has a reply
            subject, to which the client sends an empty message once it has taken the part. 0 for a client that does
            not; its answer is at most 32 MiB (`too_large` otherwise), since a server cuts off a reader that is too
            slow.
    """

    sql: Annotated[str, Meta(min_length=1, max_length=100_000)]
    format: ResultFormat = ResultFormat.JSON
    limit: Annotated[int, Meta(ge=1, le=MAX_ROWS)] = 10_000
    timeout_seconds: Annotated[float, Meta(gt=0, le=600)] = 30.0
    query_id: Annotated[str, Meta(min_length=1, max_length=128, pattern=names.IDENTIFIER)] | None = None
    window: Annotated[int, Meta(ge=0, le=64)] = 0


class QueryResult(Struct, frozen=True, kw_only=True, tag="result", tag_field="type"):
    """The rows of a query, as `json` and `msgpack` give them.

    NaN and the infinities are text (`"NaN"`, `"Infinity"`, `"-Infinity"`), times RFC 3339 in UTC, intervals ISO 8601,
    blobs base64. In JSON whole numbers and decimals have all their digits, also beyond 2^53; in MessagePack a decimal
    that no number can represent is text.

    Attributes:
        columns: their names.
        types: their types, as DuckDB names them.
        rows: each a list with a value per column.
        truncated: true if there were more rows than the limit.
        warnings: fields of the request that this processor does not know and has ignored; left out if there are none.
    """

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]
    truncated: bool
    warnings: list[str] = []


class QueryEnd(Struct, frozen=True, kw_only=True):
    """Outcome of a query, in the header `Corral-End` of the last part of its answer.

    Attributes:
        rows: number of rows returned.
        truncated: true if there were more rows than the limit.
        seconds: time that it took in the database.
        error: why it failed; empty if it did not.
        code: as in `Error.code`; empty if it did not fail.
        warnings: fields of the request that this processor does not know and has ignored.
    """

    rows: int = 0
    truncated: bool = False
    seconds: float = 0.0
    error: str = ""
    code: str = ""
    warnings: list[str] = []


class CancelRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cancel a query that runs or waits.

    Attributes:
        query_id: id with which the query was sent.
    """

    query_id: str


class Cancelled(Struct, frozen=True, kw_only=True, tag="cancelled", tag_field="type"):
    """Confirmation of a cancellation. The query was running or waiting, and ends now with the code `cancelled`.

    Attributes:
        query_id: id of the query.
        warnings: fields of the request that this processor does not know and has ignored.
    """

    query_id: str
    warnings: list[str] = []


class SnapshotRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Ask for a consistent copy of the history.

    Attributes:
        archive: true to include the samples of archived days.
    """

    archive: bool = True


class Snapshot(Struct, frozen=True, kw_only=True, tag="snapshot", tag_field="type"):
    """A copy of the history that can be read for an hour.

    Attributes:
        snapshot_id: id of the copy.
        bytes: size of the DuckDB file.
        samples: number of device samples in it.
        warnings: fields of the request that this processor does not know and has ignored.
    """

    snapshot_id: str
    bytes: int
    samples: int
    warnings: list[str] = []


class SnapshotRead(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Ask for a piece of a copy of the history. The answer is the bytes of the piece, and empty past the end.

    Attributes:
        snapshot_id: as in `Snapshot`.
        offset: offset of the first byte.
        done: true if nothing more is wanted, so that the copy may be deleted. There is no answer then.
    """

    snapshot_id: str
    offset: Annotated[int, Meta(ge=0, le=2**53)] = 0
    done: bool = False


class ProcessorStatus(Struct, frozen=True, kw_only=True, tag="processor", tag_field="type"):
    """State of a processor.

    Attributes:
        processor: id of the processor.
        database: path of its database.
        watermarks: sequence of the last stored message, by stream.
        lag_messages: number of messages that are not stored yet, by stream; for a lake, `CORRAL_TELEMETRY` counts those
            that are not copied into its partitions yet.
        samples: device samples stored since its start.
        dead_letters: messages refused since its start.
        duplicates: messages that were delivered again and changed nothing, since its start.
        paused: why it stores nothing at the moment; empty while it stores.
        database_bytes: size of the database on disk.
    """

    processor: str
    database: str = ""
    watermarks: dict[str, int] = {}
    lag_messages: dict[str, int] = {}
    samples: int = 0
    dead_letters: int = 0
    duplicates: int = 0
    paused: str = ""
    database_bytes: int = 0
