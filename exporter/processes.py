"""Use of devices by leases and processes, as the collectors' lists of processes have it. Pure.

A device that several leases share has one utilization and one number of used bytes; these say whose they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Final

from msgspec import Struct
from prometheus_client.core import GaugeMetricFamily, Metric

from ..schemas.requests import Lease
from ..schemas.system_processes import is_system_process
from ..schemas.telemetry import ProcessSample
from .live import Host
from .page import device_labels

MOST_PROCESSES: Final = 32
"""Processes of a device that have series of their own: those that hold the most memory."""
_DEVICE: Final = ("UUID", "gpu", "GPU_I_ID", "Hostname")
_LEASE: Final = (*_DEVICE, "owner", "group", "name")
_PROCESS: Final = (*_LEASE, "lease", "user", "process", "pid")


class Shown(StrEnum):
    """Processes that have series."""

    NONE = "none"
    LEASES = "leases"
    """Sums over the processes of each lease, and over those without one."""
    ALL = "all"
    """These, and each process by itself."""


class Use(Struct):
    """Use of a device by processes.

    Attributes:
        processes: their number.
        memory_used_bytes: memory that they hold; None if the driver hides it.
        sm_utilization_percent: their share of SM time; None if the driver has none.
    """

    processes: int = 0
    memory_used_bytes: int | None = None
    sm_utilization_percent: float | None = None

    def add(self, other: Use) -> None:
        """Add the use of others."""
        self.processes += other.processes
        if other.memory_used_bytes is not None:
            self.memory_used_bytes = (self.memory_used_bytes or 0) + other.memory_used_bytes
        if other.sm_utilization_percent is not None:
            self.sm_utilization_percent = (self.sm_utilization_percent or 0.0) + other.sm_utilization_percent


class LeaseUse(Struct, frozen=True):
    """Use of one device by the processes of a lease, or by those without one.

    Attributes:
        host: name of the host.
        device: uuid of the device.
        lease: the lease; None for processes that hold no active lease.
        use: what they use.
    """

    host: str
    device: str
    lease: Lease | None
    use: Use


def by_lease(hosts: Sequence[Host], leases: Iterable[Lease]) -> list[LeaseUse]:
    """Sum up the use of each device by lease. A lease without processes has an entry with none.

    A process that names a lease which does not hold its device has none: anyone can name any lease. Hosts whose
    collector can't attribute processes are left out, and so are processes of the desktop and the driver.
    """
    active = {lease.lease_id: lease for lease in leases}
    found: dict[tuple[str, str, str], Use] = defaultdict(Use)
    holding = _holding(active.values())
    listed = [host for host in hosts if host.processes is not None and host.processes.identified]
    names = {host.name for host in listed}
    for lease in active.values():
        for grant in lease.grants:
            if grant.device and grant.host in names:
                found[grant.host, grant.device, lease.lease_id] = Use()
    for host in listed:
        assert host.processes is not None
        for process in host.processes.processes:
            lease_id = process.lease if (host.name, process.device, process.lease) in holding else ""
            if lease_id or not is_system_process(process.name, process.kind):
                found[host.name, process.device, lease_id].add(
                    Use(1, process.memory_used_bytes, process.sm_utilization_percent)
                )
    return [LeaseUse(host, device, active.get(lease), use) for (host, device, lease), use in sorted(found.items())]


def _holding(leases: Iterable[Lease]) -> set[tuple[str, str, str]]:
    """Host, device and lease of each grant."""
    return {(grant.host, grant.device, lease.lease_id) for lease in leases for grant in lease.grants}


def families(hosts: Sequence[Host], leases: Sequence[Lease], shown: Shown) -> Iterator[Metric]:
    """Yield the series of leases' use, and those of processes if they are wanted."""
    if shown is Shown.NONE:
        return
    labels = _device_labels(hosts)
    leased: dict[tuple[str, ...], Use] = defaultdict(Use)
    unleased: dict[tuple[str, ...], Use] = defaultdict(Use)
    for found in by_lease(hosts, leases):
        device = labels.get((found.host, found.device))
        if device is None:
            continue
        who = () if found.lease is None else (found.lease.owner, found.lease.group, found.lease.name)
        # Leases of one workload on a device are one, as in `corral_device_lease_share`.
        use = leased[(*device, *who)] if who else unleased[device]
        use.add(found.use)
    yield from _uses("corral_device_lease", "of a lease", _LEASE, leased)
    yield from _uses("corral_device_unleased", "without a lease", _DEVICE, unleased)
    if shown is Shown.ALL:
        yield from _processes(hosts, leases, labels)


def _device_labels(hosts: Sequence[Host]) -> dict[tuple[str, str], tuple[str, ...]]:
    return {
        (host.name, uuid): (found["UUID"], found["gpu"], found.get("GPU_I_ID", ""), host.name)
        for host in hosts
        if host.inventory is not None
        for uuid, found in device_labels(host.inventory).items()
    }


def _uses(
    name: str, whose: str, labels: tuple[str, ...], uses: dict[tuple[str, ...], Use]
) -> Iterator[GaugeMetricFamily]:
    processes = GaugeMetricFamily(f"{name}_processes", f"Processes {whose} on a device.", labels=labels)
    memory = GaugeMetricFamily(
        f"{name}_memory_used_bytes", f"Device memory that the processes {whose} hold.", labels=labels
    )
    busy = GaugeMetricFamily(
        f"{name}_sm_utilization_ratio", f"Share of SM time of the processes {whose} (0 to 1).", labels=labels
    )
    for key, use in uses.items():
        processes.add_metric(key, use.processes)
        if use.memory_used_bytes is not None:
            memory.add_metric(key, use.memory_used_bytes)
        if use.sm_utilization_percent is not None:
            busy.add_metric(key, use.sm_utilization_percent / 100)
    yield from (processes, memory, busy)


def _processes(
    hosts: Sequence[Host], leases: Sequence[Lease], labels: dict[tuple[str, str], tuple[str, ...]]
) -> Iterator[GaugeMetricFamily]:
    active = {lease.lease_id: lease for lease in leases}
    holding = _holding(leases)
    memory = GaugeMetricFamily(
        "corral_process_memory_used_bytes", "Device memory that a process holds.", labels=_PROCESS
    )
    busy = GaugeMetricFamily(
        "corral_process_sm_utilization_ratio", "Share of SM time of a process (0 to 1).", labels=_PROCESS
    )
    left_out = GaugeMetricFamily(
        "corral_device_processes_left_out", "Processes of a device without series: the smallest.", labels=_DEVICE
    )
    for host in hosts:
        by_device: dict[str, list[ProcessSample]] = defaultdict(list)
        for process in host.processes.processes if host.processes is not None else ():
            by_device[process.device].append(process)
        for uuid, processes in by_device.items():
            device = labels.get((host.name, uuid))
            if device is None:
                continue
            processes.sort(key=lambda process: (-(process.memory_used_bytes or 0), process.pid))
            left_out.add_metric(device, max(0, len(processes) - MOST_PROCESSES))
            for process in processes[:MOST_PROCESSES]:
                lease = active[process.lease] if (host.name, uuid, process.lease) in holding else None
                who = ("", "", "") if lease is None else (lease.owner, lease.group, lease.name)
                key = (*device, *who, process.lease, process.user, process.name, str(process.pid))
                if process.memory_used_bytes is not None:
                    memory.add_metric(key, process.memory_used_bytes)
                if process.sm_utilization_percent is not None:
                    busy.add_metric(key, process.sm_utilization_percent / 100)
    yield from (memory, busy, left_out)
