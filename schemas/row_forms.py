"""Constructors of catalog rows, one for each form that several metrics share."""

from __future__ import annotations

from typing import Final

from .rows import (
    ALL_LINKS,
    BYTES,
    BYTES_PER_SECOND,
    CELSIUS,
    COUNT,
    COUNTER_ROLLUP,
    GAUGE_ROLLUP,
    LAST_ROLLUP,
    LEVEL,
    LEVEL_ROLLUP,
    MEGAHERTZ,
    NANOSECONDS,
    PERCENT,
    UNSUPPORTED,
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

BEFORE_HOPPER: Final = "before Hopper, or the driver lets only root read it"
BEFORE_AMPERE: Final = "before Ampere"
BEFORE_R525: Final = "the driver gives none (before R525)"
BEFORE_R570: Final = "the driver gives none (before R570)"
NO_NVLINK: Final = "no active NVLink"
NO_ECC: Final = "the board has no ECC, or it is off"
REMAPS_ROWS: Final = "Ampere and later, which remap rows in place of it"
MIG: Final = "MIG is on for the device, or the driver gives none"

_MEBIBYTE: Final = 2**20
_GPM_MAXIMUM_PERCENT: Final = 800
_GPM_LIMIT: Final = (
    "nvml.h says 100; a MIG instance, an eighth of its board at least, has shown more (NVIDIA/DCGM issue 152)"
)
_LINK_BYTES_LIMIT: Final = "what 64 bits hold; nvml.h counts KiB"
_COUNT_32_LIMIT: Final = "unsigned int in nvml.h, and all bits set are no count (NVML_VALUE_NOT_AVAILABLE)"
_FLAG_LIMIT: Final = "yes or no: 1 or 0 in nvml.h"
_PCIE_RATE_LIMIT: Final = "none documented: four times what PCIe 7 carries each way over 16 lanes (256 GB/s)"
PCIE_GENERATION_LIMIT: Final = "nvml.h knows 6 (NVML_PCIE_LINK_MAX_SPEED_64000MBPS), PCI-SIG has published 7"
PCIE_WIDTH_LIMIT: Final = "the widest that the PCI Express specification had (PCIE_LNK_X32 in Linux)"


def utilization(help: str, attribute: str, dcgm: str, amd: Call) -> Row:
    """Utilization over the driver's last sample period."""
    reading = Call("nvmlDeviceGetUtilizationRates", attribute)
    return Row(unit=PERCENT, help=help, nvml=(reading,), null=MIG, dcgm=(dcgm, 1), amd=(amd,))


def engine(help: str, function: str, *, dcgm: str | None = None, amd: tuple[Call, ...] = ()) -> Row:
    """Utilization of an engine other than the multiprocessors, such as the video encoder."""
    return Row(
        unit=PERCENT,
        help=help,
        nvml=(Call(function, "0"),),
        cadence=Cadence.SECOND,
        dcgm=(dcgm, 1) if dcgm else None,
        amd=amd,
    )


def profiled(help: str, metric: str, dcgm: str) -> Row:
    """Share of a part of the device in use, from the GPU Performance Monitor; dcgm-exporter gives it from 0 to 1."""
    return Row(
        unit=PERCENT,
        help=help,
        nvml=(Gpm(metric),),
        null=BEFORE_HOPPER,
        dcgm=(dcgm, 0.01),
        maximum=_GPM_MAXIMUM_PERCENT,
        limit=_GPM_LIMIT,
    )


def device_memory(
    help: str, attribute: str, dcgm: str, *, rollup: tuple[str, ...] = GAUGE_ROLLUP, amd: tuple[Call, ...] = ()
) -> Row:
    """Part of the device memory, by the newer form of the call, else the older one."""
    call = "nvmlDeviceGetMemoryInfo"
    return Row(
        unit=BYTES,
        help=help,
        nvml=(Call(call, attribute, ("nvmlMemory_v2",)), Call(call, attribute)),
        rollup=rollup,
        dcgm=(dcgm, 1 / _MEBIBYTE),
        amd=amd,
    )


def constant(
    unit: Unit,
    help: str,
    *nvml: Reading,
    dcgm: tuple[str, float],
    amd: tuple[Call, ...] = (),
    maximum: float | None = None,
    limit: str = "",
) -> Row:
    """Property of the board that does not change while the driver is loaded."""
    return Row(
        unit=unit,
        help=help,
        nvml=nvml,
        cadence=Cadence.STATIC,
        rollup=LAST_ROLLUP,
        dcgm=dcgm,
        amd=amd,
        maximum=maximum,
        limit=limit,
    )


def power_limit(help: str, *nvml: Reading, dcgm: str, amd: str) -> Row:
    """Power limit of the board; `amd` is its key in `amdsmi_get_power_cap_info`, in microwatts."""
    reading = Call("amdsmi_get_power_cap_info", amd, scale=1e-6)
    return constant(WATTS, help, *nvml, dcgm=(dcgm, 1), amd=(reading,))


def amd_temperature(sensor: str, value: str = "CURRENT") -> Call:
    """amdsmi's call for a temperature: the sensor, and which value of it."""
    return Call("amdsmi_get_temp_metric", args=(f"AmdSmiTemperatureType.{sensor}", f"AmdSmiTemperatureMetric.{value}"))


def temperature_threshold(help: str, threshold: str, *, dcgm: str, amd: str) -> Row:
    """Core temperature at which the device protects itself; `amd` is the name of amdsmi's value for it."""
    reading = Call("nvmlDeviceGetTemperatureThreshold", args=(threshold,))
    both = (amd_temperature("EDGE", amd), amd_temperature("HOTSPOT", amd))
    return constant(CELSIUS, help, reading, dcgm=(dcgm, 1), amd=both)


def clock(help: str, clock: str, *, dcgm: str, amd: str, cadence: Cadence = Cadence.TICK) -> Row:
    """Clock as it runs now; `amd` is amdsmi's name of it."""
    return Row(
        unit=MEGAHERTZ,
        help=help,
        nvml=(Call("nvmlDeviceGetClockInfo", args=(clock,)),),
        cadence=cadence,
        dcgm=(dcgm, 1),
        amd=(Call("amdsmi_get_clock_info", "clk", (f"AmdSmiClkType.{amd}",)),),
    )


def max_clock(help: str, clock: str, *, dcgm: str, amd: str) -> Row:
    """Highest clock; `amd` is amdsmi's name of it."""
    reading = Call("amdsmi_get_clock_info", "max_clk", (f"AmdSmiClkType.{amd}",))
    return constant(MEGAHERTZ, help, Call("nvmlDeviceGetMaxClockInfo", args=(clock,)), dcgm=(dcgm, 1), amd=(reading,))


def counter(
    unit: Unit,
    help: str,
    *nvml: Reading,
    cadence: Cadence = Cadence.SLOW,
    null: str = UNSUPPORTED,
    dcgm: str | None = None,
    amd: tuple[Call, ...] = (),
    maximum: float | None = None,
    limit: str = "",
) -> Row:
    """Counter that only grows until the driver is loaded anew."""
    return Row(
        unit=unit,
        help=help,
        nvml=nvml,
        kind=Kind.COUNTER,
        cadence=cadence,
        null=null,
        rollup=COUNTER_ROLLUP,
        dcgm=(dcgm, 1) if dcgm else None,
        amd=amd,
        maximum=maximum,
        limit=limit,
    )


def counter_32(help: str, reading: Reading, *, null: str, dcgm: str, amd: tuple[Call, ...] = ()) -> Row:
    """Count that the driver keeps in 32 bits."""
    return counter(COUNT, help, reading, null=null, dcgm=dcgm, amd=amd, maximum=2**32 - 2, limit=_COUNT_32_LIMIT)


def violation(help: str, policy: str, dcgm: str) -> Row:
    """Time with clocks held down by a policy: the end of `NVML_FI_DEV_PERF_POLICY_…` and of `NVML_PERF_POLICY_…`."""
    return counter(
        NANOSECONDS,
        help,
        FieldValue(f"NVML_FI_DEV_PERF_POLICY_{policy}"),
        Call("nvmlDeviceGetViolationStatus", "violationTime", (f"NVML_PERF_POLICY_{policy}",)),
        cadence=Cadence.SECOND,
        dcgm=dcgm,
    )


def slowdown(help: str, reason: str) -> Row:
    """Time slowed for a reason: the end of `NVML_FI_DEV_CLOCKS_EVENT_REASON_…`."""
    reading = FieldValue(f"NVML_FI_DEV_CLOCKS_EVENT_REASON_{reason}")
    return counter(NANOSECONDS, help, reading, cadence=Cadence.SECOND, null=BEFORE_R570)


def pcie_rate(help: str, direction: str, dcgm: str) -> Row:
    """Traffic over PCIe in a direction, `RX` or `TX`."""
    return Row(
        unit=BYTES_PER_SECOND,
        help=help,
        nvml=(
            Gpm(f"NVML_GPM_METRIC_PCIE_{direction}_PER_SEC", scale=_MEBIBYTE),
            Rate(f"NVML_FI_DEV_PCIE_COUNT_{direction}_BYTES"),
            Call("nvmlDeviceGetPcieThroughput", args=(f"NVML_PCIE_UTIL_{direction}_BYTES",), scale=1000, blocking=True),
        ),
        cadence=Cadence.SECOND,
        dcgm=(dcgm, 1e-3),
        maximum=1e12,
        limit=_PCIE_RATE_LIMIT,
    )


def pcie_errors(help: str, field: str, dcgm: str | None = None) -> Row:
    """Count of PCIe errors of a severity."""
    return counter(COUNT, help, FieldValue(field), null=BEFORE_R525, dcgm=dcgm)


def nvlink_bytes(help: str, field: str) -> Row:
    """Data over all NVLinks."""
    reading = FieldValue(field, ALL_LINKS, 1024)
    return counter(
        BYTES,
        help,
        reading,
        cadence=Cadence.SECOND,
        null=NO_NVLINK,
        maximum=2**63 - 1,
        limit=_LINK_BYTES_LIMIT,
    )


def nvlink_errors(help: str, field: str, dcgm: str | None = None, null: str = NO_NVLINK) -> Row:
    """Count of NVLink errors of a kind, over all links."""
    return counter(COUNT, help, FieldValue(field), null=null, dcgm=dcgm)


def ecc_errors(help: str, severity: str, period: str, *, dcgm: str, amd: tuple[Call, ...] = ()) -> Row:
    """Memory errors by severity, `CORRECTED` or `UNCORRECTED`, and period, `AGGREGATE` or `VOLATILE`."""
    arguments = (f"NVML_MEMORY_ERROR_TYPE_{severity}", f"NVML_{period}_ECC")
    return counter(COUNT, help, Call("nvmlDeviceGetTotalEccErrors", args=arguments), null=NO_ECC, dcgm=dcgm, amd=amd)


def level(
    help: str,
    *nvml: Reading,
    maximum: float,
    limit: str,
    unit: Unit = LEVEL,
    cadence: Cadence = Cadence.SLOW,
    null: str = UNSUPPORTED,
    dcgm: str | None = None,
    amd: tuple[Call, ...] = (),
) -> Row:
    """Whole number out of a few, of which a mean says nothing."""
    return Row(
        unit=unit,
        help=help,
        nvml=nvml,
        cadence=cadence,
        null=null,
        rollup=LEVEL_ROLLUP,
        dcgm=(dcgm, 1) if dcgm else None,
        amd=amd,
        maximum=maximum,
        limit=limit,
    )


def flag(help: str, reading: Reading, *, null: str, dcgm: str) -> Row:
    """Yes or no, as 1 or 0."""
    return level(help, reading, maximum=1, limit=_FLAG_LIMIT, null=null, dcgm=dcgm)
