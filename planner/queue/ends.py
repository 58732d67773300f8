"""Expected ends of the running leases, and the hosts on which leases came, went or were found to take longer."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from typing import Final

from ..fleet.fleet import Fleet
from .durations import Estimate, unknown

LEAST_EXTENSION_SECONDS: Final = 60.0
"""A lease that exceeds its expected end is expected to go on for so long at least."""
_LOG_MOST: Final = 4096
_UNKNOWN: Final = unknown()


class Running:
    """A running lease.

    Attributes:
        started_at: seconds.
        estimate: of its duration.
        ends_at: expected end.
        deadline: time at which it ends at the latest; infinite without one.
    """

    __slots__ = ("deadline", "ends_at", "estimate", "started_at")

    def __init__(self, started_at: float, estimate: Estimate) -> None:
        self.started_at = started_at
        self.estimate = estimate
        self.ends_at = started_at + estimate.seconds
        self.deadline = math.inf

    def extend(self, now: float) -> None:
        """Expect a later end: it still runs at its expected one."""
        left = self.estimate.remaining(now - self.started_at)
        self.ends_at = now + max(LEAST_EXTENSION_SECONDS, left)
        if self.started_at + self.estimate.limit > now:
            self.ends_at = min(self.ends_at, self.started_at + self.estimate.limit)


class Ends:
    """Expected ends of the leases of a fleet.

    Attributes:
        running: by lease id.
        log: names of hosts whose expected ends changed, oldest first.
        base: number of entries that were cut off the front of the log.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._due: list[tuple[float, str]] = []
        self.running: dict[str, Running] = {}
        self.log: list[str] = []
        self.base = 0

    @property
    def log_end(self) -> int:
        """Position of the next entry of the log, counted from the first ever."""
        return self.base + len(self.log)

    def started(self, lease_id: str, estimate: Estimate, now: float) -> None:
        """Note a lease that the fleet holds."""
        found = self.running[lease_id] = Running(now, estimate)
        heappush(self._due, (found.ends_at, lease_id))
        self._touch(lease_id)

    def expect(self, lease_id: str, ends_at: float) -> None:
        """Expect the end of a lease at a time, such as the deadline of its preemption."""
        found = self.running.get(lease_id)
        if found is None:
            found = self.running[lease_id] = Running(ends_at, _UNKNOWN)
        found.ends_at = found.deadline = ends_at
        heappush(self._due, (ends_at, lease_id))
        self._touch(lease_id)

    def expect_by_estimate(self, lease_id: str) -> None:
        """Expect the end of a lease by its estimate again, since the notice of its preemption was withdrawn."""
        found = self.running.get(lease_id)
        if found is not None:
            self.started(lease_id, found.estimate, found.started_at)

    def revise(self, lease_id: str, estimate: Estimate, now: float) -> None:
        """Change the estimate of a running lease, on which the end of one with a deadline does not depend.

        Unknown leases are ignored.
        """
        found = self.running.get(lease_id)
        if found is None:
            return
        found.estimate = estimate
        if found.deadline < math.inf:
            return
        before, found.ends_at = found.ends_at, found.started_at + estimate.seconds
        if found.ends_at <= now:
            found.extend(now)
        if found.ends_at != before:
            heappush(self._due, (found.ends_at, lease_id))
            self._touch(lease_id)

    def ended(self, lease_id: str) -> None:
        """Note that a lease ended, before or after the fleet frees what it held."""
        self.running.pop(lease_id, None)
        self._touch(lease_id)

    def resized(self, lease_id: str) -> None:
        """Note that a lease holds other devices."""
        self._touch(lease_id)

    def advance(self, now: float) -> None:
        """Extend the expected ends of leases that still run past them."""
        due = self._due
        while due and due[0][0] <= now:
            at, lease_id = heappop(due)
            found = self.running.get(lease_id)
            if found is not None and found.ends_at == at:
                found.extend(now)
                heappush(due, (found.ends_at, lease_id))
                self._touch(lease_id)

    def ends_at(self, lease_id: str) -> float:
        """Expected end of a lease; infinite if not known."""
        found = self.running.get(lease_id)
        return math.inf if found is None else found.ends_at

    def _touch(self, lease_id: str) -> None:
        held = self._fleet.leases.get(lease_id)
        if held is None:
            return
        self.log += held.hosts
        if len(self.log) > 2 * _LOG_MOST:
            del self.log[:_LOG_MOST]
            self.base += _LOG_MOST
