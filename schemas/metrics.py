"""The metric catalogue: one row a metric, and everything else derives from it.

Each field of `DeviceSample` below its identity is one row of the catalogue. The row says what the
metric is called, in which unit, how NVML gives it, how often to read it, when it is null, what a rollup keeps,
and its dcgm-exporter name. The wire format, the NVML reader's schedule, the DuckDB columns, the Prometheus
exporter and `docs/metrics.md` are all generated from `METRICS`: adding a metric is adding one row.

This module imports nothing but msgspec, so a processor needs no NVML and a collector no DuckDB.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, get_args, get_origin, get_type_hints

from msgspec import Struct


class Kind(StrEnum):
    """A gauge is a level at an instant; a counter only grows, until a driver reload sets it back to 0."""

    GAUGE = "gauge"
    COUNTER = "counter"


class Cadence(StrEnum):
    """How often a metric is read. Between two readings the last value is repeated in each sample."""

    TICK = "tick"
    """At each tick of the collector's interval."""
    SECOND = "second"
    """At most once a second: the driver refreshes it no faster, or the call is dear."""
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
    """An NVML function of the device handle.

    Attributes:
        function: its name in pynvml.
        attribute: the field of the returned struct, or of a tuple its index as text; None takes the value itself.
        args: further arguments; a text that starts with `NVML_` names a constant of pynvml.
        scale: the raw value is multiplied by it to reach the metric's unit.
    """

    function: str
    attribute: str | None = None
    args: tuple[str | int, ...] = ()
    scale: float = 1.0


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


class Gpm(Struct, frozen=True):
    """A metric of the GPU Performance Monitor: Hopper and later, computed between two GPM samples.

    Attributes:
        metric: the name of the `NVML_GPM_METRIC_…` constant.
        scale: as in `Call`.
    """

    metric: str
    scale: float = 1.0


Reading = Call | FieldValue | Gpm


class Unit(Struct, frozen=True):
    """A unit with its storage: how its values travel and which of them are possible.

    Attributes:
        name: the unit in words.
        suffix: what the name of each metric in this unit ends on.
        dtype: the little-endian numpy type of its column on the wire (`<f4`, `<i4`, `<i8`).
        sql: its DuckDB type.
        minimum: values below are impossible.
        maximum: values above are impossible; None where there is no limit.
    """

    name: str
    suffix: str
    dtype: str
    sql: str
    minimum: float | None = 0
    maximum: float | None = None


PERCENT: Final = Unit("percent", "_percent", "<f4", "FLOAT", 0, 100)
BYTES: Final = Unit("bytes", "_bytes", "<i8", "BIGINT")
BYTES_PER_SECOND: Final = Unit("bytes per second", "_bytes_per_second", "<f4", "FLOAT")
WATTS: Final = Unit("watts", "_watts", "<f4", "FLOAT")
MILLIJOULES: Final = Unit("millijoules", "_millijoules", "<i8", "BIGINT")
CELSIUS: Final = Unit("degrees Celsius", "_celsius", "<f4", "FLOAT", -60, 200)
MEGAHERTZ: Final = Unit("megahertz", "_megahertz", "<i4", "INTEGER")
NANOSECONDS: Final = Unit("nanoseconds", "_nanoseconds", "<i8", "BIGINT")
COUNT: Final = Unit("count", "_count", "<i8", "BIGINT")
BITMASK: Final = Unit("bitmask", "_bitmask", "<i8", "BIGINT", None)
LEVEL: Final = Unit("level", "", "<i4", "INTEGER")


GAUGE_ROLLUP: Final = ("min", "mean", "max", "p95", "last")
LEVEL_ROLLUP: Final = ("min", "max", "last")
COUNTER_ROLLUP: Final = ("last", "increase")
LAST_ROLLUP: Final = ("last",)
BITMASK_ROLLUP: Final = ("last", "any")


