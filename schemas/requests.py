"""What one asks of the planner and what it answers. JSON by default; MessagePack by `Content-Type`.

Times are RFC 3339 in UTC, durations seconds, memory bytes. Every reply has a `type`, so that a client in any language
can tell an assignment from a rejection from an error by one field, and holds all its fields: what a request leaves out
takes its default, but a reader finds everything where the reference says that it is.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

# To Python `$` alone is also the place before a last line feed; JSON Schema has no `\Z`.
OwnerName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_@-][A-Za-z0-9_@.:/+-]*$(?!\n)")]
Identifier = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_-]+$(?!\n)")]
Time = Annotated[datetime, Meta(tz=True)]
"""RFC 3339 in UTC."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""As far as every language has whole numbers."""
ShortText = Annotated[str, Meta(max_length=256)]
Labels = Annotated[dict[ShortText, ShortText], Meta(max_length=64)]
Bytes = Annotated[int, Meta(ge=0, le=2**60)]
# What is divided by a share, weight or cost must stay a finite number: JSON has no other.
Share = Annotated[float, Meta(ge=1e-6, le=1)]
Weight = Annotated[float, Meta(ge=1e-9, le=1e15)]


class Placement(StrEnum):
    """Where the devices of one request may lie."""

    SAME_HOST = "same_host"
    """All on one host."""
    FEWEST_HOSTS = "fewest_hosts"
    """On one host if one can hold them, else on as few as can."""
    SPREAD = "spread"
    """Each on another host."""


class Method(StrEnum):
    """How work items are distributed over the granted devices."""

    UNIFORM = "uniform"
    """Counts that differ by one at most."""
    CAPACITY = "capacity"
    """Counts in proportion to the weights, by the largest-remainder rule."""
    BALANCED = "balanced"
    """Independent items with a cost: the smallest time until the last device is done."""
    PIPELINE = "pipeline"
    """Contiguous runs of items over the devices in order: the fastest slowest stage."""


class WeightBy(StrEnum):
    """What a device's capacity is measured by."""

    COMPUTE = "compute"
    MEMORY = "memory"
    BANDWIDTH = "bandwidth"
    GIVEN = "given"


