"""Rows for the tables of the history, from structs whose attributes are named as the columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any, Final

import msgspec
import pyarrow as pa
from msgspec import Struct

from . import schema
from .protocol import ArrowTable

TIME: Final = pa.timestamp("us", "UTC")
_COLUMN: Final = re.compile(r'"?(\w+)"? (MAP\([^)]*\)|\w+(?:\[\])?)')
_ARROW: Final = {
    "BIGINT": pa.int64(),
    "BOOLEAN": pa.bool_(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "INTEGER": pa.int32(),
    "INTEGER[]": pa.list_(pa.int32()),
    "JSON": pa.string(),
    "MAP(VARCHAR, VARCHAR)": pa.map_(pa.string(), pa.string()),
    "TIMESTAMPTZ": TIME,
    "VARCHAR": pa.string(),
    "VARCHAR[]": pa.list_(pa.string()),
}
"""Arrow's type of each SQL type. Integers in a column of times count microseconds."""


def arrow_schema(table: str, *, without: Iterable[str] = (), seen: bool = False) -> Any:
    """Arrow schema of a table in `schema.TABLES`.

    Args:
        table: its name.
        without: columns that statements compute.
        seen: add a time `seen`, from which they do.
    """
    found = [
        (name, _ARROW[sql])
        for name, sql in _COLUMN.findall(schema.TABLES[table].replace(" NOT NULL", ""))
        if name not in without
    ]
    return pa.schema([*found, ("seen", TIME)] if seen else found)


class Columns:
    """Columns of a table: some are given with each row, all others are attributes of a struct.

    Args:
        schema: Arrow schema of the rows.
        source: type of the structs.
        given: names of the columns that are given.

    Raises:
        TypeError: a column is neither given nor an attribute.
    """

    def __init__(self, schema: Any, source: type[Struct], given: Sequence[str]) -> None:
        self.schema = schema
        self.read = [name for name in schema.names if name not in given]
        attributes = {field.name for field in msgspec.structs.fields(source)}
        if strange := {*self.read} - attributes | {*given} - {*schema.names}:
            raise TypeError(f"{source.__name__} has no {', '.join(sorted(strange))}")
        self._names = [*given, *self.read]
        self._given: Callable[[Any], tuple[Any, ...]] = _of_several(itemgetter, given)
        self._read: Callable[[Any], tuple[Any, ...]] = _of_several(attrgetter, self.read)

    def row(self, source: Struct, /, **given: Any) -> tuple[Any, ...]:
        """Values of one row."""
        return (*self._given(given), *self._read(source))

    def table(self, rows: Sequence[tuple[Any, ...]]) -> ArrowTable:
        """Rows as an Arrow table, with the columns in the order of the schema."""
        columns = dict(zip(self._names, zip(*rows, strict=True) if rows else [()] * len(self._names), strict=True))
        return pa.table(columns, schema=self.schema)


def _of_several(getter: Callable[..., Any], names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A getter of a tuple, also of one value or none."""
    if len(names) > 1:
        return getter(*names)
    one = [getter(name) for name in names]
    return lambda source: tuple(get(source) for get in one)


def table_of(schema: Any, rows: Sequence[tuple[Any, ...]]) -> ArrowTable:
    """Arrow table of rows whose values are in the order of a schema."""
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema)
