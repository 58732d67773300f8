"""Input of a decision: states of devices and hosts as shared (interned) values, and a request in whole numbers.

Hosts whose state is equal have the same `HostState` object, so that a score is computed once for all of them. Amounts
are exact integers: bytes, thousandths of a core (`cpus_milli`), billionths of a device (`share`). Policies weigh shares
in thousandths (`share_milli`, `share_free`), which are not used for grants.

Live telemetry would make the state of every device unique, so a state has it in coarse steps: free memory rounded down
to `MEMORY_GRAIN_BYTES` (exact amounts are compared before a request is refused for the remainder), temperature by
`HEAT_STEP_CELSIUS`, utilization by `LOAD_STEP_PERCENT`. The state of a device that can take no work has none of it.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final, NamedTuple

from ...schemas.requests import Placement, WorkRequest
from ...schemas.telemetry import DeviceInfo
from .topology import Topology

WHOLE_MILLI: Final = 1000
"""A whole device's share, as policies weigh it."""
WHOLE_SHARE: Final = 10**9
"""A whole device's share, as it is granted. Rounded down to so fine a unit, n parts of 1/n fit n times for every n."""
SHARE_PER_MILLI: Final = WHOLE_SHARE // WHOLE_MILLI
MIN_SHARE: Final = WHOLE_SHARE // 10**6
"""The smallest share that can be requested; less than that is a remainder of rounding."""
_HALF_SHARE: Final = 5e-7
"""Tolerance: a float counts as a whole number of units if its last bits alone differ; less than 1 - 1/n for all n."""
UNLIMITED: Final = 2**62
"""Cores or bytes of a host that does not report how much it has, so that an unknown amount limits no request."""
MEMORY_GRAIN_BYTES: Final = 128 * 2**20
ROUNDED_OFF_BYTES: Final = MEMORY_GRAIN_BYTES * 5 // 4
"""Upper bound on the free memory that a state leaves out: a grain, and a quarter for hysteresis."""
HEAT_BASE_CELSIUS: Final = 60.0
HEAT_STEP_CELSIUS: Final = 10.0
HEAT_LEVELS: Final = 4
LOAD_STEP_PERCENT: Final = 25.0
LOAD_LEVELS: Final = 3

STALE: Final = 1
UNHEALTHY: Final = 2
DRAINED: Final = 4
MIG_PARENT: Final = 8
HOST_LOST: Final = 16
RESERVED: Final = 32
"""All that is free of the device is reserved for queued requests; set only in the state that decisions see."""
BLOCKS: Final = {
    MIG_PARENT: "mig_parent",
    HOST_LOST: "host_lost",
    STALE: "stale",
    UNHEALTHY: "unhealthy",
    DRAINED: "drained",
    RESERVED: "reserved",
}
"""Reasons why a device takes no work, in order of precedence."""


