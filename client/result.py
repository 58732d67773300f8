"""Results of queries as tuples, dictionaries, Arrow tables, or pandas and Polars data frames."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import msgspec

from ..schemas.query import QueryEnd, ResultFormat
from .errors import CorralError
from .notebook import table


class _JsonResult(msgspec.Struct):
    columns: list[str]
    rows: list[list[Any]]
    types: list[str] = []


class QueryResult:
    """Result of one statement.

    Attributes:
        columns: names of the columns.
        types: types of the columns, as the database or Arrow names them.
        truncated: true if there were more rows than the limit; pandas frames have it in `attrs["truncated"]` too.
        seconds: execution time of the statement in the database.
        format: format of the answer.
        raw: the answer as received, in that format.
    """

    def __init__(self, raw: bytes, format: ResultFormat, end: QueryEnd) -> None:
        self.raw = raw
        self.format = format
        self.truncated = end.truncated
        self.seconds = end.seconds
        self._table: Any = None
        self._rows: list[tuple[Any, ...]] | None = None
        if format is ResultFormat.ARROW:
            self._table = _read_arrow(raw)
            self.columns: list[str] = list(self._table.column_names)
            self.types: list[str] = [str(type) for type in self._table.schema.types]
        elif format is ResultFormat.JSON:
            try:
                document = msgspec.json.decode(raw, type=_JsonResult)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise CorralError(f"the result can't be read: {error}") from None
            if any(len(row) != len(document.columns) for row in document.rows):
                raise CorralError("the result can't be read: its rows don't have as many values as there are columns")
            self.columns, self.types = document.columns, document.types
            self._rows = [tuple(row) for row in document.rows]
        else:
            self.columns, self.types, self._rows = [], [], []

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        """Rows as tuples. Times are `datetime` in an Arrow result, and text in a JSON result."""
        if self._rows is None:
            columns = [column.to_pylist() for column in self._table.columns]
            self._rows = list(zip(*columns, strict=True)) if columns else []
        return self._rows

    def dicts(self) -> list[dict[str, Any]]:
        """Rows as dictionaries by column name."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def scalar(self) -> Any:
        """The value of a result with one row and one column.

        Raises:
            ValueError: the result has another shape.
        """
        if len(self.rows) != 1 or len(self.columns) != 1:
            raise ValueError(f"expected one value, got {len(self.rows)} rows of {len(self.columns)} columns")
        return self.rows[0][0]

    def arrow(self) -> Any:
        """The result as a `pyarrow.Table`."""
        if self._table is None:
            columns = list(zip(*self.rows, strict=True)) or [() for _ in self.columns]
            self._table = _pyarrow().table([list(column) for column in columns], names=self.columns)
        return self._table

    def pandas(self) -> Any:
        """The result as a `pandas.DataFrame`.

        Decimals of an Arrow result, such as sums of integers, become `int64` or `float64`; `rows` and `arrow()` keep
        all digits.
        """
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise CorralError("pandas is not installed: pip install pandas") from None
        if self.format is ResultFormat.ARROW:
            frame = _numeric(self._table).to_pandas()
        else:
            frame = pandas.DataFrame.from_records(self.rows, columns=self.columns)
        frame.attrs["truncated"] = self.truncated
        return frame

    def polars(self) -> Any:
        """The result as a `polars.DataFrame`."""
        try:
            import polars  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise CorralError("polars is not installed: pip install polars") from None
        if self.format is ResultFormat.ARROW:
            return polars.from_arrow(self._table)
        return polars.DataFrame(self.rows, schema=self.columns, orient="row")

    def __len__(self) -> int:
        return len(self.rows) if self._table is None else self._table.num_rows

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        more = ", truncated" if self.truncated else ""
        return f"<QueryResult {len(self)} rows × {len(self.columns)} columns{more}>"

    def _repr_html_(self) -> str:
        """HTML table for notebooks, with at most 100 rows."""
        note = f"{len(self)} rows{', truncated at the limit' if self.truncated else ''}"
        return table(self.columns, self.rows[:100], note)


def _read_arrow(raw: bytes) -> Any:
    """Read a table from an IPC stream and validate it fully, since Arrow doesn't check offsets when it reads them."""
    arrow = _pyarrow()
    try:
        table = arrow.ipc.open_stream(io.BytesIO(raw)).read_all()
        table.validate(full=True)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise CorralError(f"the result can't be read: {error}") from None
    return table


def _numeric(table: Any) -> Any:
    """Convert columns of decimals to `int64` if all values are integers that fit, else to `float64`."""
    arrow = _pyarrow()
    for at, field in enumerate(table.schema):
        if not arrow.types.is_decimal(field.type):
            continue
        try:
            column = table.column(at).cast(arrow.int64())
        except arrow.ArrowInvalid:
            column = table.column(at).cast(arrow.float64())
        table = table.set_column(at, field.name, column)
    return table


def _pyarrow() -> Any:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.ipc  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError:
        raise CorralError("pyarrow is not installed: pip install pyarrow, or query with format='json'") from None
    return pyarrow
