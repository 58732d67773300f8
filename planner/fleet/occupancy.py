"""Use of a device other than by its leases: foreign memory, and processes and load without a lease.

The driver reports how much memory is used, and usually by which processes. Memory that can't be attributed to a lease
is foreign:

- If every lease on the device has processes in the list, each accounts for what these use, up to what was granted.
- A lease that is missing in the list (its processes are hidden, the list is unreadable, or there is none) accounts for
  as much as it was granted. But memory that was foreign before the lease stays foreign, as long as the driver reports
  that much as used.
- Between two lists a lease may grow up to what it was granted.

A device is in use if foreign memory is more than the driver takes, if a process without a lease computes on it, if it
is busy without a lease, or if a lease on it ended without being released and the device has not been seen idle since.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from ...schemas.values.units import format_bytes

IDLE_MEMORY_BYTES: Final = 512 * 2**20
"""Memory used on an idle device: drivers take 0 to 20 MiB (NVIDIA, without reserved memory), an MPS server 30, and
amdgpu about 300."""
IDLE_MEMORY_FRACTION: Final = 1 / 16
"""Limit for a small device or MIG instance, as a part of its memory: a CUDA context alone takes 300 MiB and more."""
SERVICES_MEMORY_BYTES: Final = 2**30
"""Memory that a display server and other services on the device may use."""
IDLE_UTILIZATION_PERCENT: Final = 5.0
BUSY_SAMPLES: Final = 2
"""Number of samples in a row that make a device busy: the driver's start shows up in single ones."""
CONTEXT_LEAST_BYTES: Final = 64 * 2**20
"""Least memory of a process that computes: a CUDA context takes more, and so does one of ROCm."""
SETTLE_SECONDS: Final = 2.0
"""Utilization is an average over the last second or so, and includes what a lease did before its release."""
FREE_SECONDS: Final = 0.5
"""A driver frees the memory of a process a moment after its end: readings this soon after a release include it."""
_RELEASES_KEPT: Final = 64
UNIDENTIFIED: Final = "?"
"""In place of the lease of a process that can't be identified. It counts as one of a lease, while there is one."""


class Listed(NamedTuple):
    """A process on the device.

    Attributes:
        lease: that it runs under; empty if none.
        memory_bytes: None if hidden.
        service: true for a service, such as a display server, which is not work.
    """

    lease: str
    memory_bytes: int | None
    service: bool


