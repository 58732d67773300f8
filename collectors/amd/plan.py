"""Read schedule of one AMD device, compiled from the catalog as that of an NVIDIA device is."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from ...schemas.metrics import METRICS
from ...schemas.rows import CADENCE_SECONDS, Cadence, Call
from ..agent.tickcolumns import INDEX, NAMES, Values
from ..retry import Retry
from .library import DRIVER_GONE, LATER, UNSUPPORTED, AmdFailure, AmdLibrary

log = logging.getLogger("corral.collector.amd")

_PCIE_GENERATIONS: Final = {2500: 1, 5000: 2, 8000: 3, 16000: 4, 32000: 5, 64000: 6}
"""PCIe generation by the speed of a lane in millions of transfers a second."""
_POWER_CAP: Final = 0x4
_THERMAL: Final = 0x20
_HARDWARE_THERMAL: Final = 0x40
_REASONS: Final = (
    ("active_ppt_pwr", _POWER_CAP),
    ("active_socket_thrm", _THERMAL),
    ("active_vr_thrm", _THERMAL),
    ("active_hbm_thrm", _THERMAL),
    ("active_prochot_thrm", _HARDWARE_THERMAL),
)
"""amdsmi's violations, with the bits of the corresponding throttle reasons of NVML."""

Take = Callable[[Any], float | int | None]


