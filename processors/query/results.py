"""Rows of a query as JSON, CSV, Arrow IPC or MessagePack, in parts of bounded size.

Arrow record batches come in, bytes go out; a result is never held as a whole, except in MessagePack. JSON keeps values
that it has a type for, and writes others as text: NaN and infinities as `"NaN"`, `"Infinity"`, `"-Infinity"` (as
protobuf does), times in RFC 3339 and UTC, intervals in ISO 8601, blobs in base64, a map with text keys as an object and
any other as a list of pairs. Whole numbers and decimals keep all their digits. CSV is RFC 4180 with a header; lists and
structs are JSON in their cell. MessagePack has the same values as JSON; a decimal that it has no equal number for is
text.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import io
import math
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Protocol, cast

import msgspec
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from ...schemas.query import ResultFormat
from .guard.errors import QueryError

# pyarrow comes without type annotations: these names only document what a value is.
Array = Any
Batch = Any
Schema = Any
pc: Final[Any] = pyarrow.compute

JSON_TYPE: Final = "application/json"
CSV_TYPE: Final = "text/csv"
MSGPACK_TYPE: Final = "application/msgpack"
MAX_PACKED_BYTES: Final = 32 * 2**20
"""Limit on the rows held for MessagePack: that of an answer to a reader that acknowledges nothing."""
ARROW_TYPE: Final = "application/vnd.apache.arrow.stream"
CONTENT_TYPES: Final = {
    ResultFormat.JSON: JSON_TYPE,
    ResultFormat.CSV: CSV_TYPE,
    ResultFormat.ARROW: ARROW_TYPE,
    ResultFormat.MSGPACK: MSGPACK_TYPE,
}


_NO_FORM: Final = ("BIGNUM", "TIME WITH TIME ZONE", "VARIANT")
"""Types whose values DuckDB exports only as raw bytes, or not at all."""
_NO_FORM_NESTED: Final = ("BIT", "UHUGEINT")
"""Types that can't be told from their storage type within a list or a struct."""
_NO_FORM_ARROW: Final = ("UHUGEINT",)
"""Types that DuckDB exports to Arrow as a signed number of the same width."""
_QUOTED: Final = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*\"""")
_LARGEST: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Ticks per second, by unit."""
_MAX_YEARS: Final = 32_000
"""Arrow writes years in 16 bits."""


def check_types(types: Sequence[str], format: ResultFormat) -> None:
    """Refuse types that an answer can't represent, before any of it is sent.

    Raises:
        QueryError: with the type, and what to do.
    """
    for type in types:
        bare = _QUOTED.sub("", type)
        nested = bare.endswith((")", "]")) and not bare.startswith(("DECIMAL(", "ENUM("))
        refused = [*_NO_FORM, *(_NO_FORM_NESTED if nested else ()), *(_NO_FORM_ARROW if format == "arrow" else ())]
        for name in refused:
            if re.search(rf"\b{name}(?=[\[\],)]|$)", bare):
                where = f"{name} within {type}" if nested else f"type {name}"
                raise QueryError("invalid", f"a column of {where} can't be represented: cast it to VARCHAR")


class Writer(Protocol):
    """Turns batches into bytes."""

    def start(self, columns: list[str], types: list[str], schema: Schema) -> bytes:
        """Return the bytes before the first row."""
        ...

    def write(self, batch: Batch) -> bytes:
        """The rows of a batch."""
        ...

    def end(self, truncated: bool, warnings: Sequence[str] = ()) -> bytes:
        """Return the bytes after the last row."""
        ...


def writer(format: ResultFormat) -> Writer:
    """The writer of a format."""
    writers: dict[ResultFormat, type[Writer]] = {
        ResultFormat.JSON: JsonWriter,
        ResultFormat.CSV: CsvWriter,
        ResultFormat.ARROW: ArrowWriter,
        ResultFormat.MSGPACK: MsgpackWriter,
    }
    return writers[format]()


class ArrowWriter:
    """An Arrow IPC stream, with DuckDB's types as it exports them to Arrow."""

    def __init__(self) -> None:
        self._sink = io.BytesIO()
        self._stream: Any = None

    def start(self, columns: list[str], types: list[str], schema: Schema) -> bytes:
        """The schema."""
        self._stream = pa.ipc.new_stream(self._sink, schema)
        return self._taken()

    def write(self, batch: Batch) -> bytes:
        """One record batch message."""
        self._stream.write_batch(batch)
        return self._taken()

    def end(self, truncated: bool, warnings: Sequence[str] = ()) -> bytes:
        """The end-of-stream mark."""
        self._stream.close()
        return self._taken()

    def _taken(self) -> bytes:
        taken = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return taken


