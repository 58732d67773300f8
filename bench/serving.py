"""How many tokens a second does a placement of layers on unlike machines carry, and how many does it serve?

The data are two clusters of 24 machines with what each machine does with n layers of Llama-2 70B, and placements that
were published for them (Helix, ASPLOS 2025; its MILP took 10 to 50 minutes on 14 to 20 threads). Flow is checked with
the independent evaluator beside the data where scipy is installed. Time is processor time of one core.

With --profiles FOLDER placements are simulated too. It is the folder `simulator/model_manager/llama2_70b` of Helix's
artifact, with the seconds of a layer by tokens of a batch for each machine; its simulator gave the published rates. The
load is as there: requests one after another as the KV cache allows, 60 s of warm-up, 600 s measured. Each figure is a
mean over seeds of the lengths that are drawn.

    python bench/serving.py [--data FOLDER] [--cluster FILE …] [--profiles FOLDER] [--seeds 3] [--only flow|output]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import statistics
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
from corral.planner.work.serving.simulate import Load, simulate
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
"""Processor time of the search for each, where it has no number of steps."""
SEARCH_STEPS = {"single24": 250_000}
"""Steps of the search for each, so that each machine finds the same."""
SWARM_REQUESTS = 180
"""Requests in progress with SWARM's scheduler: the artifact's setting."""
SWARM_FIRST_DELAY_SECONDS = 0.05
"""Delay that SWARM's scheduler assumes for each way at first: the artifact's setting."""
_PAIRS = """
427,93 1207,400 1001,407 50,168 1381,40 396,93 1040,396 394,88 378,48 1307,501 974,402 1129,467 1040,388 1159,405
946,398 967,419 1109,383 1171,526 1670,65 1039,399 1184,405 421,99 1046,398 1034,428 373,93 890,115 377,51 426,126
1508,76 1059,410 1196,410 1072,419 1020,394 26,150 1045,378 1116,446 1084,418 1338,195 1137,509 1130,468 1053,409
407,136 126,178 1057,442 406,143 129,177 1093,396 206,217 1055,411 1316,161 206,167 1030,405 1103,423 393,75 957,113
1054,424 1301,401 1316,182 389,133 392,105 403,69 1017,570 209,217 373,58 1020,411 120,14 1001,396 1069,388 403,111
209,217 200,167 396,89 1059,401 493,107 1316,216 1314,210 1075,375 320,18 181,205 1064,411 376,74 181,201 408,89
397,98 391,161 1014,394 385,97 415,113 412,101 1111,459 407,113 380,73 382,99 375,52 206,158 410,96 1036,451 375,41
385,102 374,79 181,142 428,95 376,42 1315,160 374,87 382,78 334,18 381,96 371,87 200,183 374,63 873,382 404,144
200,179 376,52 382,87 913,447 1066,403 392,65 396,162 464,104 181,169 1076,405 42,168 396,92 396,99 406,117 1129,40
956,513 1772,75 413,90 1013,408 374,54 1020,399 1314,130 401,94 886,138 400,99 181,97 399,101 1802,87 395,117 411,100
400,84 1316,158 181,309 958,395 1901,101 426,111 421,99 402,130 16,190 1186,45 1262,59 1314,202 419,105 385,109
412,104 405,119 946,399 1153,388 1174,145 1121,114 1342,73 1966,118 417,90 989,411 437,91 165,217 618,145 1416,377
454,80 1121,484 134,81 804,70 216,111 401,88 1087,393 1122,394 1369,109 1315,200 399,92 417,133 1245,50 1094,417
1177,115 207,59 419,111 395,83 965,110 428,94 1152,382 932,55 817,135 556,47 201,68 459,331 618,117 445,97 1179,81
120,12 1064,419 1075,414 1243,423 399,107 1123,411 200,183 1193,394 1114,396 1187,992 1351,202 1121,388 398,97 844,110
1212,401 402,83 1045,958 1210,380 416,125 1316,176 1036,419 989,414 1047,537 399,104 1056,397 203,162 206,158 1212,409
203,161 203,183 996,520 200,152 1103,442 1051,388 48,202 1074,391 953,405 1076,394 1184,414 1037,409
"""
LENGTHS = [(int(prompt), int(output)) for prompt, output in (pair.split(",") for pair in _PAIRS.split())]
"""Prompt and output lengths: 40 requests each from six places, 120,000 bytes apart, of the conversations in the Azure
LLM inference trace of 2023 (CC BY 4.0), without prompts beyond 2,048 tokens. Their means are 742 and 226; of all that
the artifact draws from, 763 and 232."""


def profiled(cluster: Cluster, names: Sequence[str], folder: Path) -> Cluster:
    """Add the times of iterations."""
    copying = sum(cluster.model.activation_bytes / rate for rate in COPY_BYTES_PER_SECOND)

    def batch(name: str, phase: str, most: int) -> Batch:
        with (folder / name.lower() / f"{phase}_bs2time.csv").open() as file:
            rows = [(float(tokens), float(ms) / 1000) for tokens, ms in csv.reader(file) if float(tokens) > 0]
        if phase == "prompt":
            # Below the first size a prompt takes time in proportion to its tokens.
            rows.insert(0, (1.0, rows[0][1] / rows[0][0]))
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


def all_ways(cluster: Cluster, placement: Placement, *, weight: float = 1.0, partial: bool = True) -> list[Route]:
    """All pairs of nodes that may hand on, alike; without `partial` only to nodes whose first layer is the next one."""
    found: list[Route] = []
    for link in cluster.links:
        a, b = link.origin, link.target
        end = 0 if a == SOURCE else placement[a].end
        if (a == SOURCE or placement[a].layers) and (b == SINK or placement[b].layers):
            if b == SINK:
                takes = end == cluster.model.layers
            else:
                first = placement[b].first
                takes = first <= end < placement[b].end if partial and a != SOURCE else first == end
            if takes:
                found.append(Route(a, b, weight))
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
    """The greatest flow that networkx finds, as the artifact asks it.

    The artifact's links lead only to nodes whose first layer is the next one (`allow_partial_inference` is false).
    """
    graph: Any = networkx.DiGraph()
    carried = cluster.model.carried_bytes
    card = cluster.nic_bytes_per_second / carried
    for node, (_, layers) in enumerate(placement):
        if layers:
            graph.add_edge(f"{node}_in", f"{node}_start", capacity=card)
            graph.add_edge(f"{node}_start", f"{node}_end", capacity=cluster.kind_of(node).tokens_per_second[layers - 1])
            graph.add_edge(f"{node}_end", f"{node}_out", capacity=card)
    rates = {(link.origin, link.target): link.bytes_per_second for link in cluster.links}
    for a, b, _ in (ways := all_ways(cluster, placement, partial=False)):
        size = cluster.model.token_bytes if a == SOURCE or b == SINK else carried
        graph.add_edge(
            "source" if a == SOURCE else f"{a}_out", "sink" if b == SINK else f"{b}_in", capacity=rates[a, b] / size
        )
    _, flows = networkx.maximum_flow(graph, "source", "sink")

    def passed(a: int, b: int) -> float:
        return flows["source" if a == SOURCE else f"{a}_out"]["sink" if b == SINK else f"{b}_in"]

    return [Route(a, b, passed(a, b)) for a, b, _ in ways if passed(a, b) > 1e-9]


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


def compare_output(name: str, raw: Mapping[str, Any], folder: Path, profiles: Path, seeds: int) -> None:
    cluster = profiled(published(raw), list(raw["machines"]), profiles)
    # The artifact sends each request's activations by themselves, so that the first one to arrive starts an iteration.
    load = Load(LENGTHS, together_seconds=0.0)

    def row(
        what: str, cluster: Cluster, placement: Placement, ways: Sequence[Route], load: Load, value: float = 0
    ) -> None:
        """Simulate with each seed of the lengths, and print means."""
        results = [
            simulate(cluster, placement, ways, msgspec.structs.replace(load, seed=seed)) for seed in range(seeds)
        ]
        outputs = [result.decode_tokens_per_second for result in results]
        mean = statistics.fmean(outputs)
        beside = f", artifact {value}, {100 * (mean / value - 1):+.1f} %" if value else ""
        first, following, concurrency = (
            statistics.fmean(getattr(result, field) for result in results)
            for field in ("first_token_seconds", "token_seconds", "concurrency")
        )
        print(
            f"{name} {what}: output {mean:.1f} tokens/s{beside} ({', '.join(f'{output:.1f}' for output in outputs)}), "
            f"first token {first:.2f} s, next {following:.2f} s, {concurrency:.0f} requests",
            flush=True,
        )

    helix = intervals(folder / f"{name}_helix.json")
    row("helix", cluster, helix, networkx_routes(cluster, helix), load, PUBLISHED[name, "helix"])
    swarm = intervals(folder / f"{name}_swarm.json")
    by_delay = msgspec.structs.replace(load, concurrency=SWARM_REQUESTS, by_delay=True, cache_share=1e9)
    ways = all_ways(cluster, swarm, weight=1 / SWARM_FIRST_DELAY_SECONDS)
    row("swarm", cluster, swarm, ways, by_delay, PUBLISHED[name, "swarm"])
    for order in range(2):
        other, placement = shuffled(cluster, helix, order)
        row(f"helix, our greatest flow {order}", other, placement, routes(Network(other), placement), load)
    greatest = place(cluster, seconds=SECONDS.get(name, 5.0))
    row(f"ours, greatest flow {greatest.flow:,.0f}", cluster, greatest.placement, greatest.routes, load)
    start = time.process_time()
    steps = SEARCH_STEPS.get(name)
    served = serve(
        cluster,
        load,
        seconds=None if steps else (1 + CANDIDATES) * SEARCH_SECONDS,
        steps=steps and (1 + CANDIDATES) * steps,
        candidates=CANDIDATES,
    )
    took = time.process_time() - start
    print(f"{name}: searches and simulations took {took:.1f} s of processor time")
    for placed, result in served:
        print(f"{name} expected of flow {placed.flow:,.0f}: output {result.decode_tokens_per_second:.1f}")
    best = served[0].placed
    row(f"ours, best, flow {best.flow:,.0f}", cluster, best.placement, best.routes, load)
    other, placement = shuffled(cluster, best.placement, 1)
    row("ours, best, another greatest flow", other, placement, routes(Network(other), placement), load)


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
            compare_output(file.stem, json.loads(file.read_text()), file.parent, arguments.profiles, arguments.seeds)


if __name__ == "__main__":
    main()
