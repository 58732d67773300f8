"""One device as the source reads it: its schedule, its NVLinks and its health."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from ...schemas.telemetry import Severity
from ..agent.tickcolumns import INDEX
from ..processes.proc import hashed_boot_id
from ..source import Emit, SourceEvent
from .health import SETTLE_SECONDS, STARTED, Finding, Health, changes
from .inventory import Found
from .library import GPU_IS_LOST, Library, NvmlFailure
from .links import SUMS, LinkDetails, LinkState, nvlinks, summary
from .plan import DevicePlan

CHECK_SECONDS: Final = 10.0
"""Time between checks of links and health."""
LINKS_SECONDS: Final = 600.0
"""Time between events `nvlink`, which describe each link, where nothing happens."""
LINKS_MIN_SECONDS: Final = 60.0
"""Shortest time between them, where errors go on."""
SILENT_TICKS: Final = 3
SILENT_SECONDS: Final = 1.0
"""A device is lost once no call to it succeeds for this time and for `SILENT_TICKS` ticks, whatever the error."""
SILENCE: Final = "every call"
"""Stands for the failed function where a device is lost because no call succeeds, not because the driver says so."""

_NVLINK_METRICS: Final = frozenset(name for name in INDEX if name.startswith("nvlink_"))
_ERRORS: Final = tuple(INDEX[name] for name in INDEX if name.startswith("nvlink_") and name.endswith("_errors_count"))
_ACTIVE: Final = INDEX["nvlink_active_count"]
_ENERGY: Final = INDEX["energy_millijoules"]
_HEALTH: Final = {
    "recovery_action": INDEX["recovery_action"],
    "remap_failure": INDEX["remapped_rows_failure"],
    "remap_pending": INDEX["remapped_rows_pending"],
    "retired_pending": INDEX["retired_pages_pending"],
    "uncorrected": INDEX["ecc_uncorrected_volatile_count"],
}


class Device:
    """A device that is being read.

    Args:
        library: NVML.
        host: the host's name.
        found: the device as it was discovered.
        links: its NVLinks.
        emit: takes its events.
        before: the same device as it was read until now; its health state is carried over.

    Attributes:
        found: the device as it was discovered.
        plan: its read schedule, with the last values.
        links: current state of its NVLinks.
        place: its position among the host's devices, 0 to 1, by which slow readings are spread.
        faulted_at: when the driver last reported a fault, on the monotonic clock; None if it has not.

    Raises:
        NvmlFailure: it is lost already.
    """

    def __init__(
        self,
        library: Library,
        host: str,
        found: Found,
        links: list[LinkState],
        emit: Emit,
        before: Device | None = None,
    ) -> None:
        self.found = found
        self.place = 0.0
        self.faulted_at: float | None = before.faulted_at if before is not None else None
        self._library = library
        self._host = host
        self._emit = emit
        self.links = links
        self._silent = 0
        self._heard = time.monotonic()
        self._check_due = 0.0
        self._links_due = 0.0
        self._links_published = -LINKS_MIN_SECONDS
        self._link_errors = 0
        self._health: Health | None = before._health if before is not None else None
        skip = _NVLINK_METRICS if not links else frozenset[str]()
        self.plan = DevicePlan(
            library,
            found.handle,
            found.info.uuid,
            skip=skip,
            gpm_handle=found.parent,
            gpm_instance=found.gpu_instance if found.parent is not None else None,
            kind=f"{found.info.name} {found.info.mig_enabled}",
        )
        self._details = LinkDetails(library, found.handle, links) if links else None

    def read(self, now: float) -> Iterable[int]:
        """Read what is due; returns the indices of the metrics that were read.

        Raises:
            NvmlFailure: it is lost, or the driver is gone.
        """
        first = self._check_due == 0.0
        answered, fresh = self.plan.read(now)
        if answered:
            self._silent = 0
            self._heard = now
        elif self.plan.asks:
            self._silent += 1
            if self._silent >= SILENT_TICKS and now - self._heard >= SILENT_SECONDS:
                raise NvmlFailure(GPU_IS_LOST, SILENCE, f"fails for {now - self._heard:.0f} s")
        if first:
            self.plan.spread(self.place)
        if self.plan.blocking_fresh:
            fresh += self.plan.blocking_fresh
            self.plan.blocking_fresh = []
        if now >= self._check_due:
            # From the second check on the devices are spread, so that no tick checks all of them.
            self._check_due = now + CHECK_SECONDS * (1 - self.place if first else 1)
            fresh += self._check(now)
        return fresh

    def read_blocking(self) -> None:
        """Make the calls that take tens of milliseconds; runs in a separate thread."""
        self.plan.read_blocking()

    def _check(self, now: float) -> list[int]:
        """Check links and health; returns the indices of the metrics that this fills."""
        values = self.plan.values
        fresh = self._check_links(self._details, now) if self._details is not None else []
        health = Health(**{field: _whole(values[index]) for field, index in _HEALTH.items()})
        faulted = self.faulted_at is not None and now - self.faulted_at >= SETTLE_SECONDS
        for finding in changes(self._health, health, faulted=faulted):
            self._tell(finding, self._marks() if finding.kind == STARTED else None)
        if faulted:
            self.faulted_at = None
        self._health = health
        return fresh

    @property
    def energy_millijoules(self) -> int | None:
        """The energy counter as last read, in millijoules; None where the device has none."""
        return _whole(self.plan.values[_ENERGY])

    def _marks(self) -> dict[str, str | int | float | bool | None]:
        """Facts for a later run to compare: another boot id, or an energy counter that began anew, means a reset."""
        info = self.found.info
        marks: dict[str, str | int | float | bool | None] = {}
        if info.mig_parent is None:
            marks |= {"pcie_address": info.pcie_address, "index": info.index, "name": info.name}
        if boot := hashed_boot_id():
            marks["boot"] = boot
        if (energy := self.energy_millijoules) is not None:
            marks["energy_millijoules"] = energy
        return marks

    def _check_links(self, reader: LinkDetails, now: float) -> list[int]:
        links = nvlinks(self._library, self.found.handle, self.links)
        self.plan.values[_ACTIVE] = sum(link.active for link in links)
        was = {link.number: link.active for link in self.links}
        for link in links:
            if was.get(link.number, link.active) != link.active:
                kind = "nvlink_up" if link.active else "nvlink_down"
                severity = Severity.INFO if link.active else Severity.WARNING
                self._tell(Finding(kind, severity, f"NVLink {link.number} went {'up' if link.active else 'down'}"))
                self._links_due = now
        self.links = links
        errors = sum(int(self.plan.values[index] or 0) for index in _ERRORS)
        if errors > self._link_errors and now >= self._links_published + LINKS_MIN_SECONDS:
            self._links_due = now
        fresh = [_ACTIVE]
        sums = {name: metric for name, metric in SUMS.items() if metric not in self.plan.supported}
        if not sums and now < self._links_due:
            return fresh
        details = reader.read()
        for name, metric in sums.items():
            of_links = [value for (_, kind), value in details.items() if kind == name]
            if of_links:
                self.plan.values[INDEX[metric]] = sum(of_links)
                fresh.append(INDEX[metric])
        if now >= self._links_due:
            self._links_due = now + LINKS_SECONDS
            self._links_published = now
            self._link_errors = errors
            active = sum(link.active for link in links)
            self._tell(
                Finding("nvlink", Severity.INFO, f"{active} of {len(links)} NVLinks are up"),
                summary(links, details),
            )
        return fresh

    def _tell(self, finding: Finding, data: dict[str, str | int | float | bool | None] | None = None) -> None:
        self._emit(
            SourceEvent(
                host=self._host,
                time_ns=time.time_ns(),
                kind=finding.kind,
                severity=finding.severity,
                device=self.found.info.uuid,
                message=finding.message,
                data=data or {},
            )
        )


def _whole(value: float | int | None) -> int | None:
    return None if value is None else int(value)
