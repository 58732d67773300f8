"""Parts of a row of the metric catalog: units, kinds, cadences, and the calls of a vendor's library that read it."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct


class Kind(StrEnum):
    """Kind of a metric: a gauge is a level at an instant; a counter only grows, until a driver reload resets it."""

    GAUGE = "gauge"
    COUNTER = "counter"


class Cadence(StrEnum):
    """Cadence at which a metric is read. Between two readings each sample repeats the last value."""

    TICK = "tick"
    """At each tick of the collector's interval."""
    SECOND = "second"
    """At most once a second: the driver refreshes it no faster, or the call is expensive."""
    SLOW = "slow"
    """Every 10 s: values that move by the hour, such as ECC counts or power limits."""
    STATIC = "static"
    """Once, and again when the inventory is read anew (every 60 s)."""


CADENCE_SECONDS: Final[dict[Cadence, float]] = {
    Cadence.TICK: 0.0,
    Cadence.SECOND: 1.0,
    Cadence.SLOW: 10.0,
    Cadence.STATIC: 60.0,
}


class Call(Struct, frozen=True):
    """A function of the vendor's library (pynvml, amdsmi) on the device handle.

    Attributes:
        function: its name in the library's Python module.
        attribute: path to the value in what it returns: the field of a struct, the key of a dict, the index in a tuple
            or list, or `len` for its length; steps are joined by dots. None takes the returned value itself.
        args: further arguments; a text names a constant of that module (with dots for its enumerations).
        scale: factor from the raw value to the metric's unit.
        blocking: True if it takes tens of milliseconds: it is made in a separate thread, never in a tick.
    """

    function: str
    attribute: str | None = None
    args: tuple[str | int, ...] = ()
    scale: float = 1.0
    blocking: bool = False


class FieldValue(Struct, frozen=True):
    """A value of `nvmlDeviceGetFieldValues`, read in one batch with all the others of its cadence.

    Attributes:
        field: the name of the `NVML_FI_DEV_…` constant.
        scope: the scope id that goes with it (a link, say); 0 where NVML knows none.
        scale: as in `Call`.
    """

    field: str
    scope: int = 0
    scale: float = 1.0


class Rate(Struct, frozen=True):
    """The growth of a 64 bit counter of `nvmlDeviceGetFieldValues`, per second, between two readings.

    Drivers that give the counter in 32 bits count as not supporting it: at the speed of a bus it wraps too often.

    Attributes:
        field: as in `FieldValue`.
        scope: as in `FieldValue`.
        scale: as in `Call`.
    """

    field: str
    scope: int = 0
    scale: float = 1.0


class Gpm(Struct, frozen=True):
    """A metric of the GPU Performance Monitor: Hopper and later, computed between two GPM samples.

    Whatever the cadence of its row, it is read at most every 100 ms; between two readings the last value is repeated.

    Attributes:
        metric: the name of the `NVML_GPM_METRIC_…` constant.
        scale: as in `Call`.
    """

    metric: str
    scale: float = 1.0


Reading = Call | FieldValue | Rate | Gpm

ALL_LINKS: Final = 0xFFFFFFFF
"""The scope of a field value that means all NVLinks together."""


class Unit(Struct, frozen=True):
    """A unit with its storage: how its values travel and which of them are possible.

    Attributes:
        name: the unit in words.
        suffix: ending of the name of each metric in this unit.
        dtype: the little-endian numpy type of its column on the wire (`<f4`, `<i4`, `<i8`).
        sql: its DuckDB type.
        minimum: values below are impossible.
        maximum: values above are impossible; None where there is no limit.
        per_second: a counter can't grow faster; None where nothing limits it.
        source: where the limits come from, in words.
    """

    name: str
    suffix: str
    dtype: str
    sql: str
    minimum: float | None = 0
    maximum: float | None = None
    per_second: float | None = None
    source: str = ""


