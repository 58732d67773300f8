"""Requests to the planner and its answers. JSON by default; MessagePack by `Content-Type`.

Times are RFC 3339 in UTC, durations seconds, memory bytes. Every reply has a `type`, so that a client in any language
can tell assignments, rejections and errors apart by one field. A field that a request leaves out takes its default; a
reply always holds all its fields.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct
from msgspec.structs import force_setattr

from .limits import GRACE_SECONDS, MAX_GRACE_SECONDS, MAX_TTL_SECONDS, MAX_WAIT_SECONDS
from .models.serving import ServePlan, ServeWork
from .values import names

OwnerName = Annotated[str, Meta(min_length=1, max_length=128, pattern=names.OWNER)]
Identifier = Annotated[str, Meta(min_length=1, max_length=128, pattern=names.IDENTIFIER)]
Time = Annotated[datetime, Meta(tz=True)]
"""RFC 3339 in UTC."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""A whole number that every language can hold exactly."""
ShortText = Annotated[str, Meta(max_length=256)]
LabelName = Annotated[str, Meta(min_length=1, max_length=256)]
Labels = Annotated[dict[ShortText, ShortText], Meta(max_length=64)]
Bytes = Annotated[int, Meta(ge=0, le=2**60)]
# A number divided by a share, weight or cost must stay finite: JSON has no infinity.
Share = Annotated[float, Meta(ge=1e-6, le=1)]
Weight = Annotated[float, Meta(ge=1e-9, le=1e15)]
WorkSeconds = Annotated[float, Meta(ge=1, le=366 * 86400)]
GraceSeconds = Annotated[float, Meta(ge=0, le=MAX_GRACE_SECONDS)]


class GpuRange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fewest and most devices of an elastic lease.

    Attributes:
        min: devices without which the work can't run.
        max: devices that it can use.
    """

    min: Annotated[int, Meta(ge=1, le=4096)]
    max: Annotated[int, Meta(ge=1, le=4096)]

    def __post_init__(self) -> None:
        """Check the order, also of a decoded message."""
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, which is less than min, {self.min}")

    def __str__(self) -> str:
        return f"{self.min}-{self.max}"


if TYPE_CHECKING:
    GpuCount = int
else:  # `WorkRequest` makes two numbers of a range, so that its readers have a number in any case
    GpuCount = Annotated[int, Meta(ge=0, le=4096)] | GpuRange


class Placement(StrEnum):
    """Constraint on the hosts of a request's devices."""

    SAME_HOST = "same_host"
    """All on one host."""
    FEWEST_HOSTS = "fewest_hosts"
    """On one host if one can hold them, else on as few as can."""
    SPREAD = "spread"
    """Each on another host; with `gpus_per_host` so many on each."""


class Method(StrEnum):
    """Method of distributing work items over the granted devices."""

    UNIFORM = "uniform"
    """Counts that differ by one at most."""
    CAPACITY = "capacity"
    """Counts in proportion to the weights, by the largest-remainder rule."""
    BALANCED = "balanced"
    """Independent items with a cost, so that the last device is done as early as possible."""
    PIPELINE = "pipeline"
    """Contiguous runs of items over the devices in order, so that the slowest stage is as fast as possible."""
    SERVE = "serve"
    """Layers of a model over the devices, for the most tokens a second; `serve` describes the model."""


class WeightBy(StrEnum):
    """Measure of a device's capacity, for the distribution of work items."""

    COMPUTE = "compute"
    MEMORY = "memory"
    BANDWIDTH = "bandwidth"
    GIVEN = "given"


