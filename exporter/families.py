"""Series of a device: each metric of the catalog under dcgm-exporter's name, type and unit, or as `corral_…`.

Names, types and defaults are those of dcgm-exporter's `etc/default-counters.csv`, so that dashboards and alerts made
for it work. Metrics that it does not have follow Prometheus' rules of naming: base units, `_total` after counters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from msgspec import Struct

from ..schemas.metrics import METRICS, Metric
from ..schemas.rows import COUNT, NANOSECONDS, Kind

Text = Callable[[float], str]

XID: Final = "xid"
"""Stands for a column that no batch has: code of the last Xid of each device."""
XID_RECENT: Final = "xid_recent"
"""Likewise: number of each device's Xids in the last five minutes, by code."""
XID_TOTAL: Final = "xid_total"
"""Likewise: number of each device's Xids, by code."""
MEMORY_SHARE: Final = "memory_share"
"""Likewise: used memory as a share of the memory that the driver has not reserved."""
NVLINK: Final = "nvlink"
"""Stands for the sum of both directions of NVLink, in bytes."""

DEFAULTS: Final = (
    "DCGM_FI_DEV_SM_CLOCK",
    "DCGM_FI_DEV_MEM_CLOCK",
    "DCGM_FI_DEV_MEMORY_TEMP",
    "DCGM_FI_DEV_GPU_TEMP",
    "DCGM_FI_DEV_POWER_USAGE",
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER",
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_MEM_COPY_UTIL",
    "DCGM_FI_DEV_ENC_UTIL",
    "DCGM_FI_DEV_DEC_UTIL",
    "DCGM_FI_DEV_XID_ERRORS",
    "DCGM_FI_DEV_FB_FREE",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_FB_RESERVED",
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL",
    "DCGM_FI_DEV_VGPU_LICENSE_STATUS",
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS",
    "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS",
    "DCGM_FI_DEV_ROW_REMAP_FAILURE",
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
    "DCGM_FI_PROF_DRAM_ACTIVE",
    "DCGM_FI_PROF_PCIE_TX_BYTES",
    "DCGM_FI_PROF_PCIE_RX_BYTES",
)
"""Series that dcgm-exporter serves by default."""

_TYPES: Final = {
    # Rates and a level, but dcgm-exporter calls them counters.
    "DCGM_FI_DEV_PCIE_TX_THROUGHPUT": "counter",
    "DCGM_FI_DEV_PCIE_RX_THROUGHPUT": "counter",
    "DCGM_FI_DEV_RETIRED_PENDING": "counter",
}
_MIB: Final = 2**-20
_UNITS: Final = {_MIB: "MiB", 0.01: "a ratio from 0 to 1", 0.001: "KB/s"}


class Family(Struct, frozen=True):
    """A metric family of Prometheus: name, type, help, and the source of its values.

    Attributes:
        name: name of the series.
        kind: `gauge` or `counter`.
        help: one sentence.
        metric: metric of the catalog, or the name that stands for a column that no batch has.
        text: formats a value of the metric for Prometheus.
    """

    name: str
    kind: str
    help: str
    metric: str
    text: Text


def _float(value: float) -> str:
    return f"{value:.7g}"


def _mebibytes(value: float) -> str:
    return str(int(value) >> 20)


def _kibibytes(value: float) -> str:
    return str(int(value) >> 10)


def _seconds(value: float) -> str:
    return repr(value / 1e9)


def _scaled(factor: float) -> Text:
    return lambda value: f"{value * factor:.7g}"


def _plain(metric: Metric) -> Text:
    return str if metric.integer else _float


def corral_name(metric: Metric) -> str:
    """Name of the series of a metric that dcgm-exporter does not have, by Prometheus' rules of naming."""
    name = metric.name
    if metric.row.unit is NANOSECONDS:
        name = f"{name.removesuffix(NANOSECONDS.suffix)}_seconds"
    elif metric.row.unit is COUNT:
        name = name.removesuffix(COUNT.suffix)
    return f"corral_{name}{'_total' if metric.row.kind is Kind.COUNTER else ''}"


def _family(metric: Metric) -> Family:
    row = metric.row
    help = row.help.rstrip(".")
    if row.dcgm is None:
        text = _seconds if row.unit is NANOSECONDS else _plain(metric)
        unit = "seconds" if row.unit is NANOSECONDS else row.unit.name
        return Family(corral_name(metric), row.kind.value, f"{help} ({unit}).", metric.name, text)
    name, factor = row.dcgm
    text = _plain(metric) if factor == 1 else _mebibytes if factor == _MIB else _scaled(factor)
    unit = _UNITS.get(factor, row.unit.name)
    return Family(name, _TYPES.get(name, row.kind.value), f"{help} ({unit}).", metric.name, text)


def _families() -> dict[str, Family]:
    found = [_family(metric) for metric in METRICS.values()]
    found += [
        Family(
            "DCGM_FI_DEV_XID_ERRORS",
            "gauge",
            "Last Xid; a fatal one until the device is reset; 0 if none.",
            XID,
            str,
        ),
        Family("DCGM_EXP_XID_ERRORS_COUNT", "gauge", "Xids in the last five minutes.", XID_RECENT, str),
        Family("DCGM_EXP_XID_ERRORS_TOTAL", "counter", "Xids, by code.", XID_TOTAL, str),
        Family(
            "DCGM_FI_DEV_FB_USED_PERCENT",
            "gauge",
            "Device memory in use as a share of what the driver makes available (0 to 1).",
            MEMORY_SHARE,
            _float,
        ),
        Family(
            "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS",
            "gauge",
            "Name of DCGM_FI_DEV_CLOCKS_EVENT_REASONS before DCGM 3.3 (bitmask).",
            "throttle_reasons_bitmask",
            str,
        ),
        Family(
            "DCGM_FI_PROF_NVLINK_TX_BYTES",
            "gauge",
            "Data sent over all NVLinks (bytes/s).",
            "nvlink_tx_bytes_per_second",
            _float,
        ),
        Family(
            "DCGM_FI_PROF_NVLINK_RX_BYTES",
            "gauge",
            "Data received over all NVLinks (bytes/s).",
            "nvlink_rx_bytes_per_second",
            _float,
        ),
        Family(
            "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL",
            "counter",
            "Data over all NVLinks, both ways (KiB).",
            NVLINK,
            _kibibytes,
        ),
        Family(
            "DCGM_FI_PROF_PCIE_TX_BYTES", "gauge", "Data sent over PCIe (bytes/s).", "pcie_tx_bytes_per_second", _float
        ),
        Family(
            "DCGM_FI_PROF_PCIE_RX_BYTES",
            "gauge",
            "Data received over PCIe (bytes/s).",
            "pcie_rx_bytes_per_second",
            _float,
        ),
    ]
    return {family.name: family for family in found}


FAMILIES: Final[dict[str, Family]] = _families()
"""Every series that a device may have, by name."""


def choose(wanted: Sequence[str]) -> list[Family]:
    """Select families by words: `all`, `default` (dcgm-exporter's), names, or globs over them.

    Raises:
        ValueError: a word names none; the message says which.
    """
    chosen: dict[str, Family] = {}
    for word in wanted:
        if word == "all":
            found = list(FAMILIES)
        elif word == "default":
            found = list(DEFAULTS)
        else:
            found = [name for name in FAMILIES if fnmatchcase(name, word)]
        if not found:
            raise ValueError(f"no metric matches {word!r}: use all, default, or names and globs such as DCGM_FI_DEV_*")
        chosen.update((name, FAMILIES[name]) for name in found)
    return list(chosen.values())
