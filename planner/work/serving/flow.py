"""The greatest flow of tokens through a placement.

A node with layers [first, end) hands a token on to a node that holds layer `end`; that one computes the rest of its own
layers. So a token's way is a chain of intervals that covers all layers, and passes each node at most once.

Where no link limits it, the flow is the least coverage: the minimum over layers of the sum of the rates of the nodes
that hold it. By Menger's theorem the flow is the least sum of rates of nodes that meet every chain. Nodes meet every
chain if and only if they include all that hold some layer, since otherwise the others still cover all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .cluster import SINK, SOURCE, Cluster, Placement, Route
from .graph import NEGLIGIBLE, Graph

_INFINITE: Final = float("inf")


class Network:
    """Rates of nodes and links of a cluster in tokens a second.

    Attributes:
        layers: layers of the model.
        rates: for each node, by layers held from 1, tokens a second that it passes, by its speed and network card. The
            card carries no activations where the node holds the whole model.
        links: for each node the rate of its link to each other node, 0 where there is none.
        source: for each node the rate of its link from the source.
        sink: for each node the rate of its link to the sink.
        sites: groups of nodes between which no link can limit the flow.
        site_of: for each node its group.
        free: true if no link at all can limit the flow.
    """

    __slots__ = ("free", "layers", "links", "rates", "sink", "site_of", "sites", "source")

    def __init__(self, cluster: Cluster) -> None:
        model = cluster.model
        carried = model.carried_bytes
        card, bare_card = cluster.nic_bytes_per_second / carried, cluster.nic_bytes_per_second / model.token_bytes
        count = len(cluster.nodes)
        self.layers = model.layers
        tables = [
            [
                min(rate, bare_card if layers == model.layers else card)
                for layers, rate in enumerate(kind.tokens_per_second[: model.layers], 1)
            ]
            for kind in cluster.kinds
        ]
        self.rates = [tables[kind] for kind in cluster.nodes]
        self.links = [[0.0] * count for _ in range(count)]
        self.source = [0.0] * count
        self.sink = [0.0] * count
        for link in cluster.links:
            if link.origin == SOURCE:
                self.source[link.target] = link.bytes_per_second / model.token_bytes
            elif link.target == SINK:
                self.sink[link.origin] = link.bytes_per_second / model.token_bytes
            else:
                self.links[link.origin][link.target] = link.bytes_per_second / carried
        most = [max(rates) for rates in self.rates]
        self.sites = self._sites(most)
        self.site_of = [0] * count
        for site, nodes in enumerate(self.sites):
            for node in nodes:
                self.site_of[node] = site
        self.free = len(self.sites) <= 1 and all(
            self.source[node] >= most[node] and self.sink[node] >= most[node] for node in range(count)
        )

    def _sites(self, most: Sequence[float]) -> list[list[int]]:
        sites: list[list[int]] = []
        for node in range(len(most)):
            for site in sites:
                if all(
                    min(self.links[node][other], self.links[other][node]) >= min(most[node], most[other])
                    for other in site
                ):
                    site.append(node)
                    break
            else:
                sites.append([node])
        return sites

    def coverage(self, placement: Placement) -> list[float]:
        """For each layer the sum of the rates of the nodes that hold it."""
        covered = [0.0] * self.layers
        for node, (first, layers) in enumerate(placement):
            if layers:
                rate = self.rates[node][layers - 1]
                for layer in range(first, first + layers):
                    covered[layer] += rate
        return covered


class _Built:
    """The graph of a placement. Within a site all hand over through one vertex (hub) for each position in the model.

    Attributes:
        pairs: edges that are a link, with the two nodes.
        into: for each hub its edges from nodes, with the node.
        out_of: for each hub its edges to nodes, likewise.
    """

    __slots__ = ("graph", "into", "out_of", "pairs", "sink", "source")

    def __init__(self, network: Network, placement: Placement) -> None:
        self.graph = graph = Graph()
        self.source, self.sink = graph.vertex(), graph.vertex()
        self.pairs: list[tuple[int, int, int]] = []
        self.into: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.out_of: dict[tuple[int, int], list[tuple[int, int]]] = {}
        held = [(node, first, first + layers) for node, (first, layers) in enumerate(placement) if layers]
        enter: dict[int, int] = {}
        leave: dict[int, int] = {}
        for node, first, end in held:
            enter[node], leave[node] = graph.vertex(), graph.vertex()
            graph.edge(enter[node], leave[node], network.rates[node][end - first - 1])
        for node, first, end in held:
            if first == 0 and network.source[node]:
                self.pairs.append((graph.edge(self.source, enter[node], network.source[node]), SOURCE, node))
            if end == network.layers:
                if network.sink[node]:
                    self.pairs.append((graph.edge(leave[node], self.sink, network.sink[node]), node, SINK))
                continue
            site = network.site_of[node]
            links = network.links[node]
            for other, start, stop in held:
                if start <= end < stop and network.site_of[other] != site and links[other]:
                    self.pairs.append((graph.edge(leave[node], enter[other], links[other]), node, other))
            self.into.setdefault((site, end), []).append((leave[node], node))
        for (site, at), nodes in self.into.items():
            hub = graph.vertex()
            self.into[site, at] = [(graph.edge(vertex, hub, _INFINITE), node) for vertex, node in nodes]
            self.out_of[site, at] = [
                (graph.edge(hub, enter[other], _INFINITE), other)
                for other, start, stop in held
                if start <= at < stop and network.site_of[other] == site
            ]


def flow(network: Network, placement: Placement) -> float:
    """Compute the tokens a second that pass all layers, at most."""
    if network.free:
        return min(network.coverage(placement))
    built = _Built(network, placement)
    return built.graph.maximum(built.source, built.sink)


def routes(network: Network, placement: Placement) -> tuple[Route, ...]:
    """Compute a greatest flow by pairs of nodes, in order of the nodes.

    Where several nodes of a site hand over at the same layer, each divides its tokens over the receivers alike.
    """
    built = _Built(network, placement)
    graph = built.graph
    graph.maximum(built.source, built.sink)
    found = {(origin, target): graph.flow(edge) for edge, origin, target in built.pairs}
    for key, nodes in built.into.items():
        out = [(graph.flow(edge), node) for edge, node in built.out_of[key]]
        total = sum(tokens for tokens, _ in out)
        for edge, origin in nodes:
            for tokens, target in out:
                if total > NEGLIGIBLE:
                    found[origin, target] = graph.flow(edge) * tokens / total
    return tuple(Route(*pair, tokens) for pair, tokens in sorted(found.items()) if tokens > NEGLIGIBLE)
