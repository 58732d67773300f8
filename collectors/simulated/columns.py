"""Columns of the ticks of simulated hosts, from arrays over the whole fleet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...schemas.metrics import METRICS
from ..source import Tick
from .fleet import Fleet
from .jobs import Floats
from .models import Model
from .physics import Physics

Array = npt.NDArray[Any]

_RESERVED: Final = 0.006
"""Share of a device's memory that the driver reserves."""


class Counters:
    """Counters that grow with events rather than with load, one value per device each."""

    def __init__(self, size: int) -> None:
        self.ecc_corrected: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.ecc_uncorrected: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        # Since the driver was loaded or the device reset.
        self.ecc_corrected_volatile: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.ecc_uncorrected_volatile: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.remapped_corrected: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.remapped_uncorrected: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.remap_pending: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.remap_failure: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.retired_pages: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.pcie_replays: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)


class Columns:
    """Cuts the fleet's arrays into ticks.

    Columns that never change are packed once for each host. The others are computed and packed for the whole fleet at
    once, and each host gets its part of the bytes.
    """

    def __init__(self, fleet: Fleet, physics: Physics) -> None:
        self._fleet = fleet
        self._physics = physics
        count = fleet.per_host
        size = len(fleet.uuids)
        self.total: Floats = np.repeat(np.array([float(model.memory_bytes) for model in fleet.models]), count)
        self.reserved: Floats = np.floor(self.total * _RESERVED)
        self._memory_clock: Floats = np.repeat(np.array([float(model.memory_clock) for model in fleet.models]), count)
        self._fixed = [_fixed(model, count) for model in fleet.models]
        self._without = [_without(model) for model in fleet.models]
        self._devices = [fleet.uuids[at * count : (at + 1) * count] for at in range(len(fleet.hosts))]
        self._memory_bound: Floats = 0.35 + 0.5 * ((np.arange(size, dtype=np.float64) * 0.618034) % 1.0)

    def ticks(self, time_ns: int, used: Floats, counters: Counters, lost: npt.NDArray[np.bool_]) -> list[Tick]:
        """Make one tick of every host, except hosts whose devices are all lost.

        Args:
            time_ns: time of reading.
            used: device memory in use, bytes.
            counters: counters that events have increased.
            lost: mask of devices that can't be read, which are left out.
        """
        count = self._fleet.per_host
        moving = {name: _pack(name, values) for name, values in self._moving(used, counters).items()}
        sizes = {name: len(raw) // len(self._fleet.hosts) for name, raw in moving.items()}
        times = np.full(count, time_ns, dtype="<i8").tobytes()
        broken = set(np.flatnonzero(lost.reshape(-1, count).any(axis=1)).tolist()) if lost.any() else set[int]()
        ticks: list[Tick] = []
        for at, host in enumerate(self._fleet.hosts):
            without = self._without[at]
            columns = {
                name: raw[at * sizes[name] : (at + 1) * sizes[name]]
                for name, raw in moving.items()
                if name not in without
            }
            columns.update(self._fixed[at])
            if at in broken:
                kept = np.flatnonzero(~lost[at * count : (at + 1) * count])
                if len(kept):
                    ticks.append(_only(host, self._devices[at], times, columns, kept))
            else:
                ticks.append(Tick(host=host, devices=self._devices[at], times_ns=times, columns=columns))
        return ticks

    def _moving(self, used: Floats, counters: Counters) -> dict[str, Array]:
        physics = self._physics
        utilization = physics.utilization * 100
        busy = physics.utilization > 0
        memory_utilization = utilization * self._memory_bound
        clock = physics.clock * physics.sm_clock_max
        traffic = physics.traffic
        pcie = physics.utilization * 1.5e9 + busy * 2e6
        return {
            "gpu_utilization_percent": utilization,
            "memory_utilization_percent": memory_utilization,
            "memory_used_bytes": used,
            "memory_free_bytes": self.total - self.reserved - used,
            "power_watts": physics.power,
            "energy_millijoules": physics.energy,
            # Sensors give whole degrees.
            "temperature_celsius": np.round(physics.temperature),
            # Memory beside the die is cooled last.
            "memory_temperature_celsius": np.round(
                physics.temperature + 4 * physics.obstructed + 0.08 * memory_utilization
            ),
            "sm_clock_megahertz": np.round(clock / 15) * 15,
            "memory_clock_megahertz": np.where(busy, self._memory_clock, np.minimum(self._memory_clock, 405)),
            "video_clock_megahertz": np.round(clock * 0.9 / 15) * 15,
            "throttle_reasons_bitmask": physics.throttle,
            "pcie_rx_bytes_per_second": pcie,
            "pcie_tx_bytes_per_second": pcie * 0.4,
            "nvlink_rx_bytes": traffic,
            "nvlink_tx_bytes": traffic,
            "ecc_corrected_count": counters.ecc_corrected,
            "ecc_uncorrected_count": counters.ecc_uncorrected,
            "ecc_corrected_volatile_count": counters.ecc_corrected_volatile,
            "ecc_uncorrected_volatile_count": counters.ecc_uncorrected_volatile,
            "remapped_rows_pending": counters.remap_pending,
            "remapped_rows_failure": counters.remap_failure,
            "retired_pages_pending": counters.remap_pending,
            "remapped_rows_corrected_count": counters.remapped_corrected,
            "remapped_rows_uncorrected_count": counters.remapped_uncorrected,
            "retired_pages_count": counters.retired_pages,
            "pcie_replay_count": counters.pcie_replays,
            "power_violation_nanoseconds": physics.power_capped * 1e9,
            "thermal_violation_nanoseconds": physics.heat_held * 1e9,
            "graphics_active_percent": utilization,
            "nvlink_rx_bytes_per_second": physics.traffic_rate,
            "nvlink_tx_bytes_per_second": physics.traffic_rate,
            # Shares of the load that well-tuned training reaches; the load itself says only that a kernel ran.
            "sm_active_percent": utilization * 0.82,
            "sm_occupancy_percent": utilization * 0.38,
            "tensor_active_percent": utilization * 0.41 * physics.clock,
            "dram_active_percent": memory_utilization * 0.9,
            "fan_percent": np.clip((physics.temperature - 40) * 2.2, 0, 100).round(),
            "performance_state": np.where(busy, 0, 8),
        }


def _fixed(model: Model, count: int) -> dict[str, bytes]:
    reserved = np.floor(model.memory_bytes * _RESERVED)
    values: dict[str, float] = {
        "memory_total_bytes": model.memory_bytes,
        "memory_reserved_bytes": reserved,
        "power_limit_watts": model.power_limit,
        "power_limit_max_watts": model.power_limit,
        "temperature_slowdown_celsius": model.slowdown,
        "sm_clock_max_megahertz": model.sm_clock,
        "memory_clock_max_megahertz": model.memory_clock,
        "video_clock_max_megahertz": round(model.sm_clock * 0.9),
        "encoder_utilization_percent": 0,
        "decoder_utilization_percent": 0,
        "pcie_generation": model.pcie_generation,
        "pcie_width": 16,
    }
    return {name: _pack(name, np.full(count, value)) for name, value in values.items()}


def _without(model: Model) -> frozenset[str]:
    """Metrics that a product does not have."""
    supported: dict[str, Callable[[Model], bool]] = {
        "memory_temperature_celsius": lambda m: m.hbm,
        "nvlink_rx_bytes": lambda m: m.nvlinks > 0 and m.vendor == "nvidia",
        "nvlink_tx_bytes": lambda m: m.nvlinks > 0 and m.vendor == "nvidia",
        "ecc_corrected_count": lambda m: m.ecc,
        "ecc_uncorrected_count": lambda m: m.ecc,
        "ecc_corrected_volatile_count": lambda m: m.ecc,
        "ecc_uncorrected_volatile_count": lambda m: m.ecc,
        "remapped_rows_pending": lambda m: m.remaps,
        "remapped_rows_failure": lambda m: m.remaps,
        "retired_pages_pending": lambda m: not m.remaps and m.ecc,
        "remapped_rows_corrected_count": lambda m: m.remaps,
        "remapped_rows_uncorrected_count": lambda m: m.remaps,
        "retired_pages_count": lambda m: not m.remaps and m.ecc,
        "fan_percent": lambda m: m.fan,
        "performance_state": lambda m: m.vendor == "nvidia",
        "power_violation_nanoseconds": lambda m: m.vendor == "nvidia",
        "thermal_violation_nanoseconds": lambda m: m.vendor == "nvidia",
        # The performance monitor came with Hopper.
        "graphics_active_percent": lambda m: m.architecture == "Hopper",
        "nvlink_rx_bytes_per_second": lambda m: m.architecture == "Hopper",
        "nvlink_tx_bytes_per_second": lambda m: m.architecture == "Hopper",
        "sm_active_percent": lambda m: m.architecture == "Hopper",
        "sm_occupancy_percent": lambda m: m.architecture == "Hopper",
        "tensor_active_percent": lambda m: m.architecture == "Hopper",
        "dram_active_percent": lambda m: m.architecture == "Hopper",
        "video_clock_megahertz": lambda m: m.vendor == "nvidia",
    }
    return frozenset(name for name, has in supported.items() if not has(model))


def _pack(name: str, values: Array) -> bytes:
    dtype = METRICS[name].row.unit.dtype
    return values.astype(dtype).tobytes()


def _only(host: str, devices: list[str], times: bytes, columns: dict[str, bytes], kept: npt.NDArray[np.int64]) -> Tick:
    """Make a tick of the kept devices alone, without those that can't be read."""

    def take(raw: bytes, dtype: str) -> bytes:
        return np.frombuffer(raw, dtype=dtype)[kept].tobytes()

    return Tick(
        host=host,
        devices=[devices[at] for at in kept.tolist()],
        times_ns=take(times, "<i8"),
        columns={name: take(raw, METRICS[name].row.unit.dtype) for name, raw in columns.items()},
    )
