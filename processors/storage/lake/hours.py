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
from ..rollup_columns import BIN_RATIO, HOUR, MINUTE, ZERO_BIN, binned, columns, from_minutes, is_linear
from ..schema import sql_text
from ..statements import registered
from .unwritten import Numbers, minutes_of, series_of
from .writing import Devices, between

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
    cursor.execute(
        "CREATE OR REPLACE TEMP TABLE hour_bins AS SELECT hour, series, metric, bin, sum(n)::UINTEGER AS n "
        f"FROM {minutes('_bins')} GROUP BY ALL"
    )
    _find_quantiles(cursor, binned(metrics))
    return Staged(metrics, between(first, end, "t.time"))


def _find_quantiles(cursor: DuckDBPyConnection, metrics: Sequence[Metric]) -> None:
    """Create the table `hour_quantiles` of the value of the bin of each metric's p95, by the metric's name."""
    quantiles = "".join(f", max(value) FILTER (metric = {sql_text(m.name)}) AS {m.name}" for m in metrics)
    linear = ", ".join(sql_text(metric.name) for metric in metrics if is_linear(metric)) or "''"
    value = (
        f"CASE WHEN metric IN ({linear}) THEN min(bin) WHEN min(bin) = {ZERO_BIN} THEN 0 "
        f"ELSE pow({BIN_RATIO}, min(bin)) END AS value"
    )
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE hour_quantiles AS SELECT series, hour{quantiles} FROM ("
        f"SELECT series, hour, metric, {value} FROM ("
        "SELECT *, sum(n) OVER (PARTITION BY series, hour, metric ORDER BY bin) AS upto, "
        "sum(n) OVER (PARTITION BY series, hour, metric) AS total FROM temp.main.hour_bins) "
        "WHERE upto * 100 >= total * 95 GROUP BY series, hour, metric) GROUP BY series, hour"
    )


def write(cursor: DuckDBPyConnection, staged: Staged) -> None:
    """Replace the hours that are staged, in a transaction."""
    for suffix in ("", "_bins"):
        cursor.execute(
            f"DELETE FROM lake.{HOUR.table}{suffix} AS t USING temp.main.touched d WHERE t.host = d.host "
            f"AND t.device = d.device AND t.time = d.time AND {staged.within}"
        )
    names = [name for name, _ in columns(staged.metrics, HOUR)]
    p95 = {f"{metric.name}_p95": metric for metric in binned(staged.metrics)}

    def value(name: str) -> str:
        # The middle of a bin may lie outside of what was measured; the least and the greatest are exact.
        metric = p95.get(name)
        if metric is None:
            return f"h.{name}"
        middle, low, high = f"q.{metric.name}::{metric.row.unit.sql}", f"h.{metric.name}_min", f"h.{metric.name}_max"
        return f"CASE WHEN {middle} IS NOT NULL THEN least(greatest({middle}, {low}), {high}) END"

    cursor.execute(
        f"INSERT INTO lake.{HOUR.table} (time, host, device, {', '.join(names)}) "
        f"SELECT h.hour, h.host, h.device, {', '.join(value(name) for name in names)} FROM temp.main.hour_rows h "
        f"LEFT JOIN temp.main.hour_quantiles q ON q.series = h.series AND q.hour = h.hour ORDER BY h.series, h.hour"
    )
    cursor.execute(
        f"INSERT INTO lake.{HOUR.table}_bins (time, host, device, metric, bin, n) "
        "SELECT b.hour, d.host, d.device, b.metric, b.bin, b.n FROM temp.main.hour_bins b "
        "JOIN temp.main.touched d ON d.series = b.series AND d.time = b.hour ORDER BY b.series, b.metric, b.bin"
    )