class WorkItem(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One item of work, for one device.

    Attributes:
        id: id of the item within the request.
        memory_bytes: device memory that it takes.
        cost: relative time that it takes on a device of weight 1.
    """

    id: Annotated[str, Meta(min_length=1, max_length=256)]
    memory_bytes: Bytes = 0
    cost: Annotated[float, Meta(ge=0, le=1e15)] = 1.0


class Distribution(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Work to distribute over the granted devices.

    Attributes:
        items: number of items, or their ids, or items with memory and cost.
        method: method of the distribution.
        weight_by: measure of a device's capacity, for `capacity`, `balanced` and `pipeline`.
        weights: one number per device, 1e-9 to 1e15, in the order of the assignment, for `weight_by: given`.
        max_items_per_device: most items on one device; no limit by default.
        memory_per_item_bytes: device memory of each item that does not give one.
        serve: for `method: serve`, the model to serve; its layers are the items.
    """

    items: Annotated[int, Meta(ge=0, le=10_000_000)] | list[str | WorkItem] = 0
    method: Method = Method.UNIFORM
    weight_by: WeightBy = WeightBy.COMPUTE
    weights: list[Weight] | None = None
    max_items_per_device: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    memory_per_item_bytes: Bytes = 0
    serve: ServeWork | None = None


class WorkRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A request for devices. All of it is granted, or nothing.

    Attributes:
        owner: owner of the lease; only the owner may renew or release it.
        gpus: number of devices. 0 asks for CPU and memory of a host alone. Also `{"min": 2, "max": 8}`, which is the
            same as `gpus: 2` with `gpus_max: 8`.
        gpus_max: most devices of an elastic lease, which starts with at least `gpus` of them. It is offered further
            ones while they are idle and nobody else could take them, and is asked to give them back when somebody
            could. It has others only when its holder agrees. Cores and RAM are for `gpus` devices; each further one
            comes with its part. Only whole devices, not with `placement: spread`, `mig` or `distribution`.
        gpu_memory_bytes: memory that must be free on each device; it is granted to the lease.
        gpu_share: part of one device, 0.000001 to 1; null takes devices whole. Only with `gpus: 1`. Without
            `gpu_memory_bytes` the same part of the device's memory is granted.
        cpus: logical cores in all; on several hosts, in proportion to the devices there.
        host_memory_bytes: host RAM in all; on several hosts, in proportion to the devices there.
        models: globs over the device's name, case-insensitive, such as `*H100*`; empty allows any.
        vendors: such as `nvidia`; empty allows any.
        hosts: globs over host names; empty allows any.
        host_labels: labels that a host must have, each with this value.
        min_compute_capability: lowest compute capability, such as `8.0`; null allows any.
        placement: constraint on the hosts of the devices.
        gpus_per_host: with `placement: spread`, number of devices on each host, of which `gpus` is a multiple; null for
            one. Only whole devices.
        within: name of a label, such as `rack` or `nvlink_domain`: all hosts of the devices must have it with the same
            value. For devices on several hosts; null for no such constraint.
        prefer_within: the same as a wish: hosts with the same value if the devices fit there now, else any.
        ttl_seconds: time to live: the lease ends then unless it is renewed.
        request_id: idempotency key: the same id with the same body gets the same answer. With null the planner chooses
            an id.
        name: name of the workload; right-sizing and history group by it.
        labels: kept with the lease and its history; 16 KiB in all.
        policy: name of a ranking policy; null takes the planner's default.
        wait_seconds: longest time in the queue where nothing fits now but could later; 0 answers at once.
        priority: priority in the queue; the greater goes first.
        distribution: work items to distribute over the devices.
        holder: name of the process that will hold the lease (`bus/process_identity.py`). Its descendants count as
            working under the lease, even where their environment can't be read.
        allow_in_use: accept whole devices on which processes without a lease compute or hold memory; otherwise they
            must be idle. Grants of such devices have `in_use`.
        mig: ask for a MIG instance: true for any, or a glob over profiles such as `1g.10gb` or `*g.20gb`. Without it,
            and unless `models` names profiles, only whole devices are granted. Only with `gpus: 1`, since a CUDA
            program sees one instance.
        expected_seconds: estimate of how long the work takes. The queue orders and forecasts by it; nothing ends
            because of it. With null the planner estimates from past leases.
        max_seconds: longest duration of the lease: it ends then, however often it is renewed. Null for no limit.
        preemptible: the lease may be preempted: its holder gets a notice, and the lease ends `grace_seconds` later.
        grace_seconds: time between the notice of a preemption and the end; 0 ends the lease without a notice.
        checkpoint: the holder saves its work when it gets the notice.
        min_run_seconds: the lease is not preempted before it has lasted so long.
        requeue_of: id of a lease of this owner that was preempted, whose work shall go on. The request gets its place
            in the queue by the age of that lease's request. One request may have it at a time.
        devices: uuids of the devices to grant, `gpus` of them, in this order; empty lets the planner choose. Only whole
            devices, and only without `wait_seconds`.
    """

    owner: OwnerName
    gpus: GpuCount = 1
    gpu_memory_bytes: Bytes = 0
    gpu_share: Share | None = None
    cpus: Annotated[float, Meta(ge=0, le=1_000_000)] = 0.0
    host_memory_bytes: Bytes = 0
    models: Annotated[list[ShortText], Meta(max_length=64)] = []
    vendors: Annotated[list[ShortText], Meta(max_length=16)] = []
    hosts: Annotated[list[ShortText], Meta(max_length=1024)] = []
    host_labels: Labels = {}
    min_compute_capability: Annotated[str, Meta(pattern=names.VERSION)] | None = None
    placement: Placement = Placement.SAME_HOST
    gpus_per_host: Annotated[int, Meta(ge=1, le=4096)] | None = None
    within: LabelName | None = None
    prefer_within: LabelName | None = None
    ttl_seconds: Annotated[float, Meta(ge=1, le=MAX_TTL_SECONDS)] = 300.0
    request_id: Identifier | None = None
    name: ShortText = ""
    labels: Labels = {}
    policy: ShortText | None = None
    wait_seconds: Annotated[float, Meta(ge=0, le=MAX_WAIT_SECONDS)] = 0.0
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    distribution: Distribution | None = None
    holder: ShortText = ""
    allow_in_use: bool = False
    mig: bool | Annotated[str, Meta(min_length=1, max_length=64)] = False
    expected_seconds: WorkSeconds | None = None
    max_seconds: WorkSeconds | None = None
    preemptible: bool = False
    grace_seconds: GraceSeconds = GRACE_SECONDS
    checkpoint: bool = False
    min_run_seconds: Annotated[float, Meta(ge=0, le=366 * 86400)] = 0.0
    requeue_of: Identifier | None = None
    devices: Annotated[list[ShortText], Meta(max_length=4096)] = []
    gpus_max: Annotated[int, Meta(ge=1, le=4096)] | None = None

    def __post_init__(self) -> None:
        """Make two numbers of a range; a range of one number is that number."""
        gpus: object = self.gpus
        if isinstance(gpus, GpuRange):
            if self.gpus_max is not None:
                raise ValueError("gpus is a range: leave gpus_max out")
            force_setattr(self, "gpus", gpus.min)
            force_setattr(self, "gpus_max", gpus.max)
        if self.gpus_max is not None:
            if self.gpus_max < self.gpus:
                raise ValueError(f"gpus_max is {self.gpus_max}, which is less than gpus, {self.gpus}")
            if self.gpus_max == self.gpus:
                force_setattr(self, "gpus_max", None)


class Grant(Struct, frozen=True, kw_only=True):
    """One device of an assignment.

    Attributes:
        host: the host's name.
        device: uuid of the device; empty for a grant of CPU and memory alone.
        index: the driver's index on that host.
        model: the device's name.
        memory_bytes: device memory granted.
        share: share of the device, in (0, 1].
        cpus: logical cores granted with it.
        host_memory_bytes: host RAM granted with it.
        score: score that the ranking policy gave it; greater is better.
        score_parts: parts of the score, by name; they sum to `score`.
        items: ids or numbers (from 0) of the work items for this device.
        in_use: true if processes without a lease computed or held memory on the device when it was granted.
        mig_parent: uuid of the board that the device is an instance of; empty for a whole device.
        since: time from which an elastic lease has it, where that is after the grant of the lease.
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
    since: Time | None = None


class UnassignedItem(Struct, frozen=True, kw_only=True):
    """A work item that no device took.

    Attributes:
        id: its id, or its number for items given as a count.
        reason: why, in words.
    """

    id: str | int
    reason: str


class Distributed(Struct, frozen=True, kw_only=True):
    """Quality of a distribution of work items over the granted devices.

    Attributes:
        method: method that was used.
        weights: capacity that each device was assumed to have, in the order of the grants.
        makespan: time until the last device is done, in cost over weight; for `pipeline` the time of the slowest stage.
        bound: lower bound on the makespan of the items that are placed (for `pipeline`, in their order).
        optimal: true if no distribution is better.
        plan: for `serve`, stages with their layers, and expected throughput; `makespan` is then the seconds per token,
            and `bound` those of the bound. Null for other methods, and where the devices can't hold the model.
    """

    method: Method
    weights: list[float]
    makespan: float
    bound: float
    optimal: bool = False
    plan: ServePlan | None = None


class LeaseState(StrEnum):
    """State of a lease. `active` holds devices; all others are final."""

    ACTIVE = "active"
    RELEASED = "released"
    EXPIRED = "expired"
    LOST = "lost"
    """Its host has vanished."""
    EVICTED = "evicted"
    """An operator took it back, it was preempted (then its `preemption` is set), or it ended by the rule for idle
    devices (then its `idle` is set, with no `acted_at`)."""


class Preemption(Struct, frozen=True, kw_only=True):
    """Notice that a lease will be preempted.

    Attributes:
        notified_at: time of the notice.
        ends_at: time at which the lease ends, if its holder does not end it before.
        reason: why.
        claimant: id of the request that gets the devices; empty if an operator preempts.
        claimant_owner: owner of that request.
        claimant_group: group of that owner; empty if none counts.
        extended: true if the holder has put the end off, which it may once.
    """

    notified_at: Time
    ends_at: Time
    reason: str = ""
    claimant: str = ""
    claimant_owner: str = ""
    claimant_group: str = ""
    extended: bool = False


class IdleNotice(Struct, frozen=True, kw_only=True):
    """Warning that all devices of a lease are idle, by a rule of its owner's group. Activity withdraws it.

    Attributes:
        group: group whose rule applies.
        rule: the rule as text: `below 5% for 30m: end after 10m`.
        since: time from which on the devices were idle.
        noticed_at: time of the warning.
        acts_at: time of the rule's action, if the devices stay idle; later if that is unknown meanwhile. Null if the
            rule only warns.
        acted_at: time at which the lease became preemptible by the rule; null before. The notice then stays.
        mean_percent: mean GPU utilization of the devices since then, up to the warning or the action; null if unknown.
        peak_percent: maximum of the samples since then, likewise.
    """

    group: str
    rule: str
    since: Time
    noticed_at: Time
    acts_at: Time | None = None
    acted_at: Time | None = None
    mean_percent: float | None = None
    peak_percent: float | None = None


class ResizeKind(StrEnum):
    """Kind of a notice to the holder of an elastic lease."""

    OFFER = "offer"
    """Idle devices, which it may have."""
    REQUEST = "request"
    """Devices that it is asked to give back."""


class Resize(Struct, frozen=True, kw_only=True):
    """Notice to the holder of an elastic lease: devices that are offered, or that it is asked to give back.

    Nothing changes unless the holder agrees by `ends_at`.

    Attributes:
        number: number of the notice, which an answer names; it differs from that of any other notice of the lease.
        kind: `offer` or `request`.
        notified_at: time of the notice.
        ends_at: time after which it is over.
        grants: the devices. The holder may give back as many others instead.
        reason: why.
        claimant: id of the request that could take the devices; empty for an offer.
        claimant_owner: owner of that request.
        claimant_group: group of that owner; empty if none counts.
    """

    number: int
    kind: ResizeKind
    notified_at: Time
    ends_at: Time
    grants: list[Grant]
    reason: str = ""
    claimant: str = ""
    claimant_owner: str = ""
    claimant_group: str = ""


class Lease(Struct, frozen=True, kw_only=True, tag="lease", tag_field="type"):
    """Durable grant of devices to an owner until a time.

    Attributes:
        lease_id: id of the lease.
        owner: owner of the lease.
        state: `active`, or how it ended.
        granted_at: when it was granted.
        expires_at: when it ends unless it is renewed.
        ttl_seconds: time to live: a renewal sets `expires_at` this far ahead.
        grants: the devices.
        request_id: id of the request.
        name: name of the workload.
        labels: labels of the request.
        environment: variables to set for the work, by host: its devices in the form that their runtime takes
            (`CUDA_VISIBLE_DEVICES`; `ROCR_VISIBLE_DEVICES` and `HIP_VISIBLE_DEVICES` on AMD), and `CORRAL_LEASE`.
        unassigned: work items that no device took.
        ended_at: when it ended; null while active.
        reason: why it ended; for an eviction also the operator.
        policy: name of the policy that ranked the devices.
        distribution: quality of the distribution of the work items; null without items.
        holder: name of the process that holds the lease, from the request or a renewal.
        addresses: addresses of the hosts of the grants (for ssh, say), where known.
        warnings: in an answer: fields of the request that this planner does not know and has ignored.
        asked_at: when the planner received the request; null in leases of earlier versions.
        expected_seconds: estimate of how long the work takes, as requested or by the planner; null if unknown.
        ends_at: time at which the lease ends however often it is renewed, by `max_seconds`, or with the booked window
            that it is in; null for no limit.
        preemptible: true if it may be preempted.
        grace_seconds: time between the notice of a preemption and the end.
        checkpoint: true if its holder saves its work when it gets the notice.
        min_run_seconds: it is not preempted before it has lasted so long.
        priority: priority of the request.
        requeued: true if it goes on with the work of a lease that was preempted.
        saved_at: time at which its holder last said that its work is saved; null if it never did.
        preemption: notice that it will be preempted, or of the preemption that ended it; null without one.
        window: id of the booked window that it is in; empty for none.
        group: group of the owner at the grant; empty without groups, and in leases of earlier versions.
        idle: warning that its devices are idle; null without one.
        elastic: fewest and most devices that it may have; null if it keeps those that it was granted.
        resize: devices that are offered to an elastic lease, or that it is asked to give back; null without either.
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
    asked_at: Time | None = None
    expected_seconds: float | None = None
    ends_at: Time | None = None
    preemptible: bool = False
    grace_seconds: float = GRACE_SECONDS
    checkpoint: bool = False
    min_run_seconds: float = 0.0
    priority: int = 0
    requeued: bool = False
    saved_at: Time | None = None
    preemption: Preemption | None = None
    window: str = ""
    group: str = ""
    idle: IdleNotice | None = None
    elastic: GpuRange | None = None
    resize: Resize | None = None


class Assignment(Struct, frozen=True, kw_only=True, tag="assignment", tag_field="type"):
    """Answer to a request that was granted.

    Attributes:
        lease: the lease with its devices.
        warnings: fields of the request that this planner does not know and has ignored.
    """

    lease: Lease
    warnings: list[str] = []


class RejectionCode(StrEnum):
    """Reason code of a rejected request."""

    NO_CAPACITY = "no_capacity"
    """It fits this fleet, but not now."""
    IMPOSSIBLE = "impossible"
    """No device of this fleet could ever hold it."""
    NO_DEVICES = "no_devices"
    """The planner knows no device at all (yet)."""
    TIMED_OUT = "timed_out"
    """It waited for its `wait_seconds`, and nothing became free."""
    WITHDRAWN = "withdrawn"
    """Its client withdrew it."""


class Reason(Struct, frozen=True, kw_only=True):
    """Reason why some devices could not be used, with their number.

    Attributes:
        code: `memory`, `share`, `model`, `stale`, `unhealthy`, `drained`, `leased`, `reserved`, `booked`, `in_use`,
            `mig`, `cpus`, …
        devices: number of devices.
        detail: the reason in words, with the nearest miss where there is one.
    """

    code: str
    devices: int
    detail: str


class Rejection(Struct, frozen=True, kw_only=True, tag="rejection", tag_field="type"):
    """Answer to a request that was not granted.

    Attributes:
        code: reason code.
        message: all reasons in one sentence.
        reasons: reasons, each with the number of devices that it excludes.
        could_ever_fit: true if the same fleet, idle and healthy, could hold it.
        request_id: id of the request.
        nearest: what would have to change for it to fit, in words; empty if unknown.
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
    """Answer to a message that could not be carried out.

    Attributes:
        code: `invalid`, `not_found`, `not_owner`, `conflict`, `too_large`, `too_many_requests`, `unavailable`,
            `refused`, `timeout`, …
        message: what is wrong and what to do.
        field: path of the field at fault, such as `$.gpus`; empty if none.
        retry_after_seconds: for `too_many_requests`, time after which to try again; null if unknown.
    """

    code: str
    message: str
    field: str = ""
    retry_after_seconds: float | None = None


class WithdrawAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Withdraw a request that may still wait in the queue.

    The answer is that of the request: the rejection `withdrawn`; the assignment, if it was granted just before, whose
    lease is then to be released; or the rejection that it had before. A repeated withdrawal gets the same answer. A
    request that arrives under this id after its withdrawal is rejected.

    Attributes:
        request_id: id of the request.
        owner: owner of the request.
    """

    request_id: Identifier
    owner: OwnerName


class LeaseAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Renew or release a lease.

    Attributes:
        lease_id: id of the lease.
        owner: owner of the lease.
        ttl_seconds: for a renewal, the new time to live; null keeps that of the lease.
        holder: for a renewal, name of the process that holds the lease from now on; empty keeps the one before.
    """

    lease_id: Identifier
    owner: OwnerName
    ttl_seconds: Annotated[float, Meta(ge=1, le=MAX_TTL_SECONDS)] | None = None
    holder: ShortText = ""


class CheckpointAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Answer of a holder to the notice of a preemption, or news that its work is saved.

    Attributes:
        lease_id: id of the lease.
        owner: owner of the lease.
        saved: the work is saved as of now. While a notice is out, the lease ends at once.
        busy_seconds: the holder needs so long from now. It moves the end once, to the time of the notice's end plus
            `grace_seconds` at most, and never to an earlier one.
    """

    lease_id: Identifier
    owner: OwnerName
    saved: bool = False
    busy_seconds: Annotated[float, Meta(gt=0, le=MAX_GRACE_SECONDS)] | None = None


class ResizeAction(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Answer of a holder to the notice that its elastic lease may grow or shrink, or devices that it gives back.

    Attributes:
        lease_id: id of the lease.
        owner: owner of the lease.
        accept: take the devices that are offered, or give back those that are asked for: no process of the holder is on
            them any more. False declines.
        number: the notice that is answered; null for the one that is out. An answer to another one is refused.
        devices: uuids: of an offer, those to take; of a request, those to give back instead, as many at least. Without
            a notice they are given back. Empty for those of the notice.
    """

    lease_id: Identifier
    owner: OwnerName
    accept: bool = True
    number: Count | None = None
    devices: Annotated[list[ShortText], Meta(max_length=4096)] = []


class LeaseEventKind(StrEnum):
    """Kind of a lease event."""

    GRANTED = "granted"
    RENEWED = "renewed"
    EXPIRING = "expiring"
    """It ends soon: a fifth of its time to live is left."""
    PREEMPTING = "preempting"
    """It will be preempted: its `preemption` says when and why, or the end was put off."""
    RESIZE_OFFERED = "resize_offered"
    """It may have more devices: those of its `resize`."""
    RESIZE_REQUESTED = "resize_requested"
    """It is asked to give devices back: its `resize` says which, until when and for whom."""
    RESIZED = "resized"
    """It has other devices now, as its holder agreed."""
    RELEASED = "released"
    EXPIRED = "expired"
    LOST = "lost"
    EVICTED = "evicted"


class LeaseEvent(Struct, frozen=True, kw_only=True, tag="lease_event", tag_field="type"):
    """A change of a lease, published once as JSON.

    Of renewals that follow each other within a second only the last is published. For an owner whose events take much
    of the stream, renewals are published less often, but always before the `expires_at` that was published last.

    Attributes:
        kind: kind of the change.
        time: when it happened.
        lease: the lease after the change, without work items. Only `granted` has environment, addresses, distribution
            and score parts. Other events leave out labels where they are many, and `renewed`, `expiring` and
            `preempting` also grants where they are many. The planner answers with the whole lease.
        planner: id of the planner.
    """

    kind: LeaseEventKind
    time: Time
    lease: Lease
    planner: str = ""
    returned: list[Grant] = []


PlanReply = Assignment | Rejection | Error
