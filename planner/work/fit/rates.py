"""Rates of devices: memory bandwidth and floating-point operations a second, measured or from data sheets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ....schemas.models.serving import DeviceRate
from ....schemas.telemetry import DeviceInfo
from ....schemas.values import globs

OPERATIONS_PER_CLOCK: Final[dict[str, int]] = {
    "6.0": 256,
    "6.1": 256,
    "7.0": 1024,
    "7.2": 1024,
    "7.5": 1024,
    "8.0": 2048,
    "8.6": 1024,
    "8.7": 1024,
    "8.9": 1024,
    "9.0": 4096,
    "10.0": 8192,
    "10.3": 8192,
    "12.0": 1024,
}
"""Dense 16-bit floating-point operations of one streaming multiprocessor in one clock, by compute capability.

From NVIDIA's white papers: V100 125 TFLOP/s = 80 × 1,530 MHz × 1,024; T4 65 = 40 × 1,590 × 1,024; A100 312 = 108 ×
1,410 × 2,048; A10 125 = 72 × 1,695 × 1,024; L4 121 = 58 × 2,040 × 1,024; H100 989 = 132 × 1,830 × 4,096; B200 2,250 ≈
148 × 1,850 × 8,192. Before 7.0 without tensor cores.
"""
_AMD: Final[dict[str, int]] = {"gfx908": 1024, "gfx90a": 1024, "gfx942": 2048, "cdna 2": 1024, "cdna 3": 2048}
"""The same of one compute unit, by a part of the architecture's name.

From AMD's data sheets: MI100 184.6 TFLOP/s = 120 × 1,502 MHz × 1,024; MI300X 1,307 = 304 × 2,100 × 2,048.
"""


_NVLINK: Final = (
    ("v100-sxm", 150e9),
    ("a100-sxm", 300e9),
    ("a800-sxm", 200e9),
    ("h100 80gb hbm3", 450e9),
    ("h100-sxm", 450e9),
    ("h800", 200e9),
    ("h200", 450e9),
    ("gh200", 450e9),
    ("b200", 900e9),
    ("b300", 900e9),
)
"""Part of a product's name, with the bytes a second that its NVLinks carry in each direction (NVIDIA's data sheets).

Such devices are sold on boards that link them all. A driver says so, but Corral does not record it yet.
"""


class Rates(NamedTuple):
    """Rates of a device.

    Attributes:
        bytes_per_second: memory bandwidth; 0 if unknown.
        operations_per_second: 16-bit floating-point operations; 0 if unknown.
        source: what they rest on, in words.
        link_bytes_per_second: of its links to like devices of its host, in each direction; 0 if they are not known.
    """

    bytes_per_second: float
    operations_per_second: float
    source: str
    link_bytes_per_second: float = 0.0


def data_sheet(info: DeviceInfo) -> Rates:
    """Peak rates of a device, from what its driver reports; real servers reach less."""
    per_clock = OPERATIONS_PER_CLOCK.get(info.compute_capability, 0)
    if info.vendor == "amd":
        name = info.architecture.lower()
        per_clock = next((count for key, count in _AMD.items() if key in name), 0)
    operations = info.sm_count * info.sm_clock_max_megahertz * 1e6 * per_clock
    name = info.name.lower()
    links = next((rate for part, rate in _NVLINK if part in name), 0.0)
    found = Rates(
        info.memory_bandwidth_bytes_per_second, operations, f"{info.name}: peak rates of the data sheet", links
    )
    return found._replace(source=found.source + _linked(found))


def _linked(rates: Rates) -> str:
    return f", NVLink at {rates.link_bytes_per_second / 1e9:g} GB/s" if rates.link_bytes_per_second else ""


def rates_of(info: DeviceInfo, measured: Sequence[DeviceRate]) -> Rates:
    """Rates of a device: the first measured ones whose glob matches its name, else those of its data sheet."""
    peak = data_sheet(info)
    for rate in measured:
        if globs.matches_any(info.name.lower(), (rate.device.lower(),)):
            return Rates(
                rate.memory_bytes_per_second,
                rate.operations_per_second or peak.operations_per_second,
                f"{info.name}: measured" + (f" ({rate.source})" if rate.source else "") + _linked(peak),
                peak.link_bytes_per_second,
            )
    return peak
