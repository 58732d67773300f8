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

from .row_forms import (
    BEFORE_AMPERE,
    BEFORE_R570,
    PCIE_GENERATION_LIMIT,
    PCIE_WIDTH_LIMIT,
    REMAPS_ROWS,
    amd_temperature,
    clock,
    constant,
    counter,
    counter_32,
    device_memory,
    ecc_errors,
    engine,
    flag,
    level,
    max_clock,
    nvlink_bytes,
    nvlink_errors,
    pcie_errors,
    pcie_rate,
    power_limit,
    profiled,
    slowdown,
    temperature_threshold,
    utilization,
    violation,
)
from .rows import (
    BITMASK,
    BITMASK_ROLLUP,
    BYTES,
    BYTES_PER_SECOND,
    CELSIUS,
    COUNT,
    LAST_ROLLUP,
    LEVEL,
    MILLIJOULES,
    PERCENT,
    UNSUPPORTED,
    WATTS,
    Cadence,
    Call,
    FieldValue,
    Gpm,
    Row,
)


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
        utilization(
            "Share of the driver's last sample period in which at least one kernel ran.",
            "gpu",
            "DCGM_FI_DEV_GPU_UTIL",
            Call("amdsmi_get_gpu_activity", "gfx_activity"),
        ),
    ] = None
    memory_utilization_percent: Annotated[
        float | None,
        utilization(
            "Share of the driver's last sample period in which device memory was read or written.",
            "memory",
            "DCGM_FI_DEV_MEM_COPY_UTIL",
            Call("amdsmi_get_gpu_activity", "umc_activity"),
        ),
    ] = None
    encoder_utilization_percent: Annotated[
        float | None, engine("Video encoder busy.", "nvmlDeviceGetEncoderUtilization", dcgm="DCGM_FI_DEV_ENC_UTIL")
    ] = None
    decoder_utilization_percent: Annotated[
        float | None,
        engine(
            "Video decoder busy.",
            "nvmlDeviceGetDecoderUtilization",
            dcgm="DCGM_FI_DEV_DEC_UTIL",
            amd=(Call("amdsmi_get_gpu_activity", "mm_activity"),),
        ),
    ] = None
    jpeg_utilization_percent: Annotated[float | None, engine("JPEG engine busy.", "nvmlDeviceGetJpgUtilization")] = None
    optical_flow_utilization_percent: Annotated[
        float | None, engine("Optical flow accelerator (OFA) busy.", "nvmlDeviceGetOfaUtilization")
    ] = None
    graphics_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which any graphics or compute work was on the device.",
            "NVML_GPM_METRIC_GRAPHICS_UTIL",
            "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
        ),
    ] = None
    sm_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which a streaming multiprocessor had a warp resident, over all of them.",
            "NVML_GPM_METRIC_SM_UTIL",
            "DCGM_FI_PROF_SM_ACTIVE",
        ),
    ] = None
    sm_occupancy_percent: Annotated[
        float | None,
        profiled(
            "Warps resident on the streaming multiprocessors, as a share of the most that fit.",
            "NVML_GPM_METRIC_SM_OCCUPANCY",
            "DCGM_FI_PROF_SM_OCCUPANCY",
        ),
    ] = None
    integer_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which the integer pipes were busy.",
            "NVML_GPM_METRIC_INTEGER_UTIL",
            "DCGM_FI_PROF_PIPE_INT_ACTIVE",
        ),
    ] = None
    tensor_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which the tensor cores were busy.",
            "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
            "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
        ),
    ] = None
    tensor_fp16_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which the tensor cores worked on 16 bit floating point or less (HMMA).",
            "NVML_GPM_METRIC_HMMA_TENSOR_UTIL",
            "DCGM_FI_PROF_PIPE_TENSOR_HMMA_ACTIVE",
        ),
    ] = None
    tensor_fp64_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which the tensor cores worked on 64 bit floating point (DFMA).",
            "NVML_GPM_METRIC_DFMA_TENSOR_UTIL",
            "DCGM_FI_PROF_PIPE_TENSOR_DFMA_ACTIVE",
        ),
    ] = None
    tensor_integer_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which the tensor cores worked on integers (IMMA).",
            "NVML_GPM_METRIC_IMMA_TENSOR_UTIL",
            "DCGM_FI_PROF_PIPE_TENSOR_IMMA_ACTIVE",
        ),
    ] = None
    fp64_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which the 64 bit floating point pipes were busy, tensor cores aside.",
            "NVML_GPM_METRIC_FP64_UTIL",
            "DCGM_FI_PROF_PIPE_FP64_ACTIVE",
        ),
    ] = None
    fp32_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which the 32 bit floating point pipes were busy, tensor cores aside.",
            "NVML_GPM_METRIC_FP32_UTIL",
            "DCGM_FI_PROF_PIPE_FP32_ACTIVE",
        ),
    ] = None
    fp16_active_percent: Annotated[
        float | None,
        profiled(
            "Share of the time in which the 16 bit floating point pipes were busy, tensor cores aside.",
            "NVML_GPM_METRIC_FP16_UTIL",
            "DCGM_FI_PROF_PIPE_FP16_ACTIVE",
        ),
    ] = None
    dram_active_percent: Annotated[
        float | None,
        profiled(
            "Device memory bandwidth in use, as a share of its peak.",
            "NVML_GPM_METRIC_DRAM_BW_UTIL",
            "DCGM_FI_PROF_DRAM_ACTIVE",
        ),
    ] = None

    memory_used_bytes: Annotated[
        int | None,
        device_memory(
            "Device memory in use by processes.",
            "used",
            "DCGM_FI_DEV_FB_USED",
            amd=(Call("amdsmi_get_gpu_memory_usage", args=("AmdSmiMemoryType.VRAM",)),),
        ),
    ] = None
    memory_free_bytes: Annotated[
        int | None, device_memory("Device memory that can still be allocated.", "free", "DCGM_FI_DEV_FB_FREE")
    ] = None
    memory_total_bytes: Annotated[
        int | None,
        device_memory(
            "Device memory in all.",
            "total",
            "DCGM_FI_DEV_FB_TOTAL",
            rollup=LAST_ROLLUP,
            amd=(Call("amdsmi_get_gpu_memory_total", args=("AmdSmiMemoryType.VRAM",)),),
        ),
    ] = None
    memory_reserved_bytes: Annotated[
        int | None,
        Row(
            unit=BYTES,
            help="Device memory kept by the driver and firmware; used + free + reserved = total.",
            nvml=(Call("nvmlDeviceGetMemoryInfo", "reserved", ("nvmlMemory_v2",)),),
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
        constant(
            BYTES,
            "BAR1 window in all.",
            Call("nvmlDeviceGetBAR1MemoryInfo", "bar1Total"),
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
        power_limit(
            "Power limit of the board as it is shipped.",
            Call("nvmlDeviceGetPowerManagementDefaultLimit", scale=1e-3),
            FieldValue("NVML_FI_DEV_POWER_DEFAULT_LIMIT", scale=1e-3),
            dcgm="DCGM_FI_DEV_POWER_MGMT_LIMIT_DEF",
            amd="default_power_cap",
        ),
    ] = None
    power_limit_min_watts: Annotated[
        float | None,
        power_limit(
            "Lowest power limit that may be set.",
            Call("nvmlDeviceGetPowerManagementLimitConstraints", "0", scale=1e-3),
            FieldValue("NVML_FI_DEV_POWER_MIN_LIMIT", scale=1e-3),
            dcgm="DCGM_FI_DEV_POWER_MGMT_LIMIT_MIN",
            amd="min_power_cap",
        ),
    ] = None
    power_limit_max_watts: Annotated[
        float | None,
        power_limit(
            "Highest power limit that may be set.",
            Call("nvmlDeviceGetPowerManagementLimitConstraints", "1", scale=1e-3),
            FieldValue("NVML_FI_DEV_POWER_MAX_LIMIT", scale=1e-3),
            dcgm="DCGM_FI_DEV_POWER_MGMT_LIMIT_MAX",
            amd="max_power_cap",
        ),
    ] = None
    energy_millijoules: Annotated[
        int | None,
        counter(
            MILLIJOULES,
            "Energy used since the driver was loaded.",
            Call("nvmlDeviceGetTotalEnergyConsumption"),
            cadence=Cadence.TICK,
            null="before Volta",
            dcgm="DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
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
            amd=(amd_temperature("EDGE"), amd_temperature("HOTSPOT")),
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
            amd=(amd_temperature("VRAM"),),
        ),
    ] = None
    temperature_slowdown_celsius: Annotated[
        float | None,
        temperature_threshold(
            "Core temperature at which the hardware slows its clocks.",
            "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN",
            dcgm="DCGM_FI_DEV_SLOWDOWN_TEMP",
            amd="CRITICAL",
        ),
    ] = None
    temperature_shutdown_celsius: Annotated[
        float | None,
        temperature_threshold(
            "Core temperature at which the device shuts itself down.",
            "NVML_TEMPERATURE_THRESHOLD_SHUTDOWN",
            dcgm="DCGM_FI_DEV_SHUTDOWN_TEMP",
            amd="EMERGENCY",
        ),
    ] = None

    sm_clock_megahertz: Annotated[
        int | None,
        clock("Clock of the streaming multiprocessors.", "NVML_CLOCK_SM", dcgm="DCGM_FI_DEV_SM_CLOCK", amd="GFX"),
    ] = None
    memory_clock_megahertz: Annotated[
        int | None, clock("Clock of the device memory.", "NVML_CLOCK_MEM", dcgm="DCGM_FI_DEV_MEM_CLOCK", amd="MEM")
    ] = None
    video_clock_megahertz: Annotated[
        int | None,
        clock(
            "Clock of the video encoder and decoder.",
            "NVML_CLOCK_VIDEO",
            dcgm="DCGM_FI_DEV_VIDEO_CLOCK",
            amd="VCLK0",
            cadence=Cadence.SECOND,
        ),
    ] = None
    sm_clock_max_megahertz: Annotated[
        int | None,
        max_clock(
            "Highest clock of the streaming multiprocessors.",
            "NVML_CLOCK_SM",
            dcgm="DCGM_FI_DEV_MAX_SM_CLOCK",
            amd="GFX",
        ),
    ] = None
    memory_clock_max_megahertz: Annotated[
        int | None,
        max_clock("Highest clock of the device memory.", "NVML_CLOCK_MEM", dcgm="DCGM_FI_DEV_MAX_MEM_CLOCK", amd="MEM"),
    ] = None
    video_clock_max_megahertz: Annotated[
        int | None,
        max_clock(
            "Highest clock of the video encoder and decoder.",
            "NVML_CLOCK_VIDEO",
            dcgm="DCGM_FI_DEV_MAX_VIDEO_CLOCK",
            amd="VCLK0",
        ),
    ] = None
    throttle_reasons_bitmask: Annotated[
        int | None,
        Row(
            unit=BITMASK,
            help="Why the clocks are below their maximum (NVML clock event reasons).",
            nvml=(Call("nvmlDeviceGetCurrentClocksEventReasons"), Call("nvmlDeviceGetCurrentClocksThrottleReasons")),
            rollup=BITMASK_ROLLUP,
            dcgm=("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", 1),
        ),
    ] = None
    power_violation_nanoseconds: Annotated[
        int | None, violation("Time with clocks held down by the power limit.", "POWER", "DCGM_FI_DEV_POWER_VIOLATION")
    ] = None
    thermal_violation_nanoseconds: Annotated[
        int | None, violation("Time with clocks held down by temperature.", "THERMAL", "DCGM_FI_DEV_THERMAL_VIOLATION")
    ] = None
    sync_boost_violation_nanoseconds: Annotated[
        int | None,
        violation(
            "Time with clocks held down to match those of other devices (sync boost).",
            "SYNC_BOOST",
            "DCGM_FI_DEV_SYNC_BOOST_VIOLATION",
        ),
    ] = None
    board_limit_violation_nanoseconds: Annotated[
        int | None,
        violation(
            "Time with clocks held down by a limit of the board.", "BOARD_LIMIT", "DCGM_FI_DEV_BOARD_LIMIT_VIOLATION"
        ),
    ] = None
    low_utilization_violation_nanoseconds: Annotated[
        int | None,
        violation(
            "Time with clocks held down since there was little to do.",
            "LOW_UTILIZATION",
            "DCGM_FI_DEV_LOW_UTIL_VIOLATION",
        ),
    ] = None
    reliability_violation_nanoseconds: Annotated[
        int | None,
        violation(
            "Time with clocks held down for reliability (voltage).", "RELIABILITY", "DCGM_FI_DEV_RELIABILITY_VIOLATION"
        ),
    ] = None
    app_clocks_violation_nanoseconds: Annotated[
        int | None,
        violation(
            "Time below the application clocks, for whatever reason.",
            "TOTAL_APP_CLOCKS",
            "DCGM_FI_DEV_TOTAL_APP_CLOCKS_VIOLATION",
        ),
    ] = None
    base_clocks_violation_nanoseconds: Annotated[
        int | None,
        violation(
            "Time below the base clocks, for whatever reason.",
            "TOTAL_BASE_CLOCKS",
            "DCGM_FI_DEV_TOTAL_BASE_CLOCKS_VIOLATION",
        ),
    ] = None
    software_thermal_slowdown_nanoseconds: Annotated[
        int | None, slowdown("Time slowed by the driver since core or memory was too hot.", "SW_THERM_SLOWDOWN")
    ] = None
    hardware_thermal_slowdown_nanoseconds: Annotated[
        int | None, slowdown("Time slowed by the hardware since the core was too hot.", "HW_THERM_SLOWDOWN")
    ] = None
    power_brake_slowdown_nanoseconds: Annotated[
        int | None,
        slowdown("Time slowed by the power brake, a signal of the server's power supply.", "HW_POWER_BRAKE_SLOWDOWN"),
    ] = None

    pcie_rx_bytes_per_second: Annotated[
        float | None,
        pcie_rate(
            "Received over PCIe since the last reading; over 20 ms where GPM and counters are missing.",
            "RX",
            "DCGM_FI_DEV_PCIE_RX_THROUGHPUT",
        ),
    ] = None
    pcie_tx_bytes_per_second: Annotated[
        float | None,
        pcie_rate(
            "Sent over PCIe since the last reading; over 20 ms where GPM and counters are missing.",
            "TX",
            "DCGM_FI_DEV_PCIE_TX_THROUGHPUT",
        ),
    ] = None
    pcie_generation: Annotated[
        int | None,
        level(
            "Generation of the PCIe link as it runs now.",
            Call("nvmlDeviceGetCurrPcieLinkGeneration"),
            maximum=15,
            limit=PCIE_GENERATION_LIMIT,
            dcgm="DCGM_FI_DEV_PCIE_LINK_GEN",
        ),
    ] = None
    pcie_width: Annotated[
        int | None,
        level(
            "Lanes of the PCIe link as it runs now.",
            Call("nvmlDeviceGetCurrPcieLinkWidth"),
            maximum=32,
            limit=PCIE_WIDTH_LIMIT,
            dcgm="DCGM_FI_DEV_PCIE_LINK_WIDTH",
            amd=(Call("amdsmi_get_pcie_info", "pcie_metric.pcie_width"),),
        ),
    ] = None
    pcie_generation_max: Annotated[
        int | None,
        constant(
            LEVEL,
            "Highest generation that device and slot can do.",
            Call("nvmlDeviceGetMaxPcieLinkGeneration"),
            dcgm=("DCGM_FI_DEV_PCIE_MAX_LINK_GEN", 1),
            amd=(Call("amdsmi_get_pcie_info", "pcie_static.pcie_interface_version"),),
            maximum=15,
            limit=PCIE_GENERATION_LIMIT,
        ),
    ] = None
    pcie_width_max: Annotated[
        int | None,
        constant(
            LEVEL,
            "Most lanes that device and slot can do.",
            Call("nvmlDeviceGetMaxPcieLinkWidth"),
            dcgm=("DCGM_FI_DEV_PCIE_MAX_LINK_WIDTH", 1),
            amd=(Call("amdsmi_get_pcie_info", "pcie_static.max_pcie_width"),),
            maximum=32,
            limit=PCIE_WIDTH_LIMIT,
        ),
    ] = None
    pcie_replay_count: Annotated[
        int | None,
        counter_32(
            "PCIe packets sent again since the driver was loaded.",
            Call("nvmlDeviceGetPcieReplayCounter"),
            null=UNSUPPORTED,
            dcgm="DCGM_FI_DEV_PCIE_REPLAY_COUNTER",
            amd=(Call("amdsmi_get_pcie_info", "pcie_metric.pcie_replay_count"),),
        ),
    ] = None
    pcie_correctable_errors_count: Annotated[
        int | None,
        pcie_errors(
            "PCIe errors that the link corrected.",
            "NVML_FI_DEV_PCIE_COUNT_CORRECTABLE_ERRORS",
            "DCGM_FI_DEV_PCIE_COUNT_CORRECTABLE_ERRORS",
        ),
    ] = None
    pcie_nonfatal_errors_count: Annotated[
        int | None,
        pcie_errors("PCIe errors that cost a transaction, not the link.", "NVML_FI_DEV_PCIE_COUNT_NON_FATAL_ERROR"),
    ] = None
    pcie_fatal_errors_count: Annotated[
        int | None, pcie_errors("PCIe errors that cost the link.", "NVML_FI_DEV_PCIE_COUNT_FATAL_ERROR")
    ] = None
    nvlink_rx_bytes: Annotated[
        int | None,
        nvlink_bytes(
            "Data received over all NVLinks since the driver was loaded.", "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX"
        ),
    ] = None
    nvlink_tx_bytes: Annotated[
        int | None,
        nvlink_bytes(
            "Data sent over all NVLinks since the driver was loaded.", "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX"
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
        level(
            "NVLinks that are up; which ones, with throughput and errors each, is in the event `nvlink`.",
            maximum=256,
            limit="seven times NVML_NVLINK_MAX_LINKS of nvml.h (36)",
            unit=COUNT,
            null="the device has no NVLink",
        ),
    ] = None
    nvlink_crc_flit_errors_count: Annotated[
        int | None,
        nvlink_errors(
            "Flow control packets with a wrong checksum, over all NVLinks.",
            "NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL",
            "DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL",
        ),
    ] = None
    nvlink_crc_data_errors_count: Annotated[
        int | None,
        nvlink_errors(
            "Data packets with a wrong checksum, over all NVLinks.",
            "NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL",
            "DCGM_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL",
        ),
    ] = None
    nvlink_replay_errors_count: Annotated[
        int | None,
        nvlink_errors(
            "Packets sent again, over all NVLinks.",
            "NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL",
            "DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL",
        ),
    ] = None
    nvlink_recovery_errors_count: Annotated[
        int | None,
        nvlink_errors(
            "Links trained anew after an error, over all NVLinks.",
            "NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
            "DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
        ),
    ] = None
    nvlink_ecc_errors_count: Annotated[
        int | None,
        nvlink_errors(
            "Data errors that ECC of the links found, over all NVLinks.",
            "NVML_FI_DEV_NVLINK_ECC_DATA_ERROR_COUNT_TOTAL",
            null="no active NVLink, or its generation has no ECC",
        ),
    ] = None

    ecc_corrected_count: Annotated[
        int | None,
        ecc_errors(
            "Memory errors that ECC corrected, over the life of the board.",
            "CORRECTED",
            "AGGREGATE",
            dcgm="DCGM_FI_DEV_ECC_SBE_AGG_TOTAL",
        ),
    ] = None
    ecc_uncorrected_count: Annotated[
        int | None,
        ecc_errors(
            "Memory errors that ECC could not correct, over the life of the board.",
            "UNCORRECTED",
            "AGGREGATE",
            dcgm="DCGM_FI_DEV_ECC_DBE_AGG_TOTAL",
        ),
    ] = None
    ecc_corrected_volatile_count: Annotated[
        int | None,
        ecc_errors(
            "Memory errors that ECC corrected since the driver was loaded.",
            "CORRECTED",
            "VOLATILE",
            dcgm="DCGM_FI_DEV_ECC_SBE_VOL_TOTAL",
            amd=(Call("amdsmi_get_gpu_total_ecc_count", "correctable_count"),),
        ),
    ] = None
    ecc_uncorrected_volatile_count: Annotated[
        int | None,
        ecc_errors(
            "Memory errors that ECC could not correct since the driver was loaded.",
            "UNCORRECTED",
            "VOLATILE",
            dcgm="DCGM_FI_DEV_ECC_DBE_VOL_TOTAL",
            amd=(Call("amdsmi_get_gpu_total_ecc_count", "uncorrectable_count"),),
        ),
    ] = None
    remapped_rows_corrected_count: Annotated[
        int | None,
        counter_32(
            "Memory rows remapped after corrected errors.",
            Call("nvmlDeviceGetRemappedRows", "0"),
            null=BEFORE_AMPERE,
            dcgm="DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS",
        ),
    ] = None
    remapped_rows_uncorrected_count: Annotated[
        int | None,
        counter_32(
            "Memory rows remapped after uncorrectable errors.",
            Call("nvmlDeviceGetRemappedRows", "1"),
            null=BEFORE_AMPERE,
            dcgm="DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS",
        ),
    ] = None
    remapped_rows_pending: Annotated[
        int | None,
        flag(
            "1 while rows wait for a reset to be remapped, else 0.",
            Call("nvmlDeviceGetRemappedRows", "2"),
            null=BEFORE_AMPERE,
            dcgm="DCGM_FI_DEV_ROW_REMAP_PENDING",
        ),
    ] = None
    remapped_rows_failure: Annotated[
        int | None,
        flag(
            "1 after a row could not be remapped, else 0: the board is due for replacement.",
            Call("nvmlDeviceGetRemappedRows", "3"),
            null=BEFORE_AMPERE,
            dcgm="DCGM_FI_DEV_ROW_REMAP_FAILURE",
        ),
    ] = None
    retired_pages_count: Annotated[
        int | None,
        counter_32(
            "Memory pages retired after double bit errors.",
            FieldValue("NVML_FI_DEV_RETIRED_DBE"),
            null=REMAPS_ROWS,
            dcgm="DCGM_FI_DEV_RETIRED_DBE",
            amd=(Call("amdsmi_get_gpu_bad_page_info", "len"),),
        ),
    ] = None
    retired_pages_corrected_count: Annotated[
        int | None,
        counter_32(
            "Memory pages retired after repeated single bit errors.",
            FieldValue("NVML_FI_DEV_RETIRED_SBE"),
            null=REMAPS_ROWS,
            dcgm="DCGM_FI_DEV_RETIRED_SBE",
        ),
    ] = None
    retired_pages_pending: Annotated[
        int | None,
        flag(
            "1 while pages wait for a reset to be retired, else 0.",
            FieldValue("NVML_FI_DEV_RETIRED_PENDING"),
            null=REMAPS_ROWS,
            dcgm="DCGM_FI_DEV_RETIRED_PENDING",
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
            dcgm=("DCGM_FI_DEV_FAN_SPEED", 1),
            amd=(Call("amdsmi_get_gpu_fan_speed", args=(0,), scale=100 / 255),),
            maximum=200,
            limit="percent of the noise tolerance, which nvml.h lets be exceeded without a limit: twice that",
        ),
    ] = None
    performance_state: Annotated[
        int | None,
        level(
            "Performance state: 0 is the fastest, 15 the slowest.",
            Call("nvmlDeviceGetPerformanceState"),
            maximum=15,
            limit="NVML_PSTATE_0 to NVML_PSTATE_15 in nvml.h, where 32 is unknown",
            cadence=Cadence.SECOND,
            dcgm="DCGM_FI_DEV_PSTATE",
        ),
    ] = None
    recovery_action: Annotated[
        int | None,
        level(
            "Recovery that the driver asks for: 0 nothing, 1 reset, 2 reboot, 3 end of peer traffic, 4 the same and "
            "reset, 5 recovery of the IMEX domain, 6 reset of the bus, 7 reboot of the system.",
            FieldValue("NVML_FI_DEV_GET_GPU_RECOVERY_ACTION"),
            maximum=255,
            limit="none documented: nvml.h has 0 to 7 so far (nvmlDeviceGpuRecoveryAction_t)",
            null=BEFORE_R570,
        ),
    ] = None
    vgpu_count: Annotated[
        int | None,
        level(
            "vGPUs of virtual machines that run on the device.",
            Call("nvmlDeviceGetActiveVgpus", "len"),
            maximum=1024,
            limit="none documented (nvml.h lets one ask by type): 1 GiB each of the largest board announced",
            unit=COUNT,
            null="the driver is not a vGPU host driver",
        ),
    ] = None
    vgpu_licensed: Annotated[
        int | None,
        flag(
            "1 while the vGPU in this virtual machine holds its license, else 0.",
            Call("nvmlDeviceGetGridLicensableFeatures", "gridLicensableFeatures.0.featureState"),
            null="not in a virtual machine with a vGPU",
            dcgm="DCGM_FI_DEV_VGPU_LICENSE_STATUS",
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


def _catalog() -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for name, hint in get_type_hints(DeviceSample, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        python_type, row = get_args(hint)
        if not isinstance(row, Row):
            raise TypeError(f"DeviceSample.{name}: annotate it with a Row")
        found[name] = Metric(name, int in get_args(python_type), row)
    return found


METRICS: Final[dict[str, Metric]] = _catalog()
"""The catalog by metric name, in the order of `DeviceSample`."""
