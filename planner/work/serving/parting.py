"""Traffic through a placement by which the ways of requests share little, and part often.

Of all flows, the one with the least crowding (`crowding.py`) is found by the Frank-Wolfe method: again and again some
traffic moves to the way that adds the least. Nodes that end at the same layer hand over to the same receivers in the
same parts, so that two requests that have shared a node part with the greatest chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from .cluster import SINK, SOURCE, Placement, Route

_ROUNDS: Final = 150
_HALVINGS: Final = 16
_OVER: Final = 50.0
"""Seconds that count for the square of the share of all traffic by which a node has too much."""
_LEAST: Final = 1e-6
_Edge = tuple[int, int]


class _Traffic:
    """Traffic into nodes, by the layer that comes next; all of it is 1.

    Attributes:
        receivers: for each layer at which tokens are handed over, the nodes that take them.
        edges: pairs of such a layer and a node.
        passed: for each pair its part of the traffic.
    """

    def __init__(self, placement: Placement, total: int, most: Sequence[float], seconds: Sequence[float]) -> None:
        held = [node for node, (_, layers) in enumerate(placement) if layers]
        self.total = total
        self.ends = {node: placement[node].end for node in held}
        # Only layers from which the last one is reached.
        self.receivers: dict[int, list[int]] = {}
        for layer in sorted({0, *self.ends.values()} - {total}, reverse=True):
            able = [
                node
                for node in held
                if placement[node].first <= layer < self.ends[node]
                and (self.ends[node] == total or self.receivers.get(self.ends[node]))
            ]
            self.receivers[layer] = able
        self.edges: list[_Edge] = [(layer, node) for layer, nodes in self.receivers.items() for node in nodes]
        self.most = most
        self.cost = {(layer, node): seconds[node] * (self.ends[node] - layer) for layer, node in self.edges}
        self.whole = {node: seconds[node] * placement[node].layers for node in held}
        self.passed: dict[_Edge, float] = dict.fromkeys(self.edges, 0.0)

    def loads(self, passed: dict[_Edge, float]) -> tuple[dict[int, float], dict[int, float]]:
        """For each node the seconds of prompts, and the traffic."""
        times: dict[int, float] = defaultdict(float)
        parts: dict[int, float] = defaultdict(float)
        for edge, part in passed.items():
            times[edge[1]] += part * self.cost[edge]
            parts[edge[1]] += part
        return times, parts

    def least(self, added: dict[_Edge, float]) -> dict[_Edge, float]:
        """All traffic on the way that adds the least."""
        best: dict[int, tuple[float, int]] = {}
        for layer, nodes in self.receivers.items():  # from the last to the first
            ways = [
                (added[layer, node] + (0.0 if self.ends[node] == self.total else best[self.ends[node]][0]), node)
                for node in nodes
            ]
            if ways:
                best[layer] = min(ways)
        found: dict[_Edge, float] = {}
        layer = 0
        while layer != self.total:
            node = best[layer][1]
            found[layer, node] = 1.0
            layer = self.ends[node]
        return found

    def gradient(self, times: dict[int, float], parts: dict[int, float]) -> dict[_Edge, float]:
        return {
            (layer, node): 2 * times[node] / self.whole[node] * self.cost[layer, node]
            + 2 * _OVER * max(0.0, parts[node] - self.most[node])
            for layer, node in self.edges
        }

    def settle(self) -> None:
        """Find the traffic."""
        self.passed |= self.least(self.cost)
        for _ in range(_ROUNDS):
            times, parts = self.loads(self.passed)
            other = self.least(self.gradient(times, parts))
            to_times, to_parts = self.loads(other)

            def slope(
                step: float,
                at: tuple[dict[int, float], dict[int, float]] = (times, parts),
                to: tuple[dict[int, float], dict[int, float]] = (to_times, to_parts),
            ) -> float:
                total = 0.0
                for node, whole in self.whole.items():
                    time, part = at[0][node], at[1][node]
                    more, moved = to[0][node] - time, to[1][node] - part
                    total += 2 * (time + step * more) * more / whole
                    total += 2 * _OVER * max(0.0, part + step * moved - self.most[node]) * moved
                return total

            low, high = 0.0, 1.0
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                low, high = (low, middle) if slope(middle) > 0 else (middle, high)
            for edge in self.edges:
                self.passed[edge] += low * (other.get(edge, 0.0) - self.passed[edge])


def parting_routes(
    placement: Placement, layers: int, flow: float, most: Sequence[float], seconds: Sequence[float]
) -> tuple[Route, ...]:
    """Compute the traffic between pairs of nodes, in order of the nodes; none if they do not hold all layers.

    Args:
        placement: layers of each node; no link may limit its flow.
        layers: of the model.
        flow: tokens a second of all traffic.
        most: for each node the tokens a second that it takes at most; more only where the flow needs it.
        seconds: for each node the seconds of a prompt in one layer.
    """
    traffic = _Traffic(placement, layers, [rate / flow for rate in most], seconds)
    if not traffic.receivers[0]:
        return ()
    traffic.settle()
    arrived: dict[int, float] = defaultdict(float)
    for (layer, _), part in traffic.passed.items():
        arrived[layer] += part
    _, parts = traffic.loads(traffic.passed)
    found = [Route(SOURCE, node, traffic.passed[0, node] * flow) for node in traffic.receivers[0]]
    for origin, part in parts.items():
        end = traffic.ends[origin]
        if end == layers:
            found.append(Route(origin, SINK, part * flow))
        elif arrived[end] > _LEAST:
            found += [
                Route(origin, node, part * traffic.passed[end, node] / arrived[end] * flow)
                for node in traffic.receivers[end]
            ]
    return tuple(route for route in sorted(found) if route.tokens_per_second > _LEAST * flow)
