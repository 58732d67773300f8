"""Distribution of work items over granted devices: each goes to one device, or is unassigned with a reason.

The methods `uniform` and `capacity` apportion counts (see `apportion`), `balanced` and `pipeline` costs (see there). A
device's memory for items is what it was granted. Its weight is, by `weight_by`, streaming multiprocessors × highest
clock, granted memory, memory bandwidth, or the number given; compute and bandwidth are multiplied by the granted share.
If the weight of one device is unknown (0), all weights are equal, since a comparison would be a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import structs

from ...schemas.models.serving import ServeWork
from ...schemas.requests import Distributed, Distribution, Grant, Method, UnassignedItem, WeightBy
from ...schemas.telemetry import DeviceInfo
from ...schemas.values.units import format_bytes
from .apportion import apportion
from .balance import Machine, balance, lower_bound, span
from .fit.plans import fit
from .fit.rates import rates_of
from .fit.units import Candidate
from .pipeline import pipeline


class Items(NamedTuple):
    """Items in whole numbers.

    Attributes:
        ids: ids, or numbers from 0.
        costs: relative time on a device of weight 1.
        sizes: bytes.
    """

    ids: Sequence[str | int]
    costs: Sequence[float]
    sizes: Sequence[int]


class Outcome(NamedTuple):
    """A distribution.

    Attributes:
        grants: with their items.
        unassigned: items that no device took.
        report: quality of the distribution.
    """

    grants: list[Grant]
    unassigned: list[UnassignedItem]
    report: Distributed


def distribute(work: Distribution, grants: Sequence[Grant], devices: Sequence[DeviceInfo]) -> Outcome:
    """Distribute work items over grants.

    Args:
        work: items and method.
        grants: the devices, one at least.
        devices: their capabilities, in the order of the grants.
    """
    if work.serve is not None:
        return _serve(work.serve, grants, devices)
    items = items_of(work)
    weights = weights_of(work, grants, devices)
    machines = [
        Machine(weight, grant.memory_bytes, work.max_items_per_device)
        for weight, grant in zip(weights, grants, strict=True)
    ]
    optimal = False
    if work.method is Method.BALANCED:
        found = balance(items.costs, items.sizes, machines)
        place, optimal, bound = found.place, found.optimal, found.bound
    elif work.method is Method.PIPELINE:
        place = _stages(pipeline(items.costs, items.sizes, machines).ends, len(items.ids))
        bound, optimal = span(items.costs, machines, place), True
    else:
        place = _counted(items, weights if work.method is Method.CAPACITY else [1.0] * len(grants), machines)
        placed = [at for at, machine in enumerate(place) if machine >= 0]
        bound = lower_bound(items.costs, items.sizes, machines, placed)
    ids: list[list[str | int]] = [[] for _ in grants]
    out: list[int] = []
    for at, machine in enumerate(place):
        if machine >= 0:
            ids[machine].append(items.ids[at])
        else:
            out.append(at)
    filled = [structs.replace(grant, items=held) for grant, held in zip(grants, ids, strict=True)]
    makespan = span(items.costs, machines, place)
    report = Distributed(
        method=work.method, weights=weights, makespan=makespan, bound=min(bound, makespan), optimal=optimal
    )
    return Outcome(filled, _reasons(work, items, out, machines, place), report)


def _serve(work: ServeWork, grants: Sequence[Grant], devices: Sequence[DeviceInfo]) -> Outcome:
    """Distribute the layers of a model over grants; none of them if they can't hold all."""
    rates = [rates_of(info, work.rates).bytes_per_second for info in devices]
    found = fit(work, [Candidate(info, grant.memory_bytes) for info, grant in zip(devices, grants, strict=True)])
    if not found.plans:
        out = [UnassignedItem(id=layer, reason=found.message) for layer in range(work.model.layers)]
        report = Distributed(method=Method.SERVE, weights=rates, makespan=0.0, bound=0.0)
        return Outcome(list(grants), out, report)
    best = found.plans[0]
    layers = {
        device.device: list(range(stage.first_layer, stage.first_layer + stage.layers))
        for stage in best.stages
        for device in stage.devices
    }
    filled = [structs.replace(grant, items=[*layers.get(grant.device, [])]) for grant in grants]
    per_token = 1 / best.tokens_per_second if best.tokens_per_second else 0.0
    bound = 1 / found.bound_tokens_per_second if found.bound_tokens_per_second else 0.0
    report = Distributed(method=Method.SERVE, weights=rates, makespan=per_token, bound=bound, plan=best)
    return Outcome(filled, [], report)


