"""`corral simulate`: replay a trace of requests through the planner's own core."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .. import exits
from ..options import AsJson, console, print_json

if TYPE_CHECKING:
    from ...planner.simulation.jobs import Job
    from ...planner.simulation.simulate import Simulation
    from ...planner.simulation.trace import Node

WORDS: Final = {
    "cpus": "too few free cores where devices were free",
    "host_memory": "too little free RAM where devices were free",
    "host_devices": "too few free devices on one host",
    "share": "no device with so much share free",
    "leased": "no device wholly free",
    "memory": "too little free device memory",
    "devices": "too few devices together",
    "impossible": "not even the idle fleet could hold it",
}


def simulate(
    nodes: Annotated[
        str | None,
        typer.Option(
            "--nodes",
            metavar="FILE",
            help="Hosts, CSV: gpu, and sn, cpu_milli, memory_mib, model. Or 8x4 for 8 nodes of 4 GPUs, 8x4:MODEL.",
        ),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--requests",
            metavar="FILE",
            help="In order, CSV: num_gpu, and name, cpu_milli, memory_mib, gpu_milli, gpu_spec; with time also "
            "submit_seconds, duration_seconds, and owner, priority, preemptible, expected_seconds. Or sacct -P.",
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="NAME", help="Ranking policy. Default: the planner's.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="Typical requests, a CSV as for --requests. Default: policies that need it learn it on the way.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write placements, CSV: name, node, gpu_indices; with time also start_seconds, end_seconds.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the placements independently of the planner's code.")
    ] = False,
    bound: Annotated[
        bool, typer.Option("--bound", help="Show an upper bound for any policy (a linear program; takes some seconds).")
    ] = False,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            metavar="NAME",
            help="Order of the queue: fifo, shortest, fair, module:function; or attained, which preempts.",
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="NAMES", help="Rules to compare, with commas between.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write a chart of the times to completion, SVG.")
    ] = None,
    start_cost: Annotated[
        str, typer.Option("--start-cost", metavar="TIME", help="Charged to each start, without progress.")
    ] = "10s",
    guess: Annotated[
        float | None,
        typer.Option(
            "--guess", metavar="SIGMA", help="Expect wrong durations: lognormal error, this sigma.", min=0, max=10
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="NUMBER", help="Of the errors of --guess.")] = 0,
    learn: Annotated[
        bool, typer.Option("--learn", help="Know of durations only what the jobs that ended before have shown.")
    ] = False,
    history: Annotated[
        Path | None,
        typer.Option("--history", metavar="FILE", help="Replay the leases of Corral's history, on its devices."),
    ] = None,
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="Of --history: the time before its newest grant.")
    ] = "7d",
    add: Annotated[
        list[str] | None,
        typer.Option("--add", metavar="NxMODEL", help="With so many more devices, such as 8xH100. Repeatable."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Replay requests on a fleet, as the planner would decide them.

    Requests without time arrive one by one and stay until the end; one that fits somewhere is always placed. Requests
    with submit_seconds and duration_seconds wait in the planner's queue, run and end; more GPUs than a node has take
    whole nodes. Tables may be gzipped (.gz).

    The optional columns default to no cores, no RAM and whole devices of any model for requests, and to enough cores
    and RAM for nodes. Other columns are ignored. Accepted alternatives: node, host; cpus, cores (1 is 1000 cpu_milli);
    memory_gib; gpus, num_gpus, gpu_count; gpu_model, gpu_type; job_name, pod.

    Examples:
      corral simulate --nodes n.csv --requests r.csv --out placements.csv
      corral simulate --nodes n.csv --requests r.csv --policy best-fit --json
      corral simulate --nodes n.csv --requests r.csv --verify --bound
      corral simulate --nodes 8x8 --requests jobs.csv --compare fifo,shortest,fair --plot jobs.svg
      corral simulate --nodes 8x8 --requests jobs.csv --compare shortest,attained --learn
      corral simulate --nodes 8x8 --requests jobs.csv --guess 1 --out runs.csv --verify
      corral simulate --nodes n.csv --requests sacct.txt --learn
      corral simulate --history corral.duckdb --since 7d --add 8xH100
    """
    from ...planner.placement.policies import DEFAULT, POLICIES
    from ...planner.simulation.trace import TraceError

    name = policy if policy is not None else DEFAULT
    if name not in POLICIES:
        raise typer.BadParameter(f"{name!r} is not known: use one of {', '.join(POLICIES)}", param_hint="--policy")
    if history is None and (nodes is None or requests is None):
        raise typer.BadParameter(
            "name the hosts, or a --history", param_hint="--nodes" if nodes is None else "--requests"
        )
    inputs = [Path(nodes) if nodes else None, requests, profile, history]
    for target in (out, plot):
        _check_out(target, [path for path in inputs if path is not None])
    try:
        with_time = history is not None or _has_time(requests)
        if not with_time:
            if nodes is None or requests is None:
                raise typer.BadParameter("a table of requests has none of the times", param_hint="--requests")
            _placements(nodes, requests, name, profile, out, verify=verify, bound=bound, json=json)
            return
        if bound or profile is not None:
            hint = "--bound" if bound else "--profile"
            raise exits.CommandError(f"{hint} is for requests without time", exits.USAGE)
        if learn and guess is not None:
            raise exits.CommandError("--learn and --guess: durations are either learned or guessed", exits.USAGE)
        rules = _rules(rule, compare)
        if out is not None and len(rules) > 1:
            raise exits.CommandError("--out has the runs of one rule: leave it out, or --compare", exits.USAGE)
        hosts, jobs = _timed_inputs(nodes, requests, history, since)
    except TraceError as error:
        raise exits.CommandError(str(error), exits.USAGE) from None
    from .simulate_timed import Timed, simulate_timed

    simulate_timed(
        hosts,
        jobs,
        Timed(
            rules=rules,
            compared=compare is not None,
            policy=name,
            start_cost_seconds=_seconds(start_cost, "--start-cost"),
            guess=guess,
            seed=seed,
            learn=learn,
            add=add or [],
            out=out,
            plot=plot,
            verify=verify,
            json=json,
        ),
    )


