"""How much of a fleet does each policy allocate before requests no longer fit?

The Monte-Carlo inflation of the FGD paper (USENIX ATC'23, section 6) on the production traces that it used: requests
arrive in a seeded order until they ask for 130 % of all GPUs, none leaves, what fits must be placed. Every run goes
through `corral simulate`'s functions and is checked by sums that know nothing of the planner. Beside the means over the
seeds stand the published figures (means over ten) and what no policy could exceed (`planner/simulation/bound.py`).

    python bench/placement.py [--seeds 42-51] [--traces default gpuspec33] [--policies fragmentation opportunity ...]
                              [--pods other-trace.csv ...] [--json results.jsonl]

The traces are looked for in $CORRAL_DATA, then in ../shared/data (folder `openb`, with `arrivals.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from corral.planner.placement.policies import POLICIES, make
from corral.planner.simulation.audit import audit
from corral.planner.simulation.bound import upper_bound
from corral.planner.simulation.simulate import simulate, write_placements
from corral.planner.simulation.trace import profile_of, read_arrivals, read_nodes

PUBLISHED = {
    "default": {"random": 87.47, "best-fit": 93.08, "fragmentation": 95.39},
    "gpuspec33": {"random": 86.46, "best-fit": 93.09, "fragmentation": 94.55},
}
"""Percent, from the paper's result files. Its other policies: dot-product 90.85 and 89.14, GPU clustering 91.88 and
92.12, GPU packing 92.00 and 93.22."""
LEARNING = ("fragmentation", "opportunity")
"""Run twice: with the trace's mix of requests given, as the paper does, and learning it from the requests that come."""


def seeds_of(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def runs_of(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, how) for name in names for how in (("given", "learned") if name in LEARNING else ("",))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("CORRAL_DATA") or Path(__file__).parents[2] / "shared" / "data") / "openb"
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("42-51"))
    parser.add_argument("--traces", nargs="*", default=["default", "gpuspec33"])
    parser.add_argument("--pods", nargs="*", type=Path, default=[], help="further traces, tables of requests")
    parser.add_argument("--policies", nargs="*", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--no-bound", action="store_true")
    parser.add_argument("--json", type=Path, help="append each run as a line")
    options = parser.parse_args()
    nodes_file = data / "openb_node_list_gpu_node.csv"
    if not nodes_file.is_file():
        sys.exit(f"the traces are not on this machine (looked in {data}; set CORRAL_DATA)")
    nodes = read_nodes(nodes_file)
    traces = [(name, data / f"openb_pod_list_{name}.csv") for name in options.traces]
    traces += [(path.stem, path) for path in options.pods]
    print(
        f"{len(nodes)} nodes, {sum(node.gpus for node in nodes)} GPUs; seeds {options.seeds[0]}-{options.seeds[-1]}; "
        f"CPython {platform.python_version()}, {os.cpu_count()} cores; decision times are of the processor"
    )
    for name, pods in traces:
        mix = profile_of(read_arrivals(pods))
        shares: dict[tuple[str, str], list[float]] = {}
        times: dict[tuple[str, str], list[float]] = {}
        rates: dict[tuple[str, str], list[float]] = {}
        bounds: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            requests, placements = Path(folder, "requests.csv"), Path(folder, "placements.csv")
            for seed in options.seeds:
                subprocess.run(
                    [sys.executable, data / "arrivals.py", pods, nodes_file, str(seed), requests],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                arrivals = read_arrivals(requests)
                for policy, how in runs_of(options.policies):
                    result = simulate(nodes, arrivals, make(policy, profile=mix if how == "given" else None))
                    write_placements(placements, result.placements)
                    checked = audit(nodes_file, requests, placements)
                    share = 100 * checked.allocated_milli / checked.capacity_milli
                    shares.setdefault((policy, how), []).append(share)
                    times.setdefault((policy, how), []).extend(result.decision_seconds)
                    rates.setdefault((policy, how), []).append(len(result.decision_seconds) / result.busy_seconds)
                    note(options.json, trace=name, seed=seed, policy=policy, mix=how, percent=share)
                if not options.no_bound:
                    started = time.perf_counter()
                    bounds.append(upper_bound(nodes, arrivals).percent)
                    seconds = time.perf_counter() - started
                    note(options.json, trace=name, seed=seed, bound=bounds[-1], seconds=seconds)
        report(name, shares, times, rates, bounds)


def note(path: Path | None, **values: object) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def report(
    name: str,
    shares: dict[tuple[str, str], list[float]],
    times: dict[tuple[str, str], list[float]],
    rates: dict[tuple[str, str], list[float]],
    bounds: list[float],
) -> None:
    limit = fmean(bounds) if bounds else None
    print(f"\n{name}" + (f": bound {limit:.2f} % (mean over {len(bounds)} seeds)" if limit is not None else ""))
    print("| policy | mix | allocated % | least | most | published | to the bound | p50 µs | p99 µs | decisions/s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (policy, how), percents in shares.items():
        taken = sorted(times[policy, how])
        published = PUBLISHED.get(name, {}).get(policy)
        cells = (
            policy,
            how or "–",
            f"**{fmean(percents):.2f}**",
            f"{min(percents):.2f}",
            f"{max(percents):.2f}",
            "–" if published is None else f"{published:.2f} ({fmean(percents) - published:+.2f})",
            "–" if limit is None else f"{limit - fmean(percents):.2f}",
            f"{1e6 * taken[len(taken) // 2]:.0f}",
            f"{1e6 * taken[int(len(taken) * 0.99)]:.0f}",
            f"{fmean(rates[policy, how]):,.0f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
