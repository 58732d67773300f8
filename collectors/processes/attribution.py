"""Attribution of processes on devices to leases, and use of devices without a lease or beyond it.

Pure functions: the agent passes in what the source has read and the active leases, and publishes the results.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.requests import Grant, Lease
from ...schemas.system_processes import is_system_process
from ...schemas.telemetry import AttributionKind, ProcessSample, Severity
from ...schemas.values.units import format_bytes

GRACE_SECONDS: Final = 30.0
"""A violation that lasts for less is not reported: a job may be starting, or winding down after its release."""

Ancestry = Mapping[int, Sequence[str]]
"""Names of a process and its ancestors, nearest first (`bus/process_identity.py`), by process id."""


class Violation(Struct, frozen=True, kw_only=True):
    """A use of a device that no lease covers.

    Attributes:
        kind: kind of the violation.
        device: uuid of the device.
        lease: the lease whose memory is exceeded, or that the process claims to have; empty if none.
        owner: owner of that lease, where it is known.
        memory_used_bytes: memory of the process, or of the lease's processes on the device; None where the driver hides
            it.
        memory_granted_bytes: memory granted to the lease on the device; 0 for a process without a lease.
        share: share of the device that the lease holds; 0 for a process without a lease.
        leased: True if a lease holds the device.
        pid: id of a process without a lease.
        started_ns: when that process started.
        name: name of its executable.
        user: account that runs it.
        container: container that it is in.
    """

    kind: AttributionKind
    device: str
    lease: str = ""
    owner: str = ""
    memory_used_bytes: int | None = None
    memory_granted_bytes: int = 0
    share: float = 0.0
    leased: bool = False
    pid: int = 0
    started_ns: int = 0
    name: str = ""
    user: str = ""
    container: str = ""

    @property
    def key(self) -> str:
        """Key of the violation, which stays the same however long it lasts and however much is used."""
        if self.kind is AttributionKind.LEASE_MEMORY_EXCEEDED:
            return f"memory/{self.device}/{self.lease}"
        # Use of a leased device and use of a free one are different violations.
        return f"{'leased' if self.leased else 'free'}/{self.device}/{self.pid}/{self.started_ns}"

    @property
    def severity(self) -> Severity:
        """Severity of the violation, never one that says anything about the device's health."""
        return Severity.APPLICATION if self.leased else Severity.INFO

    @property
    def message(self) -> str:
        """One sentence for people."""
        used = "an unknown amount" if self.memory_used_bytes is None else format_bytes(self.memory_used_bytes)
        if self.kind is AttributionKind.LEASE_MEMORY_EXCEEDED:
            return (
                f"the processes of lease {self.lease} of {self.owner} use {used}; "
                f"{format_bytes(self.memory_granted_bytes)} were granted"
            )
        who = f"{self.name or 'a process'} (pid {self.pid}, {self.user or 'unknown user'})"
        why = f"lease {self.lease} does not hold it" if self.lease else "it has no lease"
        whose = "a leased device" if self.leased else "a device"
        return f"{who} uses {used} of {whose}, and {why}"


def attribute(
    processes: Sequence[ProcessSample],
    leases: Iterable[Lease],
    ancestry: Ancestry | None = None,
    shared: Collection[str] = (),
) -> tuple[list[ProcessSample], list[Violation]]:
    """Join the processes of a host to its active leases.

    A process belongs to the lease that its environment names, or to one whose holder it descends from, or to the only
    lease of other processes in its container; of several, to the first that holds the device.

    Args:
        processes: processes on the host's devices.
        leases: active leases with devices on the host; others do no harm.
        ancestry: ancestry of the processes, where it could be read.
        shared: containers that identify no lease, such as the one that everything on this host is in.

    Returns:
        The processes with their leases, in the same order, and the violations.
    """
    active = {lease.lease_id: lease for lease in leases}
    held: dict[tuple[str, str], Grant] = {}
    leased: set[str] = set()
    by_holder: dict[str, list[str]] = {}
    for lease in active.values():
        if lease.holder:
            by_holder.setdefault(lease.holder, []).append(lease.lease_id)
        for grant in lease.grants:
            if grant.device:
                held[lease.lease_id, grant.device] = grant
                leased.add(grant.device)

    def own(process: ProcessSample) -> list[str]:
        found = [process.lease] if process.lease in active else []
        for name in (ancestry or {}).get(process.pid, ()):
            found += by_holder.get(name, ())
        return found

    def pick(process: ProcessSample, found: Sequence[str]) -> str:
        holding = (lease for lease in found if (lease, process.device) in held)
        return next(holding, found[0] if found else process.lease)

    candidates = [own(process) for process in processes]
    in_container: dict[str, set[str]] = {}
    for process, found in zip(processes, candidates, strict=True):
        if process.container and process.container not in shared and found:
            in_container.setdefault(process.container, set()).add(pick(process, found))
    attributed: list[ProcessSample] = []
    for process, found in zip(processes, candidates, strict=True):
        around = in_container.get(process.container, ()) if not found else ()
        lease = pick(process, found or (list(around) if len(around) == 1 else []))
        attributed.append(process if lease == process.lease else replace(process, lease=lease))
    return attributed, [*_beyond(attributed, active, held), *_without(attributed, active, held, leased)]