class Row(Struct, frozen=True, kw_only=True):
    """What a row of the catalogue says of its metric, beside the name and the Python type of the field.

    Attributes:
        unit: unit, wire type, SQL type and limits.
        help: one sentence: what the number means.
        nvml: how NVML gives it, tried in order until one is supported; empty where the collector computes it.
        kind: gauge or counter.
        cadence: how often it is read.
        null: when it is null, in words.
        rollup: the aggregates that a rollup keeps.
        dcgm: the field's name in dcgm-exporter, with the factor from our unit to theirs; None where it has none.
        maximum: overrides the unit's.
    """

    unit: Unit
    help: str
    nvml: tuple[Reading, ...] = ()
    kind: Kind = Kind.GAUGE
    cadence: Cadence = Cadence.TICK
    null: str = "the device does not support it"
    rollup: tuple[str, ...] = GAUGE_ROLLUP
    dcgm: tuple[str, float] | None = None
    maximum: float | None = None


_UTILIZATION = "nvmlDeviceGetUtilizationRates"
_MEMORY = "nvmlDeviceGetMemoryInfo"
_CLOCK = "nvmlDeviceGetClockInfo"
_MAX_CLOCK = "nvmlDeviceGetMaxClockInfo"
_ECC = "nvmlDeviceGetTotalEccErrors"
_REMAPPED = "nvmlDeviceGetRemappedRows"


