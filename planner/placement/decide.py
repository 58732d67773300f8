"""Placement decisions (filter → rank → select over the fleet's state), and their explanation in words.

`decide` holds no devices. The caller makes the grants durable and has the fleet hold them (`fleet.hold`, or the `Lease`
as an event) before the next decision: two decisions in a row would otherwise get the same devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from msgspec import Struct
from msgspec.structs import replace

from ...schemas.limits import LEASE_VARIABLE
from ...schemas.models.serving import ServeFit
from ...schemas.operations import Addition, Explanation
from ...schemas.requests import (
    Distributed,
    Distribution,
    Grant,
    Method,
    Rejection,
    RejectionCode,
    UnassignedItem,
    WeightBy,
    WorkRequest,
)
from ...schemas.telemetry import DeviceInfo, HostInfo, Inventory
from ..fleet.device import Device
from ..fleet.fleet import Fleet, HostForgotten, advance, apply, reblock
from ..fleet.state import UNLIMITED, Ask, DeviceState, InvalidRequest, ask_key
from ..work.distribute import distribute
from .explain import verdicts
from .named import check_named, named_picks
from .policies import DEFAULT, POLICIES, Policy, make
from .reject import could_ever_fit, quota_rejection, reject
from .select import Pick, select
from .serve import fit_fleet
from .visible import visible


class Placed(Struct, frozen=True):
    """A placement that is feasible now.

    Attributes:
        grants: one per device, hosts in the order of the policy, devices by index.
        policy: name of the policy that ranked.
        unassigned: work items that no device took.
        distribution: quality of the distribution of work items; None without items.
        devices: of the grants, in their order, if work items are still to be distributed.
    """

    grants: list[Grant]
    policy: str
    unassigned: list[UnassignedItem] = []
    distribution: Distributed | None = None
    devices: list[DeviceInfo] = []


Decision = Placed | Rejection


class Policies:
    """The policies of one planner, made on first use.

    Attributes:
        default: name of the policy for requests that name none.
    """

    def __init__(self, default: str = DEFAULT) -> None:
        if default not in POLICIES:
            raise KeyError(default)
        self.default = default
        self._made: dict[str, Policy] = {}

    def get(self, name: str | None) -> Policy:
        """Policy of a name; the default for None.

        Raises:
            InvalidRequest: there is none of that name.
        """
        name = name or self.default
        found = self._made.get(name)
        if found is None:
            if name not in POLICIES:
                raise InvalidRequest(
                    f"policy {name!r} is not known: use one of {', '.join(sorted(POLICIES))}", "$.policy"
                )
            found = self._made[name] = make(name)
        return found

    def use(self, policy: Policy) -> None:
        """Register a policy under its name."""
        self._made[policy.name] = policy


def check(fleet: Fleet, request: WorkRequest, policies: Policies) -> None:
    """Check that a request is valid.

    Raises:
        InvalidRequest: it contradicts itself, or names an unknown policy; with the field at fault and what to do.
    """
    policies.get(request.policy)
    _asked(fleet, request)


def decide(
    fleet: Fleet,
    request: WorkRequest,
    now: float,
    policies: Policies,
    *,
    learn: bool = True,
    distributing: bool = True,
    barred: tuple[str, ...] | str = (),
) -> Decision:
    """Decide on a request: a placement or a rejection. Changes nothing in the fleet but its time.

    Args:
        fleet: the state.
        request: to decide on.
        now: seconds since the epoch.
        policies: of this planner.
        learn: true if the policy should learn from the request; false if the same one is tried again.
        distributing: true if work items should be distributed over the devices; otherwise the caller does that.
        barred: models that a quota keeps from it, sorted; or the reason why quotas let it take nothing.

    Raises:
        InvalidRequest: fields contradict each other, or the policy is unknown.
    """
    policy = policies.get(request.policy)
    advance(fleet, now)
    ask = _asked(fleet, request)
    if isinstance(barred, str):
        return quota_rejection(fleet, ask, barred, request.request_id or "")
    ask = _without(fleet, ask, barred)
    if learn:
        policy.observe(fleet, ask if ask.plain else fleet.ask(ask.key.anytime))
    picks = _picks(fleet, policy, ask, request)
    if isinstance(picks, Rejection):
        return picks
    return placed(request, ask, policy, picks, distributing)


def _picks(fleet: Fleet, policy: Policy, ask: Ask, request: WorkRequest) -> list[Pick] | Rejection:
    if request.devices:
        return named_picks(fleet, ask, request)
    picks = select(fleet, policy, ask)
    return reject(fleet, ask, request.request_id or "") if picks is None else picks


def explain(
    fleet: Fleet,
    request: WorkRequest,
    now: float,
    policies: Policies,
    with_more: Sequence[Addition] = (),
    barred: tuple[str, ...] | str = (),
) -> Explanation:
    """Explain the decision on a request, per device and per host, without granting it.

    Args:
        fleet: the state.
        request: to decide on.
        now: seconds since the epoch.
        policies: of this planner.
        with_more: devices to add for this explanation (what-if).
        barred: as for `decide`.

    Raises:
        InvalidRequest: as `decide`; also for an addition of a model that the fleet does not have.
    """
    policy = policies.get(request.policy)
    advance(fleet, now)
    ask = _asked(fleet, request)
    if not isinstance(barred, str):
        ask = _without(fleet, ask, barred)
    with with_additions(fleet, with_more):
        found: ServeFit | None = None
        picks: list[Pick] | Rejection
        if isinstance(barred, str):
            picks = quota_rejection(fleet, ask, barred, request.request_id or "")
        elif _serves(request):
            found, picks = _fit_picks(fleet, policy, ask, request)
        else:
            picks = _picks(fleet, policy, ask, request)
        failed = isinstance(picks, Rejection)
        decision: Decision = picks if failed else placed(request, ask, policy, picks, found is None)
        per_device, per_host = verdicts(fleet, policy, ask, [] if failed else picks)
    if isinstance(decision, Rejection):
        return Explanation(
            granted=False,
            message=decision.message,
            rejection=decision,
            verdicts=per_device,
            hosts=per_host,
            policy=policy.name,
            fit=found,
        )
    return Explanation(
        granted=True,
        message=_words(decision.grants) if found is None else found.message,
        grants=decision.grants,
        verdicts=per_device,
        hosts=per_host,
        policy=policy.name,
        fit=found,
    )


def _serves(request: WorkRequest) -> bool:
    return request.distribution is not None and request.distribution.method is Method.SERVE


def _fit_picks(fleet: Fleet, policy: Policy, ask: Ask, request: WorkRequest) -> tuple[ServeFit, list[Pick] | Rejection]:
    """Verdict on serving the model of a request with all devices it could get, and the devices of the first plan."""
    assert request.distribution is not None
    assert request.distribution.serve is not None
    found = fit_fleet(fleet, ask, request.distribution.serve, request.devices)
    if not found.devices and isinstance(none := _picks(fleet, policy, ask, request), Rejection):
        found = replace(found, message=f"{found.message}: {none.message}")
    if not found.plans:
        text = f"{found.message}; nearest: {found.nearest}" if found.nearest else found.message
        return found, Rejection(
            code=RejectionCode.NO_CAPACITY, message=text, request_id=request.request_id or "", nearest=found.nearest
        )
    uuids = [device.device for device in found.plans[0].devices]
    return found, named_picks(fleet, ask, replace(request, devices=uuids, gpus=len(uuids)))


@contextmanager
def with_additions(fleet: Fleet, additions: Sequence[Addition]) -> Generator[Fleet]:
    """Context in which the fleet has more devices, idle and healthy, on additional hosts.

    Raises:
        InvalidRequest: the fleet has no such model to take the capabilities from.
    """
    if not additions:
        yield fleet
        return
    added: list[str] = []
    try:
        for number, addition in enumerate(additions):
            like = _like(fleet, addition.model, f"$.with_more[{number}].model")
            host = fleet.hosts[like.host]
            left = addition.devices
            while left > 0:
                name = f"what-if-{number + 1}-{len(added) + 1:05d}"
                count = min(left, addition.per_host)
                left -= count
                _add(fleet, name, like.info, count, host.cpus_total, host.memory_total, max(1, len(host.devices)))
                added.append(name)
        yield fleet
    finally:
        for name in added:
            apply(fleet, HostForgotten(name))


def _like(fleet: Fleet, model: str, field: str) -> Device:
    """A device of a model, named in full or by a part of its name that no other model has.

    Raises:
        InvalidRequest: there is none, or several models have it.
    """
    wanted = model.lower()
    whole = {device.info.name: device for device in fleet.devices.values() if not device.parent}
    found = [name for name in whole if name.lower() == wanted] or [name for name in whole if wanted in name.lower()]
    if len(found) != 1:
        what = "several models are called" if found else "no model of the fleet is called"
        names = ", ".join(sorted(found or whole)) or "no devices"
        raise InvalidRequest(f"{what} {model!r}: there {'is' if len(found or whole) < 2 else 'are'} {names}", field)
    return whole[found[0]]


def _add(fleet: Fleet, name: str, like: DeviceInfo, count: int, cpus: int, memory: int, per_host: int) -> None:
    """Add a host with devices like `like`, and as many cores and as much RAM per device as that device's host has.

    Args:
        fleet: changed in place.
        name: of the host.
        like: device to copy.
        count: number of devices.
        cpus: thousandths of cores of that device's host.
        memory: bytes of RAM of that device's host.
        per_host: number of devices of that device's host.
    """
    infos = [
        DeviceInfo(
            uuid=f"{name}-{index}",
            host=name,
            index=index,
            name=like.name,
            vendor=like.vendor,
            architecture=like.architecture,
            compute_capability=like.compute_capability,
            sm_count=like.sm_count,
            memory_bytes=like.memory_bytes,
            memory_bandwidth_bytes_per_second=like.memory_bandwidth_bytes_per_second,
            sm_clock_max_megahertz=like.sm_clock_max_megahertz,
        )
        for index in range(count)
    ]
    host = HostInfo(
        name=name,
        cpus=0 if cpus >= UNLIMITED else max(1, cpus // 1000 * count // per_host),
        memory_bytes=0 if memory >= UNLIMITED else memory * count // per_host,
    )
    apply(fleet, Inventory(host=host, agent="what-if", time_ns=0, devices=infos))
    for info in infos:
        fleet.devices[info.uuid].seen_at = fleet.now
    reblock(fleet, name)


def environment(fleet: Fleet, grants: Sequence[Grant], lease_id: str) -> dict[str, dict[str, str]]:
    """Environment variables for the work, by host: the visible devices for their vendor's runtime, and the lease id."""
    by_host: dict[str, list[str]] = {}
    for grant in grants:
        devices = by_host.setdefault(grant.host, [])
        if grant.device:
            devices.append(grant.device)
    found: dict[str, dict[str, str]] = {}
    for name, uuids in by_host.items():
        host = fleet.hosts.get(name)
        around = {device.info.vendor for device in host.devices} if host is not None else set[str]()
        held = [(uuid, fleet.devices[uuid].info if uuid in fleet.devices else None) for uuid in uuids]
        found[name] = {LEASE_VARIABLE: lease_id} | visible(held, around)
    return found


