"""How many tokens a second does a placement of layers on unlike machines carry, and how many does it serve?

The data are two clusters of 24 machines with what each machine does with n layers of Llama-2 70B, and placements that
were published for them (Helix, ASPLOS 2025; its MILP took 10 to 50 minutes on 14 to 20 threads). Flow is checked with
the independent evaluator beside the data where scipy is installed. Time is processor time of one core.

With --profiles FOLDER placements are simulated too. It is the folder `simulator/model_manager/llama2_70b` of Helix's
artifact, with the seconds of a layer by tokens of a batch for each machine; its simulator gave the published rates. The
load is as there: requests one after another as the KV cache allows, 60 s of warm-up, 600 s measured.

    python bench/serving.py [--data FOLDER] [--cluster FILE …] [--profiles FOLDER] [--seeds 3] [--only flow|output]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import networkx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from corral.planner.work.serving.cluster import SINK, SOURCE, Batch, Cluster, Interval, Placement, Route
from corral.planner.work.serving.flow import Network, flow, routes
from corral.planner.work.serving.place import place
from corral.planner.work.serving.serve import serve
from corral.planner.work.serving.simulate import Load, Simulated, simulate
from support.serving_clusters import intervals, published

DATA = Path(__file__).parents[2] / "shared" / "data" / "inference"
SECONDS = {"single24": 2.0}
"""Processor time for a search, 5 s where none is given."""
METHODS = ("helix", "swarm", "petals")
PUBLISHED = {
    ("single24", "helix"): 252.1,
    ("single24", "swarm"): 124.7,
    ("sites24", "helix"): 98.0,
    ("sites24", "swarm"): 51.9,
}
"""Output tokens a second in the artifact's simulator."""
MOST = {"A100": (3, 300), "L4": (1, 280), "T4": (1, 300)}
"""Prompts and output tokens in an iteration at most: the artifact's settings."""
COPY_BYTES_PER_SECOND = (4e9, 5e9)
"""Rates at which the artifact charges for concatenating and for copying activations."""
CANDIDATES = 9
"""Placements with more KV cache that are tried."""
SEARCH_SECONDS = 1.5
"""Processor time of the search for each."""
SWARM_REQUESTS = 180
"""Requests in progress with SWARM's scheduler: the artifact's setting."""
_PAIRS = """
1104,396 1127,426 1114,414 1083,396 1313,173 888,395 13,130 874,89 1065,395 1157,426 1077,390 1149,411 996,389
990,394 197,183 197,217 1378,407 1214,421 1016,375 1186,398 1100,426 218,217 1232,419 975,416 209,217 181,85
1029,388 888,418 1113,375 1035,520 1009,425 869,450 1183,431 972,395 1097,396 206,183 181,208 1316,200 908,456
1094,422 996,422 420,89 1112,385 1133,396 890,403 833,36 1093,426 206,211 898,454 1312,180 1129,396 375,67
862,425 167,179 914,414 209,217 982,594 200,161 1313,156 999,416 389,60 380,60 396,93 399,80 1315,200 1697,47
1058,431 408,105 1275,54 1033,507 1103,391 412,95 392,84 1068,384 383,60 392,89 871,40 1073,380 409,105 418,84
397,137 372,57 1086,393 397,108 385,88 998,388 408,55 405,105 401,106 1131,397 438,93 396,123 400,108 422,93
429,95 1842,101 397,91 409,94 403,94 412,123 426,103 415,121 1318,183 389,76 380,53 200,153 374,86 1031,361
400,102 408,108 398,124 398,135 413,101 395,107 1969,111 946,80 181,130 390,147 414,164 1895,113
"""
LENGTHS = [(int(prompt), int(output)) for prompt, output in (pair.split(",") for pair in _PAIRS.split())]
"""Prompt and output lengths: 60 requests each of two minutes of the conversations in the Azure LLM inference trace of
2023 (CC BY 4.0), without prompts beyond 2,048 tokens. Their means are 759 and 239; of all that the artifact draws from,
763 and 232."""