class DeviceSample(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device at one instant: the row form of a sample, as `client.watch()` yields it.

    On the wire samples travel as columns (`SampleBatch`). None means that the device does not support the metric
    or that it was not read; it is never written as 0.
    """

    host: str
    device: str
    time_ns: int

    gpu_utilization_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the driver's last sample period in which at least one kernel ran.",
            nvml=(Call(_UTILIZATION, "gpu"),),
            null="MIG is on for the device, or the driver gives none",
            dcgm=("DCGM_FI_DEV_GPU_UTIL", 1),
        ),
    ] = None
    memory_utilization_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the driver's last sample period in which device memory was read or written.",
            nvml=(Call(_UTILIZATION, "memory"),),
            null="MIG is on for the device, or the driver gives none",
            dcgm=("DCGM_FI_DEV_MEM_COPY_UTIL", 1),
        ),
    ] = None
    encoder_utilization_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Video encoder busy.",
            nvml=(Call("nvmlDeviceGetEncoderUtilization", "0"),),
            cadence=Cadence.SECOND,
            dcgm=("DCGM_FI_DEV_ENC_UTIL", 1),
        ),
    ] = None
    decoder_utilization_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Video decoder busy.",
            nvml=(Call("nvmlDeviceGetDecoderUtilization", "0"),),
            cadence=Cadence.SECOND,
            dcgm=("DCGM_FI_DEV_DEC_UTIL", 1),
        ),
    ] = None

    memory_used_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Device memory in use by processes.",
            nvml=(Call(_MEMORY, "used", ("nvmlMemory_v2",)), Call(_MEMORY, "used")),
            dcgm=("DCGM_FI_DEV_FB_USED", 2**-20),
        ),
    ] = None
    memory_free_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Device memory that can still be allocated.",
            nvml=(Call(_MEMORY, "free", ("nvmlMemory_v2",)), Call(_MEMORY, "free")),
            dcgm=("DCGM_FI_DEV_FB_FREE", 2**-20),
        ),
    ] = None
    memory_total_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Device memory in all.",
            nvml=(Call(_MEMORY, "total", ("nvmlMemory_v2",)), Call(_MEMORY, "total")),
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_FB_TOTAL", 2**-20),
        ),
    ] = None
    memory_reserved_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Device memory kept by the driver and firmware; used + free + reserved = total.",
            nvml=(Call(_MEMORY, "reserved", ("nvmlMemory_v2",)),),
            null="the driver knows only the older form of the call (before R510)",
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_FB_RESERVED", 2**-20),
        ),
    ] = None

    power_watts: Annotated[
        float | None,
        Row(
            unit=WATTS,
            help="Power draw of the board, averaged over a second on Ampere and later.",
            nvml=(Call("nvmlDeviceGetPowerUsage", scale=1e-3),),
            dcgm=("DCGM_FI_DEV_POWER_USAGE", 1),
        ),
    ] = None
    power_limit_watts: Annotated[
        float | None,
        Row(
            unit=WATTS,
            help="Power limit that the driver enforces.",
            nvml=(Call("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),),
            cadence=Cadence.SLOW,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_POWER_MGMT_LIMIT", 1),
        ),
    ] = None
    energy_millijoules: Annotated[
        int | None,
        Row(
            unit=MILLIJOULES,
            help="Energy used since the driver was loaded.",
            nvml=(Call("nvmlDeviceGetTotalEnergyConsumption"),),
            kind=Kind.COUNTER,
            null="before Volta",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", 1),
        ),
    ] = None

    temperature_celsius: Annotated[
        float | None,
        Row(
            unit=CELSIUS,
            help="Temperature of the GPU core.",
            nvml=(Call("nvmlDeviceGetTemperature", args=("NVML_TEMPERATURE_GPU",)),),
            cadence=Cadence.SECOND,
            dcgm=("DCGM_FI_DEV_GPU_TEMP", 1),
        ),
    ] = None
    memory_temperature_celsius: Annotated[
        float | None,
        Row(
            unit=CELSIUS,
            help="Temperature of the device memory.",
            nvml=(FieldValue("NVML_FI_DEV_MEMORY_TEMP"),),
            cadence=Cadence.SECOND,
            null="the memory has no sensor (most GDDR boards)",
            dcgm=("DCGM_FI_DEV_MEMORY_TEMP", 1),
        ),
    ] = None

    sm_clock_megahertz: Annotated[
        int | None,
        Row(
            unit=MEGAHERTZ,
            help="Clock of the streaming multiprocessors.",
            nvml=(Call(_CLOCK, args=("NVML_CLOCK_SM",)),),
            dcgm=("DCGM_FI_DEV_SM_CLOCK", 1),
        ),
    ] = None
    memory_clock_megahertz: Annotated[
        int | None,
        Row(
            unit=MEGAHERTZ,
            help="Clock of the device memory.",
            nvml=(Call(_CLOCK, args=("NVML_CLOCK_MEM",)),),
            dcgm=("DCGM_FI_DEV_MEM_CLOCK", 1),
        ),
    ] = None
    video_clock_megahertz: Annotated[
        int | None,
        Row(
            unit=MEGAHERTZ,
            help="Clock of the video encoder and decoder.",
            nvml=(Call(_CLOCK, args=("NVML_CLOCK_VIDEO",)),),
            cadence=Cadence.SECOND,
            dcgm=("DCGM_FI_DEV_VIDEO_CLOCK", 1),
        ),
    ] = None
    sm_clock_max_megahertz: Annotated[
        int | None,
        Row(
            unit=MEGAHERTZ,
            help="Highest clock of the streaming multiprocessors.",
            nvml=(Call(_MAX_CLOCK, args=("NVML_CLOCK_SM",)),),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_MAX_SM_CLOCK", 1),
        ),
    ] = None
    memory_clock_max_megahertz: Annotated[
        int | None,
        Row(
            unit=MEGAHERTZ,
            help="Highest clock of the device memory.",
            nvml=(Call(_MAX_CLOCK, args=("NVML_CLOCK_MEM",)),),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_MAX_MEM_CLOCK", 1),
        ),
    ] = None
    video_clock_max_megahertz: Annotated[
        int | None,
        Row(
            unit=MEGAHERTZ,
            help="Highest clock of the video encoder and decoder.",
            nvml=(Call(_MAX_CLOCK, args=("NVML_CLOCK_VIDEO",)),),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_MAX_VIDEO_CLOCK", 1),
        ),
    ] = None
    throttle_reasons_bitmask: Annotated[
        int | None,
        Row(
            unit=BITMASK,
            help="Why the clocks are below their maximum (NVML clock event reasons).",
            nvml=(
                Call("nvmlDeviceGetCurrentClocksEventReasons"),
                Call("nvmlDeviceGetCurrentClocksThrottleReasons"),
            ),
            rollup=BITMASK_ROLLUP,
            dcgm=("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", 1),
        ),
    ] = None

    pcie_rx_bytes_per_second: Annotated[
        float | None,
        Row(
            unit=BYTES_PER_SECOND,
            help="Received over PCIe, over a window of 20 ms.",
            nvml=(Call("nvmlDeviceGetPcieThroughput", args=("NVML_PCIE_UTIL_RX_BYTES",), scale=1000),),
            cadence=Cadence.SLOW,
        ),
    ] = None
    pcie_tx_bytes_per_second: Annotated[
        float | None,
        Row(
            unit=BYTES_PER_SECOND,
            help="Sent over PCIe, over a window of 20 ms.",
            nvml=(Call("nvmlDeviceGetPcieThroughput", args=("NVML_PCIE_UTIL_TX_BYTES",), scale=1000),),
            cadence=Cadence.SLOW,
        ),
    ] = None
    pcie_generation: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="Generation of the PCIe link as it runs now.",
            nvml=(Call("nvmlDeviceGetCurrPcieLinkGeneration"),),
            cadence=Cadence.SLOW,
            rollup=LEVEL_ROLLUP,
            dcgm=("DCGM_FI_DEV_PCIE_LINK_GEN", 1),
        ),
    ] = None
    pcie_width: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="Lanes of the PCIe link as it runs now.",
            nvml=(Call("nvmlDeviceGetCurrPcieLinkWidth"),),
            cadence=Cadence.SLOW,
            rollup=LEVEL_ROLLUP,
            dcgm=("DCGM_FI_DEV_PCIE_LINK_WIDTH", 1),
        ),
    ] = None
    pcie_replay_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="PCIe packets sent again since the driver was loaded.",
            nvml=(Call("nvmlDeviceGetPcieReplayCounter"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", 1),
        ),
    ] = None
    nvlink_rx_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Data received over all NVLinks since the driver was loaded.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", scale=1024),),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            null="no active NVLink",
            rollup=COUNTER_ROLLUP,
        ),
    ] = None
    nvlink_tx_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Data sent over all NVLinks since the driver was loaded.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", scale=1024),),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            null="no active NVLink",
            rollup=COUNTER_ROLLUP,
        ),
    ] = None

    ecc_corrected_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Memory errors that ECC mended, over the life of the board.",
            nvml=(Call(_ECC, args=("NVML_MEMORY_ERROR_TYPE_CORRECTED", "NVML_AGGREGATE_ECC")),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="the board has no ECC, or it is off",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_ECC_SBE_AGG_TOTAL", 1),
        ),
    ] = None
    ecc_uncorrected_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Memory errors that ECC could not mend, over the life of the board.",
            nvml=(Call(_ECC, args=("NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_AGGREGATE_ECC")),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="the board has no ECC, or it is off",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_ECC_DBE_AGG_TOTAL", 1),
        ),
    ] = None
    remapped_rows_corrected_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Memory rows remapped after corrected errors.",
            nvml=(Call(_REMAPPED, "0"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="before Ampere",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", 1),
        ),
    ] = None
    remapped_rows_uncorrected_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Memory rows remapped after uncorrectable errors.",
            nvml=(Call(_REMAPPED, "1"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="before Ampere",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", 1),
        ),
    ] = None
    retired_pages_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Memory pages retired after double bit errors.",
            nvml=(FieldValue("NVML_FI_DEV_RETIRED_DBE"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="Ampere and later, which remap rows in place of it",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_RETIRED_DBE", 1),
        ),
    ] = None
    fan_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Fan speed as a share of its maximum.",
            nvml=(Call("nvmlDeviceGetFanSpeed"),),
            cadence=Cadence.SECOND,
            null="passively cooled boards",
            maximum=200,
            dcgm=("DCGM_FI_DEV_FAN_SPEED", 1),
        ),
    ] = None
    performance_state: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="Performance state: 0 is the fastest, 15 the slowest.",
            nvml=(Call("nvmlDeviceGetPerformanceState"),),
            cadence=Cadence.SECOND,
            rollup=LEVEL_ROLLUP,
            maximum=15,
            dcgm=("DCGM_FI_DEV_PSTATE", 1),
        ),
    ] = None


class Metric(Struct, frozen=True):
    """A row of the catalogue with its name."""

    name: str
    integer: bool
    row: Row

    @property
    def minimum(self) -> float | None:
        """The least possible value, in the metric's unit; None where there is no limit."""
        return self.row.unit.minimum

    @property
    def maximum(self) -> float | None:
        """The greatest possible value, in the metric's unit; None where there is no limit."""
        return self.row.unit.maximum if self.row.maximum is None else self.row.maximum


def _catalogue() -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for name, hint in get_type_hints(DeviceSample, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        python_type, row = get_args(hint)
        if not isinstance(row, Row):
            raise TypeError(f"DeviceSample.{name}: annotate it with a Row")
        found[name] = Metric(name, int in get_args(python_type), row)
    return found


METRICS: Final[dict[str, Metric]] = _catalogue()
"""The catalogue by metric name, in the order of `DeviceSample`."""