def addresses(fleet: Fleet, grants: Sequence[Grant]) -> dict[str, str]:
    """Network addresses of the hosts of grants, by host, if their collectors report them."""
    hosts = {grant.host: fleet.hosts.get(grant.host) for grant in grants}
    return {name: host.address for name, host in hosts.items() if host is not None and host.address}


def ask_of(fleet: Fleet, request: WorkRequest) -> Ask:
    """Request in whole numbers, as it is decided in this fleet.

    Raises:
        InvalidRequest: fields contradict each other.
    """
    key = ask_key(replace(request, mig=True) if _any_instance(fleet, request) else request)
    return fleet.ask(fleet.bookings.classify(key, request, fleet.now) if fleet.bookings else key)


def _without(fleet: Fleet, ask: Ask, barred: tuple[str, ...]) -> Ask:
    """A request without the models that a quota keeps from it."""
    return fleet.ask(ask.key._replace(barred=barred)) if barred else ask


def _asked(fleet: Fleet, request: WorkRequest) -> Ask:
    ask = ask_of(fleet, request)
    check_named(request)
    if request.distribution is not None:
        check_work(request, request.distribution)
    return ask


def _any_instance(fleet: Fleet, request: WorkRequest) -> bool:
    """True if the request is for any one device, and the fleet has MIG instances alone: then it gets an instance."""
    anything = request.gpus == 1 and request.gpu_share is None and not request.models and not request.mig
    return anything and request.gpus_max is None and bool(fleet.parents) and not fleet.has_boards


