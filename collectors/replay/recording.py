"""A recording of samples in memory: read from Parquet or CSV, checked, and sorted by time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from msgspec import Struct

from ...schemas.metrics import METRICS
from ...schemas.subjects import host_token

# pyarrow makes its functions as it is imported and has no types for them.
pc: Final[Any] = pyarrow.compute
Table = Any

TIME_COLUMNS: Final[dict[str, int]] = {
    "time_ns": 1,
    "timestamp_ns": 1,
    "epoch_ns": 1,
    "time_us": 1_000,
    "epoch_us": 1_000,
    "time_ms": 1_000_000,
    "timestamp_ms": 1_000_000,
    "epoch_ms": 1_000_000,
    "time_s": 1_000_000_000,
    "epoch_s": 1_000_000_000,
    "timestamp_s": 1_000_000_000,
    "epoch": 1_000_000_000,
    "time": 1_000_000_000,
    "timestamp": 1_000_000_000,
    "ts": 1_000_000_000,
}
"""Columns that may hold the time → nanoseconds in their unit, for those that hold numbers."""
DEVICE_COLUMNS: Final = ("device", "device_uuid", "uuid", "gpu_uuid", "gpu", "gpu_id", "index")
HOST_COLUMNS: Final = ("host", "hostname", "node")
MODEL_COLUMNS: Final = ("model", "device_name", "gpu_name", "name")
ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "gpu_utilization_percent": ("gpu_util_percent", "utilization_gpu", "gpu_util", "utilization.gpu [%]"),
    "memory_utilization_percent": ("memory_util_percent", "utilization_memory", "utilization.memory [%]"),
    "memory_used_bytes": ("mem_used_bytes",),
    "memory_total_bytes": ("mem_total_bytes",),
    "power_watts": ("power_draw_watts", "power.draw [W]"),
    "temperature_celsius": ("temperature_c", "temperature.gpu", "gpu_temp"),
}


class Column(Struct, frozen=True):
    """A metric's values in its wire type, with a mask of missing ones."""

    values: npt.NDArray[Any]
    nulls: npt.NDArray[np.bool_]


class Recording(Struct, frozen=True, kw_only=True):
    """R samples of D devices, sorted by time.

    Attributes:
        path: file that it was read from.
        times_ns: R times, nanoseconds since the epoch.
        device: R indices into `devices`.
        devices: D names, sorted.
        columns: metric name → R values.
        hosts: host of each device; None where the file does not say.
        models: model of each device; None where the file does not say.
        memory_bytes: total memory of each device; 0 where the file does not say.
        peak_used_bytes: greatest used memory of each device.
        left_out: number of rows without a time or a device.
        unsorted: True if the file was not in the order of time.
    """

    path: Path
    times_ns: npt.NDArray[np.int64]
    device: npt.NDArray[np.int64]
    devices: list[str]
    columns: dict[str, Column]
    hosts: list[str] | None
    models: list[str] | None
    memory_bytes: list[int]
    peak_used_bytes: list[int]
    left_out: int
    unsorted: bool

    @property
    def span_ns(self) -> int:
        """Length of one round in nanoseconds: from the first sample to the last, plus the median step."""
        moments = np.unique(self.times_ns)
        step = int(np.median(np.diff(moments))) if len(moments) > 1 else 1_000_000_000
        return int(moments[-1] - moments[0]) + step


def load(path: Path, columns: dict[str, str]) -> Recording:
    """Read a recording.

    Args:
        path: a `.parquet` or `.csv` file (`.csv.gz` too).
        columns: metric name, `time`, `device`, `host` or `model` → column of the file, where they do not match by name.

    Raises:
        ValueError: what is wrong with the file, and what to do.
    """
    table = _table(path)
    try:
        return _load(path, table, columns)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"{path}: a column can't be read: {error}") from error


