"""SQL over the bus: what one asks of a processor and how the answer comes.

The answer to a query is one or more messages to the reply subject. Each has the header `Corral-Part` (from 0); the last
has `Corral-End` with a `QueryEnd` as JSON. Parts joined in order are the result: one JSON or CSV document, or one Arrow
IPC stream. A small result is one message with both headers, so a plain request/reply client needs to know none of this.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

PART_HEADER: Final = "Corral-Part"
END_HEADER: Final = "Corral-End"
MOST_ROWS: Final = 100_000_000
"""Of one answer."""


class ResultFormat(StrEnum):
    """How the rows come."""

    JSON = "json"
    """`{"type": "result", "columns": [...], "types": [...], "rows": [[...]], "truncated": false}`"""
    CSV = "csv"
    ARROW = "arrow"
    """An Arrow IPC stream."""
    MSGPACK = "msgpack"
    """As `json`, in MessagePack; what a question in MessagePack gets that names no format, or `json`."""


class QueryRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One read-only SQL statement.

    Attributes:
        sql: a SELECT (or WITH, FROM, DESCRIBE, SHOW, SUMMARIZE, EXPLAIN).
        format: of the result.
        limit: at most so many rows; a result cut there says so in `truncated`.
        timeout_seconds: the statement is cancelled then.
        query_id: names it for a cancellation; None if it can't be cancelled.
        window: parts that may be under way at a time, for answers of any size: each part then has a reply subject, to
            which the asker sends an empty message once it has taken the part. 0 for an asker that does not; its
            answer is at most 32 MiB (`too_large` otherwise), since a server cuts off a reader that is too slow.
    """

    sql: Annotated[str, Meta(min_length=1, max_length=100_000)]
    format: ResultFormat = ResultFormat.JSON
    limit: Annotated[int, Meta(ge=1, le=MOST_ROWS)] = 10_000
    timeout_seconds: Annotated[float, Meta(gt=0, le=600)] = 30.0
    query_id: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_-]+$(?!\n)")] | None = None
    window: Annotated[int, Meta(ge=0, le=64)] = 0


class QueryResult(Struct, frozen=True, kw_only=True, tag="result", tag_field="type"):
    """The rows of a query, as `json` and `msgpack` give them.

    NaN and the infinities are text (`"NaN"`, `"Infinity"`, `"-Infinity"`), times RFC 3339 in UTC, intervals ISO 8601,
    blobs base64. In JSON whole numbers and decimals have all their digits, also beyond 2^53; in MessagePack a decimal
    that no number can say is text.

    Attributes:
        columns: their names.
        types: their types, as DuckDB names them.
        rows: each a list with a value per column.
        truncated: there were more rows than the limit.
        warnings: fields of the request that this processor does not know and has ignored; left out if there are none.
    """

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]
    truncated: bool
    warnings: list[str] = []


class QueryEnd(Struct, frozen=True, kw_only=True):
    """How a query ended.

    Attributes:
        rows: rows returned.
        truncated: there were more rows than the limit.
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
        query_id: as the query was given it.
    """

    query_id: str


class Cancelled(Struct, frozen=True, kw_only=True, tag="cancelled", tag_field="type"):
    """The query was running or waiting, and ends now; its own answer has the code `cancelled`.

    Attributes:
        query_id: of the query.
        warnings: fields of the question that this processor does not know and has ignored.
    """

    query_id: str
    warnings: list[str] = []


class SnapshotRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Ask for a consistent copy of the history.

    Attributes:
        archive: with the samples of archived days.
    """

    archive: bool = True


class Snapshot(Struct, frozen=True, kw_only=True, tag="snapshot", tag_field="type"):
    """A copy that is ready to be read, for an hour.

    Attributes:
        snapshot_id: names it.
        bytes: size of the DuckDB file.
        samples: device samples in it.
        warnings: fields of the question that this processor does not know and has ignored.
    """

    snapshot_id: str
    bytes: int
    samples: int
    warnings: list[str] = []


class SnapshotRead(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Ask for a piece of a copy; the answer is its bytes, empty behind the end.

    Attributes:
        snapshot_id: of `Snapshot`.
        offset: of the first byte.
        done: nothing more is wanted: the copy may go. There is no answer.
    """

    snapshot_id: str
    offset: Annotated[int, Meta(ge=0, le=2**53)] = 0
    done: bool = False


class ProcessorStatus(Struct, frozen=True, kw_only=True, tag="processor", tag_field="type"):
    """A processor on itself.

    Attributes:
        processor: its id.
        database: path of its database.
        watermarks: last stored sequence by stream.
        lag_messages: messages in the streams that are not stored yet, by stream; of a lake, `CORRAL_TELEMETRY` counts
            those that are not copied into its partitions yet.
        samples: device samples stored since its start.
        dead_letters: messages refused since its start.
        duplicates: messages that came again and changed nothing, since its start.
        paused: why it does not store at the moment; empty while it does.
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