def check_work(request: WorkRequest, work: Distribution) -> None:
    """Check that work items are valid for a request.

    Raises:
        InvalidRequest: they contradict each other, or the request; with the field at fault and what to do.
    """
    if not request.gpus:
        raise InvalidRequest("gpus is 0, so there is no device for work items", "$.distribution")
    if (work.method is Method.SERVE) != (work.serve is not None):
        text = "method serve goes with serve, the model to serve"
        raise InvalidRequest(text, "$.distribution.serve")
    if work.serve is not None and work.items:
        raise InvalidRequest("the layers of the model are the items: leave items out", "$.distribution.items")
    if work.weight_by is WeightBy.GIVEN and work.weights is None:
        raise InvalidRequest("weight_by is given, so weights must be there", "$.distribution.weights")
    if work.weights is not None and len(work.weights) != request.gpus:
        raise InvalidRequest(
            f"{len(work.weights)} weights for {request.gpus} devices: give one for each", "$.distribution.weights"
        )
    if isinstance(work.items, list):
        ids = [item if isinstance(item, str) else item.id for item in work.items]
        if len(set(ids)) != len(ids):
            twice = next(name for name, times in Counter(ids).items() if times > 1)
            raise InvalidRequest(f"item {twice!r} is there twice: every id names one item", "$.distribution.items")


