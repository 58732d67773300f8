"""Units as the nodes of a cluster for the placement with the greatest flow: their rates, caches and links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ....schemas.models.sizes import activation_bytes
from ..serving.cluster import SINK, SOURCE, Cluster, Interval, Kind, Link, Model
from .costs import Costs, Unit

TOKEN_BYTES: Final = 4.0
"""Bytes of a token's number between the clients and the units."""


def ends(costs: Costs, layers: int) -> int:
    """Bytes that a unit with some layers holds at most besides them: embedding, head, or both with all layers."""
    first, last = costs.sizes.embedding, costs.sizes.last
    if layers < costs.model.layers:
        return max(first, last)
    return first + (last if costs.sizes.head else costs.sizes.other)


def most_layers(costs: Costs, unit: Unit) -> int:
    """Most layers that a unit holds, any of them, with the KV cache of one sequence."""
    layer = max(costs.sizes.layers) / unit.size
    kept = costs.kv_layer_bytes / costs.work.sequences / costs.kv_parts(unit.size)
    room = unit.memory - costs.working
    most = costs.model.layers
    if most * (layer + kept) + ends(costs, most) / unit.size <= room:
        return most
    return max(0, min(most - 1, int((room - ends(costs, 1) / unit.size) / (layer + kept))))


def _layer_seconds(costs: Costs, unit: Unit, batch: float) -> list[tuple[float, int]] | None:
    """Times of one layer with numbers of such layers, the fastest first; None if a rate is unknown.

    The output head is left out, which the last unit alone computes.
    """
    found: list[tuple[float, int]] = []
    for start, end in costs.runs:
        # The last layer would come with the head.
        seconds = costs.decode_seconds(unit, start, min(start + 1, costs.model.layers), batch)
        if seconds is None:
            return None
        head = costs.head_seconds(unit) if start + 1 == costs.model.layers else 0.0
        found.append((seconds - head, end - start))
    return sorted(found)


def fastest_layer_seconds(costs: Costs, unit: Unit, batch: float) -> float | None:
    """Time of the fastest layer for a batch, without output head; None if a rate is unknown."""
    found = _layer_seconds(costs, unit, batch)
    return None if found is None else found[0][0]


def most_sequences(costs: Costs, unit: Unit) -> int:
    """Most sequences whose KV cache a unit holds, with the smallest layer alone; no more than are asked."""
    kept = costs.kv_layer_bytes / costs.work.sequences / costs.kv_parts(unit.size)
    room = unit.memory - costs.working - min(costs.sizes.layers) / unit.size
    return max(1, min(costs.work.sequences, int(room / kept) if kept else costs.work.sequences))


def kind_of(costs: Costs, unit: Unit, batch: float, *, at_best: bool = False) -> Kind | None:
    """A unit with `batch` sequences in each iteration; None if it holds no layer, or a rate is unknown.

    Args:
        costs: of the model.
        unit: the unit.
        batch: sequences of an iteration.
        at_best: true to take the fastest layers, for a bound; else all are as slow as the slowest.
    """
    times = _layer_seconds(costs, unit, batch)
    most = most_layers(costs, unit)
    if times is None or not most:
        return None
    each = costs.kv_layer_bytes / (costs.work.sequences * costs.work.context_tokens) / costs.kv_parts(unit.size)
    by_layer = [seconds for seconds, count in times for _ in range(count)] if at_best else [times[-1][0]] * most
    rates: list[float] = []
    caches: list[float] = []
    total = 0.0
    for layers in range(1, most + 1):
        total += by_layer[layers - 1]
        rates.append(batch / total)
        held = layers * max(costs.sizes.layers) + ends(costs, layers)
        caches.append(max(0.0, (unit.memory - costs.working - held / unit.size) / each))
    return Kind(tokens_per_second=tuple(rates), kv_cache_tokens=tuple(caches))


def cluster_of(
    costs: Costs, units: Sequence[Unit], batch: float, *, at_best: bool = False
) -> tuple[Cluster, list[Unit]] | None:
    """A cluster of the units that can hold a layer, and these units; None if a rate is unknown or none can.

    Args:
        costs: of the model.
        units: the units.
        batch: sequences in each iteration of a unit.
        at_best: see `kind_of`.
    """
    kinds: list[Kind] = []
    known: dict[tuple[object, ...], int] = {}
    nodes: list[int] = []
    kept: list[Unit] = []
    for unit in units:
        key = (unit.memory, unit.rates, unit.size)
        if key not in known:
            if not most_layers(costs, unit):
                continue
            kind = kind_of(costs, unit, batch, at_best=at_best)
            if kind is None:
                return None
            known[key] = len(kinds)
            kinds.append(kind)
        nodes.append(known[key])
        kept.append(unit)
    return (_cluster(costs, kept, kinds, nodes), kept) if kept else None


def placed_cluster(
    costs: Costs, units: Sequence[Unit], placement: Sequence[Interval], batches: Sequence[float]
) -> Cluster | None:
    """A cluster in which each unit has the exact rate of its layers, by its batch; None if a rate is unknown."""
    kinds: list[Kind] = []
    for unit, interval, batch in zip(units, placement, batches, strict=True):
        seconds = costs.decode_seconds(unit, interval.first, interval.end, batch)
        if seconds is None:
            return None
        kinds.append(Kind(tokens_per_second=(batch / seconds,) * interval.layers))
    return cluster_with(costs, units, kinds)


def cluster_with(costs: Costs, units: Sequence[Unit], kinds: Sequence[Kind]) -> Cluster:
    """A cluster in which each unit has a kind of its own."""
    return _cluster(costs, units, kinds, range(len(units)))


def _cluster(costs: Costs, units: Sequence[Unit], kinds: Sequence[Kind], nodes: Sequence[int]) -> Cluster:
    links = tuple(_links(costs, units))
    return Cluster(_model(costs), tuple(kinds), tuple(nodes), links, _fastest(costs, units))


def _model(costs: Costs) -> Model:
    return Model(layers=costs.model.layers, token_bytes=TOKEN_BYTES, activation_bytes=activation_bytes(costs.model))


def _fastest(costs: Costs, units: Sequence[Unit]) -> float:
    """Rate that no link exceeds: a device has no card of its own that limits the sum of its links."""
    links = costs.work.links
    most = max(links.host_bytes_per_second, links.network_bytes_per_second)
    return len(units) * max(most, *(unit.rates.link_bytes_per_second for unit in units))


def _links(costs: Costs, units: Sequence[Unit]) -> list[Link]:
    links = costs.work.links
    found: list[Link] = []
    for at, unit in enumerate(units):
        found.append(Link(SOURCE, at, links.network_bytes_per_second, links.network_latency_seconds))
        found.append(Link(at, SINK, links.network_bytes_per_second, links.network_latency_seconds))
        for to, other in enumerate(units):
            if to == at:
                continue
            if unit.host == other.host:
                both = min(unit.rates.link_bytes_per_second, other.rates.link_bytes_per_second)
                found.append(Link(at, to, both or links.host_bytes_per_second, links.host_latency_seconds))
            else:
                found.append(Link(at, to, links.network_bytes_per_second, links.network_latency_seconds))
    return found