def _has_time(requests: Path | None) -> bool:
    from ...planner.simulation.jobs import timed

    return requests is not None and timed(requests)


def _rules(rule: str | None, compare: str | None) -> list[str]:
    from ...planner.queue.order import DEFAULT

    if rule is not None and compare is not None:
        raise exits.CommandError("--rule and --compare: name the rules in one of them", exits.USAGE)
    if compare is None:
        return [rule or DEFAULT]
    names = [name.strip() for name in compare.split(",") if name.strip()]
    if not names:
        raise exits.CommandError("--compare names no rule: write it like fifo,shortest,fair", exits.USAGE)
    return list(dict.fromkeys(names))


def _seconds(text: str, option: str) -> float:
    from ...schemas.values.units import parse_seconds

    try:
        return parse_seconds(text)
    except ValueError as error:
        raise exits.CommandError(f"{option}: {error}", exits.USAGE) from None


def _timed_inputs(
    nodes: str | None, requests: Path | None, history: Path | None, since: str
) -> tuple[list[Node], list[Job]]:
    """Hosts and jobs. What a history lacks, or what is to be another, is named by the other options."""
    from .simulate_timed import read_requests

    hosts: list[Node] | None = None if nodes is None else _read_nodes(nodes)
    jobs: list[Job] | None = None
    if history is not None:
        from ...planner.simulation.recorded import read_history

        had, jobs = read_history(history, _seconds(since, "--since"))
        hosts = had if hosts is None else hosts
    assert hosts is not None
    if requests is not None:
        jobs = read_requests(requests, hosts)
    assert jobs is not None
    return hosts, jobs


def _read_nodes(text: str) -> list[Node]:
    from ...planner.simulation.trace import read_nodes
    from .simulate_timed import nodes_of

    path = Path(text)
    found = None if path.exists() else nodes_of(text)
    return read_nodes(path) if found is None else found