class InvalidRequest(ValueError):
    """A request that no fleet could answer.

    Attributes:
        field: path of the field at fault, such as `$.gpu_share`.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class ModelKey(NamedTuple):
    """Identity of a `Model`, which has these attributes too."""

    name: str
    vendor: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    compute: int
    bandwidth: int
    mig_profile: str


class Model:
    """The capabilities that devices of one product share. Equal ones are one object.

    Attributes:
        name: the product's name.
        vendor: such as `nvidia`.
        compute_capability: such as (9, 0); (0, 0) if it has none.
        memory_bytes: device memory in all.
        compute: streaming multiprocessors × highest clock in MHz; 0 if unknown.
        bandwidth: peak memory bandwidth in bytes per second; 0 if unknown.
        mig_profile: of a MIG instance, such as `1g.10gb`; empty for a whole device.
        order: sorts models the same way in every run.
    """

    __slots__ = ("bandwidth", "compute", "compute_capability", "memory_bytes", "mig_profile", "name", "order", "vendor")

    def __init__(self, key: ModelKey) -> None:
        self.name = key.name
        self.vendor = key.vendor
        self.compute_capability = key.compute_capability
        self.memory_bytes = key.memory_bytes
        self.compute = key.compute
        self.bandwidth = key.bandwidth
        self.mig_profile = key.mig_profile
        self.order = key


class StateKey(NamedTuple):
    """Identity of a `DeviceState`, which has these attributes too."""

    model: Model
    share: int = 0
    memory_free: int = 0
    blocked: int = 0
    leased: bool = False
    heat: int = 0
    load: int = 0
    throttled: bool = False
    warned: bool = False
    rounded: bool = False
    in_use: bool = False
    memory_most: int = 0
    booked_for: str = ""
    booked_from: float = math.inf

    @property
    def core(self) -> StateKey:
        """The same without heat, load, throttling and warnings, which have no effect on feasibility."""
        return self._replace(heat=0, load=0, throttled=False, warned=False)


class DeviceState:
    """State of a device, as decisions see it. Equal states are one object.

    Attributes:
        key: its identity.
        model: see `Model`.
        share: billionths that no lease holds; 0 if it is blocked.
        memory_free: bytes that a request could get, at least; the device may have up to a grain more (`rounded`).
        blocked: bits of `BLOCKS`; 0 if it may take work.
        leased: true if a lease is on it.
        heat: level of temperature, from 0 below `HEAT_BASE_CELSIUS`, by steps, to `HEAT_LEVELS`.
        load: steps of recent utilization, 0 to `LOAD_LEVELS`.
        throttled: true if the clocks are lowered because of heat or power.
        warned: true if it gave a health warning recently.
        rounded: true if `memory_free` may be rounded down.
        in_use: true if processes without a lease compute or hold memory on it.
        memory_most: bytes that leases can have of it together, rounded down; a share that names no memory gets its
            part of them.
        booked_for: id of the booked window that has it now; empty for none.
        booked_from: time by which leases on it must have ended, since it is booked, in seconds since the epoch;
            infinite if it is not booked.
        whole: true if no lease is on it, and it may take work.
        idle: true if `whole`, not in use, not booked, and no MIG instance: requests for whole devices get these by
            default.
        open_share: `share`, but 0 for a MIG instance, which must be requested as such, and for a booked device.
        share_free: `open_share` in thousandths, for policies.
        order: sorts states the same way in every run.
        strain: cache of `policies`; None before it was computed.
    """

    __slots__ = (
        "_core",
        "blocked",
        "booked_for",
        "booked_from",
        "heat",
        "idle",
        "in_use",
        "key",
        "leased",
        "load",
        "memory_free",
        "memory_most",
        "model",
        "open_share",
        "order",
        "rounded",
        "share",
        "share_free",
        "strain",
        "throttled",
        "warned",
        "whole",
    )

    def __init__(self, key: StateKey, core: DeviceState | None = None) -> None:
        self.key = key
        self.model = key.model
        self.share = key.share
        self.memory_free = key.memory_free
        self.blocked = key.blocked
        self.leased = key.leased
        self.heat = key.heat
        self.load = key.load
        self.throttled = key.throttled
        self.warned = key.warned
        self.rounded = key.rounded
        self.in_use = key.in_use
        self.memory_most = key.memory_most
        self.booked_for = key.booked_for
        self.booked_from = key.booked_from
        self.whole = self.share == WHOLE_SHARE and not self.leased
        special = bool(self.model.mig_profile) or self.booked_from < math.inf
        self.open_share = 0 if special else self.share
        self.idle = self.whole and not self.in_use and not special
        self.share_free = milli_of(self.open_share)
        self.order = (self.model.order, *key[1:])
        self.strain: float | None = None
        # None if it is this object: a reference cycle would keep it in memory after it was forgotten.
        self._core = core

    @property
    def core(self) -> DeviceState:
        """The same state without heat, load, throttling and warnings, which have no effect on feasibility."""
        return self if self._core is None else self._core


class HostState:
    """State of a host, as decisions see it. Equal states are one object, which caches what was computed for them.

    Attributes:
        topology: links between the devices; None if no pair is better than another (then `devices` are sorted).
        cpus_free: thousandths of cores that no lease holds.
        memory_free: bytes of RAM that no lease holds.
        blocked: bits of `BLOCKS` for the host itself.
        booked_from: time by which leases of cores and RAM alone must have ended, since maintenance begins; minus
            infinity during maintenance, infinite if none is booked.
        devices: their states, by index or sorted.
        kinds: each different device state with the indexes in `devices` that have it.
        share_free: thousandths over all devices that no lease holds.
        whole_free: devices that are `DeviceState.idle`.
        share_most: the greatest `open_share` of one device.
        order: sorts states the same way in every run; the fuller host comes first.
        standing: cache of `policies`, with a mark of the object that computed it; it lives as long as the state.
    """

    __slots__ = (
        "_core",
        "blocked",
        "booked_from",
        "cpus_free",
        "devices",
        "kinds",
        "memory_free",
        "order",
        "share_free",
        "share_most",
        "standing",
        "topology",
        "whole_free",
    )

    def __init__(
        self,
        topology: Topology | None,
        cpus_free: int,
        memory_free: int,
        blocked: int,
        devices: tuple[DeviceState, ...],
        core: HostState | None = None,
        booked_from: float = math.inf,
    ) -> None:
        self.topology = topology
        self.cpus_free = cpus_free
        self.memory_free = memory_free
        self.blocked = blocked
        self.booked_from = booked_from
        self.devices = devices
        self.standing: tuple[object, Any] | None = None
        self._core = core
        kinds: dict[DeviceState, list[int]] = {}
        free = whole = most = 0
        for at, device in enumerate(devices):
            kinds.setdefault(device, []).append(at)
            free += device.share_free
            most = max(most, device.open_share)
            if device.idle:
                whole += 1
        self.kinds = tuple(kinds.items())
        self.share_free, self.whole_free, self.share_most = free, whole, most
        self.order = (
            free,
            cpus_free,
            memory_free,
            blocked,
            booked_from,
            tuple((device.order, len(places)) for device, places in self.kinds),
            () if topology is None else (topology.levels, tuple(device.order for device in devices)),
        )

    @property
    def core(self) -> HostState:
        """The same state with the `core` of each device."""
        return self if self._core is None else self._core


class AskKey(NamedTuple):
    """Identity of an `Ask`, which has these attributes too."""

    gpus: int
    whole: bool
    share: int
    gpu_memory_bytes: int
    cpus_milli: int
    host_memory_bytes: int
    models: tuple[str, ...]
    vendors: tuple[str, ...]
    min_compute_capability: tuple[int, int]
    hosts: tuple[str, ...]
    host_labels: tuple[tuple[str, str], ...]
    placement: Placement
    mig: tuple[str, ...]
    allow_in_use: bool
    barred: tuple[str, ...] = ()
    ends_by: float = math.inf
    windows: tuple[str, ...] = ()
    inside: bool = False
    outlasts: bool = False
    within: tuple[str, ...] = ()
    prefer_within: str = ""
    per_host: int = 1

    @property
    def anytime(self) -> AskKey:
        """The same whatever is booked."""
        return self._replace(ends_by=math.inf, windows=(), inside=False, outlasts=False)


class Ask:
    """A request in whole numbers. Equal requests are one `Ask`, whichever owner sends them.

    Attributes:
        gpus: number of devices; 0 for cores and RAM alone. With `placement: spread` the number of hosts, each with
            `per_host` devices.
        per_host: number of devices on each host of `placement: spread`; 1 otherwise.
        whole: true if each device must be free of leases.
        share: billionths of each device.
        share_milli: the same in thousandths, for policies.
        gpu_memory_bytes: on each device.
        cpus_milli: in all.
        host_memory_bytes: in all.
        models: lower-case globs; empty allows any.
        vendors: lower-case; empty allows any.
        min_compute_capability: (0, 0) allows any.
        hosts: lower-case globs; empty allows any.
        host_labels: sorted pairs.
        placement: see `Placement`.
        mig: lower-case globs over the profiles of MIG instances, one of which is requested; empty requests none.
        allow_in_use: true if whole devices may have processes without a lease on them.
        barred: names of models that a quota keeps from it, sorted.
        ends_by: time by which its lease will have ended, rounded up to one from which devices are booked, in seconds
            since the epoch; infinite if it may last longer than that.
        windows: ids of the booked windows, of those that are now, which its owner may use.
        inside: true if it is for devices of these windows only.
        outlasts: true if it is expected to take longer than these windows.
        within: labels of which all its hosts must have the same value, each.
        prefer_within: a label of which they should have the same value; empty for none.
        mig_models: those of `models` that name instances.
        plain: true if it requests neither instances nor devices in use, and may use no booked device.
        any_model: true if it names no models, vendors or capability, and none is barred.
        allowed: model → true if it is allowed. A cache, filled by `feasible`.
        verdicts: device state → reason why it can't be used; empty text if it can. A cache, filled by `feasible`.
    """

    __slots__ = (
        "allow_in_use",
        "allowed",
        "any_model",
        "barred",
        "cpus_milli",
        "ends_by",
        "gpu_memory_bytes",
        "gpus",
        "host_labels",
        "host_memory_bytes",
        "hosts",
        "inside",
        "key",
        "mig",
        "mig_models",
        "min_compute_capability",
        "models",
        "outlasts",
        "parts",
        "per_host",
        "placement",
        "plain",
        "prefer_within",
        "share",
        "share_milli",
        "vendors",
        "verdicts",
        "whole",
        "windows",
        "within",
    )

    def __init__(self, key: AskKey) -> None:
        self.key = key
        self.gpus = key.gpus
        self.whole = key.whole
        self.share = key.share
        self.gpu_memory_bytes = key.gpu_memory_bytes
        self.cpus_milli = key.cpus_milli
        self.host_memory_bytes = key.host_memory_bytes
        self.models = key.models
        self.vendors = key.vendors
        self.min_compute_capability = key.min_compute_capability
        self.hosts = key.hosts
        self.host_labels = key.host_labels
        self.placement = key.placement
        self.mig = key.mig
        self.allow_in_use = key.allow_in_use
        self.barred = key.barred
        self.ends_by = key.ends_by
        self.windows = key.windows
        self.inside = key.inside
        self.outlasts = key.outlasts
        self.within = key.within
        self.prefer_within = key.prefer_within
        self.per_host = key.per_host
        self.share_milli = milli_of(self.share)
        self.mig_models = tuple(glob for glob in self.models if names_instances(glob))
        special = self.mig or self.mig_models or self.allow_in_use or self.windows or self.ends_by < math.inf
        self.plain = not special
        self.any_model = not (self.models or self.vendors or any(self.min_compute_capability) or self.barred)
        self.allowed: dict[Model, bool] = {}
        self.verdicts: dict[DeviceState, str] = {}
        self.parts: dict[int, Ask] = {}

    @property
    def filtered(self) -> bool:
        """True if it names hosts or labels of hosts."""
        return bool(self.hosts or self.host_labels or self.within)

    @property
    def devices(self) -> int:
        """Number of devices on all hosts."""
        return self.gpus * self.per_host

    def part(self, gpus: int) -> Ask:
        """Request for so many of its devices on one host, with their part of cores and RAM (rounded up).

        With `placement: spread` for so many times `per_host` devices.
        """
        found = self.parts.get(gpus)
        if found is None:
            total = max(self.gpus, 1)
            part = self.key._replace(
                gpus=gpus * self.per_host,
                per_host=1,
                cpus_milli=-(-self.cpus_milli * gpus // total),
                host_memory_bytes=-(-self.host_memory_bytes * gpus // total),
                placement=Placement.SAME_HOST,
                prefer_within="",
            )
            found = self.parts[gpus] = Ask(part)
            found.verdicts = self.verdicts
            found.allowed = self.allowed
        return found


def milli(amount: float) -> int:
    """An amount in thousandths, rounded up, so that no request gets less than it asks for; exact thousandths stay."""
    return math.ceil(round(amount * 1000, 6))


def share_of(amount: float) -> int:
    """A share in billionths, rounded down, so that n parts of 1/n are no more than the whole."""
    return max(1, math.floor(amount * WHOLE_SHARE + _HALF_SHARE))


def milli_of(share: int) -> int:
    """Billionths in thousandths, rounded down, but at least 1 if it is not 0."""
    return max(1, share // SHARE_PER_MILLI) if share else 0


_INSTANCES: Final = re.compile(r"\bmig\b|[0-9*?\]]g\.[0-9*?\[]")


def names_instances(glob: str) -> bool:
    """True if a glob over models names MIG instances, as `*H100*1g.10gb` and `*MIG*` do and `*H100*` does not."""
    return _INSTANCES.search(glob.lower()) is not None


def version_pair(text: str) -> tuple[int, int]:
    """Parse a version: `9.0` is (9, 0), and a text that is no version (0, 0)."""
    major, _, minor = text.partition(".")
    if not major.isdecimal():
        return (0, 0)
    return (int(major), int(minor) if minor.isdecimal() else 0)


def model_key(info: DeviceInfo) -> ModelKey:
    """Key of a device's model: devices with equal keys are of the same model."""
    return ModelKey(
        name=info.name,
        vendor=info.vendor,
        compute_capability=version_pair(info.compute_capability),
        memory_bytes=info.memory_bytes,
        compute=info.sm_count * info.sm_clock_max_megahertz,
        bandwidth=info.memory_bandwidth_bytes_per_second,
        mig_profile=(info.mig_profile or "mig") if info.mig_parent else "",
    )


