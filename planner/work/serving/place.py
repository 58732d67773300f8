"""Placement of a model's layers with the greatest flow of tokens, and a bound that no placement exceeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random
from typing import Final

import msgspec

from .anneal import Budget, Found, anneal
from .bound import bound
from .chain import chain
from .cluster import SINK, SOURCE, Cluster, Interval, Placed, Requirement
from .flow import Network, flow, routes
from .latency import in_time, layer_seconds
from .shortage import LinkedShortage, Shortage

_CLOSE: Final = 1e-6
"""Relative distance to the bound at which the search stops."""
_FREE: Final = (0.92, 0.1, 0.005)
"""Target as a share of the bound, temperature at the start and at the end, where no link limits the flow."""
_LINKED: Final = (0.85, 0.05, 0.004)
"""The same where links do: less hot, so that the sites stay in their order along the model."""
_RUNS_FREE: Final = 2
"""Runs from random starts."""
_ORDERS: Final = 6
"""Orders of sites along the model to start from, at most."""
_FIRST_PASS: Final = 0.5
"""Share of the budget for all orders of sites; the rest is for the best."""
_SECOND_PASS: Final = 2
"""Number of the best."""


def place(
    cluster: Cluster,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    requirement: Requirement | None = None,
    start: Sequence[Interval] | None = None,
) -> Placed:
    """Find a placement of layers with a great flow of tokens, on one core.

    Args:
        cluster: nodes and links.
        seconds: processor time to search for; None: no limit.
        steps: steps of the search at most; with it and without `seconds` the same seed gives the same result on each
            machine. None: no limit.
        seed: seed of the random choices.
        requirement: what the placement must offer apart from flow. If none found does, the flow is 0.
        start: a placement to start from, for example the one in use.

    Raises:
        ValueError: both limits are None.
    """
    if seconds is None and steps is None:
        raise ValueError("A search needs a limit: seconds or steps.")
    required = requirement or Requirement()
    budget = Budget(seconds, steps)
    random = Random(seed)
    whole = Network(cluster)
    ceiling = bound(whole)
    kept = _kept(cluster, required)
    best = Found((Interval(0, 0),) * len(cluster.nodes), 0.0)
    for number, nodes in enumerate(kept, 1):
        part = _only(cluster, nodes)
        given = None if start is None else [start[node] for node in nodes]
        found = _search(part, required, budget, number / len(kept), random, given)
        placement = list(best.placement)
        placement[:] = (Interval(0, 0),) * len(placement)
        for node, interval in zip(nodes, found.placement, strict=True):
            placement[node] = interval
        if found.flow > best.flow and in_time(cluster, placement, routes(whole, placement), required):
            best = Found(tuple(placement), found.flow)
    return Placed(best.placement, best.flow, ceiling, routes(whole, best.placement) if best.flow else (), budget.done)


def _kept(cluster: Cluster, required: Requirement) -> list[list[int]]:
    """Sets of nodes to search: all; with a limit on latency also without those of the slowest kind, two kinds, …."""
    everything = list(range(len(cluster.nodes)))
    if required.token_seconds is None and required.first_token_seconds is None:
        return [everything]
    prompt = None if required.first_token_seconds is None else required.prompt_tokens
    used = sorted(set(cluster.nodes), key=lambda kind: layer_seconds(cluster.kinds[kind], prompt), reverse=True)
    return [[node for node in everything if cluster.nodes[node] in used[out:]] for out in range(len(used))]


def _only(cluster: Cluster, nodes: Sequence[int]) -> Cluster:
    """Return the cluster with some of its nodes."""
    number = {node: at for at, node in enumerate(nodes)} | {SOURCE: SOURCE, SINK: SINK}
    links = tuple(
        msgspec.structs.replace(link, origin=number[link.origin], target=number[link.target])
        for link in cluster.links
        if link.origin in number and link.target in number
    )
    return msgspec.structs.replace(cluster, nodes=tuple(cluster.nodes[node] for node in nodes), links=links)


def _search(
    cluster: Cluster,
    required: Requirement,
    budget: Budget,
    until: float,
    random: Random,
    start: Sequence[Interval] | None,
) -> Found:
    """Search until a share of the budget is used."""
    network = Network(cluster)
    ceiling = min(bound(network), required.enough_flow or math.inf)
    caches = [cluster.kind_of(node).kv_cache_tokens for node in range(len(cluster.nodes))]
    cache_least = (required.kv_cache_tokens or 0.0) if all(caches) else 0.0

    def state(placement: Sequence[tuple[int, int]], target: float) -> Shortage:
        return (Shortage if network.free else LinkedShortage)(network, placement, target, caches, cache_least)

    nothing = Found((Interval(0, 0),) * len(cluster.nodes), 0.0)
    if not ceiling:
        return nothing
    enough = ceiling * (1 - _CLOSE)
    chains = [chain(network, [node for site in order for node in site]) for order in _orders(network.sites, random)]
    given = [] if start is None else [tuple(start)]
    best = nothing
    for placement in (*given, *chains):
        found = Found(placement, flow(network, placement))
        if found.flow > best.flow and state(placement, 1.0).enough_cache():
            best = found
    begun = budget.used()
    target, hot, cold = _FREE if network.free else _LINKED

    def search(starts: Sequence[tuple[Interval, ...]], begun: float, until: float) -> list[tuple[Interval, ...]]:
        """Search from each start for an equal time, and return the starts in order of what was found."""
        nonlocal best
        results: list[tuple[float, tuple[Interval, ...]]] = []
        for number, placement in enumerate(starts, 1):
            if best.flow >= enough:
                break
            aim = ceiling if required.enough_flow else min(ceiling, max(target * ceiling, best.flow * 1.01))
            end = begun + (until - begun) * number / len(starts)
            found = anneal(state(placement, aim), budget, end, random, enough, hot, cold)
            results.append((found.flow, placement))
            if found.flow > best.flow:
                best = found
        return [placement for _, placement in sorted(results, key=lambda result: -result[0])]

    if network.free:
        runs = (1 if cache_least else _RUNS_FREE) - len(given)
        search([*given, *(random_placement(network, ceiling, random) for _ in range(runs))], begun, until)
    else:
        middle = begun + (until - begun) * _FIRST_PASS
        starts = search([*given, *chains], begun, middle)
        search(starts[:_SECOND_PASS], middle, until)
    return best


def _orders(sites: Sequence[list[int]], random: Random) -> list[list[list[int]]]:
    """Orders of sites, all if there are few."""
    if math.factorial(min(len(sites), _ORDERS)) <= _ORDERS:
        return [list(order) for order in itertools.permutations(sites)]
    return [random.sample(sites, len(sites)) for _ in range(_ORDERS)]


def random_placement(network: Network, ceiling: float, random: Random) -> tuple[Interval, ...]:
    """A placement in which each node has the number of layers with which it does the most work, anywhere."""
    placement: list[Interval] = []
    for rates in network.rates:
        layers = max(range(1, len(rates) + 1), key=lambda layers: layers * min(rates[layers - 1], ceiling))
        placement.append(Interval(random.randrange(network.layers - layers + 1), layers))
    return tuple(placement)