def _beyond(
    processes: Iterable[ProcessSample], active: Mapping[str, Lease], held: Mapping[tuple[str, str], Grant]
) -> list[Violation]:
    used: dict[tuple[str, str], int] = {}
    for process in processes:
        place = process.lease, process.device
        if place in held:
            used[place] = used.get(place, 0) + (process.memory_used_bytes or 0)
    return [
        Violation(
            kind=AttributionKind.LEASE_MEMORY_EXCEEDED,
            device=device,
            lease=lease,
            owner=active[lease].owner,
            memory_used_bytes=amount,
            memory_granted_bytes=held[lease, device].memory_bytes,
            share=held[lease, device].share,
            leased=True,
        )
        for (lease, device), amount in used.items()
        # A lease on a whole device takes from no other: it was granted what was free at that moment.
        if amount > held[lease, device].memory_bytes > 0 and held[lease, device].share < 1.0
    ]


def _without(
    processes: Iterable[ProcessSample],
    active: Mapping[str, Lease],
    held: Mapping[tuple[str, str], Grant],
    leased: Collection[str],
) -> list[Violation]:
    return [
        Violation(
            kind=AttributionKind.PROCESS_WITHOUT_LEASE,
            device=process.device,
            lease=process.lease,
            owner=active[process.lease].owner if process.lease in active else "",
            memory_used_bytes=process.memory_used_bytes,
            leased=process.device in leased,
            pid=process.pid,
            started_ns=process.started_ns,
            name=process.name,
            user=process.user,
            container=process.container,
        )
        for process in processes
        if (process.lease, process.device) not in held and not is_system_process(process.name, process.kind)
    ]


class Watched(Struct, frozen=True, kw_only=True):
    """A violation with the times at which it was seen.

    Attributes:
        violation: the violation as last seen, with the greatest amount of memory so far.
        since: when it was first seen, seconds since the epoch.
        until: when it was last seen, seconds since the epoch.
        reported: True if its begin was reported.
    """

    violation: Violation
    since: float
    until: float
    reported: bool = False


class Notice(Struct, frozen=True, kw_only=True):
    """Begin or end of a violation, to be reported once.

    Attributes:
        watched: the violation.
        ended: True if it is the end.
    """

    watched: Watched
    ended: bool = False


def follow(
    before: Mapping[str, Watched], violations: Iterable[Violation], now: float, grace_seconds: float = GRACE_SECONDS
) -> tuple[dict[str, Watched], list[Notice]]:
    """Fold the violations that are seen at a time into those that are known.

    A begin is reported once the violation was seen for the grace time without a break, an end once it was not seen for
    as long.

    Args:
        before: the known violations that the last call returned; empty at the start.
        violations: violations seen now.
        now: the time, seconds since the epoch.
        grace_seconds: the grace time; 0 reports at once.

    Returns:
        The violations known now, by `Violation.key`, and the begins and ends to report.
    """
    after: dict[str, Watched] = {}
    notices: list[Notice] = []
    for violation in violations:
        known = before.get(violation.key)
        watched = Watched(violation=violation, since=now, until=now)
        if known is not None:
            most = max(
                (v.memory_used_bytes for v in (known.violation, violation) if v.memory_used_bytes is not None),
                default=None,
            )
            worst = replace(violation, memory_used_bytes=most)
            watched = Watched(violation=worst, since=known.since, until=now, reported=known.reported)
        if not watched.reported and now - watched.since >= grace_seconds:
            watched = replace(watched, reported=True)
            notices.append(Notice(watched=watched))
        after[violation.key] = watched
    for key, known in before.items():
        if key in after or not known.reported:
            continue
        if now - known.until >= grace_seconds:
            notices.append(Notice(watched=known, ended=True))
        else:
            after[key] = known
    return after, notices


ENDED: Final = {
    AttributionKind.LEASE_MEMORY_EXCEEDED: AttributionKind.LEASE_MEMORY_EXCEEDED_ENDED,
    AttributionKind.PROCESS_WITHOUT_LEASE: AttributionKind.PROCESS_WITHOUT_LEASE_ENDED,
}
