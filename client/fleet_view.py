"""Live view of a fleet, for `corral top` and the dashboard: snapshots of the planner's state, and processes by host."""

from __future__ import annotations

import asyncio
import fnmatch
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import IntEnum
from typing import Final

from msgspec import Struct
from nats.aio.msg import Msg

from ..schemas import codec, operations, requests, subjects
from ..schemas.telemetry import ProcessBatch, ProcessSample
from .client import Client
from .errors import CorralError

REFRESH_SHARE: Final = 5.0
"""Minimum pause after a refresh, as a multiple of its duration: it leaves the planner time for requests."""
_PENDING_MESSAGES: Final = 4096
_MAX_RECALLED: Final = 100_000
_RECALLED: Final = {
    "host": "host",
    "device": "device",
    "pid": "pid",
    "kind": "kind",
    "memory_used_bytes": "memory_used_bytes",
    "sm_utilization_percent": "sm_utilization_percent",
    "process": "name",
    "user": "user",
    "container": "container",
    "lease_id": "lease",
}
"""Columns of the view `processes_now`, with the corresponding fields of a `ProcessSample`."""


class DeviceState(IntEnum):
    """Availability of a device for requests; if several states apply, the one that says most about that."""

    FREE = 0
    SHARED = 1
    """Part of the device is leased."""
    LEASED = 2
    THROTTLED = 3
    """Not leased, and heat or power limits hold the clocks back."""
    DRAINED = 4
    STALE = 5
    """No recent samples, or the host is lost."""
    UNHEALTHY = 6
    UNUSABLE = 7
    """Not usable for another reason, such as a device that is split into MIG instances."""
    IN_USE = 8
    """In use by a process without a lease."""
    RESERVED = 9
    """Not leased, in a window that is booked now."""


STATE_WORDS: Final = {
    DeviceState.FREE: "free",
    DeviceState.SHARED: "leased in part",
    DeviceState.LEASED: "leased",
    DeviceState.IN_USE: "in use without a lease",
    DeviceState.RESERVED: "reserved",
    DeviceState.THROTTLED: "throttled",
    DeviceState.DRAINED: "drained",
    DeviceState.UNHEALTHY: "unhealthy",
    DeviceState.STALE: "without samples",
    DeviceState.UNUSABLE: "unusable",
}
"""Each state in words, in the order of listings."""
_BOOKED_NOW: Final = re.compile(r"booked|booked for .* until [-:\dT]+Z", re.DOTALL)
"""Forms of `DeviceStatus.booked` for a window that has begun."""


def device_state(device: operations.DeviceStatus) -> DeviceState:
    """The state of a device."""
    why = set(device.why_not)
    if why & {"stale", "host_lost"}:
        return DeviceState.STALE
    if "unhealthy" in why or device.health:
        return DeviceState.UNHEALTHY
    if "drained" in why or device.drain_reason:
        return DeviceState.DRAINED
    if not device.usable:
        return DeviceState.UNUSABLE
    if device.leases:
        return DeviceState.LEASED if device.share_free <= 0 else DeviceState.SHARED
    if device.in_use:
        return DeviceState.IN_USE
    if device.throttled:
        return DeviceState.THROTTLED
    return DeviceState.RESERVED if _BOOKED_NOW.fullmatch(device.booked) else DeviceState.FREE


def state_counts(devices: Iterable[operations.DeviceStatus]) -> Counter[DeviceState]:
    """Number of devices in each state; a device that is split into MIG instances counts by these alone."""
    return Counter(device_state(device) for device in devices if "mig_parent" not in device.why_not)


def gpus_free(summary: operations.FleetSummary, devices: Sequence[operations.DeviceStatus]) -> float:
    """Capacity that is usable, not leased, and in use by nobody, as a number of whole GPUs.

    Args:
        summary: aggregates over the devices; its `share_free` includes those in use without a lease.
        devices: the devices. Of a split one, all MIG instances count as equal parts.
    """
    instances = Counter(device.mig_parent for device in devices if device.mig_parent)
    taken = [
        device.share_free / (instances[device.mig_parent] if device.mig_parent else 1)
        for device in devices
        if device.usable and device.in_use
    ]
    return max(0.0, summary.share_free - sum(taken))


def holder(lease: requests.Lease) -> str:
    """Holder of a lease: its owner, and the name of the workload if it has one."""
    return f"{lease.owner}: {lease.name}" if lease.name else lease.owner


def matches(device: operations.DeviceStatus, words: Sequence[str], holders: Mapping[str, str]) -> bool:
    """True if each word occurs in a device's host, model, UUID, lease, holder or state.

    Besides the names of `DeviceState`, the states are `leased` (in whole or in part), `free` (no lease, and in use by
    nobody), `unusable`, and the planner's codes for unusable devices, such as `stale` or `drained`.

    Args:
        device: the device.
        words: words in lower case; one with `*`, `?` or `[` is a glob over each of the texts.
        holders: holder of each active lease, by lease id.
    """
    availability = "leased" if device.leases else "unusable" if not device.usable else "" if device.in_use else "free"
    texts = [device.host, device.model, device.uuid, device_state(device).name, availability]
    texts += [*device.leases, *device.why_not, *(holders.get(lease, "") for lease in device.leases)]
    lowered = [text.lower() for text in texts if text]
    return all(
        any(fnmatch.fnmatchcase(text, word) if set(word) & set("*?[") else word in text for text in lowered)
        for word in words
    )


