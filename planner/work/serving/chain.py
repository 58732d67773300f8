"""The chain: each layer on one node only, exact; for speeds that do not depend on the layers held, as `pipeline`."""

from __future__ import annotations

from collections.abc import Sequence

from .cluster import Interval
from .flow import Network


def chain(network: Network, order: Sequence[int]) -> tuple[Interval, ...]:
    """Place the layers in contiguous runs on nodes in order, with the greatest rate of the slowest.

    Links are ignored. A rate F is reached if and only if the most layers that each node passes at F are enough in all,
    so the best F is one of the rates, found by bisection over them. If memory does not suffice, no node holds layers.
    """
    nothing = (Interval(0, 0),) * len(network.rates)
    values = sorted({rate for rates in network.rates for rate in rates})
    most = _most(network, order, values[0]) if values else []
    if sum(most) < network.layers:
        return nothing
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        found = _most(network, order, values[middle])
        if sum(found) >= network.layers:
            low, most = middle, found
        else:
            high = middle
    placement = list(nothing)
    # Layers too many are taken from the nodes that would be slowest, one by one.
    for _ in range(sum(most) - network.layers):
        at = min(
            (at for at in range(len(order)) if most[at]),
            key=lambda at: (network.rates[order[at]][most[at] - 1], -at),
        )
        most[at] -= 1
    first = 0
    for node, layers in zip(order, most, strict=True):
        if layers:
            placement[node] = Interval(first, layers)
        first += layers
    return tuple(placement)


def _most(network: Network, order: Sequence[int], least: float) -> list[int]:
    """For each node in order the most layers with which it passes at least so many tokens a second."""
    return [
        max((layers for layers, rate in enumerate(network.rates[node], 1) if rate >= least), default=0)
        for node in order
    ]
