"""Independent audit of a replay with time: all is computed anew from the three tables, without the planner's code.

It imports the standard library and the column names (`columns.py`) alone. It checks that each job runs once, not before
it is submitted, for its duration and the cost of each start, in one interval or, if it was preempted, in several, one
after the other; that it has the devices that it asks for in each, on one node or on whole nodes; and that no node gives
more than it has at any instant. Also a command:

    python -m corral.planner.simulation.timed_audit NODES.csv JOBS.csv RUNS.csv [START_COST]
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .audit import number
from .audit import rows as table_rows
from .columns import DOMAIN_LABELS, JOB_COLUMNS, NODE_COLUMNS

TOLERANCE_SECONDS = 1e-3
RELATIVE = 1e-9


class TimedAuditError(Exception):
    """A run is wrong."""


class TimedAudit(NamedTuple):
    """Totals of audited runs.

    Attributes:
        jobs: number of jobs.
        ran: number of those that ran.
        jct_mean: mean time from submission to the end, in seconds.
        makespan: end of the last job, in seconds.
    """

    jobs: int
    ran: int
    jct_mean: float
    makespan: float


class _Node:
    def __init__(self, row: dict[str, str]) -> None:
        self.cpu, self.memory = number(row["cpu_milli"]), number(row["memory_mib"])
        self.gpus = number(row["gpu"])
        self.model = row["model"]
        self.labels = {name: row[name] for name in DOMAIN_LABELS}
        self.uses: list[tuple[float, int, float, float, dict[int, int], str]] = []
        """(time, 1 for a start and 0 for an end, cores, RAM, milli by device, job)"""

    def use(self, start: float, end: float, cpu: float, memory: float, devices: dict[int, int], job: str) -> None:
        if end > start:
            self.uses.append((start, 1, cpu, memory, devices, job))
            self.uses.append((end, 0, cpu, memory, devices, job))

    def check(self, name: str) -> None:
        """Add and subtract in order of time; what ends at an instant is free to what starts then."""
        cpu = memory = 0.0
        milli = [0] * self.gpus
        for at, starts, cores, ram, devices, job in sorted(self.uses, key=lambda use: use[:2]):
            sign = 1 if starts else -1
            cpu += sign * cores
            memory += sign * ram
            for index, share in devices.items():
                milli[index] += sign * share
                if milli[index] > 1000:
                    raise TimedAuditError(f"{job}: device {index} of {name} is taken twice at {at:.3f}")
            if cpu > self.cpu * (1 + RELATIVE) + 1e-6 or memory > self.memory * (1 + RELATIVE) + 1e-6:
                raise TimedAuditError(f"{job}: {name} has too few cores or too little RAM at {at:.3f}")


class _Job(NamedTuple):
    where: str
    name: str
    submit: float
    duration: float
    cpu: int
    memory: int
    gpus: int
    milli: int
    models: frozenset[str]
    within: str

    def allows(self, node: _Node) -> bool:
        return not self.gpus or not self.models or node.model in self.models


class _Row(NamedTuple):
    name: str
    node: str
    devices: tuple[int, ...]
    start: float
    end: float


def _jobs(path: Path) -> list[_Job]:
    found: list[_Job] = []
    for at, row in enumerate(table_rows(path, JOB_COLUMNS, "{}"), 1):
        gpus = number(row["num_gpu"])
        found.append(
            _Job(
                where=f"job {at} ({row['name']})",
                name=row["name"],
                submit=float(row["submit_seconds"]),
                duration=float(row["duration_seconds"]),
                cpu=number(row["cpu_milli"]),
                memory=number(row["memory_mib"]),
                gpus=gpus,
                milli=number(row["gpu_milli"] or "1000") if gpus == 1 else 1000,
                models=frozenset(model.strip() for model in row["gpu_spec"].split("|") if model.strip()),
                within=row["within"],
            )
        )
    return found


def _runs(path: Path) -> list[_Row]:
    return [
        _Row(
            row["name"],
            row["node"],
            tuple(int(text) for text in row["gpu_indices"].split(";") if text),
            float(row["start_seconds"] or "nan"),
            float(row["end_seconds"] or "nan"),
        )
        for row in csv.DictReader(io.StringIO(path.read_text(), newline=""))
    ]


def audit_runs(nodes: Path, jobs: Path, runs: Path, start_cost: float = 10.0) -> TimedAudit:
    """Check the runs of jobs on nodes.

    Args:
        nodes: table of nodes.
        jobs: table of jobs.
        runs: table of runs, a row for each node of each interval, in the order of the jobs.
        start_cost: seconds without progress at each start.

    Raises:
        TimedAuditError: describes the first run that is wrong.
    """
    fleet = {row["sn"]: _Node(row) for row in table_rows(nodes, NODE_COLUMNS, "node-{}")}
    asked, rows = _jobs(jobs), _runs(runs)
    at = ran = 0
    total = makespan = 0.0
    for job in asked:
        if at < len(rows) and rows[at].name == job.name and not rows[at].node:
            mine, at = [], at + 1
        else:
            mine, at = _segments(job, rows, at, start_cost)
        if not mine:
            if _possible(job, fleet):
                raise TimedAuditError(f"{job.where} never ran, but the nodes could hold it")
            continue
        for segment in mine:
            _take(job, segment, fleet)
        ran += 1
        total += mine[-1][0].end - job.submit
        makespan = max(makespan, mine[-1][0].end)
    if at < len(rows):
        raise TimedAuditError(f"row {at + 1} of the runs, of {rows[at].name}, belongs to no job")
    for name, node in fleet.items():
        node.check(name)
    return TimedAudit(len(asked), ran, total / ran if ran else 0.0, makespan)


def _segments(job: _Job, rows: Sequence[_Row], at: int, cost: float) -> tuple[list[list[_Row]], int]:
    """The intervals of a job from a place of the table on, each with its nodes' rows, until its duration is done.

    The last one is no shorter than the cost of a start, even if the job has nothing left to do.
    """
    found: list[list[_Row]] = []
    done = 0.0
    close = TOLERANCE_SECONDS + RELATIVE * job.duration
    before = job.submit
    over = False
    while at < len(rows) and rows[at].name == job.name and not over:
        first = rows[at]
        segment = [first]
        at += 1
        while at < len(rows) and _count(segment) < job.gpus and _same(rows[at], first):
            segment.append(rows[at])
            at += 1
        if not first.start >= before - TOLERANCE_SECONDS:
            raise TimedAuditError(f"{job.where} starts at {first.start:.3f}, before {before:.3f}")
        if not first.end >= first.start:
            raise TimedAuditError(f"{job.where} ends before it starts")
        before = first.end
        done += max(0.0, first.end - first.start - cost)
        over = done >= job.duration - close and first.end - first.start >= cost - TOLERANCE_SECONDS
        found.append(segment)
    close += RELATIVE * before
    if found and abs(done - job.duration) > close:
        raise TimedAuditError(f"{job.where} ran {done:.3f} s without the cost of starts, not {job.duration:.3f} s")
    if found and found[-1][0].end - found[-1][0].start < cost - close:
        raise TimedAuditError(f"{job.where} ends {cost:g} s too soon: before its last start is over")
    return found, at


def _count(segment: Sequence[_Row]) -> int:
    return sum(len(row.devices) for row in segment)


def _same(row: _Row, first: _Row) -> bool:
    return row.name == first.name and row.start == first.start and row.end == first.end


def _take(job: _Job, segment: Sequence[_Row], fleet: dict[str, _Node]) -> None:
    names = [row.node for row in segment]
    if len(set(names)) < len(names):
        raise TimedAuditError(f"{job.where} has a node twice")
    if _count(segment) != job.gpus:
        raise TimedAuditError(f"{job.where} asks for {job.gpus} devices, and got {_count(segment)}")
    several = len(segment) > 1
    if several and job.within:
        domains = {fleet[name].labels[job.within] for name in names if name in fleet}
        if len(domains) > 1 or "" in domains:
            raise TimedAuditError(f"{job.where} must be within one {job.within}, and is in {sorted(domains)}")
    for row in segment:
        node = fleet.get(row.node)
        if node is None:
            raise TimedAuditError(f"{job.where}: there is no node {row.node}")
        if not job.allows(node):
            raise TimedAuditError(f"{job.where} may not use {node.model}")
        if len(set(row.devices)) < len(row.devices) or any(not 0 <= index < node.gpus for index in row.devices):
            raise TimedAuditError(f"{job.where}: {row.devices} are no devices of {row.node}")
        if several and row is not segment[-1] and len(row.devices) < node.gpus:
            raise TimedAuditError(f"{job.where} has more than one node, but not all of {row.node}")
        # On several nodes a job has them whole, whatever it uses of the last.
        devices = dict.fromkeys(range(node.gpus) if several else row.devices, job.milli)
        node.use(
            row.start, row.end, job.cpu / len(segment), job.memory / len(segment), devices, f"{job.where} on {row.node}"
        )


def _possible(job: _Job, fleet: dict[str, _Node]) -> bool:
    """True if idle nodes could hold a job: on one of them, or on whole ones of one size."""
    able = [node for node in fleet.values() if job.allows(node)]
    largest = max((node.gpus for node in able), default=0)
    if job.gpus <= largest or not job.gpus:
        return any(
            node.gpus >= job.gpus and node.cpu >= job.cpu and node.memory >= job.memory
            for node in (able if job.gpus else fleet.values())
        )
    # Of the sizes of which there are enough, the largest.
    sizes = sorted({node.gpus for node in able if node.gpus}, reverse=True)
    size = next((size for size in sizes if size * sum(node.gpus == size for node in able) >= job.gpus), 0)
    count = -(-job.gpus // size) if size else 0
    roomy = (
        [
            node
            for node in able
            if node.gpus == size and node.cpu >= job.cpu / count and node.memory >= job.memory / count
        ]
        if size
        else []
    )
    if not job.within:
        return bool(size) and len(roomy) >= count
    domains = Counter(node.labels[job.within] for node in roomy if node.labels[job.within])
    return bool(size) and max(domains.values(), default=0) >= count


if __name__ == "__main__":
    try:
        found = audit_runs(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *map(float, sys.argv[4:5]))
    except TimedAuditError as error:
        sys.exit(f"wrong: {error}")
    print(f"right: {found.ran} of {found.jobs} ran; mean JCT {found.jct_mean:.1f} s, makespan {found.makespan:.0f} s")
