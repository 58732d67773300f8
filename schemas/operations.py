"""Messages about the fleet and its leases, and actions of operators; the encoding is as in `requests.py`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from .models.serving import ServeFit
from .request_events import Forecast
from .requests import Count, Grant, Identifier, Lease, LeaseState, Rejection, ShortText, WorkRequest
from .values.durations import DurationEstimate


class LeaseFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Request for a list of leases. Each field narrows the list.

    Attributes:
        owner: only leases of this owner.
        states: only leases in these states; active ones by default.
        lease_id: only the lease with this id.
        hosts: only leases with a grant on one of these hosts; an empty list allows any.
        offset: skip this many of the oldest, to read a list in parts.
        limit: list at most this many; null lists all, which is refused as `too_large` if it does not fit in a message.
    """

    owner: str | None = None
    states: tuple[LeaseState, ...] = (LeaseState.ACTIVE,)
    lease_id: str | None = None
    hosts: list[str] = []
    offset: Count = 0
    limit: Annotated[int, Meta(ge=1, le=2**53)] | None = None


class Leases(Struct, frozen=True, kw_only=True, tag="leases", tag_field="type"):
    """A list of leases, oldest first.

    Attributes:
        leases: leases that match the filter.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    leases: list[Lease]
    warnings: list[str] = []


class DeviceFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Filter of a request about devices. Each field is a list of globs, and an empty list allows any.

    Attributes:
        hosts: globs over host names.
        models: globs over the device's name, case-insensitive.
        devices: globs over uuids.
    """

    hosts: list[str] = []
    models: list[str] = []
    devices: list[str] = []


class DeviceStatus(Struct, frozen=True, kw_only=True):
    """A device as the planner sees it now.

    Attributes:
        uuid: uuid of the device.
        host: the host's name.
        index: the driver's index on that host.
        model: the device's name.
        usable: true if it may take work now.
        why_not: reasons if it is not usable: `stale`, `unhealthy`, `drained`, `mig_parent`, `host_lost`,
            `maintenance`.
        memory_total_bytes: device memory in all.
        memory_used_bytes: device memory in use, as measured last; null if unknown.
        memory_free_bytes: device memory that a request could still get, without that of leases and foreign processes.
        share_free: part of the device that is not leased, 0 to 1.
        utilization_percent: as measured last; null if unknown.
        temperature_celsius: as measured last; null if unknown.
        power_watts: as measured last; null if unknown.
        throttled: true if heat or power limits hold the clocks back.
        sample_age_seconds: age of the last sample; null before the first.
        leases: ids of the leases on it.
        drain_reason: why an operator drained it; empty if it is not drained.
        health: the last severity that counts, in words; empty if the device is healthy.
        mig_parent: uuid of the parent of a MIG instance; null for a whole device.
        in_use: true if processes without a lease, or left by a lease that has ended, compute or hold memory on it. It
            is then granted as a whole only to a request with `allow_in_use`.
        in_use_reason: what uses it, in words; empty if it is not in use.
        mig_profile: profile of a MIG instance, such as `1g.10gb`; empty for a whole device.
        booked: for whom it is booked now or next, and when, in words; empty if it is not booked.
    """

    uuid: str
    host: str
    index: int
    model: str = ""
    usable: bool = True
    why_not: list[str] = []
    memory_total_bytes: int = 0
    memory_used_bytes: int | None = None
    memory_free_bytes: int = 0
    share_free: float = 1.0
    utilization_percent: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    throttled: bool = False
    sample_age_seconds: float | None = None
    leases: list[str] = []
    drain_reason: str = ""
    health: str = ""
    mig_parent: str | None = None
    in_use: bool = False
    in_use_reason: str = ""
    mig_profile: str = ""
    booked: str = ""