class JsonWriter:
    """One JSON document, as `ResultFormat.JSON` shows it."""

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder(decimal_format="number").encode
        self._types: list[str] = []
        self._first = True

    def start(self, columns: list[str], types: list[str], schema: Schema) -> bytes:
        """Bytes before the first row: columns and types."""
        self._types = types
        return b'{"type":"result","columns":%b,"types":%b,"rows":[' % (self._encode(columns), self._encode(types))

    def write(self, batch: Batch) -> bytes:
        """The rows, preceded by a comma except for the first ones."""
        if not batch.num_rows:
            return b""
        columns = [_values(column, type) for column, type in zip(batch.columns, self._types, strict=True)]
        rows = self._encode(list(zip(*columns, strict=True)))[1:-1]
        separator, self._first = (b"" if self._first else b","), False
        return separator + rows

    def end(self, truncated: bool, warnings: Sequence[str] = ()) -> bytes:
        """The rest, with `truncated`, and with warnings of ignored fields in the request, if there are any."""
        more = b',"warnings":' + self._encode(list(warnings)) if warnings else b""
        return b'],"truncated":%b%b}' % (b"true" if truncated else b"false", more)


class MsgpackWriter:
    """One MessagePack document with the content that `JsonWriter` writes.

    An array in MessagePack begins with its length, so the rows are held until all of them are known.
    """

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder(decimal_format="string").encode
        self._head: list[Any] = []
        self._types: list[str] = []
        self._rows = bytearray()
        self._count = 0

    def start(self, columns: list[str], types: list[str], schema: Schema) -> bytes:
        """Keep the columns and types for `end`; return nothing yet."""
        self._head, self._types = ["type", "result", "columns", columns, "types", types, "rows"], types
        return b""

    def write(self, batch: Batch) -> bytes:
        """Encode and hold the rows; return nothing yet.

        Raises:
            QueryError: the rows take more than is held.
        """
        if batch.num_rows:
            columns = [_values(column, type) for column, type in zip(batch.columns, self._types, strict=True)]
            for row in zip(*columns, strict=True):
                self._rows += self._encode([_exact(value) for value in row])
            self._count += batch.num_rows
        if len(self._rows) > MAX_PACKED_BYTES:
            raise QueryError(
                "too_large",
                f"the answer is larger than {MAX_PACKED_BYTES >> 20} MiB, which in MessagePack must be held as a "
                "whole: lower `limit`, or ask with the format csv or arrow, or in JSON",
            )
        return b""

    def end(self, truncated: bool, warnings: Sequence[str] = ()) -> bytes:
        """The document."""
        tail: list[Any] = ["truncated", truncated, *(["warnings", list(warnings)] if warnings else [])]
        head = b"".join(self._encode(value) for value in self._head)
        fields = (len(self._head) + 1 + len(tail)) // 2
        rows = b"\xdd" + self._count.to_bytes(4, "big") + self._rows
        return bytes([0x80 | fields]) + head + rows + b"".join(self._encode(value) for value in tail)


def _exact(value: Any) -> Any:
    """Convert decimals to equal integers or floats. One without an equal in MessagePack stays, and becomes text."""
    match value:
        case decimal.Decimal():
            if value == value.to_integral_value():
                return int(value) if -(2**63) <= value < 2**64 else value
            return float(value) if decimal.Decimal(repr(float(value))) == value else value
        case list():
            return [_exact(item) for item in cast("list[Any]", value)]
        case dict():
            return {key: _exact(item) for key, item in cast("dict[Any, Any]", value).items()}
        case _:
            return value


