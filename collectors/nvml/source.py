"""The NVML source: one host's NVIDIA devices as ticks, inventory, processes and events."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any, Final

from ...bus import process_identity
from ...schemas import columns
from ...schemas.telemetry import Inventory, ProcessSample, Severity
from ..agent.tickcolumns import TickColumns
from ..identity import Identities
from ..processes import proc
from ..source import Emit, SourceEvent, SourceUnavailable, Tick
from .device import SILENCE, Device
from .events import EventThread
from .fabric import DOMAIN_LABEL, nvlink_domain
from .inventory import Found, Split, discover, handle_of, layout
from .library import DRIVER_GONE, LOST, Library, NvmlFailure
from .links import nvlinks, topology
from .plan import answers
from .processes import ProcessReader

log = logging.getLogger("corral.collector.nvml")

RETURN_SECONDS: Final = 5.0
"""Time between searches for a lost device."""
LAYOUT_SECONDS: Final = 10.0
"""Time between checks of the MIG layout, where no event has reported a change."""
BLOCKING_SECONDS: Final = 10.0
"""Time between the calls that take tens of milliseconds."""


class NvmlSource:
    """NVIDIA devices of this host (`collectors.source.Source`).

    Args:
        host: the host's name as in subjects.
        labels: labels of the host, set by the operator; they replace those that are found.
        with_commands: publish the command lines of processes; they often hold secrets.
        with_events: wait for the driver's events in a thread.

    Attributes:
        read_errors: NVML calls that failed with anything but "not supported", since the start.
        identifies_processes: as in `ProcessBatch.identified`.
        impossible: number of values from the driver that their metric can't have, by metric.
    """

    name = "nvml"

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
        self.identifies_processes = process_identity.sees_host_processes()
        self._with_commands = with_commands
        self._with_events = with_events
        self._errors_before = 0
        self._library: Library | None = None
        self._emit: Emit = _ignore
        self._identities = Identities(host)
        self._devices: list[Device] = []
        self._lost: list[Found] = []
        self._told_unreachable: set[int] = set()
        self._told_lost: set[str] = set()
        self._fallen: set[str] = set()
        self._events: EventThread | None = None
        self._processes: ProcessReader | None = None
        self._layout: dict[str, Split] = {}
        self._layout_changed = threading.Event()
        self._layout_due = 0.0
        self._return_due = 0.0
        self._aside: threading.Thread | None = None
        self._aside_stop = threading.Event()
        self._columns = TickColumns()
        self.impossible: Counter[str] = Counter()

    @property
    def read_errors(self) -> int:
        """NVML calls that failed with anything but "not supported", since the start."""
        processes = self._processes.errors if self._processes is not None else 0
        return self._errors_before + processes + sum(device.plan.errors for device in self._devices)

    @property
    def unreadable(self) -> Sequence[str]:
        """Uuids of the devices whose processes can't be listed, or not all of them."""
        return self._processes.unreadable if self._processes is not None else ()

    # -- the protocol

    def open(self, emit: Emit) -> None:
        """See `Source.open`."""
        self._library = Library(self.impossible)
        self._emit = emit
        self._told_unreachable.clear()
        self._told_lost.clear()
        self._fallen.clear()
        self._lost = []
        try:
            found = self._discover(self._library)
            if not found:
                raise SourceUnavailable("the NVIDIA driver shows no device that answers")
            self._processes = ProcessReader(self._library, with_commands=self._with_commands)
            self._take(found)
        except NvmlFailure as failure:
            self.close()
            raise SourceUnavailable(str(failure)) from failure
        except SourceUnavailable:
            self.close()
            raise

    def inventory(self) -> Sequence[Inventory]:
        """See `Source.inventory`. Lost devices stay in it: an event reports what is wrong with them."""
        library = self._opened()
        try:
            found = self._discover(library)
            if {f.info.uuid for f in found} != {d.found.info.uuid for d in self._devices}:
                self._take(found)
            domain = nvlink_domain(library, found)
        except NvmlFailure as failure:
            raise SourceUnavailable(str(failure)) from failure
        everything = sorted([*found, *self._lost], key=lambda f: (f.info.index, f.info.mig_parent is not None))
        labels = {DOMAIN_LABEL: domain, **self.labels} if domain else self.labels
        try:
            joins = {device.found.info.uuid: device.links for device in self._devices}
            links, counts = topology(library, everything, joins)
        except NvmlFailure as failure:
            if failure.code in DRIVER_GONE:
                raise SourceUnavailable(str(failure)) from failure
            links, counts = [], []
        driver = everything[0].info.driver if everything else ""
        return [
            Inventory(
                host=proc.host_info(self.host, labels, driver),
                agent="",
                time_ns=time.time_ns(),
                devices=[f.info for f in everything],
                links=links,
                nvlink_counts=counts,
                source=self.name,
            )
        ]

    def read(self) -> Sequence[Tick]:
        """See `Source.read`."""
        library = self._opened()
        now = monotonic()
        try:
            if self._layout_changed.is_set() or now >= self._layout_due:
                self._check_layout(library, now)
            if self._lost and now >= self._return_due:
                self._return_due = now + RETURN_SECONDS
                self._find_lost(library)
        except NvmlFailure as failure:
            if failure.code in DRIVER_GONE:
                raise SourceUnavailable(str(failure)) from failure
        times: dict[str, int] = {}
        fresh: set[int] = set()
        for device in list(self._devices):
            if device not in self._devices:  # lost with its parent
                continue
            times[device.found.info.uuid] = time.time_ns()
            try:
                fresh.update(device.read(now))
            except NvmlFailure as failure:
                if failure.code in DRIVER_GONE:
                    raise SourceUnavailable(str(failure)) from failure
                self._lose(library, device, failure)
        if not self._devices:
            return []
        self._columns.update([device.plan.values for device in self._devices], fresh)
        devices = [device.found.info.uuid for device in self._devices]
        return [
            Tick(
                host=self.host,
                devices=devices,
                times_ns=columns.pack_times([times[uuid] for uuid in devices]),
                columns=self._columns.columns.copy(),
                nulls=self._columns.nulls.copy(),
            )
        ]

    def processes(self) -> dict[str, list[ProcessSample]]:
        """See `Source.processes`."""
        self._opened()
        if self._processes is None:
            return {}
        try:
            return {self.host: self._processes.read([device.found for device in self._devices])}
        except NvmlFailure as failure:
            raise SourceUnavailable(str(failure)) from failure

    def ancestry(self, pids: Iterable[int]) -> dict[int, list[str]]:
        """See `HostSource.ancestry`."""
        return {pid: list(process_identity.lineage(pid)) for pid in pids} if self.identifies_processes else {}

    def close(self) -> None:
        """See `Source.close`."""
        self._errors_before = self.read_errors
        self._processes = None
        free = self._stop_threads()
        for device in self._devices:
            device.plan.close()
        self._devices = []
        self._lost = []
        if self._library is not None and free:
            self._library.close()
        self._library = None

    # -- devices coming and going

    def _opened(self) -> Library:
        if self._library is None:
            raise SourceUnavailable("the source is not open")
        return self._library

    def _discover(self, library: Library) -> list[Found]:
        found, unreachable = discover(library, self.host, self._identities)
        there = {f.info.uuid for f in found}
        for place in unreachable:
            # It may have gone since the last tick, and nothing else would report it.
            for device in [d for d in self._devices if d.found.parent is None and d.found.info.index == place.index]:
                if device.found.info.uuid not in there:
                    self._lose(library, device, place.failure)
            if place.index not in self._told_unreachable and not any(f.info.index == place.index for f in self._lost):
                self._told_unreachable.add(place.index)
                self._tell(
                    "device_unreachable",
                    Severity.WARNING,
                    f"the device at index {place.index} does not answer: {place.failure}",
                    index=place.index,
                )
        lost = {f.info.uuid for f in self._lost}
        return [f for f in found if f.info.uuid not in lost and f.info.mig_parent not in lost]

    def _take(self, found: list[Found]) -> None:
        """Replace the devices that are read by these."""
        library = self._opened()
        self._stop_threads()
        known = {device.found.info.uuid: device for device in self._devices}
        for device in self._devices:
            device.plan.close()
        self._errors_before += sum(device.plan.errors for device in self._devices)
        self._devices = []
        for one in found:
            uuid = one.info.uuid
            try:
                links = nvlinks(library, one.handle) if one.parent is None else []
                device = Device(library, self.host, one, links, self._emit, known.get(uuid))
            except NvmlFailure as failure:
                if failure.code in DRIVER_GONE:
                    raise
                self._lost.append(one)
                self._tell_lost(one, failure)
                continue
            self._devices.append(device)
        for place, device in enumerate(self._devices):
            device.place = place / len(self._devices)
        self._layout = layout(library, [device.found for device in self._devices])
        self._layout_due = monotonic() + LAYOUT_SECONDS
        self._columns.relaid(len(self._devices))
        self._listen(library)
        if any(device.plan.blocking for device in self._devices):
            self._aside_stop = threading.Event()
            self._aside = threading.Thread(
                target=_read_aside, args=(list(self._devices), self._aside_stop), name="corral-nvml-slow", daemon=True
            )
            self._aside.start()

    def _listen(self, library: Library) -> None:
        """Wait for events of the devices that are read now."""
        if self._events is not None and not self._events.close():
            return
        found = [device.found for device in self._devices]
        self._events = (
            EventThread(library, self.host, found, self._emit, self._noticed, self._energy)
            if self._with_events and found
            else None
        )

    def _stop_threads(self) -> bool:
        """Stop the threads of events and of slow calls; True if both have ended."""
        free = True
        self._aside_stop.set()
        if self._events is not None:
            free = self._events.close()
            self._events = None
        if self._aside is not None:
            self._aside.join(5.0)
            free = free and not self._aside.is_alive()
            self._aside = None
        return free

    def _noticed(self, parent: str, kind: str, severity: Severity) -> None:
        """Take note of an event of the driver; called in the thread of events."""
        if kind == "mig_changed":
            self._layout_changed.set()
        for device in self._devices:
            if device.found.info.uuid == parent and severity in (Severity.RESET, Severity.HARDWARE):
                device.faulted_at = monotonic()

    def _energy(self, whole: str) -> int | None:
        """Energy counter of a device as last read, in millijoules; called in the thread of events."""
        return next((d.energy_millijoules for d in self._devices if d.found.info.uuid == whole), None)

    def _check_layout(self, library: Library, now: float) -> None:
        self._layout_due = now + LAYOUT_SECONDS
        announced = self._layout_changed.is_set()
        self._layout_changed.clear()
        current, changed = self._changed(library)
        if not changed:
            return
        there = {uuid for split in current.values() for uuid in split[1]}
        self._lost = [f for f in self._lost if f.info.mig_parent not in current or f.info.uuid in there]
        self._take(self._discover(library))
        if not announced:
            for uuid in changed:
                self._tell("mig_changed", Severity.INFO, "the MIG layout changed", device=uuid)

    def _lose(self, library: Library, device: Device, failure: NvmlFailure) -> None:
        """Remove a lost device with its MIG instances; of a lost instance only itself, if its device answers."""
        info = device.found.info
        gone = [device]
        parent = next((d.found for d in self._devices if d.found.info.uuid == info.mig_parent), None)
        if parent is None or not _answers(library, parent):
            whole = info.mig_parent or info.uuid
            gone = [d for d in self._devices if whole in (d.found.info.uuid, d.found.info.mig_parent)]
        elif self._changed(library)[1]:
            self._layout_due = 0.0  # it was taken apart, and nothing is wrong
            self._drop(gone)
            return
        self._drop(gone)
        for lost in gone:
            self._lost.append(lost.found)
            self._tell_lost(lost.found, failure)
        self._return_due = monotonic() + RETURN_SECONDS
        # An event set with a lost device in it reports the loss forever, and no events of the others.
        self._listen(library)

    def _changed(self, library: Library) -> tuple[dict[str, Split], list[str]]:
        """Current MIG layout of the devices, and the uuids of those whose layout has changed."""
        current = layout(library, [device.found for device in self._devices])
        return current, [uuid for uuid, split in current.items() if split != self._layout.get(uuid)]

    def _drop(self, gone: list[Device]) -> None:
        self._devices = [d for d in self._devices if d not in gone]
        for device in gone:
            self._errors_before += device.plan.errors
            device.plan.close()
        self._columns.relaid(len(self._devices))

    def _find_lost(self, library: Library) -> None:
        for lost in list(self._lost):
            parents = {f.info.uuid for f in self._lost}
            if lost not in self._lost or lost.info.mig_parent in parents or not _answers(library, lost):
                continue
            family = [f for f in self._lost if lost.info.uuid in (f.info.uuid, f.info.mig_parent)]
            self._lost = [f for f in self._lost if f not in family]
            self._take(self._discover(library))
            for back in family:
                if any(d.found.info.uuid == back.info.uuid for d in self._devices):
                    self._told_lost.discard(back.info.uuid)
                    self._tell(
                        "device_returned",
                        Severity.CLEARED,
                        f"{back.info.name} answers again",
                        device=back.info.uuid,
                        reset=back.info.uuid in self._fallen,
                    )
                    self._fallen.discard(back.info.uuid)
                elif back.parent is None and back not in self._lost:  # gone again before it was found
                    self._lost.append(back)

    def _tell_lost(self, found: Found, failure: NvmlFailure) -> None:
        if found.info.uuid in self._told_lost:  # it answered for a moment, and was never back
            return
        self._told_lost.add(found.info.uuid)
        if (
            failure.code in LOST and failure.function != SILENCE
        ):  # a device that the driver calls lost comes back only by a reset
            self._fallen.add(found.info.uuid)
        self._tell(
            "device_lost",
            Severity.RESET if failure.code == 16 else Severity.HARDWARE,
            f"{found.info.name} at {found.info.pcie_address} does not answer: {failure}",
            device=found.info.uuid,
            error=failure.code,
        )

    def _tell(
        self, kind: str, severity: Severity, message: str, *, device: str | None = None, **data: str | int
    ) -> None:
        self._emit(
            SourceEvent(
                host=self.host,
                time_ns=time.time_ns(),
                kind=kind,
                severity=severity,
                device=device,
                message=message,
                data=dict(data),
            )
        )


def _read_aside(devices: list[Device], stop: threading.Event) -> None:
    while True:
        for device in devices:
            if stop.is_set():
                return
            device.read_blocking()
        if stop.wait(BLOCKING_SECONDS):
            return


def _answers(library: Library, found: Found) -> bool:
    try:
        handle: Any = handle_of(library, found)
        return handle is not None and answers(library, handle)
    except NvmlFailure as failure:
        if failure.code in DRIVER_GONE:
            raise
        return False


def _ignore(_event: SourceEvent) -> None:
    return