class Devices(Struct, frozen=True, kw_only=True, tag="devices", tag_field="type"):
    """A list of devices, by host and index.

    Attributes:
        devices: devices that match the filter.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    devices: list[DeviceStatus]
    warnings: list[str] = []


class FleetSummary(Struct, frozen=True, kw_only=True, tag="fleet", tag_field="type"):
    """Aggregates over the fleet, or over a part of it.

    Attributes:
        hosts: number of hosts.
        devices: number of devices.
        usable_devices: number of devices that may take work now.
        leased_devices: number of devices that some lease holds, whole or in part.
        active_leases: number of active leases.
        memory_total_bytes: memory of all devices.
        memory_used_bytes: device memory in use, as measured.
        memory_free_bytes: device memory that requests could still get.
        share_free: capacity that is not leased, as a number of whole devices.
        utilization_percent_mean: mean over devices with fresh samples; null without any.
        temperature_celsius_mean: mean over devices with fresh samples; null without any.
        power_watts_total: sum over devices with fresh samples; null without any.
        models: number of devices by model.
        waiting_requests: number of requests in the queue.
        planner: id of the planner that answers.
        warnings: fields of the request that this planner does not know and has ignored.
        in_use_devices: number of devices that no lease holds, but that processes without a lease use.
        runner_hosts: number of hosts with a runner, which can take jobs; null from a planner that does not say it.
        without_runner: names of hosts without one, cut to 20.
        unready_runners: why the runners of hosts start no jobs for now, by host, cut to 20.
    """

    hosts: int = 0
    devices: int = 0
    usable_devices: int = 0
    leased_devices: int = 0
    active_leases: int = 0
    memory_total_bytes: int = 0
    memory_used_bytes: int = 0
    memory_free_bytes: int = 0
    share_free: float = 0.0
    utilization_percent_mean: float | None = None
    temperature_celsius_mean: float | None = None
    power_watts_total: float | None = None
    models: dict[str, int] = {}
    waiting_requests: int = 0
    planner: str = ""
    warnings: list[str] = []
    in_use_devices: int = 0
    runner_hosts: int | None = None
    without_runner: list[str] = []
    unready_runners: dict[str, str] = {}


class Addition(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Hypothetical devices, for a what-if question.

    Attributes:
        model: name of a model that the fleet has; its capabilities are taken over.
        devices: number of devices to add.
        per_host: number of devices on each host that is added.
    """

    model: str
    devices: Annotated[int, Meta(ge=1, le=100_000)]
    per_host: Annotated[int, Meta(ge=1, le=64)] = 8


class ExplainRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Ask whether a request would be granted, and why, without granting it.

    Attributes:
        request: the request as it would be sent.
        with_more: devices to add to the fleet first (what-if).
    """

    request: WorkRequest
    with_more: list[Addition] = []


class Verdict(Struct, frozen=True, kw_only=True):
    """Verdict on one device in an explanation.

    Attributes:
        host: the host's name.
        device: uuid of the device.
        feasible: true if the request could use it.
        reason: why it could not; empty if it could.
        score: score of a feasible device; null for others.
        score_parts: parts of the score, by name.
        selected: true if the request would get it.
    """

    host: str
    device: str
    feasible: bool
    reason: str = ""
    score: float | None = None
    score_parts: dict[str, float] = {}
    selected: bool = False


class Explanation(Struct, frozen=True, kw_only=True, tag="explanation", tag_field="type"):
    """Outcome that a request would have now, and the reasons.

    Attributes:
        granted: true if it would be granted now.
        message: the outcome in one sentence.
        grants: the devices that would be granted.
        rejection: the answer if it would not be granted; null if it would.
        verdicts: one per device, selected ones first, then by score; cut to 1,000.
        hosts: per host, why it could not hold the request; cut to 1,000.
        policy: name of the policy that ranked the devices.
        warnings: fields of the request that this planner does not know and has ignored.
        fit: for a request with `distribution.method: serve`, how the devices that it may use could serve the model;
            `granted` and `grants` are then those of its first plan. Null for any other.
    """

    granted: bool
    message: str
    grants: list[Grant] = []
    rejection: Rejection | None = None
    verdicts: list[Verdict] = []
    hosts: dict[str, str] = {}
    policy: str = ""
    warnings: list[str] = []
    fit: ServeFit | None = None


class DrainAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Drain devices, so that they take no new work, or undrain them. Existing leases go on.

    Attributes:
        drain: true drains, false undrains.
        devices: uuids of devices.
        hosts: names of hosts, with all their devices.
        host_labels: cordons every host with these labels, now and later.
        reason: why; required to drain.
        operator: name of the operator.
    """

    drain: bool
    devices: list[str] = []
    hosts: list[str] = []
    host_labels: dict[str, str] = {}
    reason: ShortText = ""
    operator: ShortText = ""


