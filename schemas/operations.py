"""What one asks about the fleet and its leases, and what operators do; the encoding is as in `requests.py`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from .requests import Count, Grant, Identifier, Lease, LeaseState, Rejection, ShortText, WorkRequest


class LeaseFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which leases to list.

    Attributes:
        owner: only of this owner.
        states: only in these states; active ones by default.
        lease_id: only this one.
        hosts: only those with a grant on one of these hosts; none allows any.
        offset: leave out so many of the oldest, to read a list in parts.
        limit: list so many at most; None lists all, which is refused as `too_large` where it does not fit in a message.
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
        leases: that the filter lets through.
        warnings: fields of the question that this planner does not know and has ignored.
    """

    leases: list[Lease]
    warnings: list[str] = []


class DeviceFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which devices to list; each field is a list of globs, and an empty one allows any.

    Attributes:
        hosts: over host names.
        models: over the device's name, upper and lower case alike.
        devices: over uuids.
    """

    hosts: list[str] = []
    models: list[str] = []
    devices: list[str] = []


class DeviceStatus(Struct, frozen=True, kw_only=True):
    """A device as the planner sees it now.

    Attributes:
        uuid: of the device.
        host: the host's name.
        index: on that host.
        model: the device's name.
        usable: whether it may take work now.
        why_not: the reasons if not: `stale`, `unhealthy`, `drained`, `mig_parent`, `host_lost`.
        memory_total_bytes: in all.
        memory_used_bytes: as measured.
        memory_free_bytes: what a request could still get, leases and foreign processes taken off.
        share_free: part of the device that is not leased, 0 to 1.
        utilization_percent: as measured last; None if unknown.
        temperature_celsius: likewise.
        power_watts: likewise.
        throttled: the clocks are held back by heat or power.
        sample_age_seconds: since the last sample; None before the first.
        leases: ids of the leases on it.
        drain_reason: why an operator drained it; empty if it is not drained.
        health: the last severity that counts, in words; empty if well.
        mig_parent: uuid of the parent of a MIG instance.
        in_use: strangers compute or hold memory on it, or what an ended lease has left there: it is not granted as a
            whole unless one asks with `allow_in_use`.
        in_use_reason: by what, in words; empty if it is not.
        mig_profile: of a MIG instance, such as `1g.10gb`; empty for a whole device.
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


class Devices(Struct, frozen=True, kw_only=True, tag="devices", tag_field="type"):
    """A list of devices, by host and index.

    Attributes:
        devices: that the filter lets through.
        warnings: fields of the question that this planner does not know and has ignored.
    """

    devices: list[DeviceStatus]
    warnings: list[str] = []


class FleetSummary(Struct, frozen=True, kw_only=True, tag="fleet", tag_field="type"):
    """Aggregates over the fleet, or over a part of it.

    Attributes:
        hosts: how many.
        devices: how many.
        usable_devices: that may take work now.
        leased_devices: that some lease holds, whole or in part.
        active_leases: how many.
        memory_total_bytes: over all devices.
        memory_used_bytes: as measured.
        memory_free_bytes: what requests could still get.
        share_free: whole devices' worth that is not leased.
        utilization_percent_mean: over devices with fresh samples; None without any.
        temperature_celsius_mean: likewise.
        power_watts_total: likewise.
        models: devices by model.
        waiting_requests: in the queue.
        planner: id of the planner that answers.
        warnings: fields of the question that this planner does not know and has ignored.
        in_use_devices: that no lease holds and strangers use.
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


class Addition(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Devices that are not there, for a what-if.

    Attributes:
        model: name of a model that the fleet has; its capabilities are taken over.
        devices: how many more.
        per_host: on hosts of so many.
    """

    model: str
    devices: Annotated[int, Meta(ge=1, le=100_000)]
    per_host: Annotated[int, Meta(ge=1, le=64)] = 8


class ExplainRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What would become of a request, without granting it.

    Attributes:
        request: as it would be sent.
        with_more: devices to add first (what-if).
    """

    request: WorkRequest
    with_more: list[Addition] = []


class Verdict(Struct, frozen=True, kw_only=True):
    """One device in an explanation.

    Attributes:
        host: the host's name.
        device: uuid.
        feasible: whether it could be used.
        reason: why not.
        score: if it could.
        score_parts: what the score is made of.
        selected: whether it would be taken.
    """

    host: str
    device: str
    feasible: bool
    reason: str = ""
    score: float | None = None
    score_parts: dict[str, float] = {}
    selected: bool = False


class Explanation(Struct, frozen=True, kw_only=True, tag="explanation", tag_field="type"):
    """What would become of a request, and why.

    Attributes:
        granted: whether it would be granted now.
        message: in one sentence.
        grants: what would be granted.
        rejection: what would be answered if not.
        verdicts: per device, the selected first, then by score; cut to 1,000.
        hosts: per host, why it could not hold the request; cut to 1,000.
        policy: that ranked.
        warnings: fields of the question that this planner does not know and has ignored.
    """

    granted: bool
    message: str
    grants: list[Grant] = []
    rejection: Rejection | None = None
    verdicts: list[Verdict] = []
    hosts: dict[str, str] = {}
    policy: str = ""
    warnings: list[str] = []


class DrainAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Keep new work off devices, or let it on again. Leases that are there go on.

    Attributes:
        drain: True drains, False undrains.
        devices: uuids.
        hosts: names.
        host_labels: cordons every host with these labels, now and later.
        reason: why; required to drain.
        operator: who.
    """

    drain: bool
    devices: list[str] = []
    hosts: list[str] = []
    host_labels: dict[str, str] = {}
    reason: ShortText = ""
    operator: ShortText = ""


class Drains(Struct, frozen=True, kw_only=True, tag="drains", tag_field="type"):
    """All drains that hold, after the change.

    Attributes:
        drains: what is drained (`host:NAME`, `device:UUID`, `label:K=V`) → reason.
        warnings: fields of the question that this planner does not know and has ignored.
    """

    drains: dict[str, str]
    warnings: list[str] = []


class EvictAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Take a lease back from its owner.

    Attributes:
        lease_id: which.
        reason: why; its holder is told.
        operator: who.
    """

    lease_id: Identifier
    reason: Annotated[str, Meta(min_length=1, max_length=256)]
    operator: ShortText = ""


class QueueFilter(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Which requests that wait to list.

    Attributes:
        owner: only of this owner.
        request_id: only this one.
        offset: leave out so many of the first, to read a list in parts.
        limit: list so many at most; None lists as many as fit in a message.
    """

    owner: str | None = None
    request_id: str | None = None
    offset: Count = 0
    limit: Annotated[int, Meta(ge=1, le=2**53)] | None = None


class QueueEntry(Struct, frozen=True, kw_only=True):
    """A request that waits.

    Attributes:
        request_id: of the request.
        owner: who asks.
        position: from 1, in the order of priority and arrival.
        waiting_seconds: so far.
        message: why it waits.
        gpus: how many it asks for.
        name: of the workload.
        heard_seconds: since it was last heard; it is out of line after 30.
        reserved_devices: how many are kept for it, since it has waited long enough: free ones, and such as will be.
        reserved_hosts: on which hosts, the first ten by name; for a request without devices, whose cores or RAM are.
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


class Queue(Struct, frozen=True, kw_only=True, tag="queue", tag_field="type"):
    """Requests that wait, first in line first.

    Attributes:
        entries: that the filter lets through, as many as fit in a message.
        total: that the filter lets through; the rest is listed with an `offset`.
        warnings: fields of the question that this planner does not know and has ignored.
    """

    entries: list[QueueEntry]
    total: int = 0
    warnings: list[str] = []