class FleetSnapshot(Struct, kw_only=True):
    """State of the fleet in the planner at one time.

    Attributes:
        time: time at which all answers had arrived.
        fleet: aggregates over the fleet.
        devices: devices by host and index.
        leases: active leases, oldest first.
        queue: requests in the queue, in queue order.
    """

    time: datetime
    fleet: operations.FleetSummary
    devices: list[operations.DeviceStatus]
    leases: list[requests.Lease]
    queue: list[operations.QueueEntry]

    @property
    def holders(self) -> dict[str, str]:
        """Holder of each active lease, by lease id."""
        return {lease.lease_id: holder(lease) for lease in self.leases}


async def take_snapshot(client: Client, hosts: Sequence[str] = (), models: Sequence[str] = ()) -> FleetSnapshot:
    """Ask the planner for fleet, devices, leases and queue concurrently.

    Args:
        client: client of the bus.
        hosts: globs over hosts; all by default.
        models: globs over models; all by default.

    Raises:
        CorralError: the planner did not answer.
    """
    fleet, devices, leases, queue = await asyncio.gather(
        client.fleet(hosts=hosts, models=models),
        client.devices(hosts=hosts, models=models),
        client.leases(),
        client.queue(),
    )
    return FleetSnapshot(time=datetime.now(UTC), fleet=fleet, devices=list(devices), leases=leases, queue=queue)


class FleetView:
    """The last snapshot of a fleet, and the processes that its hosts have published last.

    Args:
        client: client of the bus.
        hosts: globs over hosts; all by default.
        models: globs over models; all by default.
        history: number of snapshots of which `past` and `mean_past` keep the utilization.

    Attributes:
        last: the last snapshot; None before the first.
        error: error of the last attempt; None if it succeeded.
        refreshed_at: time of the last snapshot, on the monotonic clock; 0 before the first.
        took_seconds: duration of the last snapshot.
        past: utilization of each device in percent, oldest first; None where it is unknown.
        mean_past: mean utilization of the fleet in percent, oldest first; None where it is unknown.
    """

    def __init__(
        self, client: Client, hosts: Sequence[str] = (), models: Sequence[str] = (), *, history: int = 0
    ) -> None:
        self.client = client
        self._hosts = hosts
        self._models = models
        self._history = history
        self.last: FleetSnapshot | None = None
        self.error: CorralError | None = None
        self.refreshed_at = 0.0
        self.took_seconds = 0.0
        self.past: dict[str, deque[float | None]] = {}
        self.mean_past: deque[float | None] = deque(maxlen=history)
        self._processes: dict[str, list[ProcessSample] | bytes] = {}

    async def refresh(self) -> FleetSnapshot | None:
        """Take a new snapshot and return it. If that fails, keep the last one, set `error`, and return None.

        Raises:
            nats.errors.Error, OSError: the connection failed in a way that the client does not expect.
        """
        started = time.monotonic()
        try:
            seen = await take_snapshot(self.client, self._hosts, self._models)
        except CorralError as error:
            self.error = error
            return None
        self.last, self.error = seen, None
        self.refreshed_at = time.monotonic()
        self.took_seconds = self.refreshed_at - started
        if self._history:
            self._remember(seen)
        return seen

    def _remember(self, seen: FleetSnapshot) -> None:
        for device in seen.devices:
            past = self.past.get(device.uuid)
            if past is None:
                past = self.past[device.uuid] = deque(maxlen=self._history)
            past.append(device.utilization_percent)
        self.mean_past.append(seen.fleet.utilization_percent_mean)

    def pause_seconds(self, interval_seconds: float) -> float:
        """Seconds until the next refresh: at least `interval_seconds`, and longer if a refresh takes long."""
        return max(interval_seconds, REFRESH_SHARE * self.took_seconds)

    async def follow_processes(self) -> None:
        """Subscribe to the processes of all hosts, which publish them every ten seconds."""
        await self.client.nc.subscribe(
            subjects.processes_subject("*"), cb=self._on_processes, pending_msgs_limit=_PENDING_MESSAGES
        )

    async def _on_processes(self, message: Msg) -> None:
        # Decoded when they are shown: most hosts of a large fleet are not.
        self._processes[message.subject.rpartition(".")[2]] = message.data

    async def recall_processes(self) -> None:
        """Load the last processes from the history, of hosts that have published none since the subscription.

        Raises:
            CorralError: the history did not answer.
        """
        columns = ", ".join(f'"{name}"' for name in _RECALLED)
        found = await self.client.query(f"SELECT {columns} FROM processes_now", limit=_MAX_RECALLED)
        by_host: dict[str, list[ProcessSample]] = {}
        for row in found.dicts():
            host = row.pop("host")
            process = ProcessSample(**{_RECALLED[name]: value for name, value in row.items() if value is not None})
            by_host.setdefault(host, []).append(process)
        for host, processes in by_host.items():
            self._processes.setdefault(host, processes)

    def processes_of(self, host: str) -> list[ProcessSample] | None:
        """Processes on the devices of a host; None if its collector has published none, or not in a known form."""
        found = self._processes.get(host)
        if not isinstance(found, bytes):
            return found
        try:
            processes = codec.decode(found, ProcessBatch).processes
        except codec.DecodeError:
            del self._processes[host]
            return None
        self._processes[host] = processes
        return processes

    def processes_on(self, device: operations.DeviceStatus) -> list[ProcessSample] | None:
        """Processes on a device, those with the most memory first; None if its collector has published none yet."""
        processes = self.processes_of(device.host)
        if processes is None:
            return None
        found = [process for process in processes if process.device == device.uuid]
        return sorted(found, key=lambda process: -(process.memory_used_bytes or 0))

    @property
    def process_hosts(self) -> list[str]:
        """Names of the hosts whose processes are known."""
        return list(self._processes)
