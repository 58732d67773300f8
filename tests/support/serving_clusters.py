"""Clusters that serve a model: random ones, and the published ones in the shared data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corral.planner.work.serving.cluster import SINK, SOURCE, Cluster, Interval, Kind, Link, Model
from hypothesis import strategies as st


def published(raw: Mapping[str, Any]) -> Cluster:
    """Read a cluster of the shared data: links are for both directions where only one is listed."""
    names = list(raw["machines"])
    ends = {"source": SOURCE, "sink": SINK} | {str(node): node for node in range(len(raw["nodes"]))}
    links = {(ends[a], ends[b]): (rate, ms / 1000) for a, b, rate, ms in raw["links"]}
    both = {(b, a): link for (a, b), link in links.items() if a >= 0 and b >= 0} | links
    return Cluster(
        model=Model(raw["model"]["layers"], raw["model"]["token_bytes"], raw["model"]["activation_bytes"]),
        kinds=tuple(
            Kind(tuple(kind["tokens_per_second_by_layers"]), tuple(kind["kv_cache_tokens_by_layers"]))
            for kind in raw["machines"].values()
        ),
        nodes=tuple(names.index(name) for name in raw["nodes"]),
        links=tuple(Link(a, b, *link) for (a, b), link in both.items()),
        nic_bytes_per_second=raw["nic_bytes_per_second"],
    )


def intervals(path: Path) -> list[Interval]:
    return [Interval(*interval) for interval in json.loads(path.read_text())]


def meshed(kinds: tuple[Kind, ...], nodes: tuple[int, ...], layers: int, rate: float = 1e12) -> Cluster:
    """A cluster in which all nodes have links of one rate with each other, the source and the sink."""
    ends = [*range(len(nodes))]
    links = [Link(SOURCE, node, rate) for node in ends] + [Link(node, SINK, rate) for node in ends]
    links += [Link(a, b, rate) for a in ends for b in ends if a != b]
    return Cluster(Model(layers, 1.0, 1.0), kinds, nodes, tuple(links), 1e15)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Up to 7 nodes of up to 3 kinds, some links slow and some missing."""
    layers = draw(st.integers(1, 7))
    rates = st.lists(st.integers(1, 60).map(float), min_size=1, max_size=5)
    kinds = tuple(
        Kind(tuple(sorted(draw(rates), reverse=True)), (90.0, 80.0, 70.0, 60.0, 50.0))
        for _ in range(draw(st.integers(1, 3)))
    )
    nodes = tuple(draw(st.lists(st.integers(0, len(kinds) - 1), min_size=1, max_size=7)))
    speed = st.sampled_from([0.0, 6.0, 20.0, 900.0, 900.0, 900.0])
    ends = range(len(nodes))
    pairs = [(SOURCE, node) for node in ends] + [(node, SINK) for node in ends]
    pairs += [(a, b) for a in ends for b in ends if a != b]
    links = tuple(Link(a, b, rate) for a, b in pairs if (rate := draw(speed)))
    return Cluster(Model(layers, 1.0, 1.0), kinds, nodes, links, draw(st.sampled_from([40.0, 1e9])))


@st.composite
def placements(draw: st.DrawFn, cluster: Cluster) -> list[Interval]:
    """Any placement, often with gaps."""
    placed: list[Interval] = []
    for node in range(len(cluster.nodes)):
        layers = draw(st.integers(0, min(cluster.model.layers, cluster.kind_of(node).most_layers)))
        placed.append(Interval(draw(st.integers(0, cluster.model.layers - layers)), layers))
    return placed