def items_of(work: Distribution) -> Items:
    """Items of a request, given as a count, as ids, or with costs and sizes."""
    if isinstance(work.items, int):
        count = work.items
        return Items(range(count), [1.0] * count, [work.memory_per_item_bytes] * count)
    ids: list[str | int] = []
    costs: list[float] = []
    sizes: list[int] = []
    for item in work.items:
        if isinstance(item, str):
            ids.append(item)
            costs.append(1.0)
            sizes.append(work.memory_per_item_bytes)
        else:
            ids.append(item.id)
            costs.append(item.cost)
            sizes.append(item.memory_bytes or work.memory_per_item_bytes)
    return Items(ids, costs, sizes)


def weights_of(work: Distribution, grants: Sequence[Grant], devices: Sequence[DeviceInfo]) -> list[float]:
    """Weights of the devices by `weight_by`; all 1 if one is unknown."""
    if work.weight_by is WeightBy.GIVEN and work.weights is not None:
        return list(work.weights)
    pairs = list(zip(grants, devices, strict=True))
    if work.weight_by is WeightBy.MEMORY:
        found = [float(grant.memory_bytes) for grant, _ in pairs]
    elif work.weight_by is WeightBy.BANDWIDTH:
        found = [info.memory_bandwidth_bytes_per_second * grant.share for grant, info in pairs]
    else:
        found = [info.sm_count * info.sm_clock_max_megahertz * grant.share for grant, info in pairs]
    return found if all(found) else [1.0] * len(grants)


def _counted(items: Items, weights: Sequence[float], machines: Sequence[Machine]) -> list[int]:
    """Assign counts of items by the largest-remainder method, in order; by size if sizes differ and memory is short."""
    total = len(items.ids)
    if not total:
        return []
    least, most = min(items.sizes), max(items.sizes)
    if least == most:
        counts = apportion(total, weights, [_most(machine, least, total) for machine in machines])
        return _stages(_ends(counts), total)
    counts = apportion(total, weights, [machine.most for machine in machines])
    place = _stages(_ends(counts), total)
    if _fit(items.sizes, machines, place):
        return place
    return _by_size(items.sizes, counts, machines)


def _most(machine: Machine, size: int, total: int) -> int:
    fit = machine.memory // size if size else total
    return fit if machine.most is None else min(fit, machine.most)


def _ends(counts: Sequence[int]) -> list[int]:
    ends: list[int] = []
    at = 0
    for count in counts:
        at += count
        ends.append(at)
    return ends


def _stages(ends: Sequence[int], total: int) -> list[int]:
    place: list[int] = []
    for machine, end in enumerate(ends):
        place.extend([machine] * (end - len(place)))
    return place + [-1] * (total - len(place))


def _fit(sizes: Sequence[int], machines: Sequence[Machine], place: Sequence[int]) -> bool:
    left = [machine.memory for machine in machines]
    for size, machine in zip(sizes, place, strict=True):
        if machine >= 0:
            left[machine] -= size
    return min(left) >= 0


def _by_size(sizes: Sequence[int], counts: Sequence[int], machines: Sequence[Machine]) -> list[int]:
    """Assign items by size, the largest first.

    Each goes to the device with the most memory left per item that it still has to take. Items that found no room
    within the counts then go to any device that has room.
    """
    left = [machine.memory for machine in machines]
    due = list(counts)
    slots = [len(sizes) if machine.most is None else machine.most for machine in machines]
    place = [-1] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda at: (-sizes[at], at))
    for within in (True, False):
        for item in order:
            if place[item] >= 0:
                continue
            able = [
                at
                for at in range(len(machines))
                if left[at] >= sizes[item] and slots[at] > 0 and (due[at] > 0 or not within)
            ]
            if not able:
                continue
            at = max(able, key=lambda at: (left[at] / max(due[at], 1), -at))
            place[item] = at
            left[at] -= sizes[item]
            due[at] -= 1
            slots[at] -= 1
    return place


def _reasons(
    work: Distribution, items: Items, out: Sequence[int], machines: Sequence[Machine], place: Sequence[int]
) -> list[UnassignedItem]:
    """Unassigned items, each with the reason."""
    if not out:
        return []
    largest = max(machine.memory for machine in machines)
    left = [machine.memory for machine in machines]
    counts = [0] * len(machines)
    for at, machine in enumerate(place):
        if machine >= 0:
            left[machine] -= items.sizes[at]
            counts[machine] += 1
    open_ = [
        room
        for room, count, machine in zip(left, counts, machines, strict=True)
        if machine.most is None or count < machine.most
    ]
    full = f"every device has its {work.max_items_per_device} items (max_items_per_device)"
    room = f"no device has room left (most free: {format_bytes(max(open_))})" if open_ else full
    found: list[UnassignedItem] = []
    for at in out:
        size = items.sizes[at]
        if size > largest:
            reason = f"it needs {format_bytes(size)}, and no device has more than {format_bytes(largest)}"
        elif work.method is Method.PIPELINE and open_ and max(open_) >= size:
            reason = "the devices in order are full before it, and a pipeline keeps items in order"
        else:
            reason = room
        found.append(UnassignedItem(id=items.ids[at], reason=reason))
    return found
