"""Replace rows in the tables of a level: that of closed buckets, and that of the newest of each device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from duckdb import DuckDBPyConnection
from numpy.typing import NDArray

from ....schemas.metrics import Metric
from ..bucketing import Buckets
from ..folding import Folded
from ..growth import require
from ..protocol import ROW_GROUP_ROWS, ArrowTable
from ..rollup_columns import Level, add_room, columns, counters, stored_rows
from ..rollup_omission import following
from ..statements import registered


def tables(level: Level) -> tuple[str, str]:
    """The table of the closed buckets of a level, and that of the open ones."""
    return level.table, f"{level.table}_open"


def stored(cursor: DuckDBPyConnection, level: Level, metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Subqueries in brackets for the rows of both tables, with the values that these leave out."""
    return tuple(f"({stored_rows(cursor, table, metrics, level)})" for table in tables(level))


def make_room(
    cursor: DuckDBPyConnection, level: Level, metrics: Sequence[Metric], rows: ArrowTable, closed: int
) -> list[set[str]]:
    """Add the columns that the tables lack for folded rows, the first of which are closed. Call it in no transaction.

    Returns:
        Columns that are left out for each table, as `insert` takes them; those of counters only if their growth, which
        is not known yet, is 0 where they stand still.
    """
    for metric in counters(metrics):
        last, name = rows[f"{metric.name}_last"], f"{metric.name}_increase"
        zeros = pa.array(np.zeros(len(last), dtype=np.int64), type=last.type, mask=last.is_null().to_numpy())
        rows = rows.set_column(rows.column_names.index(name), name, zeros)
    # The last value tells which metrics there are.
    always = {f"{metric.name}_last" for metric in metrics}
    found: list[set[str]] = []
    for table, part in zip(tables(level), (rows[:closed], rows[closed:]), strict=True):
        left_out = following(part, metrics)
        left_out.update(name for name in rows.column_names if part[name].null_count == part.num_rows)
        found.append(left_out)
        if part.num_rows:
            add_room(cursor, table, [one for one in columns(metrics, level) if one[0] not in left_out - always])
    return found


def delete(cursor: DuckDBPyConnection, level: Level, found: Buckets, table: str, chosen: NDArray[np.bool_]) -> None:
    """Delete the stored rows of some buckets from a table."""
    if not chosen.any():
        return
    numbers = found.number[chosen]
    width = level.seconds * 1_000_000
    start, end = (f"make_timestamptz({number * width})" for number in (int(numbers.min()), int(numbers.max()) + 1))
    keys = pa.table({"series": pa.array(found.series[chosen], type=pa.int32()), "us": numbers * width})
    with registered(cursor, "old", keys):
        for suffix in ("", "_bins") if level.bins else ("",):
            cursor.execute(
                f"DELETE FROM {table}{suffix} AS t USING (SELECT series, make_timestamptz(us) AS time FROM old) o "
                f"WHERE t.series = o.series AND t.time = o.time AND t.time >= {start} AND t.time < {end}"
            )


def insert(
    cursor: DuckDBPyConnection,
    level: Level,
    metrics: Sequence[Metric],
    folded: Folded,
    closed: int,
    left_out: Sequence[set[str]],
    through: int,
) -> None:
    """Insert the buckets, the first of them as closed ones.

    Args:
        cursor: in the transaction of the step.
        level: whose buckets they are.
        metrics: that have columns.
        folded: the buckets, with the growth of counters.
        closed: number of the closed ones.
        left_out: as `make_room` has returned it.
        through: number of the batch that they are refreshed through.

    Raises:
        LacksColumns: a table has no room for some values.
    """

    def put(table: str, columns: str, values: str, rows: ArrowTable) -> None:
        # Most refreshes close no bucket, and to plan an insert of hundreds of columns takes as long without rows.
        if rows.num_rows:
            with registered(cursor, "folded", rows.to_reader(max_chunksize=ROW_GROUP_ROWS)):
                cursor.execute(f"INSERT INTO {table} ({columns}) SELECT {values} FROM folded")

    counted = counters(metrics)
    kinds = dict(columns(metrics, level))
    grown = {f"{metric.name}_{part}" for metric in counted for part in ("first", "inner", "increase")}
    parts = (folded.rows[:closed], folded.rows[closed:])
    for table, rows, others in zip(tables(level), parts, left_out, strict=True):
        if rows.num_rows:
            without = (others - grown) | following(rows, counted)
            kept = [name for name in rows.column_names if name not in without]
            require(cursor, table, [(name, kinds[name]) for name in kept if name in kinds])
            names = ", ".join(kept)
            put(table, f"{names}, batch", f"{names}, {through}::BIGINT", rows.select(kept))
    if folded.bins is not None:
        keys = "time, series, metric, bin, n"
        put(f"{level.table}_bins", keys, keys, folded.bins[: folded.closed_bins])
        put(f"{level.table}_open_bins", keys, keys, folded.bins[folded.closed_bins :])