def profiled(cluster: Cluster, names: Sequence[str], folder: Path) -> Cluster:
    """Add the times of iterations."""
    copying = sum(cluster.model.activation_bytes / rate for rate in COPY_BYTES_PER_SECOND)

    def batch(name: str, phase: str, most: int) -> Batch:
        with (folder / name.lower() / f"{phase}_bs2time.csv").open() as file:
            rows = [(float(tokens), float(ms) / 1000) for tokens, ms in csv.reader(file) if float(tokens) > 0]
        return Batch(tuple(tokens for tokens, _ in rows), tuple(seconds for _, seconds in rows), most)

    kinds = tuple(
        msgspec.structs.replace(
            kind,
            prompt=batch(name, "prompt", MOST[name][0]),
            decode=batch(name, "decode", MOST[name][1]),
            token_seconds=copying,
        )
        for kind, name in zip(cluster.kinds, names, strict=True)
    )
    return msgspec.structs.replace(cluster, kinds=kinds)


def all_ways(cluster: Cluster, placement: Placement) -> list[Route]:
    """All pairs of nodes that may hand on, alike."""
    found: list[Route] = []
    for link in cluster.links:
        a, b = link.origin, link.target
        end = 0 if a == SOURCE else placement[a].end
        if (a == SOURCE or placement[a].layers) and (b == SINK or placement[b].layers):
            if b == SINK:
                takes = end == cluster.model.layers
            else:
                takes = placement[b].first == 0 if a == SOURCE else placement[b].first <= end < placement[b].end
            if takes:
                found.append(Route(a, b, 1.0))
    return found


def shuffled(cluster: Cluster, placement: Placement, seed: int) -> tuple[Cluster, list[Interval]]:
    """The same with the nodes in another order, in which another of the greatest flows is found."""
    order = random.Random(seed).sample(range(len(cluster.nodes)), len(cluster.nodes))
    number = {node: at for at, node in enumerate(order)} | {SOURCE: SOURCE, SINK: SINK}
    links = tuple(
        msgspec.structs.replace(link, origin=number[link.origin], target=number[link.target]) for link in cluster.links
    )
    other = msgspec.structs.replace(cluster, nodes=tuple(cluster.nodes[node] for node in order), links=links)
    return other, [placement[node] for node in order]


def networkx_routes(cluster: Cluster, placement: Placement) -> list[Route]:
    """The greatest flow that networkx finds, as the artifact asks it; it depends on PYTHONHASHSEED."""
    graph: Any = networkx.DiGraph()
    carried = cluster.model.carried_bytes
    card = cluster.nic_bytes_per_second / carried
    for node, (_, layers) in enumerate(placement):
        if layers:
            graph.add_edge(f"{node}_in", f"{node}_start", capacity=card)
            graph.add_edge(f"{node}_start", f"{node}_end", capacity=cluster.kind_of(node).tokens_per_second[layers - 1])
            graph.add_edge(f"{node}_end", f"{node}_out", capacity=card)
    rates = {(link.origin, link.target): link.bytes_per_second for link in cluster.links}
    for a, b, _ in all_ways(cluster, placement):
        size = cluster.model.token_bytes if a == SOURCE or b == SINK else carried
        graph.add_edge(
            "source" if a == SOURCE else f"{a}_out", "sink" if b == SINK else f"{b}_in", capacity=rates[a, b] / size
        )
    _, flows = networkx.maximum_flow(graph, "source", "sink")

    def passed(a: int, b: int) -> float:
        return flows["source" if a == SOURCE else f"{a}_out"]["sink" if b == SINK else f"{b}_in"]

    return [Route(a, b, passed(a, b)) for a, b, _ in all_ways(cluster, placement) if passed(a, b) > 1e-9]