class Drains(Struct, frozen=True, kw_only=True, tag="drains", tag_field="type"):
    """All drains in force after the change.

    Attributes:
        drains: what is drained (`host:NAME`, `device:UUID`, `label:K=V`) → reason.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    drains: dict[str, str]
    warnings: list[str] = []


class EvictAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Take a lease back from its owner.

    Attributes:
        lease_id: id of the lease.
        reason: why; it stands in the lease that its holder sees.
        operator: name of the operator.
    """

    lease_id: Identifier
    reason: Annotated[str, Meta(min_length=1, max_length=256)]
    operator: ShortText = ""


class PreemptAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Preempt a lease that is preemptible: its holder gets a notice, and it ends after its `grace_seconds`.

    Attributes:
        lease_id: id of the lease.
        reason: why; it stands in the notice.
        operator: name of the operator.
        devices: of an elastic lease: uuids of devices that its holder is asked to give back instead. It goes on with
            the others, and stays as it is if its holder does not agree within its `grace_seconds`.
    """

    lease_id: Identifier
    reason: Annotated[str, Meta(min_length=1, max_length=256)]
    operator: ShortText = ""
    devices: Annotated[list[ShortText], Meta(max_length=4096)] = []


class QueueFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Request for a list of the requests that wait in the queue. Each field narrows the list.

    Attributes:
        owner: only requests of this owner.
        request_id: only the request with this id.
        offset: skip this many of the first, to read a list in parts.
        limit: list at most this many; null lists as many as fit in a message.
    """

    owner: str | None = None
    request_id: str | None = None
    offset: Count = 0
    limit: Annotated[int, Meta(ge=1, le=2**53)] | None = None


class QueueEntry(Struct, frozen=True, kw_only=True):
    """A request that waits in the queue.

    Attributes:
        request_id: id of the request.
        owner: owner who asks.
        position: place in the queue, from 1, by priority and arrival.
        waiting_seconds: time that it has waited so far.
        message: why it waits.
        gpus: number of devices that it asks for.
        name: name of the workload.
        heard_seconds: time since its client was last heard; after 30 s it leaves the queue.
        reserved_devices: number of devices, free now or soon, that are reserved for it since it has waited long enough.
        reserved_hosts: hosts of these devices, the first ten by name; for a request without devices, hosts whose cores
            or RAM are reserved.
        priority: priority of the request.
        estimate: estimate of how long its work takes; null in answers of earlier versions.
        forecast: expected start; null until it is computed.
        group: group of the owner; empty without groups.
        gpus_max: most devices of an elastic request; null for any other.
    """

    request_id: str
    owner: str
    position: int
    waiting_seconds: float
    message: str
    gpus: int = 0
    name: str = ""
    heard_seconds: float = 0.0
    reserved_devices: int = 0
    reserved_hosts: list[str] = []
    priority: int = 0
    estimate: DurationEstimate | None = None
    forecast: Forecast | None = None
    group: str = ""
    gpus_max: int | None = None


class Queue(Struct, frozen=True, kw_only=True, tag="queue", tag_field="type"):
    """Requests that wait in the queue, in the order of their positions.

    Attributes:
        entries: requests that match the filter, as many as fit in a message.
        total: number of requests that match the filter; list the rest with an `offset`.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    entries: list[QueueEntry]
    total: int = 0
    warnings: list[str] = []