def ask_key(request: WorkRequest) -> AskKey:
    """Key of a request, in whole numbers.

    Raises:
        InvalidRequest: fields contradict each other.
    """
    if request.gpu_share is not None and request.gpus != 1:
        raise InvalidRequest(
            f"gpu_share takes part of one device, but gpus is {request.gpus}: leave gpu_share out, or set gpus to 1",
            "$.gpu_share",
        )
    if request.gpus == 0:
        if not request.cpus and not request.host_memory_bytes:
            raise InvalidRequest("gpus is 0: ask for a GPU, or for cores or RAM alone", "$.gpus")
        if request.gpu_memory_bytes:
            raise InvalidRequest("gpus is 0, so there is no device for gpu_memory_bytes", "$.gpu_memory_bytes")
    if request.gpus_max is not None:
        _check_elastic(request)
    mig = _profiles(request)
    each = _per_host(request)
    several = _several_hosts(request) and request.gpus > each
    return AskKey(
        gpus=request.gpus // each if several else request.gpus,
        whole=request.gpu_share is None,
        share=WHOLE_SHARE if request.gpu_share is None else share_of(request.gpu_share),
        gpu_memory_bytes=request.gpu_memory_bytes,
        cpus_milli=milli(request.cpus),
        host_memory_bytes=request.host_memory_bytes,
        models=tuple(sorted({glob.lower() for glob in request.models})) if request.models else (),
        vendors=tuple(sorted({vendor.lower() for vendor in request.vendors})) if request.vendors else (),
        min_compute_capability=version_pair(request.min_compute_capability)
        if request.min_compute_capability
        else (0, 0),
        hosts=tuple(sorted({glob.lower() for glob in request.hosts})) if request.hosts else (),
        host_labels=tuple(sorted(request.host_labels.items())) if request.host_labels else (),
        placement=Placement(request.placement) if several else Placement.SAME_HOST,
        mig=mig,
        allow_in_use=request.allow_in_use and request.gpu_share is None and request.gpus > 0,
        within=(request.within,) if several and request.within else (),
        prefer_within=request.prefer_within or "" if several and request.prefer_within != request.within else "",
        per_host=each if several else 1,
    )


