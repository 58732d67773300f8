"""Plans to serve a model on some devices, the best first, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from msgspec.structs import replace

from ....schemas.models.serving import (
    FitVerdict,
    PlanKind,
    ServeFit,
    ServePlan,
    ServeRoute,
    ServeStage,
    ServeWork,
    StageDevice,
)
from ....schemas.models.sizes import kv_token_bytes
from ....schemas.values.units import short_time
from .ceiling import ceiling
from .chain import Chain, Pace, alone, best_chain, fewest, pace
from .costs import Costs, Unit
from .expected import expected, steps_needed
from .flow_plan import Flowing, greatest_flow
from .units import MOST_DEVICES, Candidate, mixes, singles
from .words import fit_words, nearest

_PLANS: Final = 6
"""Number of plans in an answer."""
_SEARCHED: Final = 0.75
"""Part of the time that searches take; the rest is for simulations."""
_STEPS: Final = 300_000
"""Steps of requests that all simulations together take for each second of the time: a quarter of it."""
_NEARLY: Final = 0.9
"""Part of the most tokens a second that a plan with fewer devices needs to go first."""


def fit(work: ServeWork, devices: Sequence[Candidate]) -> ServeFit:
    """Decide whether devices can serve a model, and how.

    Args:
        work: the model, with what it has to hold.
        devices: devices that it may use; of more than `MOST_DEVICES`, those with most free memory count.
    """
    considered = sorted(devices, key=lambda device: (-device.memory_bytes, device.info.host, device.info.index))
    considered = considered[:MOST_DEVICES]
    costs = Costs(work)
    units = singles(work, considered)
    mixed = mixes(work, considered)
    plans = _plans(costs, considered, mixed)
    ceilings = [found for found in (ceiling(costs, units) for units in mixed) if found is not None]
    usable = sum(unit.memory for unit in units)
    needed = costs.sizes.total + costs.kv(work.model.layers)
    room = sum(max(0, unit.memory - costs.working) for unit in units)
    found = ServeFit(
        verdict=_verdict(plans),
        message="",
        plans=_simulated(costs, considered, units, _chosen(plans)),
        bound_tokens_per_second=max(ceilings) if len(ceilings) == len(mixed) else None,
        weights_bytes=costs.sizes.total,
        kv_bytes=costs.kv(work.model.layers),
        kv_token_bytes=work.model.layers * kv_token_bytes(work.model, work.kv_dtype),
        working_bytes=costs.working,
        devices=len(considered),
        usable_bytes=usable,
        short_bytes=0 if plans else max(0, needed - room),
    )
    return replace(found, message=fit_words(work, found, len(devices)), nearest=nearest(costs, considered, found))


def plan(work: ServeWork, devices: Sequence[Candidate]) -> ServePlan | None:
    """The best plan that uses only some devices, in any order; None if there is none."""
    plans = fit(work, devices).plans
    return plans[0] if plans else None


def _chosen(plans: Sequence[ServePlan]) -> list[ServePlan]:
    """The first plans; the last of them makes room for the one with the fewest devices, if that is not there."""
    chosen = list(plans[:_PLANS])
    least = min(plans, key=lambda plan: len(plan.devices), default=None)
    if least is not None and len(least.devices) < min(len(plan.devices) for plan in chosen):
        chosen[_PLANS - 1 :] = [least]
    return chosen


def _simulated(
    costs: Costs, devices: Sequence[Candidate], units: Sequence[Unit], plans: list[ServePlan]
) -> list[ServePlan]:
    """Plans with what they serve in simulation, the best first by that; what one needs less is for those after it."""
    alone_ = {devices[unit.devices[0]].info.uuid: unit for unit in units}
    left = int(_STEPS * costs.work.seconds)
    made: list[ServePlan] = []
    for number, plan in enumerate(plans):
        steps = max(1, left // (len(plans) - number))
        left -= min(steps, steps_needed(costs, plan))
        made.append(_checked(costs.work, replace(plan, expected=expected(costs, plan, alone_, steps))))
    if any(plan.expected is None for plan in made):
        return made
    return sorted(made, key=_order(made))


def _verdict(plans: Sequence[ServePlan]) -> FitVerdict:
    if not plans:
        return FitVerdict.NO
    one = any(len(plan.devices) == 1 for plan in plans)
    return FitVerdict.ONE_DEVICE if one else FitVerdict.SEVERAL_DEVICES


def _plans(costs: Costs, devices: Sequence[Candidate], mixed: Sequence[list[Unit]]) -> list[ServePlan]:
    """Plans by tokens a second, those that keep all limits first; each set of devices and layers once."""
    made: list[ServePlan] = []
    for units in mixed:
        before = len(made)
        grouped = [unit for unit in units if unit.size > 1] or units
        together = _fastest(costs, alone(costs, grouped))
        if together is not None:
            made.append(chain_plan(costs, devices, together))
        made += _chains(costs, devices, units)
        made += _copies(costs, devices, grouped)
        # Units that hold no chain hold no other placement.
        found = greatest_flow(costs, units, _SEARCHED * costs.work.seconds / len(mixed)) if len(made) > before else None
        if found is not None and (plan := flow_plan(costs, devices, found)) is not None:
            made.append(plan)
    seen: dict[tuple[tuple[int, int, tuple[str, ...]], ...], ServePlan] = {}
    for plan in made:
        key = tuple(
            (stage.first_layer, stage.layers, tuple(device.device for device in stage.devices)) for stage in plan.stages
        )
        seen.setdefault(key, plan)
    return _ordered(list(seen.values()))


def _ordered(plans: list[ServePlan]) -> list[ServePlan]:
    """Plans that no other beats in tokens a second, in time per token and in the number of devices, the best first.

    The best is the one with most tokens a second, or with fewer devices and nearly as many.
    """

    def values(plan: ServePlan) -> tuple[float, float, float, int]:
        later = math.inf if plan.token_seconds is None else plan.token_seconds
        first = math.inf if plan.first_token_seconds is None else plan.first_token_seconds
        return -(plan.tokens_per_second or 0.0), later, first, len(plan.devices) + 10**6 * len(plan.warnings)

    def beaten(plan: ServePlan, other: ServePlan) -> bool:
        mine, others = values(plan), values(other)
        return mine != others and all(b <= a for a, b in zip(mine, others, strict=True))

    kept = [plan for plan in plans if not any(beaten(plan, other) for other in plans)]
    return sorted(kept, key=_order(kept))


def _order(plans: Sequence[ServePlan]) -> Callable[[ServePlan], tuple[int, bool, float, float]]:
    """Key that sorts plans: the most tokens a second come first, or fewer devices with nearly as many."""
    most = max((_served(plan) for plan in plans if not plan.warnings), default=0.0)

    def order(plan: ServePlan) -> tuple[int, bool, float, float]:
        rate, count = _served(plan), len(plan.devices)
        near = rate >= _NEARLY * most
        return len(plan.warnings), not near, count if near else -rate, -rate if near else count

    return order


def _served(plan: ServePlan) -> float:
    """Tokens a second of a plan: those expected, else at most."""
    return plan.tokens_per_second or 0.0 if plan.expected is None else plan.expected.tokens_per_second


def _fastest(costs: Costs, chains: Sequence[Chain]) -> Chain | None:
    """The chain with most tokens a second; of equal ones the first, and with unknown rates that with most memory."""

    def order(made: Chain) -> tuple[float, int]:
        found = pace(costs, made)
        return (-math.inf if found is None else found.tokens_per_second, sum(unit.memory for unit in made.units))

    return max(chains, key=order, default=None)


def _chains(costs: Costs, devices: Sequence[Candidate], units: Sequence[Unit]) -> list[ServePlan]:
    """The chain over the fewest units, and the one with most tokens a second."""
    found = [made for made in (fewest(costs, units), best_chain(costs, units)) if made is not None]
    return [chain_plan(costs, devices, made) for made in found]


def _copies(costs: Costs, devices: Sequence[Candidate], units: Sequence[Unit]) -> list[ServePlan]:
    """A plan of several units that hold the whole model each, and share the sequences by their speed."""
    work, layers = costs.work, costs.model.layers
    most = min(len(units), work.sequences)
    for count in range(most, 1, -1):
        each = Costs(replace(work, sequences=-(-work.sequences // count)))
        able = alone(each, units)
        if len(able) < count:
            continue
        paced = [(made, pace(each, made)) for made in able]
        if any(found is None for _, found in paced):
            return []
        # Of s sequences, rounded up for each copy, only s are there.
        scale = work.sequences / (count * each.work.sequences)
        scaled = [
            (made, found._replace(tokens_per_second=scale * found.tokens_per_second)) for made, found in paced if found
        ]
        best = sorted(scaled, key=lambda pair: -_rate(pair[1]))[:count]
        rate = sum(_rate(found) for _, found in best)
        stages = [_stage(each, devices, made.units[0], 0, layers, found, _rate(found) / rate) for made, found in best]
        routes = [
            route
            for at, (_, found) in enumerate(best)
            for route in (
                ServeRoute(origin=-1, target=at, weight=_rate(found) / rate, tokens_per_second=_rate(found)),
                ServeRoute(origin=at, target=-1, tokens_per_second=_rate(found)),
            )
        ]
        slowest = max(found.token_seconds for _, found in best)
        firsts = [found.first_token_seconds for _, found in best]
        first = None if None in firsts else max(second for second in firsts if second is not None)
        return [
            _checked(
                work,
                ServePlan(
                    kind=PlanKind.FLOW,
                    stages=stages,
                    routes=routes,
                    replicas=count,
                    tensor_parallel=max(made.units[0].size for made, _ in best),
                    sequences=sum(each.held_sequences(made.units[0], 0, layers) for made, _ in best),
                    tokens_per_second=rate,
                    token_seconds=slowest,
                    first_token_seconds=first,
                    rests_on=_rests_on(each, [unit for made, _ in best for unit in made.units]),
                ),
            )
        ]
    return []


def _rate(found: Pace | None) -> float:
    return 0.0 if found is None else found.tokens_per_second


def chain_plan(costs: Costs, devices: Sequence[Candidate], made: Chain) -> ServePlan:
    """Plan of a chain."""
    found = pace(costs, made)
    stages = [_stage(costs, devices, unit, first, end, found) for unit, first, end in made.runs]
    rate = None if found is None else found.tokens_per_second
    last = len(stages) - 1
    routes = [
        ServeRoute(origin=at - 1, target=at if at <= last else -1, tokens_per_second=rate) for at in range(last + 2)
    ]
    alone_ = PlanKind.ONE_DEVICE if made.units[0].size == 1 else PlanKind.TENSOR_PARALLEL
    return _checked(
        costs.work,
        ServePlan(
            kind=PlanKind.PIPELINE if last else alone_,
            stages=stages,
            routes=routes,
            tensor_parallel=max(unit.size for unit in made.units),
            sequences=min(costs.held_sequences(unit, first, end) for unit, first, end in made.runs),
            tokens_per_second=rate,
            token_seconds=None if found is None else found.token_seconds,
            first_token_seconds=None if found is None else found.first_token_seconds,
            rests_on=_rests_on(costs, made.units),
        ),
    )


def flow_plan(costs: Costs, devices: Sequence[Candidate], found: Flowing) -> ServePlan | None:
    """Plan of a placement with its flow; None if the KV cache of its part of the sequences does not fit a unit."""
    work, rate = costs.work, found.tokens_per_second
    through = [sum(way.tokens_per_second for way in found.routes if way.target == at) for at in range(len(found.units))]
    stages: list[ServeStage] = []
    sequences = math.inf
    for unit, interval, tokens in zip(found.units, found.placement, through, strict=True):
        share = min(1.0, tokens / rate)
        part = Costs(replace(work, sequences=max(1, math.ceil(work.sequences * share - 1e-9))))
        if not part.fits(unit, interval.first, interval.end):
            return None
        sequences = min(sequences, part.held_sequences(unit, interval.first, interval.end) / share)
        stages.append(_stage(part, devices, unit, interval.first, interval.end, None, share))
    out = {at: sum(way.tokens_per_second for way in found.routes if way.origin == at) for at in range(len(stages))}
    ways = [
        ServeRoute(
            origin=max(-1, way.origin),
            target=max(-1, way.target),
            weight=way.tokens_per_second / (rate if way.origin < 0 else out[way.origin]),
            tokens_per_second=way.tokens_per_second,
        )
        for way in found.routes
    ]
    replicas = sum(way.origin < 0 for way in found.routes)
    single = len(found.routes) == len({way.origin for way in found.routes if way.origin >= 0}) + sum(
        way.origin < 0 for way in found.routes
    ) and all(sum(way.target == at for way in found.routes) <= 1 for at in range(len(stages)))
    return _checked(
        work,
        ServePlan(
            kind=PlanKind.PIPELINE if single and replicas == 1 else PlanKind.FLOW,
            stages=stages,
            routes=ways,
            replicas=replicas if single else 0,
            tensor_parallel=max(unit.size for unit in found.units),
            sequences=int(sequences + 1e-6),
            tokens_per_second=rate,
            token_seconds=found.token_seconds,
            first_token_seconds=found.first_token_seconds,
            rests_on=_rests_on(costs, found.units),
        ),
    )


def _stage(
    costs: Costs,
    devices: Sequence[Candidate],
    unit: Unit,
    first: int,
    end: int,
    found: Pace | None,
    traffic: float = 1.0,
) -> ServeStage:
    weights, kv = costs.weights(first, end, unit.size), costs.kv(end - first, unit.size)
    seconds = None if found is None else costs.decode_seconds(unit, first, end, costs.work.sequences)
    return ServeStage(
        first_layer=first,
        layers=end - first,
        devices=[
            StageDevice(
                host=info.host,
                device=info.uuid,
                index=info.index,
                model=info.name,
                memory_bytes=unit.memory,
                weights_bytes=weights,
                working_bytes=costs.working,
                kv_bytes=kv,
                left_bytes=max(0, unit.memory - weights - costs.working - kv),
                total_bytes=info.memory_bytes,
                vendor=info.vendor,
                visible_id=info.visible_id,
            )
            for info in (devices[at].info for at in unit.devices)
        ],
        tokens_per_second=costs.work.sequences / seconds if seconds else None,
        traffic=traffic,
    )


def _rests_on(costs: Costs, units: Sequence[Unit]) -> list[str]:
    """Sources of the figures of a plan, in words."""
    found = sorted({unit.rates.source for unit in units})
    found.append("a roofline: the longer of bytes over bandwidth and operations over their rate")
    links, hosts = costs.work.links, {unit.host for unit in units}
    if any(not unit.rates.link_bytes_per_second for unit in units) and (
        any(unit.size > 1 for unit in units) or len(units) > len(hosts)
    ):
        found.append(f"links in a host: {links.host_bytes_per_second / 1e9:g} GB/s")
    if len(hosts) > 1:
        found.append(f"links between hosts: {links.network_bytes_per_second / 1e9:g} GB/s")
    return found


def _checked(work: ServeWork, plan: ServePlan) -> ServePlan:
    """A plan with the limits that it breaks: with nothing else to do, or as it is expected to serve."""
    found: list[str] = []
    served = plan.expected
    for name, limit, alone_, loaded in (
        ("time per token", work.max_token_seconds, plan.token_seconds, served and served.token_seconds),
        (
            "time to the first token",
            work.max_first_token_seconds,
            plan.first_token_seconds,
            served and served.first_token_seconds,
        ),
    ):
        if limit is None or alone_ is None:
            continue
        over = f", over the limit of {short_time(limit)}"
        if alone_ > limit:
            found.append(f"{name} is {short_time(alone_)}{over}")
        elif loaded is not None and loaded > limit and served is not None and served.step_tokens == 1:
            found.append(f"{name} is expected to be {short_time(loaded)} under load{over}")
    return replace(plan, warnings=found)
