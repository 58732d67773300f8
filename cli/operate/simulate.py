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
    from ...planner.simulation.simulate import Simulation

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
        Path,
        typer.Option("--nodes", metavar="FILE", help="CSV of hosts: gpu; optional: sn, cpu_milli, memory_mib, model."),
    ],
    requests: Annotated[
        Path,
        typer.Option(
            "--requests",
            metavar="FILE",
            help="CSV of requests, in order: num_gpu; optional: name, cpu_milli, memory_mib, gpu_milli, gpu_spec.",
        ),
    ],
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
        typer.Option("--out", metavar="FILE", help="Write the placements to a CSV: name, node, gpu_indices."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the placements independently of the planner's code.")
    ] = False,
    bound: Annotated[
        bool, typer.Option("--bound", help="Show an upper bound for any policy (a linear program; takes some seconds).")
    ] = False,
    json: AsJson = False,
) -> None:
    """Replay requests on a fleet, one by one, with the planner's placement code. No request ends before the last one.

    Tables may be gzipped (.gz). A request that fits somewhere is always placed.

    The optional columns default to no cores, no RAM and whole devices of any model for requests, and to enough cores
    and RAM for nodes. Other columns are ignored. Accepted alternatives: node, host; cpus, cores (1 is 1000 cpu_milli);
    memory_gib; gpus, num_gpus, gpu_count; gpu_model, gpu_type; job_name, pod.

    Examples:
      corral simulate --nodes n.csv --requests r.csv --out placements.csv
      corral simulate --nodes n.csv --requests r.csv --policy best-fit --json
      corral simulate --nodes n.csv --requests r.csv --profile history.csv
      corral simulate --nodes n.csv --requests r.csv --verify --bound
    """
    from ...planner.placement.policies import DEFAULT, POLICIES, make
    from ...planner.simulation.audit import AuditError, audit
    from ...planner.simulation.simulate import simulate as replay
    from ...planner.simulation.simulate import write_placements
    from ...planner.simulation.trace import TraceError, profile_of, read_arrivals, read_nodes

    name = policy if policy is not None else DEFAULT
    if name not in POLICIES:
        raise typer.BadParameter(f"{name!r} is not known: use one of {', '.join(POLICIES)}", param_hint="--policy")
    _check_out(out, [path for path in (nodes, requests, profile) if path is not None])
    upper_bound: Callable[..., Any] | None = None
    if bound:
        # Imported before the work, so that a missing library is reported at once.
        from ...planner.simulation.bound import upper_bound
    try:
        hosts, arrivals = read_nodes(nodes), read_arrivals(requests)
        mix = None if profile is None else profile_of(read_arrivals(profile))
    except TraceError as error:
        raise exits.CommandError(str(error), exits.USAGE) from None
    with _progress(len(arrivals), sum(host.gpus for host in hosts) * 1000) as on_progress:
        result = replay(hosts, arrivals, make(name, profile=mix), on_progress)
    report = _report(result)
    with tempfile.TemporaryDirectory() as folder:
        table = out if out is not None else Path(folder, "placements.csv")
        try:
            write_placements(table, result.placements)
        except OSError as error:
            raise exits.CommandError(f"{table} can't be written: {error.strerror}") from None
        if verify:
            try:
                found = audit(nodes, requests, table)
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