def _per_host(request: WorkRequest) -> int:
    """Number of devices on each host of a request with `placement: spread`; 1 for any other.

    Raises:
        InvalidRequest: its devices can't be so many on each host.
    """
    each = request.gpus_per_host
    if each is None:
        return 1
    if request.placement != Placement.SPREAD:
        raise InvalidRequest(
            f"gpus_per_host is for several hosts, but placement is {request.placement}: set it to spread",
            "$.gpus_per_host",
        )
    if request.gpus % each or not request.gpus:
        raise InvalidRequest(
            f"gpus is {request.gpus}, which is not a multiple of gpus_per_host, {each}: ask for {each} times the hosts",
            "$.gpus_per_host",
        )
    return each


def _several_hosts(request: WorkRequest) -> bool:
    """True if a request may be placed on several hosts.

    Raises:
        InvalidRequest: it may not, but names a label that its hosts must share.
    """
    if request.gpus <= 1:
        return False
    if request.placement != Placement.SAME_HOST:
        return True
    for field in ("within", "prefer_within"):
        if getattr(request, field):
            raise InvalidRequest(
                f"{field} is for several hosts, but placement is same_host: set it to fewest_hosts or spread",
                f"$.{field}",
            )
    return False


def _check_elastic(request: WorkRequest) -> None:
    """Check that what is asked for can grow.

    Raises:
        InvalidRequest: it can't.
    """
    if request.gpus == 0:
        raise InvalidRequest("gpus is 0: a range begins with 1 device at least", "$.gpus")
    if request.placement is Placement.SPREAD:
        text = "placement spread is for a fixed number of hosts: give gpus as a number, or take fewest_hosts"
        raise InvalidRequest(text, "$.placement")
    for name, given in (("gpu_share", request.gpu_share), ("mig", request.mig), ("distribution", request.distribution)):
        if given:
            raise InvalidRequest(f"{name} is for a fixed number of devices: give gpus as a number", f"$.{name}")


def _profiles(request: WorkRequest) -> tuple[str, ...]:
    """Globs over the profiles of MIG instances that are requested; empty if none are.

    Raises:
        InvalidRequest: not exactly one instance: a CUDA program sees one, however many it is given ("CUDA Device
            Enumeration" in https://docs.nvidia.com/datacenter/tesla/mig-user-guide/mig-device-names.html).
    """
    profiles = ("*",) if request.mig is True else (request.mig.lower(),) if request.mig else ()
    named = bool(request.models) and all(names_instances(glob) for glob in request.models)
    if request.gpus != 1 and (profiles or named):
        raise InvalidRequest(
            f"gpus is {request.gpus}, but a CUDA program sees one MIG instance only: ask for one in each request "
            "(gpus: 1), or for whole devices without mig",
            "$.gpus",
        )
    return profiles
