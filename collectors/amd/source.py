"""The AMD source: one host's devices through amdsmi, by the same catalog and protocol as NVML."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Final

from ...bus.process_identity import lineage
from ...schemas import columns
from ...schemas.telemetry import Inventory, ProcessSample, Severity
from ..agent.tickcolumns import INDEX, TickColumns
from ..identity import Identities
from ..processes import proc
from ..source import Emit, SourceEvent, SourceUnavailable, Tick
from .events import AmdEventThread
from .inventory import Found, discover, processes, topology
from .library import AmdFailure, AmdLibrary
from .plan import AmdPlan

RETURN_SECONDS: Final = 5.0
"""Time between searches for a lost device."""
SILENT_TICKS: Final = 3
SILENT_SECONDS: Final = 1.0
"""A device is lost once no call to it succeeds for this time and for `SILENT_TICKS` ticks."""
_USED: Final = INDEX["memory_used_bytes"]
_TOTAL: Final = INDEX["memory_total_bytes"]
_FREE: Final = INDEX["memory_free_bytes"]


class _Device:
    def __init__(self, library: AmdLibrary, found: Found) -> None:
        self.found = found
        self.plan = AmdPlan(library, found.handle, found.info.uuid)
        self.heard = monotonic()
        self.silent = 0

    def read(self, now: float) -> list[int] | None:
        """Read what is due; returns the indices of the metrics that were read, or None if the device is lost."""
        answered, fresh = self.plan.read(now)
        if answered or not self.plan.asks:
            self.silent, self.heard = 0, now
        else:
            self.silent += 1
            if self.silent >= SILENT_TICKS and now - self.heard >= SILENT_SECONDS:
                return None
        values = self.plan.values
        used, total = values[_USED], values[_TOTAL]
        values[_FREE] = max(total - used, 0) if used is not None and total is not None else None
        return [*fresh, _FREE]


class AmdSource:
    """AMD devices of this host (`collectors.source.Source`).

    Args:
        host: the host's name as in subjects.
        labels: labels of the host, set by the operator.
        with_commands: publish the command lines of processes; they often hold secrets.
        with_events: wait for the driver's events in a thread.

    Attributes:
        identifies_processes: as in `ProcessBatch.identified`.
        impossible: number of values from the driver that their metric can't have, by metric.
    """

    name = "amdsmi"

    def __init__(
        self,
        host: str,
        labels: dict[str, str] | None = None,
        *,
        with_commands: bool = False,
        with_events: bool = True,
    ) -> None:
        self.host = host
        self.labels = labels or {}
        self._table = proc.ProcessTable(with_commands=with_commands)
        self.identifies_processes = self._table.identifies
        self._with_events = with_events
        self._library: AmdLibrary | None = None
        self._emit: Emit = _ignore
        self._identities = Identities(host)
        self._devices: list[_Device] = []
        self._lost: list[_Device] = []
        self._return_due = 0.0
        self._errors_before = 0
        self._events: AmdEventThread | None = None
        self._columns = TickColumns()
        self.impossible: Counter[str] = Counter()
        self.unreadable: list[str] = []
        """Devices whose processes the last `processes` could not list."""

    @property
    def read_errors(self) -> int:
        """Calls that failed with anything but "not supported", since the start."""
        return self._errors_before + sum(device.plan.errors for device in self._devices)

    def open(self, emit: Emit) -> None:
        """See `Source.open`."""
        self._library = AmdLibrary(self.impossible)
        self._emit = emit
        self._lost = []
        try:
            found = discover(self._library, self.host, self._identities)
            if not found:
                raise SourceUnavailable("the amdgpu driver shows no device")
            self._take(self._library, found)
        except AmdFailure as failure:
            self.close()
            raise SourceUnavailable(str(failure)) from failure
        except SourceUnavailable:
            self.close()
            raise
        for device in self._devices:
            self._tell("device_started", Severity.CLEARED, "the device is watched", device.found)

    def inventory(self) -> Sequence[Inventory]:
        """See `Source.inventory`."""
        library = self._opened()
        try:
            found = discover(library, self.host, self._identities)
            lost = {one.found.info.uuid for one in self._lost}
            known = {device.found.info.uuid for device in self._devices} | lost
            if {one.info.uuid for one in found} - known:
                self._take(library, [one for one in found if one.info.uuid not in lost])
            everything = sorted(
                (device.found for device in (*self._devices, *self._lost)), key=lambda one: one.info.index
            )
            links = topology(library, everything)
        except AmdFailure as failure:
            raise SourceUnavailable(str(failure)) from failure
        driver = everything[0].info.driver if everything else ""
        return [
            Inventory(
                host=proc.host_info(self.host, self.labels, driver),
                agent="",
                time_ns=time.time_ns(),
                devices=[one.info for one in everything],
                links=links,
                source=self.name,
            )
        ]

    def read(self) -> Sequence[Tick]:
        """See `Source.read`."""
        library = self._opened()
        now = monotonic()
        times: list[int] = []
        fresh: set[int] = set()
        try:
            if self._lost and now >= self._return_due:
                self._return_due = now + RETURN_SECONDS
                self._find_lost(library)
            for device in list(self._devices):
                at = time.time_ns()
                read = device.read(now)
                if read is None:
                    self._lose(device)
                    continue
                fresh.update(read)
                times.append(at)
        except AmdFailure as failure:
            raise SourceUnavailable(str(failure)) from failure
        if not self._devices:
            return []
        self._columns.update([device.plan.values for device in self._devices], fresh)
        return [
            Tick(
                host=self.host,
                devices=[device.found.info.uuid for device in self._devices],
                times_ns=columns.pack_times(times),
                columns=self._columns.columns.copy(),
                nulls=self._columns.nulls.copy(),
            )
        ]

    def processes(self) -> dict[str, list[ProcessSample]]:
        """See `Source.processes`."""
        library = self._opened()
        try:
            listed = {d.found.info.uuid: processes(library, d.found, self._table) for d in self._devices}
        except AmdFailure as failure:
            raise SourceUnavailable(str(failure)) from failure
        self.unreadable = [uuid for uuid, found in listed.items() if found is None]
        return {self.host: [process for found in listed.values() for process in found or ()]}

    def ancestry(self, pids: Iterable[int]) -> dict[int, list[str]]:
        """See `HostSource.ancestry`."""
        return {pid: list(lineage(pid)) for pid in pids} if self.identifies_processes else {}

    def close(self) -> None:
        """See `Source.close`."""
        if self._events is not None:
            self._events.close()
            self._events = None
        self._errors_before = self.read_errors
        self._devices = []
        self._lost = []
        if self._library is not None:
            self._library.close()
        self._library = None

    def _opened(self) -> AmdLibrary:
        if self._library is None:
            raise SourceUnavailable("the source is not open")
        return self._library

    def _take(self, library: AmdLibrary, found: list[Found]) -> None:
        if self._events is not None:
            self._events.close()
        self._errors_before = self.read_errors
        self._devices = [_Device(library, one) for one in found]
        self._columns.relaid(len(self._devices))
        self._events = AmdEventThread(library, self.host, found, self._emit) if self._with_events else None

    def _lose(self, device: _Device) -> None:
        self._errors_before += device.plan.errors
        self._devices.remove(device)
        self._lost.append(device)
        self._columns.relaid(len(self._devices))
        self._return_due = monotonic() + RETURN_SECONDS
        info = device.found.info
        self._tell(
            "device_lost", Severity.HARDWARE, f"{info.name} at {info.pcie_address} does not answer", device.found
        )

    def _find_lost(self, library: AmdLibrary) -> None:
        back = [one for one in self._lost if one.plan.answers()]
        if not back:
            return
        self._lost = [one for one in self._lost if one not in back]
        here = sorted((device.found for device in (*self._devices, *back)), key=lambda one: one.info.index)
        self._take(library, here)
        for one in back:
            self._tell("device_returned", Severity.CLEARED, f"{one.found.info.name} answers again", one.found)

    def _tell(self, kind: str, severity: Severity, message: str, found: Found) -> None:
        self._emit(
            SourceEvent(
                host=self.host,
                time_ns=time.time_ns(),
                kind=kind,
                severity=severity,
                device=found.info.uuid,
                message=message,
            )
        )


def _ignore(_event: SourceEvent) -> None:
    return
