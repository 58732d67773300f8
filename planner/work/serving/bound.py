"""A flow that no placement on a cluster exceeds."""

from __future__ import annotations

from typing import Final

from .flow import Network

_ROUNDING: Final = 1e-9
"""Relative error of sums that must not lower the bound."""


def bound(network: Network) -> float:
    """Compute the bound: the least of these.

    Work: in a flow of F tokens a second each layer passes F, and a node with n layers passes at most min(its rate, F)
    through each of them. So the sum over nodes of the greatest n · min(rate(n), F) is at least F · layers. The greatest
    such F is found by bisection and rounded upwards.
    Where all nodes together can't hold the layers it is 0.
    Source and sink: all tokens enter and leave by their links, through nodes no faster than their best rate.
    """
    if sum(map(len, network.rates)) < network.layers:
        return 0.0
    best = [max(rates) for rates in network.rates]
    ends = min(
        sum(map(min, network.source, best)),
        sum(map(min, network.sink, best)),
    )
    return min(_work(network), ends)


def _work(network: Network) -> float:
    high = sum(max(rates) for rates in network.rates)
    low = 0.0
    tables = [list(enumerate(rates, 1)) for rates in network.rates]
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return high
        carried = sum(max(layers * min(rate, middle) for layers, rate in table) for table in tables)
        if carried >= middle * network.layers * (1 - _ROUNDING):
            low = middle
        else:
            high = middle
