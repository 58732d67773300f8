"""Approximate physics of a simulated fleet: load → clocks and power → temperature, with all devices in one array.

- Power rises from idle with the load and the square of the clock (`P ≈ f · V²`, with the voltage nearly flat in the
  upper range), and is capped at the board's limit by lower clocks.
- Temperature follows power as a first-order low-pass: `T' = (T_ambient + R · P - T) / τ`, solved exactly for each step.
- Above the slowdown temperature clocks are held back until heat and power balance.
- Energy is the integral of power.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from .jobs import Floats, Ints, uniform
from .models import Model

AMBIENT_CELSIUS: Final = 28.0
IDLE_CLOCK_MEGAHERTZ: Final = 345.0
NOISE_SECONDS: Final = 2.0

# NVML clock event reasons (nvml.h, nvmlClocksEventReasons).
GPU_IDLE: Final = 0x1
SW_POWER_CAP: Final = 0x4
SW_THERMAL_SLOWDOWN: Final = 0x20


class Physics:
    """The state of N devices.

    Args:
        models: model of each device.
        cooling: factor on each device's thermal resistance; 1 is a good case, more is hotter.
        seed: seed of the noise.

    Attributes:
        utilization: load of each device, 0 to 1.
        clock: share of the highest clock.
        power: power, W.
        temperature: temperature, °C.
        energy: energy counter, mJ.
        throttle: clock event reasons, as NVML's bits.
        traffic: bytes that have crossed each device's links.
        traffic_rate: bytes per second that cross them now.
        obstructed: temporary factor on each device's thermal resistance; more than 1 where the airflow is blocked.
        power_capped: seconds for which the power limit has held each device's clocks back.
        heat_held: seconds for which heat has held them back.
    """

    def __init__(self, models: Sequence[Model], cooling: Floats, seed: int) -> None:
        self.size = len(models)
        self.seed = seed
        self.sm_clock_max: Floats = np.array([model.sm_clock for model in models], dtype=np.float64)
        self.power_limit: Floats = np.array([model.power_limit for model in models])
        self.idle_power: Floats = np.array([model.idle_power for model in models])
        self.slowdown: Floats = np.array([model.slowdown for model in models])
        hot = np.array([model.hot for model in models])
        self._resistance: Floats = (hot - AMBIENT_CELSIUS) / self.power_limit * cooling
        self._time_constant: Floats = np.array([model.time_constant for model in models])
        self._idle_clock: Floats = IDLE_CLOCK_MEGAHERTZ / self.sm_clock_max
        links = np.array([model.nvlinks for model in models], dtype=np.float64)
        self._link_rate: Floats = links * 25e9 * 0.15
        self.utilization: Floats = np.zeros(self.size)
        self.clock: Floats = self._idle_clock.copy()
        self.power: Floats = self.idle_power.copy()
        self.temperature: Floats = AMBIENT_CELSIUS + self._resistance * self.power
        # Boards are not new: their counters do not start at 0.
        self.energy: Floats = uniform(seed, -1, self.size) * self.power_limit * 1e3 * 86400 * 20
        self.throttle: Ints = np.full(self.size, GPU_IDLE, dtype=np.int64)
        self.traffic: Floats = uniform(seed, -2, self.size) * self._link_rate * 3600
        self.traffic_rate: Floats = np.zeros(self.size)
        self.obstructed: Floats = np.ones(self.size)
        self.power_capped: Floats = np.zeros(self.size)
        self.heat_held: Floats = np.zeros(self.size)
        self._hold: Floats = np.ones(self.size)

    def step(self, load: Floats, time: float, seconds: float) -> None:
        """Advance the simulation by one step.

        Args:
            load: demand for each device's time, 0 to 1.
            time: simulation time at the end of the step, s.
            seconds: length of the step; long ones are taken in parts of 5 s at most, but in no more than 200 parts.
        """
        parts = max(1, min(int(np.ceil(seconds / 5.0)), 200))
        for _ in range(parts):
            self._step(load, time, seconds / parts)

    def _step(self, load: Floats, time: float, seconds: float) -> None:
        noise = uniform(self.seed, int(time / NOISE_SECONDS), self.size) - 0.5
        busy = load > 0.005
        follow = 1.0 - np.exp(-seconds / 0.7)
        wanted = np.where(busy, np.clip(load * (1.0 + 0.06 * noise), 0.0, 1.0), 0.0)
        self.utilization += (wanted - self.utilization) * follow
        self.utilization[(self.utilization < 0.004) & ~busy] = 0.0
        # Heat: hold the clocks back in proportion to the excess, let go slowly below it.
        excess = self.temperature - self.slowdown
        self._hold = np.clip(self._hold - np.maximum(excess, -1.0) * 0.02 * min(seconds, 2.0), 0.4, 1.0)
        hot = self._hold < 0.995
        # Power: the highest clock that the limit allows at this load.
        span = self.power_limit * 1.06 - self.idle_power
        room = (self.power_limit - self.idle_power) / np.maximum(span * self.utilization, 1e-9)
        capped = np.minimum(np.sqrt(room), 1.0)
        top = np.minimum(self._hold, capped)
        self.clock = np.where(self.utilization > 0.0, top, self._idle_clock)
        base = np.where(self.utilization > 0.0, 0.07 * span, 0.0)
        draw = self.idle_power + base * (1 - self.utilization) + span * self.utilization * self.clock**2
        self.power = np.minimum(draw * (1.0 + 0.02 * noise), self.power_limit * 1.01)
        settled = AMBIENT_CELSIUS + self._resistance * self.obstructed * self.power
        self.temperature += (settled - self.temperature) * (1.0 - np.exp(-seconds / self._time_constant))
        self.energy += self.power * (1e3 * seconds)
        self.traffic_rate = self._link_rate * self.utilization
        self.traffic += self.traffic_rate * seconds
        running = self.utilization > 0.0
        hot &= running
        short = (capped < 0.999) & running
        self.heat_held += hot * seconds
        self.power_capped += short * seconds
        self.throttle = np.where(running, hot * SW_THERMAL_SLOWDOWN + short * SW_POWER_CAP, GPU_IDLE).astype(np.int64)