class Reading:
    """One call, with the metrics that are taken from its answer."""

    def __init__(self, name: str, function: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.function = function
        self.args = args
        self.takes: list[tuple[int, Take]] = []
        self.seconds = math.inf
        self.due = -math.inf


class AmdPlan:
    """Read schedule of one device.

    Args:
        library: amdsmi.
        handle: handle of the device.
        label: name of the device in log messages.

    Attributes:
        values: the last value of each metric, in the order of the catalog; None where null.
        errors: calls that failed with anything but "not supported".
    """

    def __init__(self, library: AmdLibrary, handle: Any, label: str) -> None:
        self.values: Values = [None] * len(NAMES)
        self.errors = 0
        self._library = library
        self._handle = handle
        self._label = label
        self._logged: set[tuple[str, int | None]] = set()
        self._readings: dict[str, Reading] = {}
        self._missing: set[str] = set(METRICS)
        self._compile()
        self._retry = Retry(time.monotonic())

    def _compile(self) -> None:
        """Find a way to read each metric that has none yet, and schedule it."""
        tried: dict[str, Any] = {}
        for name, metric in METRICS.items():
            if name in self._missing and any(
                self._add(name, call, metric.row.cadence, tried) for call in metric.row.amd
            ):
                self._missing.discard(name)
        for name, function, take in _DERIVED:
            if name in self._missing and self._add_take(name, Call(function), METRICS[name].row.cadence, tried, take):
                self._missing.discard(name)

    def _add(self, name: str, call: Call, cadence: Cadence, tried: dict[str, Any]) -> bool:
        return self._add_take(name, call, cadence, tried, _path(call))

    def _add_take(self, name: str, call: Call, cadence: Cadence, tried: dict[str, Any], take: Take) -> bool:
        """Schedule a metric by a call; False if the device does not give it that way."""
        key = "/".join([call.function, *map(str, call.args)])
        args = [self._library.constant(arg) if isinstance(arg, str) else arg for arg in call.args]
        if None in args:
            return False
        if key not in tried:
            tried[key] = self._try(call.function, args)
        answer = tried[key]
        if isinstance(answer, AmdFailure):
            if answer.code in UNSUPPORTED or answer.code is None:
                return False
        elif take(answer) is None:
            return False
        reading = self._readings.setdefault(key, Reading(key, call.function, tuple(args)))
        reading.seconds = min(reading.seconds, CADENCE_SECONDS[cadence])
        reading.takes.append((INDEX[name], _bounded(name, take, self._library.impossible)))
        return True

    def _try(self, function: str, args: list[Any]) -> Any:
        try:
            return self._library.call(function, self._handle, *args)
        except AmdFailure as failure:
            if failure.code in DRIVER_GONE:
                raise
            return failure

    @property
    def asks(self) -> bool:
        """True if it makes calls at each tick."""
        return any(reading.seconds == 0 for reading in self._readings.values())

    def answers(self) -> bool:
        """Make the calls of each tick; True if any of them has an answer. Without such calls, all others are made.

        Raises:
            AmdFailure: the driver is gone.
        """
        asked = [reading for reading in self._readings.values() if reading.seconds == 0]
        for reading in asked or list(self._readings.values()):
            answer = self._try(reading.function, list(reading.args))
            if not isinstance(answer, AmdFailure) or answer.code in LATER:
                return True
        return False

    def read(self, now: float) -> tuple[int, list[int]]:
        """Read what is due.

        Args:
            now: time on the monotonic clock.

        Returns:
            Number of calls that gave a value or said that there is none now, and the indices of the metrics that were
            read.

        Raises:
            AmdFailure: the driver is gone.
        """
        answered = 0
        fresh: list[int] = []
        if now >= self._retry.due:  # refused calls are retried, less and less often
            self._compile()
            self._retry.refused(now)
        for reading in list(self._readings.values()):
            if now < reading.due:
                continue
            reading.due = now + reading.seconds * 0.95  # as for NVML: ticks jitter
            try:
                answer = self._library.call(reading.function, self._handle, *reading.args)
                answered += 1
            except AmdFailure as failure:
                answer = None
                answered += failure.code in LATER
                self._failed(reading, failure)
            for at, take in reading.takes:
                self.values[at] = None if answer is None else take(answer)
                fresh.append(at)
        return answered, fresh

    def _failed(self, reading: Reading, failure: AmdFailure) -> None:
        if failure.code in DRIVER_GONE:
            raise failure
        if failure.code in LATER:
            return
        if failure.code in UNSUPPORTED:
            # Files of a device that has gone are not found either: only silence of all calls tells the two apart.
            reading.due += 10.0
            return
        self.errors += 1
        if (reading.name, failure.code) not in self._logged:
            self._logged.add((reading.name, failure.code))
            log.warning("%s: %s (logged once)", self._label, failure)


def _path(call: Call) -> Take:
    steps = call.attribute.split(".") if call.attribute else []

    def take(answer: Any) -> float | int | None:
        value: Any = answer
        for step in steps:
            if step == "len":
                value = len(value) if isinstance(value, list) else None
            elif isinstance(value, dict):
                value = value.get(step)
            else:
                return None
        # "N/A" is what amdsmi gives for the numbers that a device does not have.
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value * call.scale if call.scale != 1 else value

    return take


def _bounded(name: str, take: Take, impossible: Counter[str]) -> Take:
    metric = METRICS[name]
    low = -math.inf if metric.minimum is None else metric.minimum
    high = math.inf if metric.maximum is None else metric.maximum

    def bounded(answer: Any) -> float | int | None:
        value = take(answer)
        if value is None:
            return None
        if not low <= value <= high:
            impossible[name] += 1
            return None
        return round(value) if metric.integer else value

    return bounded


def _energy(answer: Any) -> float | None:
    """Energy in millijoules: the counter times its resolution in microjoules."""
    count, resolution = answer.get("energy_accumulator"), answer.get("counter_resolution")
    return count * resolution / 1000 if count and resolution else None


def _generation(answer: Any) -> int | None:
    speed = answer.get("pcie_metric", {}).get("pcie_speed")
    return _PCIE_GENERATIONS.get(speed) if isinstance(speed, int) else None


def _throttle(answer: Any) -> int | None:
    known = [(answer.get(field), bit) for field, bit in _REASONS]
    if all(not isinstance(value, bool | int) for value, _ in known):
        return None
    bits = 0
    for value, bit in known:
        if isinstance(value, bool | int) and value:
            bits |= bit
    return bits


_DERIVED: Final[tuple[tuple[str, str, Take], ...]] = (
    ("energy_millijoules", "amdsmi_get_energy_count", _energy),
    ("pcie_generation", "amdsmi_get_pcie_info", _generation),
    ("throttle_reasons_bitmask", "amdsmi_get_violation_status", _throttle),
)
"""Metrics that are computed from an answer, instead of taken from one number in it."""
