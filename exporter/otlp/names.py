"""Metrics of a device: each row of the catalog under its name in OpenTelemetry.

Names, instruments, units and attributes are those of the semantic conventions for hardware (version 1.44,
docs/hardware/gpu.md, common.md, temperature.md, fan.md). A metric that they do not have is `corral.gpu.<name>`, without
the unit in its name. It imports nothing of OpenTelemetry, so that documents can list the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Final

from msgspec import Struct

from ...schemas.metrics import METRICS, Metric
from ...schemas.rows import Kind
from ..families import DEFAULTS

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
"""Version of the semantic conventions."""
MEMORY_SHARE: Final = "memory_share"
"""Stands for a column that no batch has: used memory as a share of all memory."""
STATUS: Final = "hw.status"
STATES: Final = ("ok", "degraded", "predicted_failure", "failed")
"""States of `hw.status`."""
XIDS: Final = "corral.gpu.xids"


class Instrument(StrEnum):
    """Kind of a metric in OpenTelemetry."""

    GAUGE = "gauge"
    COUNTER = "counter"
    UP_DOWN_COUNTER = "updowncounter"
    """A level that may be added up over devices."""


class DeviceMetric(Struct, frozen=True):
    """A metric of a device in OpenTelemetry, and the source of its values.

    Attributes:
        metric: metric of the catalog, or `MEMORY_SHARE`.
        name: name in OpenTelemetry.
        instrument: its kind.
        unit: in UCUM.
        help: one sentence.
        factor: multiply a value of the catalog by this; an integer stays one with 1.
        attributes: of its points, besides those that identify the device.
        sensor: last part of `hw.id` of a sensor on the device, whose `hw.parent` is the device; empty for the device.
        type: value of `hw.type`.
    """

    metric: str
    name: str
    instrument: Instrument
    unit: str
    help: str
    factor: float = 1
    attributes: dict[str, str] = {}
    sensor: str = ""
    type: str = "gpu"


_GAUGE, _COUNTER, _UP_DOWN = Instrument.GAUGE, Instrument.COUNTER, Instrument.UP_DOWN_COUNTER
_IO_HELP: Final = "Bytes that the GPU received and sent over NVLink."
_ERRORS_HELP: Final = "Memory errors that ECC found, over the life of the board."
_LIMIT_HELP: Final = "Temperature at which the driver slows the GPU down (high.degraded) or off (high.critical)."


def _utilization(metric: str, task: str) -> DeviceMetric:
    help = "Share of time in which the GPU was busy, by task."
    return DeviceMetric(metric, "hw.gpu.utilization", _GAUGE, "1", help, 0.01, {"hw.gpu.task": task})


def _io(metric: str, direction: str) -> DeviceMetric:
    attributes = {"network.io.direction": direction, "corral.gpu.link": "nvlink"}
    return DeviceMetric(metric, "hw.gpu.io", _COUNTER, "By", _IO_HELP, attributes=attributes)


def _errors(metric: str, type: str) -> DeviceMetric:
    return DeviceMetric(metric, "hw.errors", _COUNTER, "{error}", _ERRORS_HELP, attributes={"error.type": type})


def _temperature(metric: str, location: str) -> DeviceMetric:
    return DeviceMetric(
        metric,
        "hw.temperature",
        _GAUGE,
        "Cel",
        "Temperature.",
        attributes={"hw.sensor_location": location},
        sensor=f"temperature/{location}",
        type="temperature",
    )


def _temperature_limit(metric: str, limit: str) -> DeviceMetric:
    return DeviceMetric(
        metric,
        "hw.temperature.limit",
        _GAUGE,
        "Cel",
        _LIMIT_HELP,
        attributes={"hw.sensor_location": "gpu", "hw.limit_type": limit},
        sensor="temperature/gpu",
        type="temperature",
    )


_CONVENTIONS: Final = (
    _utilization("gpu_utilization_percent", "general"),
    _utilization("encoder_utilization_percent", "encoder"),
    _utilization("decoder_utilization_percent", "decoder"),
    DeviceMetric("memory_total_bytes", "hw.gpu.memory.limit", _UP_DOWN, "By", "Size of the device memory."),
    DeviceMetric("memory_used_bytes", "hw.gpu.memory.usage", _UP_DOWN, "By", "Device memory in use."),
    DeviceMetric(MEMORY_SHARE, "hw.gpu.memory.utilization", _GAUGE, "1", "Share of the device memory in use."),
    _io("nvlink_rx_bytes", "receive"),
    _io("nvlink_tx_bytes", "transmit"),
    DeviceMetric("energy_millijoules", "hw.energy", _COUNTER, "J", "Energy since the driver was loaded.", 0.001),
    DeviceMetric("power_watts", "hw.power", _GAUGE, "W", "Power."),
    _errors("ecc_corrected_count", "corrected"),
    _errors("ecc_uncorrected_count", "uncorrected"),
    _temperature("temperature_celsius", "gpu"),
    _temperature("memory_temperature_celsius", "memory"),
    _temperature_limit("temperature_slowdown_celsius", "high.degraded"),
    _temperature_limit("temperature_shutdown_celsius", "high.critical"),
    DeviceMetric(
        "fan_percent",
        "hw.fan.speed_ratio",
        _GAUGE,
        "1",
        "Fan speed as a share of its maximum.",
        0.01,
        sensor="fan",
        type="fan",
    ),
)
_UNITS: Final = {
    # Unit of the catalog: its suffix in names, the unit in UCUM, and the factor to it.
    "percent": ("_percent", "1", 0.01),
    "bytes": ("_bytes", "By", 1),
    "bytes per second": ("_bytes_per_second", "By/s", 1),
    "watts": ("_watts", "W", 1),
    "millijoules": ("_millijoules", "J", 0.001),
    "degrees Celsius": ("_celsius", "Cel", 1),
    "megahertz": ("_megahertz", "Hz", 1_000_000),
    "nanoseconds": ("_nanoseconds", "s", 1e-9),
    "count": ("_count", "{count}", 1),
}


def _own(metric: Metric) -> DeviceMetric:
    suffix, unit, factor = _UNITS.get(metric.row.unit.name, ("", "", 1))
    name = f"corral.gpu.{metric.name.removesuffix(suffix)}"
    if metric.row.unit.name == "bytes per second":  # the counter of the same bytes has the name without it
        name += ".rate"
    instrument = _COUNTER if metric.row.kind is Kind.COUNTER else _GAUGE
    return DeviceMetric(metric.name, name, instrument, unit, metric.row.help, factor)


def _all() -> tuple[DeviceMetric, ...]:
    taken = {found.metric for found in _CONVENTIONS}
    return (*_CONVENTIONS, *(_own(metric) for metric in METRICS.values() if metric.name not in taken))


DEVICE_METRICS: Final[tuple[DeviceMetric, ...]] = _all()
"""Every metric of the catalog in OpenTelemetry, those of the conventions first."""


def _by_default(found: DeviceMetric) -> bool:
    if not found.name.startswith("corral."):
        return True
    dcgm = METRICS[found.metric].row.dcgm
    return dcgm is not None and dcgm[0] in DEFAULTS


def choose(wanted: Sequence[str]) -> list[DeviceMetric]:
    """Select metrics by words: `default`, `all`, names, or globs over them.

    `default` are those of the conventions, and the others that dcgm-exporter serves by default.

    Raises:
        ValueError: a word names none; the message says which.
    """
    chosen: dict[str, DeviceMetric] = {}
    for word in wanted:
        if word == "all":
            found = list(DEVICE_METRICS)
        elif word == "default":
            found = [metric for metric in DEVICE_METRICS if _by_default(metric)]
        else:
            found = [metric for metric in DEVICE_METRICS if fnmatchcase(metric.name, word)]
        if not found:
            raise ValueError(f"no metric matches {word!r}: use all, default, or names and globs such as hw.gpu.*")
        chosen.update((metric.metric, metric) for metric in found)
    return list(chosen.values())