def _load(path: Path, table: Table, columns: dict[str, str]) -> Recording:
    names = table.column_names
    mapping = _match(path, names, columns)
    time_name, device_name = mapping["time"], mapping["device"]
    times, time_valid = _times(path, table, time_name)
    device_column = table[device_name].combine_chunks()
    texts = pc.cast(device_column, pa.string())
    device_valid = ~_mask(texts) & (np.asarray(pc.fill_null(pc.utf8_length(texts), 0)) > 0)
    found = {name: _column(path, table, name, mapping[name]) for name in METRICS if name in mapping}
    good = time_valid & device_valid
    left_out = int((~good).sum())
    if not good.any():
        raise ValueError(f"{path}: no row has both a time ({time_name}) and a device ({device_name})")
    unsorted = bool((np.diff(times[good]) < 0).any())
    rows = np.flatnonzero(good)
    rows = rows[np.argsort(times[rows], kind="stable")]
    encoded = pc.dictionary_encode(texts.take(pa.array(rows)))
    labels: list[str] = encoded.dictionary.to_pylist()
    order = sorted(range(len(labels)), key=labels.__getitem__)
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels))
    device = place[np.asarray(encoded.indices)]
    devices = [labels[at] for at in order]
    return Recording(
        path=path,
        times_ns=times[rows],
        device=device,
        devices=devices,
        columns={name: Column(column.values[rows], column.nulls[rows]) for name, column in found.items()},
        hosts=_per_device(table, mapping.get("host"), rows, device, len(devices), host_token),
        models=_per_device(table, mapping.get("model"), rows, device, len(devices), str),
        memory_bytes=_largest(found.get("memory_total_bytes"), rows, device, len(devices)),
        peak_used_bytes=_largest(found.get("memory_used_bytes"), rows, device, len(devices)),
        left_out=left_out,
        unsorted=unsorted,
    )


def _table(path: Path) -> Table:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    kind = path.name.lower()
    try:
        if kind.endswith((".parquet", ".pq")):
            table = pyarrow.parquet.read_table(path)
        elif kind.endswith((".csv", ".csv.gz")):
            options = pyarrow.csv.ConvertOptions(null_values=["", "NULL", "null", "NA", "N/A", "[N/A]", "nan", "NaN"])
            table = pyarrow.csv.read_csv(path, convert_options=options)
        else:
            raise ValueError(f"{path}: a replay reads .parquet and .csv files")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from error
    if table.num_rows == 0:
        raise ValueError(f"{path}: there are no rows in it")
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: more than one column is called {', '.join(twice)}: rename all but one")
    return table


def _match(path: Path, names: list[str], given: dict[str, str]) -> dict[str, str]:
    """Map each metric, and `time`, `device`, `host` and `model`, to its column in the file.

    Raises:
        ValueError: a given name is unknown, or a column is missing.
    """
    roles = {"time", "device", "host", "model", *METRICS}
    for key, column in given.items():
        if key not in roles:
            near = difflib.get_close_matches(key, roles, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key!r} is no metric, and not time, device, host or model{hint}")
        if column not in names:
            raise ValueError(f"{path}: there is no column {column!r} for {key}; it has {', '.join(names)}")
    mapping = dict(given)
    for role, candidates in (
        ("time", TIME_COLUMNS),
        ("device", DEVICE_COLUMNS),
        ("host", HOST_COLUMNS),
        ("model", MODEL_COLUMNS),
    ):
        name = _first(candidates, names)
        if role not in mapping and name is not None:
            mapping[role] = name
    for role, example in (("time", "epoch_s"), ("device", "uuid")):
        if role not in mapping:
            candidates = TIME_COLUMNS if role == "time" else DEVICE_COLUMNS
            raise ValueError(
                f"{path}: no column for the {role}. It has {', '.join(names)}; "
                f"name one {' or '.join(list(candidates)[:3])}, or say which it is: --column {role}={example}"
            )
    for name in METRICS:
        column = _first((name, *ALIASES.get(name, ())), names)
        if name not in mapping and column is not None:
            mapping[name] = column
    if not any(name in METRICS for name in mapping):
        raise ValueError(
            f"{path}: no column is a metric. It has {', '.join(names)}; "
            "say which is which: --column memory_used_bytes=COLUMN"
        )
    return mapping