def placed(request: WorkRequest, ask: Ask, policy: Policy, picks: list[Pick], distributing: bool = True) -> Placed:
    """Placement of a request on picked devices, whose hosts have not changed since."""
    grants: list[Grant] = []
    total, done = max(1, ask.devices), 0
    for pick in picks:
        if not ask.gpus:
            parts = policy.parts(pick.state, pick.ask, pick.choice, -1)
            grants.append(
                Grant(
                    host=pick.host.name,
                    share=0.0,
                    cpus=ask.cpus_milli / 1000,
                    host_memory_bytes=ask.host_memory_bytes,
                    score=sum(parts.values()),
                    score_parts=parts,
                )
            )
        known: dict[DeviceState, tuple[float, dict[str, float]]] = {}
        for device, place in zip(pick.devices, pick.places, strict=True):
            # Devices in the same state contribute the same to the score.
            seen = pick.state.devices[place]
            told = known.get(seen)
            if told is None:
                parts = policy.parts(pick.state, pick.ask, pick.choice, place)
                told = known[seen] = (sum(parts.values()), parts)
            score, parts = told
            # Cumulative floors: the parts of cores and RAM are whole, and sum to what was asked.
            cpus = ask.cpus_milli * (done + 1) // total - ask.cpus_milli * done // total
            ram = ask.host_memory_bytes * (done + 1) // total - ask.host_memory_bytes * done // total
            done += 1
            grants.append(
                Grant(
                    host=pick.host.name,
                    device=device.uuid,
                    index=device.index,
                    model=device.info.name,
                    memory_bytes=_memory(device, ask),
                    share=1.0 if request.gpu_share is None else request.gpu_share,
                    cpus=cpus / 1000,
                    host_memory_bytes=ram,
                    score=score,
                    score_parts=parts,
                    in_use=device.in_use != "",
                    mig_parent=device.info.mig_parent or "",
                )
            )
    if request.distribution is None:
        return Placed(grants, policy.name)
    infos = [device.info for pick in picks for device in pick.devices]
    if not distributing:
        return Placed(grants, policy.name, devices=infos)
    outcome = distribute(request.distribution, grants, infos)
    return Placed(outcome.grants, policy.name, outcome.unassigned, outcome.report)


def _memory(device: Device, ask: Ask) -> int:
    """Bytes of a device's memory that a request is granted."""
    if not ask.whole:
        return ask.gpu_memory_bytes or min(device.part(ask.share), device.memory_free)
    if device.shared_by > 1:
        # Compute instances of one GPU instance: each has its part of what they share.
        return min(max(ask.gpu_memory_bytes, device.memory_most // device.shared_by), device.memory_free)
    return device.memory_free


def _words(grants: Sequence[Grant]) -> str:
    hosts = sorted({grant.host for grant in grants})
    devices = sum(1 for grant in grants if grant.device)
    if not devices:
        return f"cores and memory on {hosts[0]}"
    word = "device" if devices == 1 else "devices"
    return f"{devices} {word} on {', '.join(hosts[:5])}{f' and {len(hosts) - 5} more hosts' if len(hosts) > 5 else ''}"


__all__ = [
    "Decision",
    "InvalidRequest",
    "Placed",
    "Policies",
    "RejectionCode",
    "ask_of",
    "check",
    "could_ever_fit",
    "decide",
    "environment",
    "explain",
    "placed",
    "with_additions",
]
