"""The metric catalog: one row per metric, and everything else derives from it.

Each field of `DeviceSample` below its identity is one row of the catalog. The row says what the
metric is called, in which unit, how NVML gives it, how often to read it, when it is null, what a rollup keeps,
and its dcgm-exporter name. The wire format, the readers' schedules, the DuckDB columns, the Prometheus
exporter and `docs/metrics.md` are all generated from `METRICS`: adding a metric is adding one row.

This module imports nothing but msgspec, so a processor needs no NVML and a collector no DuckDB.
"""

from __future__ import annotations

from typing import Annotated, Final, get_args, get_origin, get_type_hints

from msgspec import Struct

from .rows import (
    ALL_LINKS,
    BITMASK,
    BITMASK_ROLLUP,
    BYTES,
    BYTES_PER_SECOND,
    CADENCE_SECONDS,
    CELSIUS,
    COUNT,
    COUNT_32_LIMIT,
    COUNT_32_MAXIMUM,
    COUNTER_ROLLUP,
    FLAG_LIMIT,
    GAUGE_ROLLUP,
    GPM_LIMIT,
    LAST_ROLLUP,
    LEVEL,
    LEVEL_ROLLUP,
    LINK_BYTES_LIMIT,
    MEGAHERTZ,
    MILLIJOULES,
    NANOSECONDS,
    PERCENT,
    WATTS,
    Cadence,
    Call,
    FieldValue,
    Gpm,
    Kind,
    Rate,
    Reading,
    Row,
    Unit,
)

