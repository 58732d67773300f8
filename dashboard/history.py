"""Queries of the pages to the history, with results as packed arrays for the charts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from ..client import Client
from ..client.result import QueryResult
from ..schemas.metrics import METRICS, Metric
from ..schemas.values.units import parse_seconds
from .cells import packed

RANGES: Final = (
    ("5m", "5 min"),
    ("1h", "1 h"),
    ("6h", "6 h"),
    ("24h", "24 h"),
    ("7d", "7 d"),
    ("30d", "30 d"),
    ("365d", "1 y"),
)
LONGEST_SECONDS: Final = 10 * 365 * 86400.0
SHORTEST_SECONDS: Final = 5.0
# Longest window in seconds, table and bucket in seconds: the finest table with a reasonable number of points.
_LEVELS: Final = ((15 * 60, "samples", 0), (4 * 3600, "rollup_10s", 10), (36 * 3600, "rollup_1m", 60))
_COARSEST: Final = ("rollup_1h", 3600)
_EVENTS: Final = 200
MAX_POINTS: Final = 50_000


class Window(Struct, frozen=True, kw_only=True):
    """Time window of a page.

    Attributes:
        seconds: length of the window.
        end: end of the window in epoch seconds; None if it follows the present.
    """

    seconds: float
    end: float | None = None

    @classmethod
    def of(cls, range: str, start: str, end: str, default: str) -> Window:
        """Parse parameters of a page's URL: a length, or start and end in epoch seconds. Invalid ones are ignored."""
        try:
            first, last = float(start), float(end)
            if 0 <= first < last < 1e11:
                seconds = min(max(last - first, SHORTEST_SECONDS), LONGEST_SECONDS)
                return cls(seconds=seconds, end=last)
        except ValueError:
            pass
        try:
            seconds = parse_seconds(range or default)
        except ValueError:
            seconds = parse_seconds(default)
        return cls(seconds=min(max(seconds, SHORTEST_SECONDS), LONGEST_SECONDS))

    @property
    def bounds(self) -> tuple[float, float]:
        """Start and end in epoch seconds."""
        end = time.time() if self.end is None else self.end
        return end - self.seconds, end

    @property
    def query(self) -> dict[str, str]:
        """Parameters for a page's URL."""
        if self.end is not None:
            start, end = self.bounds
            return {"from": f"{start:.0f}", "to": f"{end:.0f}"}
        return {"range": self.name}

    @property
    def name(self) -> str:
        """Name of the window in `RANGES`; empty if it is none of them."""
        if self.end is not None:
            return ""
        return next((name for name, _ in RANGES if parse_seconds(name) == self.seconds), "")

    def moved(self, by: float) -> Window:
        """Window that is moved by a share of its length; one that would end in the future follows the present."""
        _, end = self.bounds
        later = end + by * self.seconds
        return Window(seconds=self.seconds, end=None if later >= time.time() else later)

    def wider(self, factor: float) -> Window:
        """Window that is longer or shorter by a factor, with the same middle; or with the present as its end."""
        seconds = min(max(self.seconds * factor, SHORTEST_SECONDS), LONGEST_SECONDS)
        if self.end is None:
            return Window(seconds=seconds)
        end = self.end + (seconds - self.seconds) / 2
        return Window(seconds=seconds, end=None if end >= time.time() else end)


def source(seconds: float) -> tuple[str, int]:
    """Table for a window of a given length in seconds, and the table's bucket in seconds (0 for samples)."""
    return next(((table, bucket) for most, table, bucket in _LEVELS if seconds <= most), _COARSEST)


def gauges() -> dict[str, Metric]:
    """Metrics that a timeline can show."""
    return {name: metric for name, metric in METRICS.items() if "mean" in metric.row.rollup}


def text(value: str) -> str:
    """Format a text as an SQL literal."""
    return "'" + value.replace("'", "''").replace("\0", "") + "'"


def instant(seconds: float) -> str:
    """Format a time in epoch seconds as an SQL expression."""
    return f"to_timestamp({seconds:.3f})"


class Series(Struct, frozen=True, kw_only=True):
    """Time series of one metric for a chart: base64 of `<f8` epoch milliseconds and of `<f4` values.

    Attributes:
        metric: name of the metric.
        unit: unit of the metric in the catalog.
        help: description of the metric.
        times: times of the values in `mean`, `low` and `high`.
        mean: mean of each bucket, or the samples; NaN where the value is unknown.
        low: minimum of each bucket; empty for samples.
        high: maximum of each bucket; empty for samples.
    """

    metric: str
    unit: str
    help: str
    times: str
    mean: str
    low: str = ""
    high: str = ""


