"""`corral simulate` with time: jobs that arrive, wait in the planner's queue, run, and end."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from .. import exits
from ..options import console, print_json, say

if TYPE_CHECKING:
    from ...planner.simulation.jobs import Job
    from ...planner.simulation.measures import Measures
    from ...planner.simulation.timed import Knowledge, Replay
    from ...planner.simulation.trace import Node

_NODES: Final = re.compile(r"(\d{1,5})x(\d{1,4})(?::(.{1,128}))?")


class Timed(Struct, frozen=True, kw_only=True):
    """Input of a simulation.

    Attributes:
        rules: names of the orders.
        compared: true if they are compared, though it be one.
        policy: that ranks hosts.
        start_cost_seconds: charged to each start.
        guess: standard deviation of the logarithm of what is expected over what it takes; None without guesses.
        seed: of the guesses.
        learn: true if durations are learned from the jobs that ended before.
        add: devices to add, such as `8xH100`.
        out: table of runs to write.
        plot: chart to write.
        verify: true if the runs are to be audited.
        json: true for JSON.
    """

    rules: Sequence[str]
    compared: bool
    policy: str
    start_cost_seconds: float
    guess: float | None = None
    seed: int = 0
    learn: bool = False
    add: Sequence[str] = ()
    out: Path | None = None
    plot: Path | None = None
    verify: bool = False
    json: bool = False


def nodes_of(text: str) -> list[Node] | None:
    """Nodes from a text such as `8x8` or `8x8:H100`, nodes × devices; None if it is none."""
    from ...planner.simulation.columns import UNBOUNDED
    from ...planner.simulation.trace import Node

    match = _NODES.fullmatch(text)
    if match is None:
        return None
    count, gpus, model = int(match[1]), int(match[2]), match[3] or ""
    width = len(str(count))
    return [Node(f"node-{number:0{width}d}", UNBOUNDED, UNBOUNDED, gpus, model) for number in range(1, count + 1)]


def read_requests(path: Path, nodes: Sequence[Node]) -> list[Job]:
    """Read jobs from a table, or from Slurm's accounting. Of the latter, jobs without devices need nodes with cores.

    Raises:
        TraceError: the file can't be read, or has an invalid value; with the line.
    """
    from ...planner.simulation.columns import UNBOUNDED
    from ...planner.simulation.jobs import is_sacct, read_jobs
    from ...planner.simulation.sacct import read_sacct
    from ...planner.simulation.trace import TraceError, first_line

    if not is_sacct(first_line(path)):
        return read_jobs(path)
    jobs = read_sacct(path)
    if any(node.cpus_milli < UNBOUNDED for node in nodes):
        return jobs
    kept = [msgspec.structs.replace(job, number=number) for number, job in enumerate(j for j in jobs if j.gpus)]
    if len(kept) < len(jobs):
        say(f"{len(jobs) - len(kept):,} jobs without GPUs are left out: the nodes do not say how many cores they have")
    if not kept:
        raise TraceError(f"{path} has no job with GPUs")
    return kept


def simulate_timed(nodes: Sequence[Node], jobs: Sequence[Job], what: Timed) -> None:
    """Replay jobs by one rule or several, and print what came of it."""
    from ...planner.simulation.measures import measure
    from ...planner.simulation.recorded import added
    from ...planner.simulation.trace import TraceError

    rules = [(name, _rule(name)) for name in what.rules]
    try:
        for number, text in enumerate(what.add, 1):
            nodes = [*nodes, *added(text, nodes, number)]
    except TraceError as error:
        raise exits.CommandError(str(error), exits.USAGE) from None
    replays: list[Replay] = []
    found: list[Measures] = []
    for name, rule in rules:
        with _progress(name, len(jobs)) as on_progress:
            replays.append(_replay(nodes, jobs, name, rule, what, on_progress))
        found.append(measure(replays[-1]))
        _write(nodes, jobs, replays[-1], what)
    if what.plot is not None:
        _plot(what.plot, replays, nodes)
    if what.json:
        reports = [msgspec.to_builtins(each) | {"gpus": replays[0].gpus, "verified": what.verify} for each in found]
        print_json(reports if what.compared else reports[0])
    else:
        _show(found, replays, what)


def _rule(name: str) -> Any:
    """Order of the queue; None for the one that preempts."""
    from ...planner.queue.order import rule_of
    from ...planner.simulation.preemptive import NAME

    if name == NAME:
        return None
    try:
        return rule_of(name)
    except ValueError as error:
        raise exits.CommandError(f"{error}, or {NAME}, which preempts", exits.USAGE) from None


def _replay(
    nodes: Sequence[Node], jobs: Sequence[Job], name: str, rule: Any, what: Timed, on_progress: Callable[[int], None]
) -> Replay:
    from ...planner.placement.policies import make
    from ...planner.simulation.preemptive import replay_preemptive
    from ...planner.simulation.timed import replay

    if rule is None:
        cost = what.start_cost_seconds
        return replay_preemptive(nodes, jobs, make(what.policy), start_cost_seconds=cost, on_progress=on_progress)
    return replay(
        nodes,
        jobs,
        rule,
        make(what.policy),
        name=name,
        start_cost_seconds=what.start_cost_seconds,
        knowledge=_knowledge_of(what),
        on_progress=on_progress,
    )


def _knowledge_of(what: Timed) -> Knowledge:
    from ...planner.simulation.timed import Guessed, Known, Learned

    if what.learn:
        return Learned()
    return Known() if what.guess is None else Guessed(what.guess, what.seed)


def _write(nodes: Sequence[Node], jobs: Sequence[Job], replay: Replay, what: Timed) -> None:
    from ...planner.simulation.tables import write_jobs, write_nodes, write_runs
    from ...planner.simulation.timed_audit import TimedAuditError, audit_runs

    if what.out is None and not what.verify:
        return
    with tempfile.TemporaryDirectory() as folder:
        hosts, asked = Path(folder, "nodes.csv"), Path(folder, "jobs.csv")
        table = what.out if what.out is not None else Path(folder, "runs.csv")
        try:
            write_runs(table, replay)
            if what.verify:
                write_nodes(hosts, nodes)
                write_jobs(asked, jobs)
        except OSError as error:
            raise exits.CommandError(f"{table} can't be written: {error.strerror}") from None
        if what.verify:
            try:
                audit_runs(hosts, asked, table, what.start_cost_seconds)
            except TimedAuditError as error:
                raise exits.CommandError(f"the runs are wrong: {error}") from None


def _plot(path: Path, replays: Sequence[Replay], nodes: Sequence[Node]) -> None:
    from ...planner.simulation.chart import draw

    title = f"{len(replays[0].runs):,} jobs on {sum(node.gpus for node in nodes):,} GPUs: share done within a time"
    try:
        draw(path, replays, title)
    except OSError as error:
        raise exits.CommandError(f"{path} can't be written: {error.strerror}") from None


def _show(found: Sequence[Measures], replays: Sequence[Replay], what: Timed) -> None:
    from rich.table import Table

    show = console().print
    first = found[0]
    show(f"{first.jobs:,} jobs on {replays[0].gpus:,} GPUs, placed by {what.policy}; {_knowledge(what)}")
    table = Table(box=None, pad_edge=False)
    table.add_column("rule")
    titles = ["mean JCT", "p99 JCT", "mean wait", "p95 wait", "makespan", "used", "slowdown", "Jain", "took"]
    preempts = any(each.preemptions for each in found)
    if preempts:
        titles.insert(-1, "preempted")
    for title in titles:
        table.add_column(title, justify="right")
    for each in found:
        table.add_row(
            each.rule,
            *(f"{value:,.0f} s" for value in (each.jct_mean, each.jct_p99, each.wait_mean, each.wait_p95)),
            f"{each.makespan:,.0f} s",
            f"{100 * each.utilization:.1f} %",
            f"{each.slowdown_mean:,.1f}",
            f"{each.jain:.3f}" if each.owners > 1 else "–",
            *([f"{each.preemptions:,}"] if preempts else []),
            f"{each.seconds:.1f} s",
        )
    show(table)
    if first.impossible:
        show(f"{first.impossible:,} jobs are left out: not even the idle nodes could hold them")
    if what.verify:
        show("verified: each job ran once, in full, on devices that nobody else had")
    for path in (what.out, what.plot):
        if path is not None:
            show(f"written   {path}", markup=False)


def _knowledge(what: Timed) -> str:
    from ...planner.simulation.preemptive import NAME

    if set(what.rules) == {NAME}:
        return "nothing is known of durations, and jobs may be preempted"
    return f"{_known(what)}; {NAME} preempts, and uses none" if NAME in what.rules else _known(what)


def _known(what: Timed) -> str:
    if what.learn:
        return "durations are learned from the jobs that ended before"
    if what.guess is not None:
        return f"durations are guessed (lognormal error, sigma {what.guess:g}, seed {what.seed})"
    return "durations are known"


@contextmanager
def _progress(rule: str, jobs: int) -> Generator[Callable[[int], None]]:
    """Show a progress bar on a terminal, and nothing in a pipe."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task(rule, total=jobs)
        yield lambda done: bar.update(task, completed=done)
