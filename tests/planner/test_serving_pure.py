"""Placement of layers for serving: the flow is the greatest one, nothing exceeds a limit, the bound holds."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import networkx
import pytest
from corral.planner.work.balance import Machine
from corral.planner.work.pipeline import pipeline
from corral.planner.work.serving.anneal import Budget
from corral.planner.work.serving.bound import bound
from corral.planner.work.serving.chain import chain
from corral.planner.work.serving.cluster import (
    SINK,
    SOURCE,
    Batch,
    Cluster,
    Interval,
    Kind,
    Link,
    Model,
    Requirement,
    Route,
)
from corral.planner.work.serving.crowding import Wanted, least_crowded
from corral.planner.work.serving.flow import Network, flow, routes
from corral.planner.work.serving.latency import idle_seconds
from corral.planner.work.serving.parting import parting_routes
from corral.planner.work.serving.place import place, random_placement
from corral.planner.work.serving.serve import serve
from corral.planner.work.serving.simulate import Load, simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving_clusters import clusters, intervals, meshed, placements, published


def by_networkx(cluster: Cluster, placement: list[Interval]) -> float:
    """The flow from the definition alone."""
    graph: Any = networkx.DiGraph()
    graph.add_nodes_from([SOURCE, SINK])
    model, card = cluster.model, cluster.nic_bytes_per_second
    for node, (first, layers) in enumerate(placement):
        if layers:
            size = [
                model.token_bytes if edge else model.carried_bytes
                for edge in (first == 0, first + layers == model.layers)
            ]
            rate = min(cluster.kind_of(node).tokens_per_second[layers - 1], card / size[0], card / size[1])
            graph.add_edge(("in", node), ("out", node), capacity=rate)
    for link in cluster.links:
        a, b = link.origin, link.target
        if (a >= 0 and not placement[a].layers) or (b >= 0 and not placement[b].layers):
            continue
        end = 0 if a == SOURCE else placement[a].end
        takes = end == model.layers if b == SINK else placement[b].first <= end < placement[b].end
        if a == SOURCE:
            takes = placement[b].first == 0
        if takes:
            size = model.token_bytes if a == SOURCE or b == SINK else model.carried_bytes
            graph.add_edge(a if a < 0 else ("out", a), b if b < 0 else ("in", b), capacity=link.bytes_per_second / size)
    return float(networkx.maximum_flow_value(graph, SOURCE, SINK))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_flow_is_the_greatest_and_routes_carry_it(data: st.DataObject) -> None:
    cluster = data.draw(clusters())
    placement = data.draw(placements(cluster))
    network = Network(cluster)
    found = flow(network, placement)
    assert found == pytest.approx(by_networkx(cluster, placement))
    assert found <= bound(network) * (1 + 1e-9)
    ways = routes(network, placement)
    assert sum(way.tokens_per_second for way in ways if way.origin == SOURCE) == pytest.approx(found)
    rates = {(link.origin, link.target): link.bytes_per_second for link in cluster.links}
    for node, (_, layers) in enumerate(placement):
        into = sum(way.tokens_per_second for way in ways if way.target == node)
        out_of = sum(way.tokens_per_second for way in ways if way.origin == node)
        assert into == pytest.approx(out_of)
        assert into <= (network.rates[node][layers - 1] if layers else 0.0) + 1e-6
    for origin, target, tokens in ways:
        size = cluster.model.token_bytes if origin == SOURCE or target == SINK else cluster.model.carried_bytes
        assert tokens <= rates[origin, target] / size + 1e-6


@given(clusters(), st.integers(0, 3), st.sampled_from([None, 100.0]))
@settings(max_examples=12, deadline=None)
def test_a_placement_fits_and_is_the_same_for_a_seed(cluster: Cluster, seed: int, cache: float | None) -> None:
    requirement = Requirement(kv_cache_tokens=cache)
    placed = place(cluster, steps=150, seed=seed, requirement=requirement)
    assert placed == place(cluster, steps=150, seed=seed, requirement=requirement)
    for node, (first, layers) in enumerate(placed.placement):
        assert 0 <= layers <= cluster.kind_of(node).most_layers
        assert 0 <= first <= first + layers <= cluster.model.layers
    assert placed.flow == pytest.approx(by_networkx(cluster, list(placed.placement)))
    assert placed.flow <= placed.bound * (1 + 1e-9)
    if placed.flow and cache:
        for layer in range(cluster.model.layers):
            holders = [
                (node, layers)
                for node, (first, layers) in enumerate(placed.placement)
                if first <= layer < first + layers
            ]
            held = sum(cluster.kind_of(node).kv_cache_tokens[layers - 1] / layers for node, layers in holders)
            assert held >= cache - 1e-9


@given(clusters(), st.sampled_from([None, 1.0, 1e9]), st.integers(0, 2))
@settings(max_examples=12, deadline=None)
def test_nodes_that_hold_no_whole_model_carry_nothing(cluster: Cluster, cache: float | None, missing: int) -> None:
    room = sum(cluster.kind_of(node).most_layers for node in range(len(cluster.nodes)))
    larger = msgspec.structs.replace(cluster, model=Model(room + 1 + missing, 1.0, 1.0))
    assert bound(Network(larger)) == 0.0
    required = Requirement(kv_cache_tokens=cache, enough_flow=1.0)
    for start in (None, [Interval(0, 1)] * len(cluster.nodes)):
        placed = place(larger, steps=60, requirement=required, start=start)
        assert (placed.flow, placed.bound, placed.routes, placed.gap) == (0.0, 0.0, (), math.inf)
    assert serve(larger, Load([(10, 5)], warm_seconds=0.0, seconds=1.0), steps=60, requirement=required) == []
    # Enough layers, but more KV cache than there is.
    full = place(cluster, steps=60, requirement=Requirement(kv_cache_tokens=1e9))
    assert (full.flow, full.routes) == (0.0, ())
    assert full.bound == 0.0 or full.bound > 1e-6


def test_a_small_cluster_is_placed_as_well_as_by_trying_all() -> None:
    kinds = (Kind((9.0, 5.0, 3.0)), Kind((6.0, 2.0)))
    cluster = meshed(kinds, (0, 0, 1, 1), 4)
    network = Network(cluster)
    choices = [
        [Interval(first, layers) for layers in range(1, len(rates) + 1) for first in range(5 - layers)]
        for rates in network.rates
    ]
    best = max(flow(network, placement) for placement in product(*choices))
    assert place(cluster, steps=20_000).flow == pytest.approx(best)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 30),
)
@settings(max_examples=30, deadline=None)
def test_a_chain_is_what_pipeline_finds(devices: list[tuple[int, int]], layers: int) -> None:
    # At a speed of s layers a second, n layers pass s / n tokens a second.
    kinds = tuple(Kind(tuple(speed / held for held in range(1, most + 1))) for speed, most in devices)
    network = Network(meshed(kinds, tuple(range(len(kinds))), layers))
    placement = chain(network, range(len(kinds)))
    staged = pipeline([1.0] * layers, [0] * layers, [Machine(float(speed), 0, most) for speed, most in devices])
    if sum(most for _, most in devices) < layers:
        assert not any(interval.layers for interval in placement)
    else:
        assert flow(network, placement) == pytest.approx(1 / staged.slowest)


def test_a_limit_on_latency_leaves_out_slow_devices() -> None:
    fast = Kind((100.0, 60.0, 40.0, 20.0), (), Batch((1.0,), (0.01,)), Batch((1.0,), (0.001,)))
    slow = Kind((100.0, 60.0, 40.0, 20.0), (), Batch((1.0,), (0.5,)), Batch((1.0,), (0.1,)))
    cluster = meshed((fast, slow), (0, 0, 1, 1), 4)
    free = place(cluster, steps=4000)
    assert idle_seconds(cluster, free.placement, free.routes, None) > 0.1
    limited = place(cluster, steps=4000, requirement=Requirement(token_seconds=0.01))
    assert 0 < limited.flow < free.flow
    assert idle_seconds(cluster, limited.placement, limited.routes, None) <= 0.01
    assert place(cluster, steps=4000, requirement=Requirement(token_seconds=0.001)).flow == 0


def test_one_request_takes_as_long_as_computed_by_hand() -> None:
    batch = Batch((1.0, 101.0), (0.010, 0.110))
    kind = Kind((50.0, 25.0), (1e6, 1e6), batch, batch)
    links = (Link(SOURCE, 0, 1e9, 0.001), Link(0, 1, 1e3, 0.002), Link(1, SINK, 1e9, 0.003))
    cluster = Cluster(Model(3, 1.0, 1.0), (kind,), (0, 0), links, 1e9)
    placement = (Interval(0, 2), Interval(1, 2))
    ways = routes(Network(cluster), placement)
    # 0.1 s a layer for the prompt of 91 tokens and 10 ms for one token, on the second node the last layer alone.
    prompt, token = 0.001 + 0.2 + 91 * 2 / 1e3 + 0.002 + 0.1 + 0.003, 0.001 + 0.02 + 2 / 1e3 + 0.002 + 0.01 + 0.003
    assert idle_seconds(cluster, placement, ways, 91) == pytest.approx(prompt)
    assert idle_seconds(cluster, placement, ways, None) == pytest.approx(token)
    load = Load([(91, 5)], concurrency=1, start_gap_seconds=0.0, warm_seconds=0.0, seconds=100.0)
    served = simulate(cluster, placement, ways, load)
    assert served.first_token_seconds == pytest.approx(prompt)
    assert served.token_seconds == pytest.approx(token)
    assert served.decode_tokens_per_second == pytest.approx(5 / (prompt + 5 * token), rel=0.02)
    assert served.concurrency == pytest.approx(1.0)


def test_requests_travel_together_or_one_after_the_other() -> None:
    # 10 ms for a layer with any batch, and 1 ms for a token over the link between the nodes.
    batch = Batch((1.0, 100.0), (0.010, 0.010))
    kind = Kind((100.0, 50.0), (1e6, 1e6), batch, batch)
    links = (Link(SOURCE, 0, 1e9), Link(0, 1, 2e3), Link(1, SINK, 1e9))
    cluster = Cluster(Model(2, 1.0, 1.0), (kind,), (0, 0), links, 1e9)
    placement = (Interval(0, 1), Interval(1, 1))
    load = Load([(1, 1000)], concurrency=10, start_gap_seconds=0.0, warm_seconds=5.0, seconds=10.0)

    def output(together: float) -> float:
        asked = msgspec.structs.replace(load, together_seconds=together)
        return simulate(cluster, placement, routes(Network(cluster), placement), asked).decode_tokens_per_second

    # One after the other, an idle node begins with the first alone, and batches get smaller.
    assert output(0.02) > 1.2 * output(0.0)


def test_ways_by_delay_prefer_the_faster_node() -> None:
    quick, slow = (Batch((1.0, 64.0), (seconds, 64 * seconds)) for seconds in (0.002, 0.010))
    kinds = tuple(Kind((100.0, 50.0), (1e6, 1e6), batch, batch) for batch in (quick, slow))
    cluster = meshed(kinds, (0, 0, 1), 2)
    placement = (Interval(0, 1), Interval(1, 1), Interval(1, 1))
    alike = [Route(a, b, 20.0) for a, b in ((SOURCE, 0), (0, 1), (0, 2), (1, SINK), (2, SINK))]
    load = Load([(20, 30)], concurrency=12, warm_seconds=5.0, seconds=30.0)
    by_weights = simulate(cluster, placement, alike, load)
    by_delay = simulate(cluster, placement, alike, msgspec.structs.replace(load, by_delay=True))
    assert by_delay.decode_tokens_per_second > 1.2 * by_weights.decode_tokens_per_second


def test_longer_strides_serve_about_the_same() -> None:
    batch = Batch((1.0, 64.0), (0.010, 0.020))
    kind = Kind((400.0, 200.0, 130.0), (30_000.0, 16_000.0, 9_000.0), batch, batch)
    cluster = meshed((kind,), (0, 0), 6)
    placement = (Interval(0, 3), Interval(3, 3))
    ways = routes(Network(cluster), placement)
    load = Load([(20, 80), (20, 120)], concurrency=8, warm_seconds=20.0, seconds=60.0, pause_seconds=1e-4)
    one = simulate(cluster, placement, ways, load)
    four = simulate(cluster, placement, ways, msgspec.structs.replace(load, stride=4))
    assert four.decode_tokens_per_second == pytest.approx(one.decode_tokens_per_second, rel=0.15)
    assert four.concurrency == pytest.approx(one.concurrency, rel=0.05)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_traffic_that_parts_passes_all_layers_and_uses_like_nodes_alike(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 7))
    held = data.draw(st.lists(st.tuples(st.integers(0, layers - 1), st.integers(0, layers)), min_size=1, max_size=8))
    placement = [Interval(first, min(count, layers - first)) for first, count in held]
    twice = [*placement, *placement]
    seconds = data.draw(st.lists(st.sampled_from([0.1, 0.5]), min_size=len(held), max_size=len(held)))
    ways = parting_routes(twice, layers, 10.0, [100.0] * len(twice), [*seconds, *seconds])
    kind = Kind((100.0,) * layers)
    assert bool(ways) == (flow(Network(meshed((kind,), (0,) * len(twice), layers)), twice) > 0)
    into, out, computed = [0.0] * len(twice), [0.0] * len(twice), [0.0] * len(twice)
    for origin, target, tokens in ways:
        assert tokens > 0
        end = 0 if origin == SOURCE else twice[origin].end
        assert end == layers if target == SINK else twice[target].first <= end < twice[target].end
        if target != SINK:
            into[target] += tokens
            computed[target] += tokens * (twice[target].end - end)
        if origin != SOURCE:
            out[origin] += tokens
    if ways:
        assert sum(way.tokens_per_second for way in ways if way.origin == SOURCE) == pytest.approx(10.0)
    for node in range(len(held)):
        assert out[node] == pytest.approx(into[node], abs=1e-3)
        assert computed[node] == pytest.approx(computed[node + len(held)], abs=layers)


def test_nodes_share_layers_where_flow_and_cache_allow_it() -> None:
    prompt, decode = Batch((1.0, 100.0), (0.001, 0.1)), Batch((1.0, 64.0), (0.01, 0.02))
    kind = Kind((90.0, 50.0, 30.0, 20.0), (4000.0, 4000.0, 3600.0, 3200.0), prompt, decode)
    cluster = meshed((kind,), (0,) * 4, 4)
    network = Network(cluster)

    def found(flow_wanted: float, cache: float) -> list[Interval]:
        random = Random(3)
        start = random_placement(network, 40.0, random)
        wanted = Wanted(flow_wanted, cache, 100.0)
        return sorted(least_crowded(cluster, network, wanted, start, Budget(None, 6000), random) or ())

    # All hold everything; with more flow and cache two share each half; with still more there is none.
    assert found(40.0, 3000.0) == [Interval(0, 4)] * 4
    assert found(90.0, 3900.0) == [Interval(0, 2)] * 2 + [Interval(2, 2)] * 2
    assert found(40.0, 5000.0) == []


def test_serving_keeps_within_the_cache_and_prefers_more_output() -> None:
    batch = Batch((1.0, 64.0), (0.010, 0.020))
    kind = Kind((400.0, 200.0, 130.0), (30_000.0, 16_000.0, 3_000.0), batch, batch)
    cluster = meshed((kind,), (0, 0, 0, 0, 0), 6)
    load = Load([(200, 50), (100, 70)], warm_seconds=5.0, seconds=20.0)
    served = serve(cluster, load, steps=9000)
    outputs = [one.simulated.decode_tokens_per_second for one in served]
    assert outputs == sorted(outputs, reverse=True)
    assert outputs[0] > 0
    for placed, simulated in served:
        # No layer holds more requests than its cache, each with a prompt and the mean output of 60 tokens.
        held = min(
            sum(
                kind.kv_cache_tokens[layers - 1] / layers
                for first, layers in placed.placement
                if first <= layer < first + layers
            )
            for layer in range(6)
        )
        assert simulated.concurrency <= held / (100 + 60)


@pytest.mark.parametrize("name", ["single24", "sites24"])
def test_published_placements_carry_what_the_evaluator_says(shared_data: Path, name: str) -> None:
    folder = shared_data / "inference"
    if not folder.is_dir() or importlib.util.find_spec("scipy") is None:
        pytest.skip("the evaluator or scipy is missing")
    spec = importlib.util.spec_from_file_location("evaluator", folder / "flow.py")
    assert spec
    assert spec.loader
    evaluator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluator)
    raw = json.loads((folder / f"{name}.json").read_text())
    cluster = published(raw)
    network = Network(cluster)
    for method in ("helix", "swarm", "petals"):
        placement = intervals(folder / f"{name}_{method}.json")
        # The evaluator cuts each capacity to whole tokens.
        assert flow(network, placement) == pytest.approx(evaluator.flow(raw, placement), abs=len(placement))
    placed = place(cluster, steps=15_000)
    assert evaluator.flow(raw, placed.placement) == pytest.approx(placed.flow, abs=len(cluster.nodes))