async def timelines(
    client: Client, device: str, metrics: Sequence[str], window: Window, max_points: int = MAX_POINTS
) -> list[Series]:
    """Query the time series of a device's metrics, in the resolution for the window.

    A period without samples becomes a gap: it has a NaN value, so that no line is drawn across it.

    Args:
        client: client of the bus.
        device: UUID of the device.
        metrics: names of the metrics; those that no timeline can show are left out.
        window: time window.
        max_points: number of points, of which the newest are kept.

    Raises:
        CorralError: the history doesn't answer, or not in time.
    """
    known = gauges()
    metrics = [name for name in metrics if name in known]
    start, end = window.bounds
    table, bucket = source(window.seconds)
    columns = ", ".join(name if not bucket else f"{name}_mean, {name}_min, {name}_max" for name in metrics)
    result = await client.query(
        f"SELECT epoch_ms(time) AS t, {columns} FROM {table} WHERE device = {text(device)} "
        f"AND time >= {instant(start - bucket)} AND time < {instant(end)} ORDER BY time DESC",
        limit=max_points,
        timeout=20,
    )
    columns_of = list(zip(*reversed(result.rows), strict=True)) or [() for _ in result.columns]
    times = [float(t) for t in columns_of[0]]
    gap = 1000.0 * (2.5 * bucket if bucket else 10.0)
    breaks = [at for at in range(1, len(times)) if times[at] - times[at - 1] > gap]
    found: list[Series] = []
    for number, name in enumerate(metrics):
        first = 1 + number * (3 if bucket else 1)
        parts = [_broken(columns_of[first + part], breaks) for part in range(3 if bucket else 1)]
        found.append(
            Series(
                metric=name,
                unit=known[name].row.unit.name,
                help=known[name].row.help,
                times=packed(_broken_times(times, breaks), "d"),
                mean=packed(parts[0], "f"),
                low=packed(parts[1], "f") if bucket else "",
                high=packed(parts[2], "f") if bucket else "",
            )
        )
    return found


def _broken(values: Sequence[Any], breaks: Sequence[int]) -> list[float]:
    """Values with a NaN inserted before each break."""
    made = [math.nan if value is None else float(value) for value in values]
    for at in reversed(breaks):
        made.insert(at, math.nan)
    return made


def _broken_times(times: Sequence[float], breaks: Sequence[int]) -> list[float]:
    made = list(times)
    for at in reversed(breaks):
        made.insert(at, (times[at - 1] + times[at]) / 2)
    return made


async def spans(client: Client, window: Window, where: str, limit: int = 2000) -> list[dict[str, Any]]:
    """Query the spans in which leases held devices in a window, newest first; `where` is SQL over `lease_spans`."""
    start, end = window.bounds
    result = await client.query(
        "SELECT s.lease_id, s.owner, s.name, s.state, l.request_id, host, device, share, "
        "epoch_ms(started) AS started, epoch_ms(ended) AS ended "
        "FROM lease_spans s LEFT JOIN leases l USING (lease_id) "
        f"WHERE started < {instant(end)} AND ended > {instant(start)} AND {where} ORDER BY started DESC",
        limit=limit,
        timeout=20,
    )
    return result.dicts()


async def events(client: Client, device: str, host: str, window: Window) -> list[dict[str, Any]]:
    """Query the events of a device and its host within a window, newest first; at most 200."""
    start, end = window.bounds
    result = await client.query(
        "SELECT epoch_ms(time) AS t, kind, severity, code, message, device IS NULL AS of_host FROM events "
        f"WHERE (device = {text(device)} OR (device IS NULL AND host = {text(host)})) "
        f"AND time >= {instant(start)} AND time < {instant(end)} ORDER BY time DESC",
        limit=_EVENTS,
        timeout=20,
    )
    return result.dicts()


async def identity(client: Client, device: str) -> dict[str, Any] | None:
    """Query the inventory row of a device, which may be gone from the fleet; None if it was never seen."""
    result: QueryResult = await client.query(
        f"SELECT * EXCLUDE (cpu_affinity) FROM devices WHERE device = {text(device)}", limit=1, timeout=20
    )
    found = result.dicts()
    return found[0] if found else None