class WorkItem(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One thing to be done on one device.

    Attributes:
        id: names it within the request.
        memory_bytes: device memory that it takes while it is there.
        cost: relative time that it takes on a device of weight 1.
    """

    id: Annotated[str, Meta(min_length=1, max_length=256)]
    memory_bytes: Bytes = 0
    cost: Annotated[float, Meta(ge=0, le=1e15)] = 1.0


class Distribution(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Work to distribute over the granted devices.

    Attributes:
        items: how many, or their ids, or items with memory and cost.
        method: see `Method`.
        weight_by: for `capacity`, `balanced` and `pipeline`.
        weights: one number per device, 1e-9 to 1e15, in the order of the assignment, for `weight_by: given`.
        max_items_per_device: none by default.
        memory_per_item_bytes: for items that do not give their own.
    """

    items: Annotated[int, Meta(ge=0, le=10_000_000)] | list[str | WorkItem] = 0
    method: Method = Method.UNIFORM
    weight_by: WeightBy = WeightBy.COMPUTE
    weights: list[Weight] | None = None
    max_items_per_device: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    memory_per_item_bytes: Bytes = 0


class WorkRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A request for devices. All of it is granted, or nothing.

    Attributes:
        owner: who asks; only the owner may renew or release.
        gpus: how many devices. 0 asks for CPU and memory of a host alone.
        gpu_memory_bytes: memory that must be free on each device; it is granted to the lease.
        gpu_share: part of one device, 0.000001 to 1; None takes devices whole. Only with `gpus: 1`. Without
            `gpu_memory_bytes` the same part of the device's memory is granted.
        cpus: logical cores in all; on several hosts, in proportion to the devices there.
        host_memory_bytes: RAM in all, split likewise.
        models: globs over the device's name, upper and lower case alike, such as `*H100*`; empty allows any.
        vendors: such as `nvidia`; empty allows any.
        hosts: globs over host names; empty allows any.
        host_labels: labels that a host must have, each with this value.
        min_compute_capability: such as `8.0`.
        placement: see `Placement`.
        ttl_seconds: the lease ends then unless it is renewed.
        request_id: the same id with the same body gets the same answer. None is given one.
        name: of the workload; right-sizing and history group by it.
        labels: kept with the lease and its history; 16 KiB in all.
        policy: name of a ranking policy; None takes the planner's default.
        wait_seconds: stay in the queue for so long where nothing fits now but could later; 0 answers at once.
        priority: the greater first in the queue.
        distribution: work items to distribute over the devices.
        holder: name of the process that will hold the lease (`bus/process_identity.py`): whoever descends from it is
            counted as working under the lease, also where its environment can't be read.
        allow_in_use: whole devices may have strangers on them, who compute or hold memory there; without it they are
            idle. Grants of such devices say `in_use`.
        mig: ask for a MIG instance: true for any, or a glob over profiles such as `1g.10gb` or `*g.20gb`. Without it,
            and unless `models` names profiles, whole devices alone are granted. Only with `gpus: 1`, since a CUDA
            program sees one instance.
    """

    owner: OwnerName
    gpus: Annotated[int, Meta(ge=0, le=4096)] = 1
    gpu_memory_bytes: Bytes = 0
    gpu_share: Share | None = None
    cpus: Annotated[float, Meta(ge=0, le=1_000_000)] = 0.0
    host_memory_bytes: Bytes = 0
    models: Annotated[list[ShortText], Meta(max_length=64)] = []
    vendors: Annotated[list[ShortText], Meta(max_length=16)] = []
    hosts: Annotated[list[ShortText], Meta(max_length=1024)] = []
    host_labels: Labels = {}
    min_compute_capability: Annotated[str, Meta(pattern=r"^[0-9]{1,3}(\.[0-9]{1,3})?$(?!\n)")] | None = None
    placement: Placement = Placement.SAME_HOST
    ttl_seconds: Annotated[float, Meta(ge=1, le=30 * 86400)] = 300.0
    request_id: Identifier | None = None
    name: ShortText = ""
    labels: Labels = {}
    policy: ShortText | None = None
    wait_seconds: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    distribution: Distribution | None = None
    holder: ShortText = ""
    allow_in_use: bool = False
    mig: bool | Annotated[str, Meta(min_length=1, max_length=64)] = False


class Grant(Struct, frozen=True, kw_only=True):
    """One device of an assignment.

    Attributes:
        host: the host's name.
        device: uuid; empty for a grant of CPU and memory alone.
        index: the driver's index on that host.
        model: the device's name.
        memory_bytes: device memory granted.
        share: of the device, in (0, 1].
        cpus: logical cores granted with it.
        host_memory_bytes: RAM granted with it.
        score: the rank's score, greater is better.
        score_parts: what it is made of, by name; they sum to `score`.
        items: ids or numbers (from 0) of the work items for this device.
        in_use: strangers computed or held memory on the device when it was granted.
        mig_parent: uuid of the board that the device is an instance of; empty for a whole device.
    """

    host: str
    device: str = ""
    index: int = 0
    model: str = ""
    memory_bytes: int = 0
    share: float = 1.0
    cpus: float = 0.0
    host_memory_bytes: int = 0
    score: float = 0.0
    score_parts: dict[str, float] = {}
    items: list[str | int] = []
    in_use: bool = False
    mig_parent: str = ""


class UnassignedItem(Struct, frozen=True, kw_only=True):
    """A work item that no device took.

    Attributes:
        id: its id, or its number for items given as a count.
        reason: why, in words.
    """

    id: str | int
    reason: str


class Distributed(Struct, frozen=True, kw_only=True):
    """How good a distribution of work items is.

    Attributes:
        method: that distributed.
        weights: what each device's capacity was taken for, in the order of the grants.
        makespan: when the last device is done, in cost over weight; for `pipeline` the time of the slowest stage.
        bound: no distribution of the items that are placed is done before it (for `pipeline`, none in their order).
        optimal: none is better.
    """

    method: Method
    weights: list[float]
    makespan: float
    bound: float
    optimal: bool = False


class LeaseState(StrEnum):
    """`active` holds devices; all others are final."""

    ACTIVE = "active"
    RELEASED = "released"
    EXPIRED = "expired"
    LOST = "lost"
    """Its host has vanished."""
    EVICTED = "evicted"
    """An operator took it back."""


class Lease(Struct, frozen=True, kw_only=True, tag="lease", tag_field="type"):
    """The durable promise of devices to an owner until a time.

    Attributes:
        lease_id: names it.
        owner: who holds it.
        state: see `LeaseState`.
        granted_at: when it was granted.
        expires_at: it ends then unless it is renewed.
        ttl_seconds: a renewal moves `expires_at` by so much.
        grants: the devices.
        request_id: of the request.
        name: of the workload.
        labels: of the request.
        environment: to set for the work, by host: its devices as their runtime takes them (`CUDA_VISIBLE_DEVICES`;
            `ROCR_VISIBLE_DEVICES` and `HIP_VISIBLE_DEVICES` on AMD), and `CORRAL_LEASE`.
        unassigned: work items that no device took.
        ended_at: when it ended; None while active.
        reason: why it ended; by whom and what for where an operator took it.
        policy: that ranked the devices.
        distribution: how good the distribution of the work items is; None without items.
        holder: of the request.
        addresses: how the hosts of the grants are reached (by ssh, say), where that is known.
        warnings: of an answer: fields of the question that this planner does not know and has ignored.
    """

    lease_id: str
    owner: str
    state: LeaseState
    granted_at: Time
    expires_at: Time
    ttl_seconds: float
    grants: list[Grant]
    request_id: str = ""
    name: str = ""
    labels: dict[str, str] = {}
    environment: dict[str, dict[str, str]] = {}
    unassigned: list[UnassignedItem] = []
    ended_at: Time | None = None
    reason: str = ""
    policy: str = ""
    distribution: Distributed | None = None
    holder: str = ""
    addresses: dict[str, str] = {}
    warnings: list[str] = []


class Assignment(Struct, frozen=True, kw_only=True, tag="assignment", tag_field="type"):
    """The answer to a request that was granted.

    Attributes:
        lease: the promise, with its devices.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    lease: Lease
    warnings: list[str] = []


class RejectionCode(StrEnum):
    """Why a request was turned down."""

    NO_CAPACITY = "no_capacity"
    """It fits this fleet, but not now."""
    IMPOSSIBLE = "impossible"
    """No device of this fleet could ever hold it."""
    NO_DEVICES = "no_devices"
    """The planner knows no device at all (yet)."""
    TIMED_OUT = "timed_out"
    """It waited as long as it wanted to, and nothing came free."""
    WITHDRAWN = "withdrawn"
    """Whoever asked wants it no more."""


class Reason(Struct, frozen=True, kw_only=True):
    """Why some devices could not be used.

    Attributes:
        code: `memory`, `share`, `model`, `stale`, `unhealthy`, `drained`, `leased`, `reserved`, `in_use`, `mig`,
            `cpus`, …
        devices: how many.
        detail: in words, with the nearest miss where there is one.
    """

    code: str
    devices: int
    detail: str


class Rejection(Struct, frozen=True, kw_only=True, tag="rejection", tag_field="type"):
    """The answer to a request that was not granted.

    Attributes:
        code: see `RejectionCode`.
        message: all reasons in one sentence.
        reasons: counted.
        could_ever_fit: whether the same fleet, idle and healthy, could hold it.
        request_id: of the request.
        nearest: what would have to change, in words; empty if unknown.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    code: RejectionCode
    message: str
    reasons: list[Reason] = []
    could_ever_fit: bool = False
    request_id: str = ""
    nearest: str = ""
    warnings: list[str] = []


class Error(Struct, frozen=True, kw_only=True, tag="error", tag_field="type"):
    """The answer to a message that asks for nothing that could be done.

    Attributes:
        code: `invalid`, `not_found`, `not_owner`, `conflict`, `too_large`, `too_many_requests`, `unavailable`,
            `refused`, `timeout`, …
        message: what is wrong and what to do.
        field: path of the field at fault, such as `$.gpus`; empty if none.
        retry_after_seconds: of `too_many_requests`: ask again then; None if nobody knows.
    """

    code: str
    message: str
    field: str = ""
    retry_after_seconds: float | None = None


class WithdrawAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Take a request back that may still wait.

    The answer is the request's own: the rejection `withdrawn`; the assignment if it was granted just before, whose
    lease is then to be released; or the rejection that it had before. Again it is answered alike, and a request that
    comes under the id after its withdrawal is turned down.

    Attributes:
        request_id: which.
        owner: must be its owner.
    """

    request_id: Identifier
    owner: OwnerName


class LeaseAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Renew or release a lease.

    Attributes:
        lease_id: which.
        owner: must be its owner.
        ttl_seconds: for a renewal; None keeps the lease's own.
        holder: for a renewal; name of the process that holds the lease from now on, empty for the one before.
    """

    lease_id: Identifier
    owner: OwnerName
    ttl_seconds: Annotated[float, Meta(ge=1, le=30 * 86400)] | None = None
    holder: ShortText = ""


class LeaseEventKind(StrEnum):
    """What happened to a lease."""

    GRANTED = "granted"
    RENEWED = "renewed"
    EXPIRING = "expiring"
    """It ends soon: a fifth of its time to live is left."""
    RELEASED = "released"
    EXPIRED = "expired"
    LOST = "lost"
    EVICTED = "evicted"


class LeaseEvent(Struct, frozen=True, kw_only=True, tag="lease_event", tag_field="type"):
    """Published on the leases subject, once for each change; JSON.

    Renewals that follow each other within a second are told as one, the last; those of an owner who takes much of the
    stream more seldom, and always before the end that was told last.

    Attributes:
        kind: see `LeaseEventKind`.
        time: when.
        lease: as it is after the change, without work items; after its grant also without environment and addresses,
            and where they are many without labels and, of a renewal, without grants. The planner tells all of it.
        planner: id of the planner.
    """

    kind: LeaseEventKind
    time: Time
    lease: Lease
    planner: str = ""


PlanReply = Assignment | Rejection | Error
