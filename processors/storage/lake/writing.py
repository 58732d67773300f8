"""Rollups of 10 s and 1 min of a partition's devices: aggregated in numpy, then replaced or inserted in the lake.

Devices have the numbers of the part's `Series` here; the lake has their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from duckdb import DuckDBPyConnection
from msgspec import Struct

from ....schemas.metrics import METRICS, Metric
from .. import growth
from ..bucketing import Array, Buckets, Samples, buckets, data_of
from ..folding import Folded, fold, with_increases
from ..growth import Tables
from ..protocol import ArrowTable, Series
from ..readings import Readings
from ..rollup_columns import HOUR, MINUTE, TEN_SECONDS, Level, binned, counters
from ..statements import registered
from .unwritten import MINUTE_US, NO_KEYS, Numbers, minute_keys, minutes_of, series_of

_HOUR_US: Final = 3_600_000_000
_BINNED: Final = [metric.name for metric in binned(METRICS.values())]
NUMBERS: Final = {name: at for at, name in enumerate(_BINNED)}
"""Number of each metric that has bins."""
_COUNTED: Final = [metric.name for metric in counters(METRICS.values())]
KNOWN: Final = "temp.main.known_devices"


class Rows(Struct, frozen=True):
    """Rows of a level that are to be written.

    Attributes:
        level: which.
        folded: its buckets.
        corrected: table of stored growth that changes, as `growth.Tables` fills it; empty if none does.
        corrected_hours: keys of the hours in which minutes change so.
    """

    level: Level
    folded: Folded
    corrected: str
    corrected_hours: Numbers


class Devices:
    """Names of devices by their numbers, and the temporary table `KNOWN` of them.

    Args:
        series: their numbers.
    """

    def __init__(self, series: Series) -> None:
        self.series = series
        self._told = 0

    def forget(self) -> None:
        """The table is gone, with its connection."""
        self._told = 0

    def know(self, cursor: DuckDBPyConnection) -> None:
        """Add the devices to the table that it does not have yet."""
        count = len(self.series.names)
        if not self._told:
            cursor.execute(f"CREATE OR REPLACE TEMP TABLE {KNOWN} (series INTEGER, host VARCHAR, device VARCHAR)")
        if count > self._told:
            with registered(cursor, "more", self.table(np.arange(self._told, count))):
                cursor.execute(f"INSERT INTO {KNOWN} FROM more")
            self._told = count

    def table(self, series: Array) -> ArrowTable:
        """Number, host and device of each of some devices."""
        numbers = pa.array(series, type=pa.int32())
        return pa.table({"series": numbers, **self.named(numbers)})

    def named(self, numbers: Any) -> dict[str, Any]:
        """Columns `host` and `device` of some numbers."""
        names = list(self.series.names)
        return {
            column: pa.DictionaryArray.from_arrays(numbers, pa.array([name[at] for name in names], pa.string()))
            for at, column in enumerate(("host", "device"))
        }


def known_keys(series: Series, rows: Iterable[tuple[str, str, int]]) -> Numbers:
    """Keys of rows with host, device, and number of the minute or hour."""
    found = [(series.number(host, device), number) for host, device, number in rows]
    if not found:
        return NO_KEYS
    numbers = np.array(found, dtype=np.int64)
    return np.unique(minute_keys(numbers[:, 0], numbers[:, 1]))


def feed(schema: str, table: str, first: int, last: int) -> str:
    """Rows that were inserted into a table in a range of snapshots."""
    return f"ducklake_table_insertions('lake', '{schema}', '{table}', {first}::BIGINT, {last}::BIGINT)"


def between(first: int, end: int, time: str = "time") -> str:
    """SQL condition of rows between two times in microseconds."""
    return f"{time} >= make_timestamptz({first}) AND {time} < make_timestamptz({end})"


def read(cursor: DuckDBPyConnection, devices: Devices, keys: Numbers) -> Samples | None:
    """Read all samples of some minutes; None if there are none."""
    minutes = minutes_of(keys)
    within = between(int(minutes.min()) * MINUTE_US, (int(minutes.max()) + 1) * MINUTE_US)
    wanted = devices.table(series_of(keys)).append_column("minute", pa.array(minutes))
    with registered(cursor, "wanted", wanted):
        rows = cursor.execute(
            f"SELECT epoch_us(s.time) AS us, w.series, {', '.join(f's.{name}' for name in METRICS)} "
            f"FROM (SELECT * FROM lake.main.samples WHERE {within}) s JOIN wanted w ON w.host = s.host "
            f"AND w.device = s.device AND w.minute = epoch_us(s.time) // {MINUTE_US}"
        ).to_arrow_table()
    if not rows.num_rows:
        return None
    kept = [name for name in rows.column_names if rows[name].null_count < rows.num_rows]
    return Samples(rows.select(kept).combine_chunks())


def stored(cursor: DuckDBPyConnection, devices: Numbers, first: int) -> Numbers:
    """Keys of the stored minutes of some devices from one minute on, in order."""
    with registered(cursor, "asked", pa.table({"series": pa.array(devices, type=pa.int32())})):
        found = cursor.execute(
            f"SELECT k.series::BIGINT AS series, epoch_us(t.time) // {MINUTE_US} AS minute "
            f"FROM (SELECT time, host, device FROM lake.{MINUTE.table} "
            f"WHERE time >= make_timestamptz({first * MINUTE_US})) t "
            f"JOIN {KNOWN} k ON k.host = t.host AND k.device = t.device SEMI JOIN asked a ON a.series = k.series"
        ).to_arrow_table()
    return np.unique(minute_keys(data_of(found["series"]), data_of(found["minute"])))


class Fold:
    """Aggregates samples. Keeps the last readings of counters in memory."""

    def __init__(self) -> None:
        self._readings = {
            level.name: Readings(level.seconds * 1_000_000, _tables(level).reach) for level in (TEN_SECONDS, MINUTE)
        }

    def forget(self) -> None:
        """Forget all readings, since the stored rows have changed otherwise."""
        for readings in self._readings.values():
            readings.forget()

    def rows(self, cursor: DuckDBPyConnection, devices: Devices, samples: Samples, newest: Numbers) -> list[Rows]:
        """Aggregate all samples of some minutes.

        Args:
            cursor: with the table `KNOWN`.
            devices: of the partition.
            samples: all of these minutes.
            newest: newest stored minute of each device, by its number; -1 for none.
        """
        metrics = [metric for name, metric in METRICS.items() if name in samples.names]
        counted = counters(metrics)
        written: list[Rows] = []
        for level in (TEN_SECONDS, MINUTE):
            found = buckets(samples, level)
            folded = fold(samples, metrics, level, NUMBERS, found, len(found.number))
            corrected, hours = "", NO_KEYS
            if counted:
                kept = self._readings[level.name]
                grown = kept.growth(counted, found, folded.counters)
                if not grown.settled.all():
                    is_newest = found.number * level.seconds // 60 >= newest[found.series]
                    tables = _tables(level)
                    _join(cursor, tables, counted, folded, found, ~grown.settled, is_newest, grown.increases, kept)
                    if cursor.execute(f"SELECT 1 FROM {tables.corrected} LIMIT 1").fetchone():
                        corrected = tables.corrected
                        hours = _corrected_hours(cursor, corrected) if level is MINUTE else hours
                folded = with_increases(folded, grown.increases, folded.counters)
            written.append(Rows(level, folded, corrected, hours))
        return written


def write(cursor: DuckDBPyConnection, devices: Devices, rows: Rows, *, replace: bool) -> None:
    """Write rows, in a transaction.

    Args:
        cursor: that has aggregated them.
        devices: of the partition.
        rows: to write.
        replace: delete stored rows of the same buckets.
    """
    level, folded = rows.level, rows.folded
    if rows.corrected:
        _correct(cursor, level, rows.corrected)
    if not folded.rows.num_rows:
        return
    series = folded.rows["series"].combine_chunks()
    named = devices.named(series)
    if replace:
        _delete(cursor, level, pa.table({"time": folded.rows["time"], **named}))
    names = ["time", "host", "device", *folded.rows.column_names[2:]]
    table = pa.table([folded.rows["time"], *named.values(), *folded.rows.columns[2:]], names=names)
    with registered(cursor, "folded", table):
        cursor.execute(f"INSERT INTO lake.{level.table} ({', '.join(names)}) SELECT {', '.join(names)} FROM folded")
    if folded.bins is not None and folded.bins.num_rows:
        bins = folded.bins
        metric = pa.DictionaryArray.from_arrays(bins["metric"].combine_chunks(), pa.array(_BINNED))
        columns = {"time": bins["time"], **devices.named(bins["series"].combine_chunks()), "metric": metric}
        with registered(cursor, "folded", pa.table({**columns, "bin": bins["bin"], "n": bins["n"]})):
            cursor.execute(f"INSERT INTO lake.{level.table}_bins BY NAME FROM folded")


def _delete(cursor: DuckDBPyConnection, level: Level, keys: ArrowTable) -> None:
    times = data_of(keys["time"].cast(pa.int64()))
    within = between(int(times.min()), int(times.max()) + 1, "t.time")
    with registered(cursor, "old", keys):
        for suffix in ("", "_bins") if level.bins else ("",):
            cursor.execute(
                f"DELETE FROM lake.{level.table}{suffix} AS t USING old o "
                f"WHERE t.host = o.host AND t.device = o.device AND t.time = o.time AND {within}"
            )


def _tables(level: Level) -> Tables:
    """Stored rows of a level and raw samples, with the numbers of devices; corrections are collected."""

    # To plan a statement with all of the hundreds of columns takes longer than to read these few.
    parts = [f"r.{name}_{part}" for name in _COUNTED for part in ("first", "last", "inner", "increase")]

    def numbered(table: str, columns: Sequence[str] = parts) -> str:
        return (
            f"(SELECT k.series, r.time, {', '.join(columns)} "
            f"FROM lake.{table} r JOIN {KNOWN} k ON k.host = r.host AND k.device = r.device)"
        )

    def readings(first: int, end: int) -> str:
        return (
            f"SELECT * FROM {numbered('main.samples', [f'r.{name}' for name in _COUNTED])} WHERE {between(first, end)}"
        )

    return Tables(
        level,
        ("series",),
        (numbered(level.table),),
        numbered(HOUR.table),
        readings,
        falls_marked=True,
        corrected=f"temp.main.corrected_{level.name}",
    )


def _join(
    cursor: DuckDBPyConnection,
    tables: Tables,
    counted: Sequence[Metric],
    folded: Folded,
    found: Buckets,
    chosen: Array,
    is_newest: Array,
    increases: Mapping[str, Array],
    kept: Readings,
) -> None:
    """Compute the growth of some devices' counters in SQL, set it in `increases`, and learn their last readings.

    Args:
        cursor: with the table `KNOWN`.
        tables: of the level.
        counted: the counters.
        folded: all buckets.
        found: the same, in the order of device and time.
        chosen: which of these.
        is_newest: buckets after which their device has no stored one.
        increases: of each counter, in the same order.
        kept: learns.
    """
    parts = [f"{metric.name}_{part}" for metric in counted for part in ("first", "last", "inner", "increase")]
    rows = folded.rows.select(["time", "series", *parts]).filter(pa.array(chosen))
    width = tables.width
    with registered(cursor, "staging", rows.append_column("open", pa.array(is_newest[chosen]))):
        cursor.execute(
            f"CREATE OR REPLACE TEMP TABLE touched AS SELECT series, epoch_us(time) // {width} AS bucket, time, open "
            "FROM staging"
        )
        cursor.execute("CREATE OR REPLACE TEMP TABLE staged AS SELECT * EXCLUDE (open) FROM staging")
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE {tables.corrected} (series INTEGER, time TIMESTAMPTZ, name VARCHAR, "
        "value BIGINT, old BIGINT)"
    )
    numbers = found.number[chosen]
    growth.join(cursor, tables, counted, int(numbers.min()), int(numbers.max()))
    names = ", ".join(f"{metric.name}_increase" for metric in counted)
    grown = cursor.execute(f"SELECT {names} FROM temp.main.staged ORDER BY series, time").fetchnumpy()
    for metric in counted:
        increases[metric.name][chosen] = np.ma.filled(grown[f"{metric.name}_increase"], growth.NOTHING)
    # The last correction of a bucket counts, and those that are written anew need none.
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE {tables.corrected} AS SELECT series, time, name, value FROM ("
        f"FROM {tables.corrected} QUALIFY row_number() OVER (PARTITION BY series, time, name ORDER BY rowid DESC) = 1"
        ") c "
        "ANTI JOIN temp.main.touched t ON t.series = c.series AND t.time = c.time WHERE value IS DISTINCT FROM old"
    )
    last = growth.last_readings(cursor, tables, counted)
    # After a late bucket others are stored, whose last readings count.
    newest = np.zeros(int(found.series.max()) + 1, dtype=np.bool_)
    newest[found.series] = is_newest
    kept.learn(counted, {name: column[newest[last["series"]]] for name, column in last.items()})


def _corrected_hours(cursor: DuckDBPyConnection, corrected: str) -> Numbers:
    found = cursor.execute(
        f"SELECT DISTINCT series::BIGINT AS series, epoch_us(time) // {_HOUR_US} AS hour FROM {corrected}"
    ).to_arrow_table()
    return np.unique(minute_keys(data_of(found["series"]), data_of(found["hour"])))


def _correct(cursor: DuckDBPyConnection, level: Level, corrected: str) -> None:
    """Update the growth of stored buckets whose neighbors have changed."""
    for name, first, last in cursor.execute(
        f"SELECT name, min(epoch_us(time)), max(epoch_us(time)) + 1 FROM {corrected} GROUP BY name"
    ).fetchall():
        cursor.execute(
            f"UPDATE lake.{level.table} AS t SET {name} = c.value FROM ("
            f"SELECT k.host, k.device, o.time, o.value FROM {corrected} o JOIN {KNOWN} k ON k.series = o.series "
            f"WHERE o.name = '{name}') c "
            f"WHERE t.host = c.host AND t.device = c.device AND t.time = c.time "
            f"AND {between(first, last, 't.time')}"
        )
