"""Attribution in an agent: joins each host's processes to its leases, and reports violations as events."""

from __future__ import annotations

from pathlib import Path

from ...schemas.requests import Lease
from ...schemas.telemetry import AttributionKind, ProcessSample, Severity
from ..source import Emit, SourceEvent
from . import proc
from .attribution import ENDED, Ancestry, Notice, Watched, attribute, follow


class Attribution:
    """Attribution of processes to leases on an agent's hosts, with the violations that last.

    This state does not outlive the agent: a new one starts without it, and reports violations that last again.

    Args:
        grace_seconds: see `attribution.follow`.
        emit: takes the events.
        here: True if the processes are this machine's: the container of this process then identifies no lease.
    """

    def __init__(self, grace_seconds: float, emit: Emit, *, here: bool) -> None:
        self._grace_seconds = grace_seconds
        self._emit = emit
        own = (
            proc.container(Path("/proc/self/cgroup").read_text()) if here and Path("/proc/self/cgroup").exists() else ""
        )
        self._shared = frozenset({own} - {""})
        self._here = here
        self._leases: dict[str, list[Lease]] | None = None
        self._watched: dict[str, dict[str, Watched]] = {}

    def set_leases(self, leases: list[Lease] | None) -> None:
        """Set all active leases; None while they are not known: no violation is reported then."""
        if leases is None:
            self._leases = None
            return
        by_host: dict[str, list[Lease]] = {}
        for lease in leases:
            # A machine gets only the leases on its devices, and may have had another name when they began.
            for host in {"" if self._here else grant.host for grant in lease.grants}:
                by_host.setdefault(host, []).append(lease)
        self._leases = by_host

    def take(self, host: str, processes: list[ProcessSample], ancestry: Ancestry, time_ns: int) -> list[ProcessSample]:
        """Attribute processes to leases, and report the violations that begin or end.

        Args:
            host: the host's name.
            processes: all processes on its devices.
            ancestry: their ancestry.
            time_ns: when they were seen, nanoseconds since the epoch.

        Returns:
            The processes with their leases.
        """
        if self._leases is None:
            return processes
        attributed, violations = attribute(
            processes, self._leases.get("" if self._here else host, ()), ancestry, self._shared
        )
        after, notices = follow(self._watched.get(host, {}), violations, time_ns / 1e9, self._grace_seconds)
        if after:
            self._watched[host] = after
        else:
            self._watched.pop(host, None)
        for notice in notices:
            self._emit(_event(host, notice))
        return attributed


def _event(host: str, notice: Notice) -> SourceEvent:
    watched, violation = notice.watched, notice.watched.violation
    since_ns, until_ns = round(watched.since * 1e9), round(watched.until * 1e9)
    data: dict[str, str | int | float | bool | None] = {
        "violation": violation.key,
        "since_ns": since_ns,
        "until_ns": until_ns,
        "lease": violation.lease,
        "owner": violation.owner,
        "leased": violation.leased,
        "memory_used_bytes": violation.memory_used_bytes,
    }
    if violation.kind is AttributionKind.LEASE_MEMORY_EXCEEDED:
        data |= {"memory_granted_bytes": violation.memory_granted_bytes, "share": violation.share}
    else:
        data |= {
            "pid": violation.pid,
            "name": violation.name,
            "user": violation.user,
            "container": violation.container,
        }
    seconds = max(watched.until - watched.since, 0.0)
    return SourceEvent(
        host=host,
        time_ns=until_ns,
        kind=ENDED[violation.kind] if notice.ended else violation.kind,
        severity=Severity.INFO if notice.ended else violation.severity,
        device=violation.device,
        message=f"over after {seconds:.0f} s: {violation.message}" if notice.ended else violation.message,
        data=data,
    )