class CsvWriter:
    """A header, then one line a row. NULL is an empty cell, an empty text is `""`."""

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder(decimal_format="number").encode
        self._columns: list[str] = []
        self._types: list[str] = []

    def start(self, columns: list[str], types: list[str], schema: Schema) -> bytes:
        """The header."""
        self._columns, self._types = columns, types
        return (",".join(_quoted(name) for name in columns) + "\r\n").encode()

    def write(self, batch: Batch) -> bytes:
        """The rows."""
        if not batch.num_rows:
            return b""
        columns = [self._text(column, type) for column, type in zip(batch.columns, self._types, strict=True)]
        # Arrow's writer needs distinct names; the header is written by `start`.
        table = pa.table(columns, names=[str(index) for index in range(len(columns))])
        sink = io.BytesIO()
        pyarrow.csv.write_csv(table, sink, pyarrow.csv.WriteOptions(include_header=False, eol="\r\n"))
        return sink.getvalue()

    def end(self, truncated: bool, warnings: Sequence[str] = ()) -> bytes:
        """Nothing: `QueryEnd` says if rows are missing."""
        return b""

    def _text(self, column: Array, type: str) -> Array:
        kind = column.type
        if pa.types.is_primitive(kind) and not pa.types.is_temporal(kind):
            return column
        if pa.types.is_string(kind) or (pa.types.is_decimal(kind) and type != "UHUGEINT"):
            return column
        texts = _fast_text(column)
        if texts is not None:
            return texts
        values = _values(column, type)
        return pa.array(
            [v if v is None or isinstance(v, str) else self._encode(v).decode() for v in values], pa.string()
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\r\n') or not name else name


def _fast_text(column: Array) -> Array | None:
    """Format dates and times as text without a Python loop; None for other types."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        # The zone is a label: the instant stays, and `UTC` is written as `Z`. A time without a zone is in UTC, too: so
        # the session takes it wherever it needs an instant.
        column = column.cast(pa.timestamp(kind.unit, "UTC"))
        text = pc.replace_substring(pc.cast(column, pa.string()), " ", "T", max_replacements=1)
        return _far_times(column.cast(pa.int64()), text, 2**63 - 1, _LARGEST[kind.unit])
    if pa.types.is_date32(kind):
        return _far_times(column.cast(pa.int32()), pc.cast(column, pa.string()), 2**31 - 1, 0)
    if pa.types.is_date(kind) or pa.types.is_time(kind):
        return pc.cast(column, pa.string())
    return None


def _far_times(ticks: Array, text: Array, greatest: int, a_second: int) -> Array:
    """Replace the text of times that Arrow gets wrong: infinities, and years beyond 16 bits.

    DuckDB stores infinities as the ends of the integer range.

    Args:
        ticks: since 1970.
        text: of Arrow.
        greatest: tick that stands for infinity.
        a_second: ticks of a second; 0 for days.
    """
    ends = pc.min_max(ticks).as_py()
    limit = _MAX_YEARS * 365 * (86_400 * a_second if a_second else 1)
    if ends["max"] is None or max(ends["max"], -ends["min"]) < limit:
        return text
    found = text.to_pylist()
    for at, tick in enumerate(ticks.to_pylist()):
        if tick is not None and abs(tick) >= limit:
            found[at] = ("-" if tick < 0 else "") + "infinity" if abs(tick) == greatest else _far(tick, a_second)
    return pa.array(found, pa.string())


def _far(tick: int, a_second: int) -> str:
    """Format a time of any year, as `_fast_text` does for the years that Arrow supports."""
    days, rest = divmod(tick, 86_400 * a_second) if a_second else (tick, 0)
    # The calendar repeats every 400 years, of 146,097 days; 2000 began 10,957 days after 1970.
    cycles, day = divmod(days - 10_957, 146_097)
    date = datetime.date(2000, 1, 1) + datetime.timedelta(day)
    year = date.year + 400 * cycles
    text = f"{'-' if year < 0 else ''}{abs(year):04}-{date:%m-%d}"
    if not a_second:
        return text
    seconds, part = divmod(rest, a_second)
    digits = len(str(a_second)) - 1
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{text}T{clock}" + (f".{part:0{digits}}" if digits else "") + "Z"


def _values(column: Array, type: str = "") -> list[Any]:
    """Values of a column, converted so that msgspec writes them as this module documents.

    Args:
        column: a column, or the values nested in one.
        type: DuckDB's name of its type; empty for nested values.
    """
    kind = column.type
    if pa.types.is_floating(kind):
        if pa.types.is_float32(kind):
            # By way of text: the few digits that identify the float, not the many of its double.
            column = column.cast(pa.string()).cast(pa.float64())
        values = column.to_pylist()
        if not pc.all(pc.is_finite(column)).as_py() and column.null_count < len(column):
            values = [_plain(value) for value in values]
        return values
    if type == "UHUGEINT":
        return [None if v is None else decimal.Decimal(int(v) % 2**128) for v in column.to_pylist()]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_decimal(kind):
        return column.to_pylist()
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode(), type)
    if type == "BIT":
        return [None if value is None else _bits(value) for value in column.to_pylist()]
    if pa.types.is_struct(kind):
        return _structs(column)
    if pa.types.is_union(kind) and kind.mode == "sparse":
        # Each member is as long as all, and a value's code says which one has it.
        members = {code: _values(column.field(at)) for at, code in enumerate(kind.type_codes)}
        return [members[code][at] for at, code in enumerate(column.type_codes.to_pylist())]
    if pa.types.is_map(kind):
        keys, values = (_values(_within(column, part)) for part in (column.keys, column.items))
        if pa.types.is_string(kind.key_type):
            return [
                None if there is None else dict(zip(keys[there], values[there], strict=True))
                for there in _spans(column)
            ]
        pairs = [list(pair) for pair in zip(keys, values, strict=True)]
        return [None if there is None else pairs[there] for there in _spans(column)]
    if pa.types.is_list(kind):
        values = _values(_within(column, column.values))
        return [None if there is None else values[there] for there in _spans(column)]
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        values = _values(column.values.slice(column.offset * size, len(column) * size))
        valid = column.is_valid().to_pylist()
        return [values[at * size : (at + 1) * size] if there else None for at, there in enumerate(valid)]
    if pa.types.is_interval(kind):
        return [None if value is None else _interval(value) for value in column.to_pylist()]
    texts = _fast_text(column)
    if texts is not None:
        return texts.to_pylist()
    return [_plain(value) for value in column.to_pylist()]


def _structs(column: Array) -> list[Any]:
    """Convert structs to objects; one without names, as `row(1, 2)` makes it, to a list."""
    names = [field.name for field in column.type]
    parts = [_values(column.field(at)) for at in range(len(names))]
    rows = zip(*parts, strict=True)
    valid = column.is_valid().to_pylist()
    named = any(names)
    return [
        None if not there else dict(zip(names, row, strict=True)) if named else list(row)
        for row, there in zip(rows, valid, strict=True)
    ]


def _within(column: Array, part: Array) -> Array:
    """Cut the nested values of lists or maps to those of a column, which may be a slice."""
    offsets = column.offsets
    first, last = (offsets[0].as_py(), offsets[len(offsets) - 1].as_py()) if len(offsets) else (0, 0)
    return part.slice(first, last - first)


def _spans(column: Array) -> list[slice | None]:
    """Slice of each list or map within the values that `_within` returns; None for a null."""
    offsets: list[int] = column.offsets.to_pylist()
    valid: list[bool] = column.is_valid().to_pylist()
    first = offsets[0] if offsets else 0
    return [
        slice(start - first, end - first) if there else None
        for start, end, there in zip(offsets, offsets[1:], valid, strict=False)
    ]


def _plain(value: Any) -> Any:
    """Convert one value of any other type to a value that JSON can represent."""
    match value:
        case None | bool() | int() | str() | decimal.Decimal():
            return value
        case float():
            if math.isfinite(value):
                return value
            return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.datetime():
            return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).isoformat().replace("+00:00", "Z")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case uuid.UUID():
            return str(value)
        case _:
            raise QueryError(
                "invalid", f"a value of type {type(value).__name__} can't be represented: cast it to VARCHAR"
            )


def _interval(value: Any) -> str:
    """Format an interval in ISO 8601, such as `P1M2DT3.5S`."""
    months, days, nanoseconds = value.months, value.days, value.nanoseconds
    text = "P" + (f"{months}M" if months else "") + (f"{days}D" if days else "")
    if nanoseconds or text == "P":
        seconds = decimal.Decimal(nanoseconds) / 10**9
        text += f"T{seconds:f}S"
    return text


def _bits(value: bytes) -> str:
    """Decode DuckDB's BIT to text: the first byte is the number of padding bits in front."""
    return "".join(f"{byte:08b}" for byte in value[1:])[value[0] :]


def cut(batches: Iterable[Batch], limit: int) -> Iterator[tuple[Batch, bool]]:
    """Yield batches up to a number of rows. The flag with the last one is true if there were more rows."""
    left = limit
    for batch in batches:
        if batch.num_rows > left:
            yield batch.slice(0, left), True
            return
        left -= batch.num_rows
        yield batch, False
