"""What pages ask of the history: SQL, and the answers as arrays that charts draw."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from ..client import Client
from ..client.result import QueryResult
from ..schemas.metrics import METRICS, Metric
from ..schemas.units import parse_seconds
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
# Each is as fine as some two thousand points across allow.
_LEVELS: Final = ((15 * 60, "samples", 0), (4 * 3600, "rollup_10s", 10), (36 * 3600, "rollup_1m", 60))
_COARSEST: Final = ("rollup_1h", 3600)
_EVENTS: Final = 200


class Window(Struct, frozen=True, kw_only=True):
    """The time that a page shows.

    Attributes:
        seconds: its length.
        end: seconds since the epoch; None while it follows the present.
    """

    seconds: float
    end: float | None = None

    @classmethod
    def of(cls, range: str, start: str, end: str, default: str) -> Window:
        """From a page's address: a length, or a start and an end in seconds since the epoch. Nonsense is left out."""
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
        """Start and end, seconds since the epoch."""
        end = time.time() if self.end is None else self.end
        return end - self.seconds, end

    @property
    def query(self) -> dict[str, str]:
        """As it stands in a page's address."""
        if self.end is not None:
            start, end = self.bounds
            return {"from": f"{start:.0f}", "to": f"{end:.0f}"}
        return {"range": self.name}

    @property
    def name(self) -> str:
        """The choice among `RANGES` that it is; empty for another."""
        if self.end is not None:
            return ""
        return next((name for name, _ in RANGES if parse_seconds(name) == self.seconds), "")

    def moved(self, by: float) -> Window:
        """Earlier or later by a share of its length; what would end in the future follows the present."""
        _, end = self.bounds
        later = end + by * self.seconds
        return Window(seconds=self.seconds, end=None if later >= time.time() else later)

    def wider(self, factor: float) -> Window:
        """Longer or shorter about its middle; about the present while it follows that."""
        seconds = min(max(self.seconds * factor, SHORTEST_SECONDS), LONGEST_SECONDS)
        if self.end is None:
            return Window(seconds=seconds)
        end = self.end + (seconds - self.seconds) / 2
        return Window(seconds=seconds, end=None if end >= time.time() else end)


def source(seconds: float) -> tuple[str, int]:
    """The table that is fine enough for a length of time, and its bucket in seconds (0 for samples)."""
    return next(((table, bucket) for most, table, bucket in _LEVELS if seconds <= most), _COARSEST)


def gauges() -> dict[str, Metric]:
    """The metrics that a timeline can show."""
    return {name: metric for name, metric in METRICS.items() if "mean" in metric.row.rollup}


def text(value: str) -> str:
    """A text as SQL writes it."""
    return "'" + value.replace("'", "''").replace("\0", "") + "'"


def instant(seconds: float) -> str:
    """A time as SQL writes it."""
    return f"to_timestamp({seconds:.3f})"


class Series(Struct, frozen=True, kw_only=True):
    """One metric over time, as a chart takes it: base64 of `<f8` milliseconds since the epoch and of `<f4` values.

    Attributes:
        metric: its name.
        unit: of the catalogue.
        help: what it is.
        times: shared by the three.
        mean: not a number where nothing is known.
        low: the least of each bucket; empty for samples.
        high: the greatest.
    """

    metric: str
    unit: str
    help: str
    times: str
    mean: str
    low: str = ""
    high: str = ""


async def timelines(client: Client, device: str, metrics: Sequence[str], window: Window) -> list[Series]:
    """Metrics of a device, as fine as the window allows. A stretch without samples is a gap, never a line across it.

    Raises:
        CorralError: the history does not answer, or not in time.
    """
    known = gauges()
    metrics = [name for name in metrics if name in known]
    start, end = window.bounds
    table, bucket = source(window.seconds)
    columns = ", ".join(name if not bucket else f"{name}_mean, {name}_min, {name}_max" for name in metrics)
    result = await client.query(
        f"SELECT epoch_ms(time) AS t, {columns} FROM {table} WHERE device = {text(device)} "
        f"AND time >= {instant(start - bucket)} AND time < {instant(end)} ORDER BY time",
        limit=50_000,
        timeout=20,
    )
    columns_of = list(zip(*result.rows, strict=True)) or [() for _ in result.columns]
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
    """The values with one that is not a number before each break."""
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
    """Which lease held which device when, within a window; `where` is SQL over `lease_spans`."""
    start, end = window.bounds
    result = await client.query(
        "SELECT lease_id, owner, name, state, host, device, share, epoch_ms(started) AS started, "
        f"epoch_ms(ended) AS ended FROM lease_spans WHERE started < {instant(end)} AND ended > {instant(start)} "
        f"AND {where} ORDER BY started DESC",
        limit=limit,
        timeout=20,
    )
    return result.dicts()


async def events(client: Client, device: str, host: str, window: Window) -> list[dict[str, Any]]:
    """What happened to a device or its host, newest first."""
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
    """What is known of a device that ever was."""
    result: QueryResult = await client.query(
        f"SELECT * EXCLUDE (cpu_affinity) FROM devices WHERE device = {text(device)}", limit=1, timeout=20
    )
    found = result.dicts()
    return found[0] if found else None