def _first(candidates: Iterable[str], names: list[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def _times(path: Path, table: Table, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    column = table[name].combine_chunks()
    missing = _mask(column)
    if pa.types.is_timestamp(column.type):
        values = np.asarray(pc.fill_null(pc.cast(pc.cast(column, pa.timestamp("ns", column.type.tz)), pa.int64()), 0))
        return values.astype(np.int64), ~missing
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ValueError(f"{path}: {name} holds {column.type}, and no times: numbers or timestamps are needed")
    scale = TIME_COLUMNS.get(name) or _unit_of(column)
    if pa.types.is_integer(column.type):
        return np.asarray(pc.fill_null(column, 0)).astype(np.int64) * scale, ~missing
    values = np.asarray(pc.fill_null(pc.cast(column, pa.float64()), 0.0))
    finite = np.isfinite(values)
    return np.round(np.where(finite, values, 0.0) * scale).astype(np.int64), ~missing & finite


def _unit_of(column: Any) -> int:
    """Nanoseconds in the unit of a time column of unknown name, by its size: the present is 1.8e9 s, 1.8e12 ms, …"""
    largest = float(pc.max(column).as_py() or 0)
    for limit, scale in ((1e11, 1_000_000_000), (1e14, 1_000_000), (1e17, 1_000)):
        if largest < limit:
            return scale
    return 1


def _column(path: Path, table: Table, name: str, column_name: str) -> Column:
    metric = METRICS[name]
    column = table[column_name].combine_chunks()
    if pa.types.is_null(column.type):
        size = len(column)
        return Column(np.zeros(size, dtype=metric.row.unit.dtype), np.ones(size, dtype=np.bool_))
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)):
        raise ValueError(f"{path}: {column_name} holds {column.type}, but {name} needs numbers")
    nulls = _mask(column)
    if metric.integer and pa.types.is_integer(column.type):
        values = np.asarray(pc.fill_null(column, 0)).astype(np.int64)
    else:
        values = np.asarray(pc.fill_null(pc.cast(column, pa.float64()), 0.0), dtype=np.float64)
        nulls |= ~np.isfinite(values)
        values = np.where(nulls, 0.0, values)
        if metric.integer:
            values = np.round(values)
    # An impossible value is a gap in the recording, not a sample.
    if metric.minimum is not None:
        nulls |= values < metric.minimum
    if metric.maximum is not None:
        nulls |= values > metric.maximum
    return Column(np.where(nulls, 0, values).astype(metric.row.unit.dtype), nulls)


def _mask(column: Any) -> npt.NDArray[np.bool_]:
    """Mask that is True where a value is missing."""
    return np.asarray(pc.is_null(column)).astype(np.bool_)


def _per_device(
    table: Table,
    name: str | None,
    rows: npt.NDArray[np.int64],
    device: npt.NDArray[np.int64],
    count: int,
    clean: Any,
) -> list[str] | None:
    """Text of each device in a column: the first in order of time; None without the column."""
    if name is None:
        return None
    texts: list[str | None] = pc.cast(table[name].combine_chunks(), pa.string()).take(pa.array(rows)).to_pylist()
    _, first = np.unique(device, return_index=True)
    found = [texts[at] for at in first.tolist()]
    return [clean(text or "unknown") for text in found] if len(found) == count else None


def _largest(
    column: Column | None, rows: npt.NDArray[np.int64], device: npt.NDArray[np.int64], count: int
) -> list[int]:
    largest = np.zeros(count, dtype=np.int64)
    if column is not None:
        np.maximum.at(largest, device, column.values[rows].astype(np.int64))
    return largest.tolist()
