"""Rollups of 1 h of a partition's devices, made of the stored minutes and their counts in bins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

import numpy as np
import pyarrow as pa
from duckdb import DuckDBPyConnection
from msgspec import Struct

from ....schemas.metrics import METRICS, Metric
from .. import retention
from ..bucketing import data_of
from ..embedded.hours import merge_bins, values_of
from ..rollup_columns import HOUR, MINUTE, binned, columns, from_minutes
from ..statements import registered
from .unwritten import Numbers, minutes_of, series_of
from .writing import NUMBERS, Devices, between

AT_ONCE: Final = 10_000
"""Hours of devices that are computed at once: 600,000 minutes."""
_WIDTH: Final = 3_600_000_000
_TIME: Final = pa.timestamp("us", "UTC")


class Staged(Struct, frozen=True):
    """Hours in the temporary tables `touched`, `hour_rows`, `hour_bins` and `hour_quantiles`.

    Attributes:
        metrics: that have a value.
        within: SQL condition on the time of a row `t`.
    """

    metrics: list[Metric]
    within: str


def steps(keys: Numbers) -> Iterator[Numbers]:
    """Cut hours into steps, the oldest first."""
    keys = keys[np.argsort(minutes_of(keys), kind="stable")]
    for begin in range(0, len(keys), AT_ONCE):
        yield keys[begin : begin + AT_ONCE]


def stage(cursor: DuckDBPyConnection, devices: Devices, keys: Numbers, minutes_from: float | None) -> Staged:
    """Compute hours, and leave them in temporary tables.

    Args:
        cursor: to the lake.
        devices: of the partition.
        keys: of the hours.
        minutes_from: minutes before this time (in seconds since the epoch) may be deleted, so hours that are stored and
            begin before the end of its day are not computed again.
    """
    hours = minutes_of(keys)
    first, end = int(hours.min()) * _WIDTH, (int(hours.max()) + 1) * _WIDTH
    wanted = devices.table(series_of(keys)).append_column("time", pa.array(hours * _WIDTH).cast(_TIME))
    with registered(cursor, "wanted", wanted):
        cursor.execute(
            "CREATE OR REPLACE TEMP TABLE touched AS SELECT series, host::VARCHAR AS host, device::VARCHAR AS device, "
            "time FROM wanted"
        )
    if minutes_from is not None:
        limit = int(retention.end_of_day(datetime.fromtimestamp(minutes_from, UTC)).timestamp() * 1e6)
        cursor.execute(
            f"DELETE FROM temp.main.touched AS d USING lake.{HOUR.table} t WHERE t.host = d.host "
            f"AND t.device = d.device AND t.time = d.time AND t.time < make_timestamptz({limit}) "
            f"AND {between(first, end, 't.time')}"
        )

    def minutes(suffix: str = "") -> str:
        return (
            f"(SELECT m.*, d.series, d.time AS hour FROM (SELECT * FROM lake.{MINUTE.table}{suffix} "
            f"WHERE {between(first, end)}) m JOIN temp.main.touched d ON d.host = m.host AND d.device = m.device "
            f"AND d.time = make_timestamptz(epoch_us(m.time) // {_WIDTH} * {_WIDTH}))"
        )

    counts = cursor.execute(
        f"SELECT {', '.join(f'count({name}_last)' for name in METRICS)} FROM {minutes()}"
    ).fetchone()
    metrics = [metric for metric, count in zip(METRICS.values(), counts or (), strict=True) if count]
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE hour_rows AS SELECT hour, series, any_value(host) AS host, "
        f"any_value(device) AS device, {from_minutes(metrics)} FROM {minutes()} GROUP BY hour, series"
    )
    _merge_bins(cursor, devices, binned(metrics), minutes("_bins"))
    return Staged(metrics, between(first, end, "t.time"))


def _merge_bins(cursor: DuckDBPyConnection, devices: Devices, metrics: Sequence[Metric], minutes: str) -> None:
    """Create the table `hour_bins` of the counts, and `hour_quantiles` of the values of each p95's bin."""
    numbers = pa.table({"metric": pa.array(list(NUMBERS)), "number": pa.array(list(NUMBERS.values()), pa.int16())})
    with registered(cursor, "numbers", numbers):
        found = cursor.execute(
            f"SELECT series, epoch_us(hour) // {_WIDTH} AS bucket, number AS metric, bin, n "
            f"FROM {minutes} JOIN numbers USING (metric)"
        ).to_arrow_table()
    touched = cursor.execute(
        f"SELECT series, epoch_us(time) // {_WIDTH} AS bucket FROM temp.main.touched ORDER BY ALL"
    ).to_arrow_table()
    merged, quantiles = merge_bins(found.combine_chunks(), touched.combine_chunks(), metrics, NUMBERS)
    numbers_of = merged["metric"].combine_chunks().cast(pa.int32())
    bins = {
        "time": pa.array(data_of(merged["bucket"]) * _WIDTH).cast(_TIME),
        **devices.named(merged["series"].combine_chunks()),
        "metric": pa.DictionaryArray.from_arrays(numbers_of, pa.array(list(NUMBERS), pa.string())),
        "bin": merged["bin"],
        "n": merged["n"],
    }
    for name, table in (("hour_bins", pa.table(bins)), ("hour_quantiles", quantiles)):
        with registered(cursor, "merged", table):
            cursor.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS FROM merged")


def write(cursor: DuckDBPyConnection, staged: Staged) -> None:
    """Replace the hours that are staged, in a transaction."""
    for suffix in ("", "_bins"):
        cursor.execute(
            f"DELETE FROM lake.{HOUR.table}{suffix} AS t USING temp.main.touched d WHERE t.host = d.host "
            f"AND t.device = d.device AND t.time = d.time AND {staged.within}"
        )
    names = [name for name, _ in columns(staged.metrics, HOUR)]
    values = ", ".join(values_of(staged.metrics))
    cursor.execute(
        f"INSERT INTO lake.{HOUR.table} (time, host, device, {', '.join(names)}) "
        f"SELECT h.hour, h.host, h.device, {values} FROM temp.main.hour_rows h LEFT JOIN temp.main.hour_quantiles q "
        f"ON q.series = h.series AND q.bucket = epoch_us(h.hour) // {_WIDTH} ORDER BY h.series, h.hour"
    )
    cursor.execute(f"INSERT INTO lake.{HOUR.table}_bins BY NAME FROM temp.main.hour_bins")
