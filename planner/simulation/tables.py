"""Tables that a replay with time writes: jobs, nodes and runs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from .jobs import Job
from .timed import Interval, Replay
from .trace import Node

RUN_COLUMNS = ("name", "node", "gpu_indices", "start_seconds", "end_seconds")
_JOB_COLUMNS = (
    "name",
    "submit_seconds",
    "duration_seconds",
    "num_gpu",
    "gpu_milli",
    "cpu_milli",
    "memory_mib",
    "gpu_spec",
    "owner",
    "priority",
    "preemptible",
    "expected_seconds",
    "within",
)


def write_runs(path: Path, replay: Replay) -> None:
    """Write the runs, a row for each node of each interval, in the order of the jobs.

    A job that no idle fleet could hold has one row, with its name alone.

    Raises:
        OSError: it can't be written.
    """
    rows = [
        (run.job.number, run.job.name, segment.node, ";".join(map(str, segment.gpu_indices)), *_times(interval))
        for run in replay.runs
        for interval in run.intervals
        for segment in interval.segments
    ]
    rows += [(job.number, job.name, "", "", "", "") for job in replay.impossible]
    rows.sort(key=lambda row: row[0])
    _write(path, RUN_COLUMNS, [row[1:] for row in rows])


def write_nodes(path: Path, nodes: Sequence[Node]) -> None:
    """Write nodes as a table that `read_nodes` reads.

    Raises:
        OSError: it can't be written.
    """
    rows = [
        (node.name, node.cpus_milli, node.memory_mib, node.gpus, node.model, node.rack, node.nvlink_domain)
        for node in nodes
    ]
    _write(path, ("sn", "cpu_milli", "memory_mib", "gpu", "model", "rack", "nvlink_domain"), rows)


def write_jobs(path: Path, jobs: Sequence[Job]) -> None:
    """Write jobs as a table that `read_jobs` reads.

    Raises:
        OSError: it can't be written.
    """
    _write(path, _JOB_COLUMNS, [_cells(job) for job in jobs])


def _cells(job: Job) -> tuple[object, ...]:
    return (
        job.name,
        repr(job.submit_seconds),
        repr(job.duration_seconds),
        job.gpus,
        job.share_milli if job.gpus == 1 else "",
        job.cpus_milli,
        job.memory_mib,
        "|".join(job.models),
        job.owner,
        job.priority,
        "true" if job.preemptible else "",
        "" if job.expected_seconds is None else repr(job.expected_seconds),
        job.within,
    )


def _times(interval: Interval) -> tuple[str, str]:
    return repr(interval.started_at), repr(interval.ended_at)


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
