"""Pack and unpack sample batches, with the standard library alone.

A collector packs what it read, the planner looks at the last tick, a client unpacks rows. A processor joins the raw
columns of many batches instead (see `SampleBatch`) and uses only `check` of this module.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec.structs import replace

from .codec import DecodeError
from .metrics import METRICS, DeviceSample, Metric
from .telemetry import SampleBatch

_FORMATS: Final = {"<f4": "f", "<i4": "i", "<i8": "q"}
_SIZES: Final = {"<f4": 4, "<i4": 4, "<i8": 8}
_SWAP: Final = sys.byteorder == "big"
TIME_SIZE: Final = 8


def pack(metric: Metric, values: Sequence[float | int | None]) -> tuple[bytes, bytes | None] | None:
    """Pack values, ticks × devices, into one column.

    Returns:
        The column and its nulls (None if there are none); None where every value is null: leave the column out then.
    """
    nulls: bytes | None = None
    if None in values:
        nulls = bytes(value is None for value in values)
        if all(nulls):
            return None
        values = [0 if value is None else value for value in values]
    dtype = metric.row.unit.dtype
    # A float that an integer column was given (a scaled reading) is rounded, never cut.
    numbers = values if dtype == "<f4" else [round(value) for value in values if value is not None]
    return _bytes(_array(_FORMATS[dtype], numbers)), nulls


def pack_times(times_ns: Sequence[int]) -> bytes:
    """Pack the times of a batch, ticks × devices, nanoseconds since the epoch."""
    return _bytes(_array("q", times_ns))


def times(batch: SampleBatch) -> Sequence[int]:
    """The times of a batch, ticks × devices, nanoseconds since the epoch."""
    return _view(batch.times_ns, "q")


def column(batch: SampleBatch, name: str) -> Sequence[float | int | None] | None:
    """The values of a metric, ticks × devices, None where null; None where the batch has no such column."""
    raw = batch.columns.get(name)
    metric = METRICS.get(name)
    if raw is None or metric is None:
        return None
    values = _view(raw, _FORMATS[metric.row.unit.dtype])
    nulls = batch.nulls.get(name)
    if nulls is None:
        return values
    return [None if null else value for value, null in zip(values, nulls, strict=True)]


def rows(batch: SampleBatch) -> Iterator[DeviceSample]:
    """Every sample of a batch as a row, tick by tick. Metrics that this version does not know are left out."""
    names = [name for name in batch.columns if name in METRICS]
    columns = [column(batch, name) or () for name in names]
    count = len(batch.devices)
    for at, time_ns in enumerate(times(batch)):
        values: dict[str, Any] = {name: values[at] for name, values in zip(names, columns, strict=True)}
        yield DeviceSample(host=batch.host, device=batch.devices[at % count], time_ns=time_ns, **values)


def check(batch: SampleBatch) -> None:
    """Refuse a batch whose arrays do not fit its devices and times.

    Raises:
        DecodeError: with the path of the field at fault. Columns of metrics that this version does not know are not
            checked: a newer collector may send them.
    """
    count = len(batch.devices)
    if count == 0:
        raise DecodeError("Expected at least one device", "invalid", "$.devices")
    if len(set(batch.devices)) != count:
        raise DecodeError("A device is named twice", "invalid", "$.devices")
    if not batch.times_ns or len(batch.times_ns) % (TIME_SIZE * count):
        raise DecodeError(
            f"Expected a multiple of {TIME_SIZE * count} bytes ({count} devices), got {len(batch.times_ns)}",
            "invalid",
            "$.times_ns",
        )
    size = len(batch.times_ns) // TIME_SIZE
    for name, raw in batch.columns.items():
        metric = METRICS.get(name)
        if metric is None:
            continue
        expected = size * _SIZES[metric.row.unit.dtype]
        if len(raw) != expected:
            raise DecodeError(f"Expected {expected} bytes, got {len(raw)}", "invalid", f"$.columns.{name}")
    for name, raw in batch.nulls.items():
        if len(raw) != size:
            raise DecodeError(f"Expected {size} bytes, got {len(raw)}", "invalid", f"$.nulls.{name}")


def possible(batch: SampleBatch) -> SampleBatch:
    """Replace values that their metrics can't have by nulls, in a batch that passed `check`.

    Collectors leave such values out; earlier versions and other publishers may not.
    """
    nulls: dict[str, bytes] = {}
    for name, raw in batch.columns.items():
        metric = METRICS.get(name)
        if metric is None or not raw:
            continue
        least, most = metric.minimum, metric.maximum
        values = _view(raw, _FORMATS[metric.row.unit.dtype])
        if (least is None or min(values) >= least) and (most is None or max(values) <= most):
            continue
        old = batch.nulls.get(name) or bytes(len(values))
        nulls[name] = bytes(null or not metric.possible(value) for value, null in zip(values, old, strict=True))
    return replace(batch, nulls=batch.nulls | nulls) if nulls else batch


def _array(format: Any, numbers: Any) -> array[Any]:
    return array(format, numbers)  # pyright: ignore[reportDeprecated]  # the overload for "u", which is not used


def _bytes(numbers: array[Any]) -> bytes:
    if _SWAP:
        numbers.byteswap()
    return numbers.tobytes()


def _view(raw: bytes, format: Any) -> Any:
    if _SWAP:
        numbers = _array(format, raw)
        numbers.byteswap()
        return numbers
    return memoryview(raw).cast(format)
