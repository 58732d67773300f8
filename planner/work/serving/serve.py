"""The placement that serves a load best in simulation.

The greatest flow is not the most tokens: requests in progress are limited by the KV cache of the layer that has the
least, and each waits behind the prompts of others. So placements with more cache, less flow and less crowding
(`crowding.py`) are tried too.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final, NamedTuple

import msgspec

from .anneal import Budget
from .bound import bound
from .cluster import Cluster, Placed, Requirement
from .crowding import Wanted, least_crowded, limited_rates, prompt_seconds
from .flow import Network, flow
from .latency import in_time
from .parting import parting_routes
from .place import place, random_placement
from .simulate import Load, Simulated, simulate

CANDIDATES: Final = ((0.64, 1.15), (0.7, 1.15), (0.64, 1.05))
"""Of each candidate: the flow that suffices, as a share of the bound, and the KV cache in the layer with the least, as
a multiple of that of the placement with the greatest flow."""
UNCROWDED: Final = ((0.7, 1.14), (0.64, 1.14), (0.7, 1.05))
"""The same of candidates with little crowding, which take their place where no link limits the flow."""
_TRIAL: Final = 0.3
"""Share of the load's time that each candidate is simulated at first."""
_FINALISTS: Final = 2
"""Candidates that are simulated for the whole time."""


class Served(NamedTuple):
    """A placement with what it serves.

    Attributes:
        placed: the placement; its bound is for flow.
        simulated: what it served of the load.
    """

    placed: Placed
    simulated: Simulated


def serve(
    cluster: Cluster,
    load: Load,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    requirement: Requirement | None = None,
    candidates: int = len(CANDIDATES),
) -> list[Served]:
    """Find placements with great flow and with more KV cache, and simulate them.

    Returns the two that serve most in a short simulation, simulated for the whole time; the better one comes first.

    Args:
        cluster: nodes and links.
        load: requests to serve.
        seconds: processor time for the searches together, without the simulations; None: no limit.
        steps: steps for the searches together; see `place`.
        seed: seed of the random choices of the searches.
        requirement: what each placement must offer.
        candidates: number of placements with more KV cache; from `len(CANDIDATES)` on their seeds differ.

    Raises:
        ValueError: both limits are None.
    """
    required = requirement or Requirement()
    searches = 1 + candidates
    limits = (None if seconds is None else seconds / searches, None if steps is None else steps // searches)

    def search(required: Requirement, seed: int) -> Placed:
        return place(cluster, seconds=limits[0], steps=limits[1], seed=seed, requirement=required)

    first = search(required, seed)
    found = {first.placement: first} if first.flow else {}
    ceiling = bound(Network(cluster))
    least = _least_cache(cluster, first)
    prompt = sum(tokens for tokens, _ in load.lengths) / len(load.lengths)
    free = Network(cluster).free and prompt_seconds(cluster, prompt) is not None
    for number in range(candidates if least else 0):
        share, more = (UNCROWDED if free else CANDIDATES)[number % len(CANDIDATES)]
        cache = max(least * more, required.kv_cache_tokens or 0.0)
        turn = seed + number // len(CANDIDATES)
        if free:
            other = _uncrowded(cluster, Wanted(share * ceiling, cache, prompt), required, Budget(*limits), turn)
        else:
            wanted = msgspec.structs.replace(required, enough_flow=share * ceiling, kv_cache_tokens=cache)
            other = search(wanted, turn)
        if other is not None and other.flow:
            found[other.placement] = other
    tries = _simulated(cluster, list(found.values()), msgspec.structs.replace(load, seconds=load.seconds * _TRIAL))
    return _simulated(cluster, [one.placed for one in tries[:_FINALISTS]], load)


def _uncrowded(cluster: Cluster, wanted: Wanted, required: Requirement, budget: Budget, seed: int) -> Placed | None:
    """Search a placement with little crowding, and the traffic for it; None if none was found."""
    network, random = Network(cluster), Random(seed)
    start = random_placement(network, wanted.flow, random)
    placement = least_crowded(cluster, network, wanted, start, budget, random)
    seconds = prompt_seconds(cluster, wanted.prompt_tokens)
    if placement is None or seconds is None:
        return None
    rates = limited_rates(cluster, network, wanted)
    most = [rates[node][layers - 1] if layers else 0.0 for node, (_, layers) in enumerate(placement)]
    ways = parting_routes(placement, network.layers, wanted.flow, most, seconds)
    if not in_time(cluster, placement, ways, required):
        return None
    return Placed(placement, flow(network, placement), bound(network), ways, budget.done)


def _simulated(cluster: Cluster, placements: Sequence[Placed], load: Load) -> list[Served]:
    """Simulate placements; the one with the most output comes first."""
    served = [Served(placed, simulate(cluster, placed.placement, placed.routes, load)) for placed in placements]
    return sorted(served, key=lambda one: -one.simulated.decode_tokens_per_second)


def _least_cache(cluster: Cluster, placed: Placed) -> float:
    """Tokens of KV cache in the layer that has the least, 0 where it is no limit."""
    cache = [0.0] * cluster.model.layers
    for node, (first, layers) in enumerate(placed.placement):
        kind = cluster.kind_of(node)
        if layers and not kind.kv_cache_tokens:
            return 0.0
        for layer in range(first, first + layers):
            cache[layer] += kind.kv_cache_tokens[layers - 1] / layers
    return min(cache)