class Occupancy:
    """Use of one device, or of several compute instances that share their memory.

    Attributes:
        foreign: bytes that are attributed to no lease.
        covering: bytes of the memory that were granted, by lease.
        granted: sum of them.
    """

    __slots__ = (
        "_base",
        "_busy",
        "_counts",
        "_doubt",
        "_doubt_at",
        "_freed_at",
        "_hidden",
        "_listed",
        "_listed_at",
        "_read_at",
        "_readable",
        "_released",
        "_services",
        "_used",
        "covering",
        "foreign",
        "granted",
    )

    def __init__(self) -> None:
        self.foreign = 0
        self.covering: dict[str, int] = {}
        self.granted = 0
        self._used: int | None = None
        self._read_at = -math.inf
        self._busy = 0
        self._listed: dict[str, int] | None = None
        """Memory by lease, with empty text for none; None if no list is known."""
        self._hidden: set[str] = set()
        self._counts: dict[str, int] = {}
        self._services = 0
        self._readable = True
        self._listed_at = -math.inf
        self._base = 0
        """Foreign memory before the first of the present leases."""
        self._freed_at = -math.inf
        self._released: dict[str, float] = {}
        self._doubt = ""
        self._doubt_at = -math.inf

    def hold(self, covering: dict[str, int], since: float = math.inf) -> None:
        """Set the memory that is granted to leases.

        Args:
            covering: bytes by lease.
            since: time when the newest of them was granted, seconds since the epoch. Samples that were read later
                include what it uses.
        """
        if not self.covering and covering:
            self._base = self.foreign
        self.covering = covering
        self.granted = sum(covering.values())
        if since < self._read_at:
            self.foreign = 0
            self._recount()

    def add(self, lease: str, memory: int, since: float) -> None:
        """Note the memory that is granted to one more lease; see `hold`."""
        if not self.covering:
            self._base = self.foreign
        self.covering[lease] = memory
        self.granted += memory
        if since < self._read_at:
            self.foreign = 0
            self._recount()

    def remove(self, lease: str, at: float, doubt: str) -> None:
        """Note the end of a lease; the others stay as they are. See `end`."""
        held = self.covering.pop(lease, 0)
        self.granted -= held
        self._ended(lease, held, at, doubt)

    def end(self, lease: str, covering: dict[str, int], at: float, doubt: str) -> None:
        """Note the end of a lease.

        Args:
            lease: that ended.
            covering: the remaining leases, as in `hold`.
            at: time of the end, seconds since the epoch.
            doubt: reason why its processes may still be there; empty if its holder has released it.
        """
        held = self.covering.get(lease, 0)
        self.covering = covering
        self.granted = sum(covering.values())
        self._ended(lease, held, at, doubt)

    def _ended(self, lease: str, held: int, at: float, doubt: str) -> None:
        if doubt:
            self._doubt, self._doubt_at = doubt, at
            if self._used is not None:
                self.foreign = max(self.foreign, self._used - self.granted)
            return
        # Readings from before are of the time when it held the device, and do not count.
        self._freed_at = max(self._freed_at, at + FREE_SECONDS)
        self._released[lease] = at + FREE_SECONDS
        if len(self._released) > _RELEASES_KEPT:
            del self._released[next(iter(self._released))]
        used = self._listed.pop(lease, 0) if self._listed is not None else 0
        self._hidden.discard(lease)
        self._counts.pop(lease, None)
        if not self.covering:
            self._counts.pop(UNIDENTIFIED, None)
            self._hidden.discard(UNIDENTIFIED)
        self._busy = 0
        self.foreign = max(0, self.foreign - max(0, used - held))
        if not self.covering and not self._counts:
            self.foreign = min(self.foreign, self._base)

    def clock_set(self, seconds: float) -> None:
        """Shift all times: the clock by which they were taken was set by so many seconds."""
        self._read_at += seconds
        self._listed_at += seconds
        self._freed_at += seconds
        self._doubt_at += seconds
        self._released = {lease: at + seconds for lease, at in self._released.items()}

    def sample(self, used: int | None, utilization: float | None, read_at: float, known: bool) -> bool:
        """Take in a sample.

        Args:
            used: bytes as the driver reports; None if it does not.
            utilization: percent; None likewise.
            read_at: time of the reading, seconds since the epoch.
            known: true if lists of processes still arrive.

        Returns:
            True if anything may have changed.
        """
        changed = False
        if not known and self._listed is not None:
            self._listed, self._listed_at = None, -math.inf
            self._hidden, self._counts, self._services = set(), {}, 0
            changed = True
        if read_at <= self._freed_at:
            return changed
        self._used, self._read_at = used, read_at
        if used is not None:
            before, least = self.foreign, used - self.granted
            foreign = before if before > least else least
            if foreign > used:
                foreign = used
            if foreign != before:
                self.foreign, changed = foreign, True
        busy = 0
        if utilization is not None and utilization > IDLE_UTILIZATION_PERCENT and not self.covering:
            busy = self._busy
            if read_at > self._freed_at + SETTLE_SECONDS:
                busy = min(busy + 1, BUSY_SAMPLES)
        if busy != self._busy:
            self._busy, changed = busy, True
        return changed or self._doubt != ""

    def processes(self, found: Iterable[Listed], read_at: float, readable: bool) -> None:
        """Take in a list of processes.

        Args:
            found: the processes.
            read_at: time of the list, seconds since the epoch.
            readable: true if it is complete.
        """
        listed: dict[str, int] = {}
        hidden: set[str] = set()
        counts: dict[str, int] = {}
        services = 0
        for lease, memory, service in found:
            if read_at <= self._released.get(lease, -math.inf):
                continue
            if service and lease not in self.covering:
                services += memory or 0
            else:
                counts[lease] = counts.get(lease, 0) + 1
            if memory is None:
                hidden.add(lease)
            else:
                listed[lease] = listed.get(lease, 0) + memory
        self._released = {lease: at for lease, at in self._released.items() if at >= read_at}
        self._listed, self._hidden, self._counts, self._services = listed, hidden, counts, services
        self._readable, self._listed_at = readable, read_at
        self._recount()

    def may_have_process_of(self, lease: str) -> bool | None:
        """True if a process of a lease, or one that no present lease explains, is in the newest list.

        Returns:
            None if no complete list is known, or its processes can't be identified.
        """
        if self._listed is None or not self._readable or UNIDENTIFIED in self._counts:
            return None
        return lease in self._counts or any(other not in self.covering for other in self._counts)

    def _listed_foreign(self) -> int:
        foreign = 0
        for lease, memory in (self._listed or {}).items():
            foreign += memory if (held := self.covering.get(lease)) is None else max(0, memory - held)
        return foreign

    def _recount(self) -> None:
        """Compute foreign memory from the newest list and sample."""
        used, listed = self._used, self._listed
        if listed is None:
            if used is not None:
                self.foreign = max(0, used - self.granted)
            return
        beyond = self._listed_foreign()
        if used is None or self._read_at <= self._freed_at:
            self.foreign = beyond
            return
        silent = not self._readable or not (listed or self._hidden)
        explained = unsaid = 0
        for lease, held in self.covering.items():
            if lease in self._hidden or (silent and lease not in listed):
                unsaid += held
            else:
                explained += min(listed.get(lease, 0), held)
        foreign = max(beyond, used - explained - unsaid)
        if unsaid:
            foreign = max(foreign, min(self.foreign, used - explained))
        self.foreign = foreign

    def why_in_use(self, total_bytes: int) -> str:
        """Reason why the device is in use, other than by its leases; empty if it is not.

        Args:
            total_bytes: size of the device's memory; 0 if unknown.
        """
        counts = self._counts.items()
        strangers = sum(
            count
            for lease, count in counts
            if lease not in self.covering and not (lease == UNIDENTIFIED and self.covering)
        )
        if strangers:
            what = "a process" if strangers == 1 else f"{strangers} processes"
            why = f"{what} without a lease"
        elif self.foreign - min(self._services, SERVICES_MEMORY_BYTES) > _overhead(total_bytes):
            why = f"{format_bytes(self.foreign)} that no lease explains"
        elif self._busy >= BUSY_SAMPLES and not self._nobody:
            why = "busy without a lease"
        else:
            if self._doubt and self._seen_since(self._doubt_at):
                self._doubt = ""
            return self._doubt
        return why

    @property
    def _nobody(self) -> bool:
        """True if no process can be there, whatever the load: a complete list is empty, and no context takes memory.

        A board without persistence mode shows up to 100 % while its driver is merely queried.
        """
        listed = self._listed is not None and self._readable
        return listed and not self._counts and self._used is not None and self._used <= CONTEXT_LEAST_BYTES

    def _seen_since(self, at: float) -> bool:
        """True if samples, and lists if there are any, have shown no load since a time."""
        quiet = not self._busy or self._nobody
        return self._read_at > at and quiet and (self._listed is None or self._listed_at > at)


def _overhead(total_bytes: int) -> float:
    return min(IDLE_MEMORY_BYTES, total_bytes * IDLE_MEMORY_FRACTION) if total_bytes else IDLE_MEMORY_BYTES
