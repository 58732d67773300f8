"""The plan with the greatest flow of tokens: replicas and stages that overlap, found by `serving/place.py`.

With s sequences and u units at work, each unit computes s / u of them at a time. What flows then is limited by the
placement, and by how soon a sequence comes round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from ..serving.bound import bound
from ..serving.cluster import Interval, Requirement, Route
from ..serving.flow import Network, flow, routes
from ..serving.place import place
from .capacity import cluster_of, placed_cluster
from .costs import Costs, Unit

MOST_UNITS: Final = 256
"""Units up to which a flow is searched: all that a plan considers; the links between all pairs take a second."""
_STEPS: Final = 200_000
_SECONDS_OF_ONE: Final = 0.025
"""Processor time of the search for each unit: small fleets need little."""


class Flowing(NamedTuple):
    """A placement with its flow.

    Attributes:
        units: units at work.
        placement: layers of each.
        routes: ways of the tokens, between indexes of `units`; negative for source and sink.
        tokens_per_second: tokens of all sequences, at most.
        token_seconds: mean time from a token to the next of a sequence.
        first_token_seconds: mean time to the first token; None if a rate of operations is unknown.
    """

    units: list[Unit]
    placement: list[Interval]
    routes: list[Route]
    tokens_per_second: float
    token_seconds: float
    first_token_seconds: float | None


def greatest_flow(costs: Costs, units: Sequence[Unit], seconds: float) -> Flowing | None:
    """Search the placement with the greatest flow; None if there is none, or a rate is unknown.

    Args:
        costs: of the model.
        units: units to place its layers on.
        seconds: processor time for the search.
    """
    work = costs.work
    if not 2 < len(units) <= MOST_UNITS:
        return None
    made = cluster_of(costs, units, max(1.0, work.sequences / len(units)))
    if made is None:
        return None
    cluster, kept = made
    needed = Requirement(kv_cache_tokens=float(work.sequences * work.context_tokens))
    if not bound(Network(cluster)):
        return None
    found = place(
        cluster, seconds=min(seconds, _SECONDS_OF_ONE * len(kept)), steps=_STEPS, seed=work.seed, requirement=needed
    )
    if not found.flow:
        return None
    used = _used(found.routes)
    return _paced(costs, [kept[at] for at in used], [found.placement[at] for at in used])


def _used(ways: Sequence[Route]) -> list[int]:
    return sorted({node for way in ways for node in (way.origin, way.target) if node >= 0})


def _paced(costs: Costs, units: list[Unit], placement: list[Interval]) -> Flowing | None:
    """The flow of a placement with as many sequences in each unit as there are for it, and as its KV cache holds."""
    batch = max(1.0, costs.work.sequences / len(units))
    held = [costs.held_sequences(unit, at.first, at.end) for unit, at in zip(units, placement, strict=True)]
    batches = [max(1.0, min(batch, most)) for most in held]
    exact = placed_cluster(costs, units, placement, batches)
    if exact is None:
        return None
    network = Network(exact)
    most = flow(network, placement)
    ways = list(routes(network, placement))
    total = sum(route.tokens_per_second for route in ways if route.origin < 0)
    if not most or not total:
        return None
    used = _used(ways)
    if len(used) < len(units):  # by exact rates, tokens pass fewer
        return _paced(costs, [units[at] for at in used], [placement[at] for at in used])
    around, first = _times(costs, units, placement, ways, total, batches)
    rate = min(most, costs.work.sequences / around)
    scale = rate / total
    scaled = [Route(way.origin, way.target, way.tokens_per_second * scale) for way in ways]
    return Flowing(units, placement, scaled, rate, costs.work.sequences / rate, first)


def _times(
    costs: Costs,
    units: Sequence[Unit],
    placement: Sequence[Interval],
    ways: Sequence[Route],
    total: float,
    batches: Sequence[float],
) -> tuple[float, float | None]:
    """Mean times of a token and of a first token over all ways, without waiting.

    A unit computes of its layers those that the one before has not.
    """
    token, first, known = 0.0, 0.0, True
    for way in ways:
        share = way.tokens_per_second / total
        if way.target < 0:
            continue
        unit, interval, batch = units[way.target], placement[way.target], batches[way.target]
        start = placement[way.origin].end if way.origin >= 0 else interval.first
        seconds = costs.decode_seconds(unit, start, interval.end, batch)
        prompt = costs.prompt_seconds(unit, start, interval.end)
        assert seconds is not None
        token += share * seconds
        if prompt is None:
            known = False
        else:
            first += share * prompt
        if way.origin >= 0:
            token += share * costs.link_seconds(units[way.origin], unit, batch)
            first += share * costs.link_seconds(units[way.origin], unit, costs.prompt_tokens)
    return token, first if known else None