# Where a vendor documents a limit, or what its driver says for "no value", the source names it: nvml.h is that of CUDA
# 13, amdsmi.h that of ROCm 7. Elsewhere it says what the limit is a multiple of.
PERCENT: Final = Unit(
    "percent", "_percent", "<f4", "FLOAT", 0, 100, source="a share of a whole: percent in nvml.h and amdsmi.h"
)
BYTES: Final = Unit(
    "bytes",
    "_bytes",
    "<i8",
    "BIGINT",
    0,
    2**44,
    source="none documented: 16 TiB are sixteen times the most that is announced for a board (1 TB, Rubin Ultra)",
)
BYTES_PER_SECOND: Final = Unit(
    "bytes per second",
    "_bytes_per_second",
    "<f4",
    "FLOAT",
    0,
    20e12,
    source="none documented: ten times what NVLink 6 carries each way (1.8 TB/s)",
)
WATTS: Final = Unit(
    "watts",
    "_watts",
    "<f4",
    "FLOAT",
    0,
    5000,
    source="none documented: over twice the greatest rating announced for a GPU (2.3 kW, Rubin), and more than a GB200 "
    "superchip (2.7 kW); all bits set are 4.29 MW",
)
MILLIJOULES: Final = Unit(
    "millijoules",
    "_millijoules",
    "<i8",
    "BIGINT",
    0,
    2**53,
    per_second=5e6,
    source="57 years at 5 kW; nvml.h counts from the load of the driver",
)
CELSIUS: Final = Unit(
    "degrees Celsius",
    "_celsius",
    "<f4",
    "FLOAT",
    -60,
    200,
    source="none documented: devices shut down near 100 °C and are not made for the cold; 255 is said without a sensor "
    "(TimSirmovics/FanControl.NvThermalSensors issue 6), 2,112 while firmware writes (ROCm/rocm-systems pull 6931)",
)
MEGAHERTZ: Final = Unit(
    "megahertz",
    "_megahertz",
    "<i4",
    "INTEGER",
    0,
    50_000,
    source="none documented: over three times what nvidia-smi says of the fastest memory (14,001, GDDR7)",
)
NANOSECONDS: Final = Unit(
    "nanoseconds",
    "_nanoseconds",
    "<i8",
    "BIGINT",
    0,
    2**61,
    per_second=2e9,
    source="73 years; nvml.h has nanoseconds in 64 bits (nvmlViolationTime_t)",
)
COUNT: Final = Unit(
    "count",
    "_count",
    "<i8",
    "BIGINT",
    0,
    2**53,
    per_second=1e7,
    source="28 years at ten million a second; all 64 bits set, and DCGM_INT64_BLANK, are no count",
)
BITMASK: Final = Unit("bitmask", "_bitmask", "<i8", "BIGINT", None, source="any bit may be set")
LEVEL: Final = Unit("level", "", "<i4", "INTEGER", 0, 255, source="no level of nvml.h has as many")

GAUGE_ROLLUP: Final = ("min", "mean", "max", "p95", "last")
LEVEL_ROLLUP: Final = ("min", "max", "last")
COUNTER_ROLLUP: Final = ("last", "increase")
LAST_ROLLUP: Final = ("last",)
BITMASK_ROLLUP: Final = ("last", "any")
UNSUPPORTED: Final = "the device does not support it"


class Row(Struct, frozen=True, kw_only=True):
    """A row of the catalog: all about a metric but its name and Python type, which the field of `DeviceSample` gives.

    Attributes:
        unit: unit, wire type, SQL type and limits.
        help: one sentence: the meaning of the number.
        nvml: ways to read it by NVML, tried in order until one is supported; empty where NVML has none, or where the
            collector computes it.
        amd: ways to read it by amdsmi, likewise.
        kind: gauge or counter.
        cadence: how often it is read.
        null: when it is null, in words.
        rollup: the aggregates that a rollup keeps.
        dcgm: the field's name in dcgm-exporter, with the factor from our unit to theirs; None where it has none.
        maximum: maximum that overrides that of the unit.
        limit: source of `maximum`, in words; empty where the unit's applies.
    """

    unit: Unit
    help: str
    nvml: tuple[Reading, ...] = ()
    amd: tuple[Call, ...] = ()
    kind: Kind = Kind.GAUGE
    cadence: Cadence = Cadence.TICK
    null: str = UNSUPPORTED
    rollup: tuple[str, ...] = GAUGE_ROLLUP
    dcgm: tuple[str, float] | None = None
    maximum: float | None = None
    limit: str = ""