def evaluator(folder: Path) -> Any:
    """The independent evaluator, None without scipy."""
    if importlib.util.find_spec("scipy") is None:
        return None
    spec = importlib.util.spec_from_file_location("evaluator", folder / "flow.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare_flows(name: str, raw: Mapping[str, Any], folder: Path, seeds: int, check: Any) -> None:
    cluster = published(raw)
    network = Network(cluster)
    for method in METHODS:
        if (file := folder / f"{name}_{method}.json").is_file():
            print(f"{name} {method}: flow {flow(network, intervals(file)):,.0f}")
    for seed in range(seeds):
        start = time.process_time()
        placed = place(cluster, seconds=SECONDS.get(name, 5.0), seed=seed)
        took = time.process_time() - start
        checked = "" if check is None else f" (evaluator {check.flow(raw, placed.placement):,})"
        print(
            f"{name} ours, seed {seed}: flow {placed.flow:,.0f}{checked}, bound {placed.bound:,.0f}, "
            f"gap {100 * placed.gap:.1f} %, {took:.2f} s of processor time, {placed.steps:,} steps",
            flush=True,
        )


def compare_output(name: str, raw: Mapping[str, Any], folder: Path, profiles: Path) -> None:
    cluster = profiled(published(raw), list(raw["machines"]), profiles)
    load = Load(LENGTHS)

    def row(what: str, result: Simulated, value: float | None = None) -> None:
        output = result.decode_tokens_per_second
        beside = "" if value is None else f" (artifact {value}, {100 * (output / value - 1):+.0f} %)"
        print(
            f"{name} {what}: output {output:.1f} tokens/s{beside}, prompts "
            f"{result.prompt_tokens_per_second:.0f}, first token {result.first_token_seconds:.2f} s, "
            f"next {result.token_seconds:.2f} s, {result.concurrency:.0f} requests",
            flush=True,
        )

    helix = intervals(folder / f"{name}_helix.json")
    for order in range(3):
        other, placement = shuffled(cluster, helix, order)
        result = simulate(other, placement, routes(Network(other), placement), load)
        row(f"helix, greatest flow {order}", result, PUBLISHED[name, "helix"])
    result = simulate(cluster, helix, networkx_routes(cluster, helix), load)
    row("helix, networkx's greatest flow", result, PUBLISHED[name, "helix"])
    greatest = place(cluster, seconds=SECONDS.get(name, 5.0))
    result = simulate(cluster, greatest.placement, greatest.routes, load)
    row(f"ours, greatest flow {greatest.flow:,.0f}", result)
    swarm = intervals(folder / f"{name}_swarm.json")
    by_delay = msgspec.structs.replace(load, concurrency=SWARM_REQUESTS, by_delay=True, cache_share=1e9)
    row("swarm, by delay", simulate(cluster, swarm, all_ways(cluster, swarm), by_delay), PUBLISHED[name, "swarm"])
    weighted = msgspec.structs.replace(by_delay, by_delay=False)
    result = simulate(cluster, swarm, routes(Network(cluster), swarm), weighted)
    row("swarm, weights from its greatest flow", result, PUBLISHED[name, "swarm"])
    start = time.process_time()
    served = serve(cluster, load, seconds=(1 + CANDIDATES) * SEARCH_SECONDS, candidates=CANDIDATES)
    took = time.process_time() - start
    for placed, result in served:
        row(f"ours, flow {placed.flow:,.0f}", result)
    print(f"{name}: searches and simulations took {took:.1f} s of processor time")
    other, placement = shuffled(cluster, served[0].placed.placement, 1)
    row("ours, best, another greatest flow", simulate(other, placement, routes(Network(other), placement), load))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cluster", type=Path, nargs="*", default=[])
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("flow", "output"))
    arguments = parser.parse_args()
    check = evaluator(arguments.data)
    files = [arguments.data / "single24.json", arguments.data / "sites24.json"]
    if arguments.only != "output":
        for file in [*files, *arguments.cluster]:
            compare_flows(file.stem, json.loads(file.read_text()), file.parent, arguments.seeds, check)
    if arguments.profiles and arguments.only != "flow":
        for file in files:
            compare_output(file.stem, json.loads(file.read_text()), file.parent, arguments.profiles)


if __name__ == "__main__":
    main()