def _placements(
    nodes: str,
    requests: Path,
    policy: str,
    profile: Path | None,
    out: Path | None,
    *,
    verify: bool,
    bound: bool,
    json: bool,
) -> None:
    """Replay requests that stay, and print what was placed."""
    from ...planner.placement.policies import make
    from ...planner.simulation.audit import AuditError, audit
    from ...planner.simulation.simulate import simulate as replay
    from ...planner.simulation.simulate import write_placements
    from ...planner.simulation.tables import write_nodes
    from ...planner.simulation.trace import profile_of, read_arrivals

    upper_bound: Callable[..., Any] | None = None
    if bound:
        # Imported before the work, so that a missing library is reported at once.
        from ...planner.simulation.bound import upper_bound
    hosts, arrivals = _read_nodes(nodes), read_arrivals(requests)
    mix = None if profile is None else profile_of(read_arrivals(profile))
    with _progress(len(arrivals), sum(host.gpus for host in hosts) * 1000) as on_progress:
        result = replay(hosts, arrivals, make(policy, profile=mix), on_progress)
    report = _report(result)
    with tempfile.TemporaryDirectory() as folder:
        table = out if out is not None else Path(folder, "placements.csv")
        try:
            write_placements(table, result.placements)
        except OSError as error:
            raise exits.CommandError(f"{table} can't be written: {error.strerror}") from None
        if verify:
            hosts_table = Path(nodes)
            if not hosts_table.exists():
                hosts_table = Path(folder, "nodes.csv")
                write_nodes(hosts_table, hosts)
            try:
                found = audit(hosts_table, requests, table)
            except AuditError as error:
                raise exits.CommandError(f"the placements are wrong: {error}") from None
            if found.allocated_milli != result.allocated_milli:
                raise exits.CommandError(
                    f"the placements are wrong: they allocate {found.allocated_milli} milli, "
                    f"not {result.allocated_milli}"
                )
            report["verified"] = True
    if upper_bound is not None:
        limit = upper_bound(hosts, arrivals)
        report["bound_percent"] = round(limit.percent, 4)
        report["gap_percent"] = round(limit.percent - result.allocated_percent, 4)
    if json:
        print_json(report)
    else:
        _show(report, out)


def _check_out(out: Path | None, inputs: list[Path]) -> None:
    if out is None:
        return
    if any(out.resolve() == path.resolve() for path in inputs):
        raise exits.CommandError(f"--out {out} would overwrite an input: use another file", exits.USAGE)
    if out.is_dir() or not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise exits.CommandError(f"--out {out} can't be written: its folder doesn't exist", exits.USAGE)


def _report(result: Simulation) -> dict[str, Any]:
    decisions = len(result.decision_seconds)
    capacity = max(1, result.capacity_milli)
    return {
        "policy": result.policy,
        "gpus": result.capacity_milli // 1000,
        "demand_percent": round(100 * result.demand_milli / capacity, 4),
        "allocated_percent": round(result.allocated_percent, 4),
        "allocated_milli": result.allocated_milli,
        "requests": len(result.placements),
        "placed": result.placed,
        "dropped": len(result.placements) - result.placed,
        "reasons": result.reasons,
        "decisions_per_second": round(decisions / result.busy_seconds, 1) if result.busy_seconds else 0.0,
        "decision_p50_microseconds": round(1e6 * result.decision_quantile(0.5), 1),
        "decision_p99_microseconds": round(1e6 * result.decision_quantile(0.99), 1),
        "seconds": round(result.seconds, 3),
    }


def _show(report: dict[str, Any], out: Path | None) -> None:
    show = console().print
    show(
        f"[bold]{report['allocated_percent']:.2f} %[/] of {report['gpus']:,} GPUs allocated by {report['policy']}, "
        f"at a demand of {report['demand_percent']:.1f} %"
    )
    show(f"placed    {report['placed']:,} of {report['requests']:,} requests")
    show(f"dropped   {report['dropped']:,}")
    for reason, count in report["reasons"].items():
        show(f"          {count:,} {WORDS.get(reason, reason)}")
    show(
        f"decisions {report['decisions_per_second']:,.0f}/s, p50 {report['decision_p50_microseconds']:.0f} µs, "
        f"p99 {report['decision_p99_microseconds']:.0f} µs; {report['seconds']:.1f} s in all"
    )
    if "bound_percent" in report:
        show(f"bound     {report['bound_percent']:.2f} %: no policy could exceed it; gap {report['gap_percent']:.2f}")
    if report.get("verified"):
        show("verified  every placement fits, and no dropped request would have fitted")
    if out is not None:
        show(f"written   {out}", markup=False)


@contextmanager
def _progress(requests: int, capacity: int) -> Generator[Callable[[int, int], None]]:
    """Show a progress bar on a terminal, and nothing in a pipe."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[allocated]}"), TimeRemainingColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("", total=requests, allocated="")

        def on_progress(done: int, allocated: int) -> None:
            bar.update(task, completed=done, allocated=f"{100 * allocated / max(1, capacity):.1f} % allocated")

        yield on_progress