__all__ = [
    "ALL_LINKS",
    "BITMASK",
    "BITMASK_ROLLUP",
    "BYTES",
    "BYTES_PER_SECOND",
    "CADENCE_SECONDS",
    "CELSIUS",
    "COUNT",
    "COUNTER_ROLLUP",
    "GAUGE_ROLLUP",
    "LAST_ROLLUP",
    "LEVEL",
    "LEVEL_ROLLUP",
    "MEGAHERTZ",
    "METRICS",
    "MILLIJOULES",
    "NANOSECONDS",
    "PERCENT",
    "WATTS",
    "Cadence",
    "Call",
    "DeviceSample",
    "FieldValue",
    "Gpm",
    "Kind",
    "Metric",
    "Rate",
    "Reading",
    "Row",
    "Unit",
]

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
            amd=(Call("amdsmi_get_gpu_activity", "gfx_activity"),),
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
            amd=(Call("amdsmi_get_gpu_activity", "umc_activity"),),
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
            amd=(Call("amdsmi_get_gpu_activity", "mm_activity"),),
        ),
    ] = None
    jpeg_utilization_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="JPEG engine busy.",
            nvml=(Call("nvmlDeviceGetJpgUtilization", "0"),),
            cadence=Cadence.SECOND,
        ),
    ] = None
    optical_flow_utilization_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Optical flow accelerator (OFA) busy.",
            nvml=(Call("nvmlDeviceGetOfaUtilization", "0"),),
            cadence=Cadence.SECOND,
        ),
    ] = None
    graphics_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which any graphics or compute work was on the device.",
            nvml=(Gpm("NVML_GPM_METRIC_GRAPHICS_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_GR_ENGINE_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    sm_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which a streaming multiprocessor had a warp resident, over all of them.",
            nvml=(Gpm("NVML_GPM_METRIC_SM_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_SM_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    sm_occupancy_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Warps resident on the streaming multiprocessors, as a share of the most that fit.",
            nvml=(Gpm("NVML_GPM_METRIC_SM_OCCUPANCY"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_SM_OCCUPANCY", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    integer_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which the integer pipes were busy.",
            nvml=(Gpm("NVML_GPM_METRIC_INTEGER_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_PIPE_INT_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    tensor_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which the tensor cores were busy.",
            nvml=(Gpm("NVML_GPM_METRIC_ANY_TENSOR_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    tensor_fp16_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which the tensor cores worked on 16 bit floating point or less (HMMA).",
            nvml=(Gpm("NVML_GPM_METRIC_HMMA_TENSOR_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_PIPE_TENSOR_HMMA_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    tensor_fp64_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which the tensor cores worked on 64 bit floating point (DFMA).",
            nvml=(Gpm("NVML_GPM_METRIC_DFMA_TENSOR_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_PIPE_TENSOR_DFMA_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    tensor_integer_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which the tensor cores worked on integers (IMMA).",
            nvml=(Gpm("NVML_GPM_METRIC_IMMA_TENSOR_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_PIPE_TENSOR_IMMA_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    fp64_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which the 64 bit floating point pipes were busy, tensor cores aside.",
            nvml=(Gpm("NVML_GPM_METRIC_FP64_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_PIPE_FP64_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    fp32_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which the 32 bit floating point pipes were busy, tensor cores aside.",
            nvml=(Gpm("NVML_GPM_METRIC_FP32_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_PIPE_FP32_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    fp16_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Share of the time in which the 16 bit floating point pipes were busy, tensor cores aside.",
            nvml=(Gpm("NVML_GPM_METRIC_FP16_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_PIPE_FP16_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None
    dram_active_percent: Annotated[
        float | None,
        Row(
            unit=PERCENT,
            help="Device memory bandwidth in use, as a share of its peak.",
            nvml=(Gpm("NVML_GPM_METRIC_DRAM_BW_UTIL"),),
            null="before Hopper, or the driver lets only root read it",
            dcgm=("DCGM_FI_PROF_DRAM_ACTIVE", 0.01),
            maximum=800,
            limit=GPM_LIMIT,
        ),
    ] = None

    memory_used_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Device memory in use by processes.",
            nvml=(Call(_MEMORY, "used", ("nvmlMemory_v2",)), Call(_MEMORY, "used")),
            dcgm=("DCGM_FI_DEV_FB_USED", 2**-20),
            amd=(Call("amdsmi_get_gpu_memory_usage", args=("AmdSmiMemoryType.VRAM",)),),
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
            amd=(Call("amdsmi_get_gpu_memory_total", args=("AmdSmiMemoryType.VRAM",)),),
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
    bar1_used_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="BAR1 window (device memory that the host can address) in use.",
            nvml=(Call("nvmlDeviceGetBAR1MemoryInfo", "bar1Used"),),
            cadence=Cadence.SLOW,
            dcgm=("DCGM_FI_DEV_BAR1_USED", 2**-20),
            amd=(Call("amdsmi_get_gpu_memory_usage", args=("AmdSmiMemoryType.VIS_VRAM",)),),
        ),
    ] = None
    bar1_total_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="BAR1 window in all.",
            nvml=(Call("nvmlDeviceGetBAR1MemoryInfo", "bar1Total"),),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_BAR1_TOTAL", 2**-20),
            amd=(Call("amdsmi_get_gpu_memory_total", args=("AmdSmiMemoryType.VIS_VRAM",)),),
        ),
    ] = None

    power_watts: Annotated[
        float | None,
        Row(
            unit=WATTS,
            help="Power draw of the board, averaged over a second on Ampere and later.",
            nvml=(Call("nvmlDeviceGetPowerUsage", scale=1e-3),),
            dcgm=("DCGM_FI_DEV_POWER_USAGE", 1),
            amd=(
                Call("amdsmi_get_power_info", "average_socket_power"),
                Call("amdsmi_get_power_info", "current_socket_power"),
            ),
        ),
    ] = None
    power_instant_watts: Annotated[
        float | None,
        Row(
            unit=WATTS,
            help="Power draw of the board at this instant, not averaged.",
            nvml=(FieldValue("NVML_FI_DEV_POWER_INSTANT", scale=1e-3),),
            null="the driver gives none (before R530)",
            dcgm=("DCGM_FI_DEV_POWER_USAGE_INSTANT", 1),
            amd=(Call("amdsmi_get_power_info", "current_socket_power"),),
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
            amd=(Call("amdsmi_get_power_cap_info", "power_cap", scale=1e-6),),
        ),
    ] = None
    power_limit_default_watts: Annotated[
        float | None,
        Row(
            unit=WATTS,
            help="Power limit of the board as it is shipped.",
            nvml=(
                Call("nvmlDeviceGetPowerManagementDefaultLimit", scale=1e-3),
                FieldValue("NVML_FI_DEV_POWER_DEFAULT_LIMIT", scale=1e-3),
            ),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_POWER_MGMT_LIMIT_DEF", 1),
            amd=(Call("amdsmi_get_power_cap_info", "default_power_cap", scale=1e-6),),
        ),
    ] = None
    power_limit_min_watts: Annotated[
        float | None,
        Row(
            unit=WATTS,
            help="Lowest power limit that may be set.",
            nvml=(
                Call("nvmlDeviceGetPowerManagementLimitConstraints", "0", scale=1e-3),
                FieldValue("NVML_FI_DEV_POWER_MIN_LIMIT", scale=1e-3),
            ),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_POWER_MGMT_LIMIT_MIN", 1),
            amd=(Call("amdsmi_get_power_cap_info", "min_power_cap", scale=1e-6),),
        ),
    ] = None
    power_limit_max_watts: Annotated[
        float | None,
        Row(
            unit=WATTS,
            help="Highest power limit that may be set.",
            nvml=(
                Call("nvmlDeviceGetPowerManagementLimitConstraints", "1", scale=1e-3),
                FieldValue("NVML_FI_DEV_POWER_MAX_LIMIT", scale=1e-3),
            ),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_POWER_MGMT_LIMIT_MAX", 1),
            amd=(Call("amdsmi_get_power_cap_info", "max_power_cap", scale=1e-6),),
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
            amd=(
                Call(
                    "amdsmi_get_temp_metric",
                    args=(
                        "AmdSmiTemperatureType.EDGE",
                        "AmdSmiTemperatureMetric.CURRENT",
                    ),
                ),
                Call(
                    "amdsmi_get_temp_metric",
                    args=(
                        "AmdSmiTemperatureType.HOTSPOT",
                        "AmdSmiTemperatureMetric.CURRENT",
                    ),
                ),
            ),
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
            amd=(
                Call(
                    "amdsmi_get_temp_metric",
                    args=(
                        "AmdSmiTemperatureType.VRAM",
                        "AmdSmiTemperatureMetric.CURRENT",
                    ),
                ),
            ),
        ),
    ] = None
    temperature_slowdown_celsius: Annotated[
        float | None,
        Row(
            unit=CELSIUS,
            help="Core temperature at which the hardware slows its clocks.",
            nvml=(Call("nvmlDeviceGetTemperatureThreshold", args=("NVML_TEMPERATURE_THRESHOLD_SLOWDOWN",)),),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_SLOWDOWN_TEMP", 1),
            amd=(
                Call(
                    "amdsmi_get_temp_metric",
                    args=(
                        "AmdSmiTemperatureType.EDGE",
                        "AmdSmiTemperatureMetric.CRITICAL",
                    ),
                ),
                Call(
                    "amdsmi_get_temp_metric",
                    args=(
                        "AmdSmiTemperatureType.HOTSPOT",
                        "AmdSmiTemperatureMetric.CRITICAL",
                    ),
                ),
            ),
        ),
    ] = None
    temperature_shutdown_celsius: Annotated[
        float | None,
        Row(
            unit=CELSIUS,
            help="Core temperature at which the device shuts itself down.",
            nvml=(Call("nvmlDeviceGetTemperatureThreshold", args=("NVML_TEMPERATURE_THRESHOLD_SHUTDOWN",)),),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_SHUTDOWN_TEMP", 1),
            amd=(
                Call(
                    "amdsmi_get_temp_metric",
                    args=(
                        "AmdSmiTemperatureType.EDGE",
                        "AmdSmiTemperatureMetric.EMERGENCY",
                    ),
                ),
                Call(
                    "amdsmi_get_temp_metric",
                    args=(
                        "AmdSmiTemperatureType.HOTSPOT",
                        "AmdSmiTemperatureMetric.EMERGENCY",
                    ),
                ),
            ),
        ),
    ] = None

    sm_clock_megahertz: Annotated[
        int | None,
        Row(
            unit=MEGAHERTZ,
            help="Clock of the streaming multiprocessors.",
            nvml=(Call(_CLOCK, args=("NVML_CLOCK_SM",)),),
            dcgm=("DCGM_FI_DEV_SM_CLOCK", 1),
            amd=(Call("amdsmi_get_clock_info", "clk", ("AmdSmiClkType.GFX",)),),
        ),
    ] = None
    memory_clock_megahertz: Annotated[
        int | None,
        Row(
            unit=MEGAHERTZ,
            help="Clock of the device memory.",
            nvml=(Call(_CLOCK, args=("NVML_CLOCK_MEM",)),),
            dcgm=("DCGM_FI_DEV_MEM_CLOCK", 1),
            amd=(Call("amdsmi_get_clock_info", "clk", ("AmdSmiClkType.MEM",)),),
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
            amd=(Call("amdsmi_get_clock_info", "clk", ("AmdSmiClkType.VCLK0",)),),
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
            amd=(Call("amdsmi_get_clock_info", "max_clk", ("AmdSmiClkType.GFX",)),),
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
            amd=(Call("amdsmi_get_clock_info", "max_clk", ("AmdSmiClkType.MEM",)),),
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
            amd=(Call("amdsmi_get_clock_info", "max_clk", ("AmdSmiClkType.VCLK0",)),),
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
    power_violation_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time with clocks held down by the power limit.",
            nvml=(
                FieldValue("NVML_FI_DEV_PERF_POLICY_POWER"),
                Call("nvmlDeviceGetViolationStatus", "violationTime", ("NVML_PERF_POLICY_POWER",)),
            ),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_POWER_VIOLATION", 1),
        ),
    ] = None
    thermal_violation_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time with clocks held down by temperature.",
            nvml=(
                FieldValue("NVML_FI_DEV_PERF_POLICY_THERMAL"),
                Call("nvmlDeviceGetViolationStatus", "violationTime", ("NVML_PERF_POLICY_THERMAL",)),
            ),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_THERMAL_VIOLATION", 1),
        ),
    ] = None
    sync_boost_violation_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time with clocks held down to match those of other devices (sync boost).",
            nvml=(
                FieldValue("NVML_FI_DEV_PERF_POLICY_SYNC_BOOST"),
                Call("nvmlDeviceGetViolationStatus", "violationTime", ("NVML_PERF_POLICY_SYNC_BOOST",)),
            ),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_SYNC_BOOST_VIOLATION", 1),
        ),
    ] = None
    board_limit_violation_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time with clocks held down by a limit of the board.",
            nvml=(
                FieldValue("NVML_FI_DEV_PERF_POLICY_BOARD_LIMIT"),
                Call("nvmlDeviceGetViolationStatus", "violationTime", ("NVML_PERF_POLICY_BOARD_LIMIT",)),
            ),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_BOARD_LIMIT_VIOLATION", 1),
        ),
    ] = None
    low_utilization_violation_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time with clocks held down since there was little to do.",
            nvml=(
                FieldValue("NVML_FI_DEV_PERF_POLICY_LOW_UTILIZATION"),
                Call("nvmlDeviceGetViolationStatus", "violationTime", ("NVML_PERF_POLICY_LOW_UTILIZATION",)),
            ),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_LOW_UTIL_VIOLATION", 1),
        ),
    ] = None
    reliability_violation_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time with clocks held down for reliability (voltage).",
            nvml=(
                FieldValue("NVML_FI_DEV_PERF_POLICY_RELIABILITY"),
                Call("nvmlDeviceGetViolationStatus", "violationTime", ("NVML_PERF_POLICY_RELIABILITY",)),
            ),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_RELIABILITY_VIOLATION", 1),
        ),
    ] = None
    app_clocks_violation_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time below the application clocks, for whatever reason.",
            nvml=(
                FieldValue("NVML_FI_DEV_PERF_POLICY_TOTAL_APP_CLOCKS"),
                Call("nvmlDeviceGetViolationStatus", "violationTime", ("NVML_PERF_POLICY_TOTAL_APP_CLOCKS",)),
            ),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_TOTAL_APP_CLOCKS_VIOLATION", 1),
        ),
    ] = None
    base_clocks_violation_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time below the base clocks, for whatever reason.",
            nvml=(
                FieldValue("NVML_FI_DEV_PERF_POLICY_TOTAL_BASE_CLOCKS"),
                Call("nvmlDeviceGetViolationStatus", "violationTime", ("NVML_PERF_POLICY_TOTAL_BASE_CLOCKS",)),
            ),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_TOTAL_BASE_CLOCKS_VIOLATION", 1),
        ),
    ] = None
    software_thermal_slowdown_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time slowed by the driver since core or memory was too hot.",
            nvml=(FieldValue("NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            null="the driver gives none (before R570)",
            rollup=COUNTER_ROLLUP,
        ),
    ] = None
    hardware_thermal_slowdown_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time slowed by the hardware since the core was too hot.",
            nvml=(FieldValue("NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            null="the driver gives none (before R570)",
            rollup=COUNTER_ROLLUP,
        ),
    ] = None
    power_brake_slowdown_nanoseconds: Annotated[
        int | None,
        Row(
            unit=NANOSECONDS,
            help="Time slowed by the power brake, a signal of the server's power supply.",
            nvml=(FieldValue("NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            null="the driver gives none (before R570)",
            rollup=COUNTER_ROLLUP,
        ),
    ] = None

    pcie_rx_bytes_per_second: Annotated[
        float | None,
        Row(
            unit=BYTES_PER_SECOND,
            help="Received over PCIe since the last reading; over 20 ms where GPM and counters are missing.",
            nvml=(
                Gpm("NVML_GPM_METRIC_PCIE_RX_PER_SEC", scale=2**20),
                Rate("NVML_FI_DEV_PCIE_COUNT_RX_BYTES"),
                Call("nvmlDeviceGetPcieThroughput", args=("NVML_PCIE_UTIL_RX_BYTES",), scale=1000, blocking=True),
            ),
            cadence=Cadence.SECOND,
            dcgm=("DCGM_FI_DEV_PCIE_RX_THROUGHPUT", 1e-3),
            maximum=1e12,
            limit="none documented: four times what PCIe 7 carries each way over 16 lanes (256 GB/s)",
        ),
    ] = None
    pcie_tx_bytes_per_second: Annotated[
        float | None,
        Row(
            unit=BYTES_PER_SECOND,
            help="Sent over PCIe since the last reading; over 20 ms where GPM and counters are missing.",
            nvml=(
                Gpm("NVML_GPM_METRIC_PCIE_TX_PER_SEC", scale=2**20),
                Rate("NVML_FI_DEV_PCIE_COUNT_TX_BYTES"),
                Call("nvmlDeviceGetPcieThroughput", args=("NVML_PCIE_UTIL_TX_BYTES",), scale=1000, blocking=True),
            ),
            cadence=Cadence.SECOND,
            dcgm=("DCGM_FI_DEV_PCIE_TX_THROUGHPUT", 1e-3),
            maximum=1e12,
            limit="none documented: four times what PCIe 7 carries each way over 16 lanes (256 GB/s)",
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
            maximum=15,
            limit="nvml.h knows 6 (NVML_PCIE_LINK_MAX_SPEED_64000MBPS), PCI-SIG has published 7",
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
            amd=(Call("amdsmi_get_pcie_info", "pcie_metric.pcie_width"),),
            maximum=32,
            limit="the widest that the PCI Express specification had (PCIE_LNK_X32 in Linux)",
        ),
    ] = None
    pcie_generation_max: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="Highest generation that device and slot can do.",
            nvml=(Call("nvmlDeviceGetMaxPcieLinkGeneration"),),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_PCIE_MAX_LINK_GEN", 1),
            amd=(Call("amdsmi_get_pcie_info", "pcie_static.pcie_interface_version"),),
            maximum=15,
            limit="nvml.h knows 6 (NVML_PCIE_LINK_MAX_SPEED_64000MBPS), PCI-SIG has published 7",
        ),
    ] = None
    pcie_width_max: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="Most lanes that device and slot can do.",
            nvml=(Call("nvmlDeviceGetMaxPcieLinkWidth"),),
            cadence=Cadence.STATIC,
            rollup=LAST_ROLLUP,
            dcgm=("DCGM_FI_DEV_PCIE_MAX_LINK_WIDTH", 1),
            amd=(Call("amdsmi_get_pcie_info", "pcie_static.max_pcie_width"),),
            maximum=32,
            limit="the widest that the PCI Express specification had (PCIE_LNK_X32 in Linux)",
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
            maximum=COUNT_32_MAXIMUM,
            limit=COUNT_32_LIMIT,
            dcgm=("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", 1),
            amd=(Call("amdsmi_get_pcie_info", "pcie_metric.pcie_replay_count"),),
        ),
    ] = None
    pcie_correctable_errors_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="PCIe errors that the link mended.",
            nvml=(FieldValue("NVML_FI_DEV_PCIE_COUNT_CORRECTABLE_ERRORS"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="the driver gives none (before R525)",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_PCIE_COUNT_CORRECTABLE_ERRORS", 1),
        ),
    ] = None
    pcie_nonfatal_errors_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="PCIe errors that cost a transaction, not the link.",
            nvml=(FieldValue("NVML_FI_DEV_PCIE_COUNT_NON_FATAL_ERROR"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="the driver gives none (before R525)",
            rollup=COUNTER_ROLLUP,
        ),
    ] = None
    pcie_fatal_errors_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="PCIe errors that cost the link.",
            nvml=(FieldValue("NVML_FI_DEV_PCIE_COUNT_FATAL_ERROR"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="the driver gives none (before R525)",
            rollup=COUNTER_ROLLUP,
        ),
    ] = None
    nvlink_rx_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Data received over all NVLinks since the driver was loaded.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", ALL_LINKS, 1024),),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            null="no active NVLink",
            rollup=COUNTER_ROLLUP,
            maximum=2**63 - 1,
            limit=LINK_BYTES_LIMIT,
        ),
    ] = None
    nvlink_tx_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Data sent over all NVLinks since the driver was loaded.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", ALL_LINKS, 1024),),
            kind=Kind.COUNTER,
            cadence=Cadence.SECOND,
            null="no active NVLink",
            rollup=COUNTER_ROLLUP,
            maximum=2**63 - 1,
            limit=LINK_BYTES_LIMIT,
        ),
    ] = None
    nvlink_rx_bytes_per_second: Annotated[
        float | None,
        Row(
            unit=BYTES_PER_SECOND,
            help="Received over all NVLinks, protocol included.",
            nvml=(Gpm("NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC", scale=2**20),),
            null="no active NVLink, or before Hopper",
        ),
    ] = None
    nvlink_tx_bytes_per_second: Annotated[
        float | None,
        Row(
            unit=BYTES_PER_SECOND,
            help="Sent over all NVLinks, protocol included.",
            nvml=(Gpm("NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC", scale=2**20),),
            null="no active NVLink, or before Hopper",
        ),
    ] = None
    nvlink_active_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="NVLinks that are up; which ones, with throughput and errors each, is in the event `nvlink`.",
            cadence=Cadence.SLOW,
            null="the device has no NVLink",
            rollup=LEVEL_ROLLUP,
            maximum=256,
            limit="seven times NVML_NVLINK_MAX_LINKS of nvml.h (36)",
        ),
    ] = None
    nvlink_crc_flit_errors_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Flow control packets with a wrong checksum, over all NVLinks.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="no active NVLink",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL", 1),
        ),
    ] = None
    nvlink_crc_data_errors_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Data packets with a wrong checksum, over all NVLinks.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="no active NVLink",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL", 1),
        ),
    ] = None
    nvlink_replay_errors_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Packets sent again, over all NVLinks.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="no active NVLink",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL", 1),
        ),
    ] = None
    nvlink_recovery_errors_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Links trained anew after an error, over all NVLinks.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="no active NVLink",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL", 1),
        ),
    ] = None
    nvlink_ecc_errors_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Data errors that ECC of the links found, over all NVLinks.",
            nvml=(FieldValue("NVML_FI_DEV_NVLINK_ECC_DATA_ERROR_COUNT_TOTAL"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="no active NVLink, or its generation has no ECC",
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
    ecc_corrected_volatile_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Memory errors that ECC mended since the driver was loaded.",
            nvml=(Call(_ECC, args=("NVML_MEMORY_ERROR_TYPE_CORRECTED", "NVML_VOLATILE_ECC")),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="the board has no ECC, or it is off",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", 1),
            amd=(Call("amdsmi_get_gpu_total_ecc_count", "correctable_count"),),
        ),
    ] = None
    ecc_uncorrected_volatile_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Memory errors that ECC could not mend since the driver was loaded.",
            nvml=(Call(_ECC, args=("NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC")),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="the board has no ECC, or it is off",
            rollup=COUNTER_ROLLUP,
            dcgm=("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", 1),
            amd=(Call("amdsmi_get_gpu_total_ecc_count", "uncorrectable_count"),),
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
            maximum=COUNT_32_MAXIMUM,
            limit=COUNT_32_LIMIT,
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
            maximum=COUNT_32_MAXIMUM,
            limit=COUNT_32_LIMIT,
            dcgm=("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", 1),
        ),
    ] = None
    remapped_rows_pending: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="1 while rows wait for a reset to be remapped, else 0.",
            nvml=(Call(_REMAPPED, "2"),),
            cadence=Cadence.SLOW,
            null="before Ampere",
            rollup=LEVEL_ROLLUP,
            maximum=1,
            limit=FLAG_LIMIT,
            dcgm=("DCGM_FI_DEV_ROW_REMAP_PENDING", 1),
        ),
    ] = None
    remapped_rows_failure: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="1 after a row could not be remapped, else 0: the board is due for replacement.",
            nvml=(Call(_REMAPPED, "3"),),
            cadence=Cadence.SLOW,
            null="before Ampere",
            rollup=LEVEL_ROLLUP,
            maximum=1,
            limit=FLAG_LIMIT,
            dcgm=("DCGM_FI_DEV_ROW_REMAP_FAILURE", 1),
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
            maximum=COUNT_32_MAXIMUM,
            limit=COUNT_32_LIMIT,
            dcgm=("DCGM_FI_DEV_RETIRED_DBE", 1),
            amd=(Call("amdsmi_get_gpu_bad_page_info", "len"),),
        ),
    ] = None
    retired_pages_corrected_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="Memory pages retired after repeated single bit errors.",
            nvml=(FieldValue("NVML_FI_DEV_RETIRED_SBE"),),
            kind=Kind.COUNTER,
            cadence=Cadence.SLOW,
            null="Ampere and later, which remap rows in place of it",
            rollup=COUNTER_ROLLUP,
            maximum=COUNT_32_MAXIMUM,
            limit=COUNT_32_LIMIT,
            dcgm=("DCGM_FI_DEV_RETIRED_SBE", 1),
        ),
    ] = None
    retired_pages_pending: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="1 while pages wait for a reset to be retired, else 0.",
            nvml=(FieldValue("NVML_FI_DEV_RETIRED_PENDING"),),
            cadence=Cadence.SLOW,
            null="Ampere and later, which remap rows in place of it",
            rollup=LEVEL_ROLLUP,
            maximum=1,
            limit=FLAG_LIMIT,
            dcgm=("DCGM_FI_DEV_RETIRED_PENDING", 1),
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
            limit="percent of the noise tolerance, which nvml.h lets be exceeded without a limit: twice that",
            dcgm=("DCGM_FI_DEV_FAN_SPEED", 1),
            amd=(Call("amdsmi_get_gpu_fan_speed", args=(0,), scale=100 / 255),),
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
            limit="NVML_PSTATE_0 to NVML_PSTATE_15 in nvml.h, where 32 is unknown",
            dcgm=("DCGM_FI_DEV_PSTATE", 1),
        ),
    ] = None
    recovery_action: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="What the driver asks for: 0 nothing, 1 reset, 2 reboot, 3 end of peer traffic, 4 the same and reset, "
            "5 recovery of the IMEX domain, 6 reset of the bus, 7 reboot of the system.",
            nvml=(FieldValue("NVML_FI_DEV_GET_GPU_RECOVERY_ACTION"),),
            cadence=Cadence.SLOW,
            null="the driver gives none (before R570)",
            rollup=LEVEL_ROLLUP,
            maximum=255,
            limit="none documented: nvml.h has 0 to 7 so far (nvmlDeviceGpuRecoveryAction_t)",
        ),
    ] = None
    vgpu_count: Annotated[
        int | None,
        Row(
            unit=COUNT,
            help="vGPUs of virtual machines that run on the device.",
            nvml=(Call("nvmlDeviceGetActiveVgpus", "len"),),
            cadence=Cadence.SLOW,
            null="the driver is not a vGPU host driver",
            rollup=LEVEL_ROLLUP,
            maximum=1024,
            limit="none documented (nvml.h lets one ask by type): 1 GiB each of the largest board announced",
        ),
    ] = None
    vgpu_licensed: Annotated[
        int | None,
        Row(
            unit=LEVEL,
            help="1 while the vGPU in this virtual machine holds its licence, else 0.",
            nvml=(Call("nvmlDeviceGetGridLicensableFeatures", "gridLicensableFeatures.0.featureState"),),
            cadence=Cadence.SLOW,
            null="not in a virtual machine with a vGPU",
            rollup=LEVEL_ROLLUP,
            maximum=1,
            limit=FLAG_LIMIT,
            dcgm=("DCGM_FI_DEV_VGPU_LICENSE_STATUS", 1),
        ),
    ] = None


class Metric(Struct, frozen=True):
    """A row of the catalog with its name."""

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

    @property
    def limits_from(self) -> str:
        """Source of `minimum` and `maximum`, in words."""
        return self.row.limit or self.row.unit.source

    def possible(self, value: float) -> bool:
        """True if the metric can have a value: a number (not NaN) within its limits."""
        least, most = self.minimum, self.maximum
        return (least is None or value >= least) and (most is None or value <= most) and value == value


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
"""The catalog by metric name, in the order of `DeviceSample`."""
