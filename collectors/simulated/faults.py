"""Faults of a simulated fleet, drawn by seed: Xid and ECC events, heat and lost devices, with effects and repair."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from ...schemas.telemetry import Severity
from ..source import Emit, SourceEvent
from .columns import Counters
from .fleet import Fleet
from .jobs import uniform

SLOT_SECONDS: Final = 60.0
REPAIR_SECONDS: Final = 600.0
"""Simulation time until someone has reset or swapped a device."""


class _Fault(Struct, frozen=True):
    weight: float
    kind: str
    code: int
    severity: Severity
    message: str
    lost: bool = False
    gone: bool = False


OBSTRUCTED: Final = 3.0
"""Factor on the thermal resistance of a device while its airflow is blocked."""
# Meanings as in NVIDIA's Xid catalog; shares are a guess at a well-run fleet's.
_FAULTS: Final = (
    _Fault(40, "ecc", 0, Severity.INFO, "corrected memory errors"),
    _Fault(20, "xid", 31, Severity.APPLICATION, "Xid 31: memory page fault of a program"),
    _Fault(15, "xid", 13, Severity.APPLICATION, "Xid 13: graphics engine exception of a program"),
    _Fault(10, "xid", 43, Severity.APPLICATION, "Xid 43: a program's channel was stopped"),
    _Fault(5, "xid", 94, Severity.APPLICATION, "Xid 94: contained memory error; the program was ended"),
    _Fault(4, "xid", 63, Severity.WARNING, "Xid 63: a memory row was remapped"),
    _Fault(3, "xid", 48, Severity.RESET, "Xid 48: double bit ECC error"),
    _Fault(1, "xid", 64, Severity.RESET, "Xid 64: a memory row could not be remapped"),
    _Fault(2, "air", 0, Severity.WARNING, "the air does not flow: the device gets hot under load"),
    _Fault(2, "xid", 119, Severity.RESET, "Xid 119: the GPU system processor does not answer"),
    _Fault(1, "xid", 79, Severity.HARDWARE, "Xid 79: the GPU has fallen off the bus", lost=True),
    _Fault(1, "xid", 79, Severity.HARDWARE, "Xid 79: the GPU has fallen off the bus", lost=True, gone=True),
)


class Faults:
    """Draws faults, and tracks the devices that are out of order.

    Args:
        fleet: the fleet whose devices fail.
        seed: seed of the draws.
        per_device_day: faults of a device per day, on average.
        counters: counters that faults increase.
    """

    def __init__(self, fleet: Fleet, seed: int, per_device_day: float, counters: Counters) -> None:
        self._fleet = fleet
        self._seed = seed
        self._chance = per_device_day * SLOT_SECONDS / 86400.0
        self._counters = counters
        self._slot = 0
        weights = np.array([fault.weight for fault in _FAULTS])
        self._edges = np.cumsum(weights / weights.sum())
        self._repairs: dict[int, float] = {}
        self._mended: dict[int, float] = {}
        self.air: npt.NDArray[np.float64] = np.ones(len(fleet.uuids))
        """Factor on the thermal resistance of each device."""
        self.gone: frozenset[int] = frozenset()
        """Indices of devices that their hosts no longer list."""
        self._lost: npt.NDArray[np.bool_] = np.zeros(len(fleet.uuids), dtype=np.bool_)

    def step(self, time: float, time_ns: int, emit: Emit) -> npt.NDArray[np.bool_]:
        """Draw the faults up to a simulation time; returns the mask of devices that can't be read."""
        slot = int(time / SLOT_SECONDS)
        for missed in range(max(self._slot, slot - 100) + 1, slot + 1):
            self._draw(missed, time, time_ns, emit)
        self._slot = slot
        for device in [device for device, due in self._repairs.items() if time >= due]:
            del self._repairs[device]
            kind = "device_returned" if self._lost[device] else "reset"
            self._lost[device] = False
            self.gone -= {device}
            self._renew(device)
            self._tell(emit, device, time_ns, kind, Severity.CLEARED, 0, "the device was reset and is well")
        for device in [device for device, due in self._mended.items() if time >= due]:
            del self._mended[device]
            self._counters.remap_pending[device] = 0
            self.air[device] = 1.0
        return self._lost

    def _renew(self, device: int) -> None:
        """Set the counters of a device to 0 that a reset clears."""
        counters = self._counters
        for counts in (
            counters.ecc_corrected_volatile,
            counters.ecc_uncorrected_volatile,
            counters.remap_pending,
            counters.remap_failure,
        ):
            counts[device] = 0

    def _draw(self, slot: int, time: float, time_ns: int, emit: Emit) -> None:
        if self._chance <= 0:
            return
        size = len(self._fleet.uuids)
        hit = uniform(self._seed + 21, slot, size) < self._chance
        if not hit.any():
            return
        which = np.searchsorted(self._edges, uniform(self._seed + 22, slot, size))
        for device in np.flatnonzero(hit).tolist():
            model = self._fleet.models[device // self._fleet.per_host]
            fault = _FAULTS[min(int(which[device]), len(_FAULTS) - 1)]
            if device in self._repairs or (fault.kind == "ecc" and not model.ecc):
                continue
            if fault.code == 64 and not model.remaps:
                continue
            if fault.kind == "xid" and model.vendor != "nvidia":
                continue
            self._apply(device, fault, time)
            self._tell(emit, device, time_ns, fault.kind, fault.severity, fault.code, fault.message)
            if fault.lost:
                self._tell(emit, device, time_ns, "device_lost", fault.severity, 0, "the device can't be read any more")

    def _apply(self, device: int, fault: _Fault, time: float) -> None:
        counters = self._counters
        if fault.kind == "ecc":
            counters.ecc_corrected[device] += 1 + device % 7
            counters.ecc_corrected_volatile[device] += 1 + device % 7
        elif fault.kind == "air":
            self.air[device] = OBSTRUCTED
            self._mended[device] = time + REPAIR_SECONDS
        elif fault.code in (48, 94):
            counters.ecc_uncorrected[device] += 1
            counters.ecc_uncorrected_volatile[device] += 1
            counters.retired_pages[device] += 1
        elif fault.code == 63:
            counters.remapped_uncorrected[device] += 1
            counters.remap_pending[device] = 1
            self._mended[device] = time + REPAIR_SECONDS
        elif fault.code == 64:
            counters.remap_failure[device] = 1
        if fault.severity in (Severity.RESET, Severity.HARDWARE):
            self._repairs[device] = time + REPAIR_SECONDS
        if fault.lost:
            self._lost[device] = True
        if fault.gone:
            self.gone |= {device}

    def _tell(
        self, emit: Emit, device: int, time_ns: int, kind: str, severity: Severity, code: int, message: str
    ) -> None:
        emit(
            SourceEvent(
                host=self._fleet.hosts[device // self._fleet.per_host],
                time_ns=time_ns,
                kind=kind,
                severity=severity,
                device=self._fleet.uuids[device],
                code=code,
                message=message,
            )
        )
