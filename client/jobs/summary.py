"""Summary of a job, or of one of its tasks, from the history: what it used, compared with what it asked for.

It says what Slurm's `seff` says, and what the devices have measured. The history counts all attempts of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from ...schemas.values.units import exact_bytes, exact_seconds, format_bytes, format_seconds
from ...schemas.work.jobs import FINAL, JobState, parse_task_name

_SOME: Final = 10
"""Indexes that are written out of a longer list."""

_SQL: Final = """\
WITH one AS (
    SELECT * FROM jobs WHERE job_id = '{job_id}' ORDER BY submitted_at DESC LIMIT 1
), attempts AS (
    SELECT s.*, s.attempt = max(s.attempt) OVER (PARTITION BY s.index) AS latest
    FROM job_summary s JOIN one USING (job_id, submitted_at){where}
)
SELECT o.job_id, o.owner, coalesce(o.name, '') AS name, o.gpus, o.hosts, o.max_seconds, {state} AS state,
    {tasks} AS tasks, count(*) FILTER (a.latest AND a.state = 'done') AS tasks_done,
    count(*) FILTER (a.latest AND a.state IN ('failed', 'lost', 'preempted')) AS tasks_failed,
    count(a.lease_id) AS attempts, avg(a.pending_seconds) FILTER (a.started_at IS NOT NULL) AS pending_seconds_mean,
    median(a.seconds) AS seconds_median, max(a.seconds) AS seconds_max, sum(a.seconds) AS seconds_total,
    sum(a.gpu_hours) AS gpu_hours, sum(a.idle_gpu_hours) AS idle_gpu_hours, sum(a.idle_minutes) AS idle_minutes,
    sum(a.gpu_hours) FILTER (a.state IN ('failed', 'lost', 'preempted', 'cancelled')) AS unfinished_gpu_hours,
    sum(a.energy_kwh) AS energy_kwh, sum(a.gpu_utilization_percent_mean * a.gpu_hours) / nullif(sum(a.gpu_hours)
        FILTER (a.gpu_utilization_percent_mean IS NOT NULL), 0) AS gpu_utilization_percent_mean,
    max(a.gpu_memory_asked_bytes) AS gpu_memory_asked_bytes,
    max(a.gpu_memory_used_bytes_peak) AS gpu_memory_used_bytes_peak,
    max(a.memory_asked_bytes) AS memory_asked_bytes, max(a.memory_used_bytes_peak) AS memory_used_bytes_peak,
    max(a.cpus_asked) AS cpus_asked, sum(a.cpus_used_mean * a.seconds)
        / nullif(sum(a.seconds) FILTER (a.cpus_used_mean IS NOT NULL), 0) AS cpus_used_mean,
    max(a.suggested_gpus) AS suggested_gpus, max(a.suggested_gpu_memory_bytes) AS suggested_gpu_memory_bytes,
    max(a.suggested_memory_bytes) AS suggested_memory_bytes, max(a.suggested_cpus) AS suggested_cpus,
    max(a.suggested_seconds) AS suggested_seconds,
    coalesce(list(DISTINCT a.index ORDER BY a.index) FILTER (a.longest_idle_minutes >= 10), []) AS stalled_indexes
FROM one o LEFT JOIN attempts a ON true GROUP BY ALL
"""


class JobSummary(Struct, frozen=True, kw_only=True):
    """Use of a job, or of one of its tasks.

    Attributes:
        job_id: id of the job.
        owner: owner of the job.
        name: name of the workload.
        index: of the task; null for the whole job.
        state: of the task, or of all tasks together.
        gpus: devices of each task.
        hosts: hosts of each task.
        max_seconds: time limit of each attempt; null for none.
        tasks: number of tasks.
        tasks_done: number of tasks that are done.
        tasks_failed: number of tasks that failed, were lost, or preempted and not queued again.
        attempts: number of starts.
        pending_seconds_mean: mean time until a start.
        seconds_median: median of the times of the attempts.
        seconds_max: longest attempt.
        seconds_total: time of all attempts.
        gpu_hours: hours held, in whole boards.
        idle_gpu_hours: GPU-hours with the device below 5%.
        idle_minutes: minutes below 5% of a device, mean over the devices of a task, in all.
        unfinished_gpu_hours: GPU-hours of attempts that ended without being done.
        energy_kwh: energy used.
        gpu_utilization_percent_mean: mean over the time held.
        gpu_memory_asked_bytes: memory asked for on each device; 0 if none was.
        gpu_memory_used_bytes_peak: largest peak of a device.
        memory_asked_bytes: host RAM asked for on each host; 0 if none was.
        memory_used_bytes_peak: most RAM of a task's processes on one host.
        cpus_asked: cores asked for; 0 if none were.
        cpus_used_mean: mean number of busy cores.
        suggested_gpus: devices that had a minute that was not idle; the most of a task.
        suggested_gpu_memory_bytes: memory of a device that would have done for all tasks.
        suggested_memory_bytes: RAM on all hosts that would have done.
        suggested_cpus: cores that would have done.
        suggested_seconds: time limit that would have done for those that are done.
        stalled_indexes: tasks whose devices were all idle for ten minutes or more without interruption.
    """

    job_id: str
    owner: str
    name: str = ""
    index: int | None = None
    state: JobState
    gpus: int = 0
    hosts: int = 1
    max_seconds: float | None = None
    tasks: int = 1
    tasks_done: int = 0
    tasks_failed: int = 0
    attempts: int = 0
    pending_seconds_mean: float | None = None
    seconds_median: float | None = None
    seconds_max: float | None = None
    seconds_total: float | None = None
    gpu_hours: float | None = None
    idle_gpu_hours: float | None = None
    idle_minutes: float | None = None
    unfinished_gpu_hours: float | None = None
    energy_kwh: float | None = None
    gpu_utilization_percent_mean: float | None = None
    gpu_memory_asked_bytes: int | None = None
    gpu_memory_used_bytes_peak: int | None = None
    memory_asked_bytes: int | None = None
    memory_used_bytes_peak: int | None = None
    cpus_asked: float | None = None
    cpus_used_mean: float | None = None
    suggested_gpus: int | None = None
    suggested_gpu_memory_bytes: int | None = None
    suggested_memory_bytes: int | None = None
    suggested_cpus: float | None = None
    suggested_seconds: float | None = None
    stalled_indexes: list[int] = []


def statement(task: str) -> str:
    """SQL for the summary of a job, or of one of its tasks: one row, or none if the history does not know it.

    Args:
        task: `1234` or `1234_7`. Of several jobs with the same id it is the one that was submitted last.

    Raises:
        ValueError: it is no name of a job or a task.
    """
    job_id, index = parse_task_name(task)
    if index is None:
        return _SQL.format(job_id=job_id, where="", state="o.state", tasks="o.tasks")
    state = "coalesce(max(a.state) FILTER (a.latest), 'pending')"
    return _SQL.format(job_id=job_id, where=f" WHERE s.index = {index}", state=state, tasks="1")


def summary_of(task: str, rows: Sequence[Mapping[str, Any]]) -> JobSummary | None:
    """Summary from the rows that `statement` gives; None without any.

    Args:
        task: as for `statement`.
        rows: as dictionaries (`QueryResult.dicts`).
    """
    if not rows:
        return None
    return msgspec.convert({**rows[0], "index": parse_task_name(task)[1]}, JobSummary, strict=False)


def lines(found: JobSummary) -> list[tuple[str, str]]:
    """The summary as names and values, in the order in which they are shown; what is not known is left out."""
    rows = [
        ("tasks", _tasks(found)),
        ("time", _times(found)),
        ("in the queue", "" if found.pending_seconds_mean is None else format_seconds(found.pending_seconds_mean)),
        ("GPUs", _devices(found)),
        ("GPU memory", _of(found.gpu_memory_used_bytes_peak, found.gpu_memory_asked_bytes)),
        ("RAM", _of(found.memory_used_bytes_peak, found.memory_asked_bytes)),
        ("cores", _cores(found)),
        ("energy", "" if found.energy_kwh is None else f"{found.energy_kwh:.3g} kWh"),
        ("stalled", _stalled(found)),
        ("would have done", suggestion(found)),
    ]
    return [(name, value) for name, value in rows if value]


def suggestion(found: JobSummary) -> str:
    """Options of a request that would have done, where they ask for less than was asked; empty if none do.

    Memory is suggested where some was asked for: a request without it takes what there is. A job that has not ended may
    still need more.
    """
    if found.state not in FINAL:
        return ""
    options: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("--gpus", _less(found.suggested_gpus, found.gpus), str),
        ("--memory", _less(found.suggested_gpu_memory_bytes, found.gpu_memory_asked_bytes), exact_bytes),
        (
            "--host-memory",
            _less(found.suggested_memory_bytes, (found.memory_asked_bytes or 0) * found.hosts),
            exact_bytes,
        ),
        ("--cpus", _less(found.suggested_cpus, found.cpus_asked), "{:g}".format),
        ("--max", _less(found.suggested_seconds, found.max_seconds), exact_seconds),
    ]
    return " ".join(f"{option} {words(value)}" for option, value, words in options if value is not None)


def _less(suggested: Any, asked: Any) -> Any:
    return suggested if suggested is not None and asked and suggested < asked else None


def _tasks(found: JobSummary) -> str:
    if found.tasks == 1 and found.attempts < 2:
        return ""
    again = f"; {found.attempts} attempts" if found.attempts > found.tasks else ""
    if found.tasks == 1:
        return f"{found.attempts} attempts"
    failed = f", {found.tasks_failed} failed" if found.tasks_failed else ""
    return f"{found.tasks}: {found.tasks_done} done{failed}{again}"


def _times(found: JobSummary) -> str:
    if found.seconds_max is None or found.seconds_median is None or found.seconds_total is None:
        return ""
    text = format_seconds(found.seconds_max)
    if found.attempts > 1:
        total = format_seconds(found.seconds_total)
        text = f"{format_seconds(found.seconds_median)} (median), {text} at most, {total} in all"
    return text + (f"; the limit is {format_seconds(found.max_seconds)}" if found.max_seconds else "")


def _devices(found: JobSummary) -> str:
    if not found.gpu_hours:
        return ""
    parts = [f"{found.gpu_hours:.2f} GPU-hours"]
    activity = found.gpu_utilization_percent_mean
    parts.append("activity not measured" if activity is None else f"{activity:.0f}% active")
    if found.idle_minutes:
        parts.append(f"{found.idle_minutes:.0f} min idle ({found.idle_gpu_hours or 0:.2f} GPU-hours)")
    if found.unfinished_gpu_hours:
        parts.append(f"{found.unfinished_gpu_hours:.2f} GPU-hours in attempts that were not done")
    return ", ".join(parts)


def _of(used: int | None, asked: int | None) -> str:
    if not used:
        return ""
    return f"{format_bytes(used)} at most" + (
        f", {used / asked:.0%} of {format_bytes(asked)} asked for" if asked else ""
    )


def _cores(found: JobSummary) -> str:
    if found.cpus_used_mean is None:
        return ""
    asked = f" of {found.cpus_asked:g} asked for" if found.cpus_asked else ""
    return f"{found.cpus_used_mean:.1f} busy on average{asked}"


def _stalled(found: JobSummary) -> str:
    if not found.stalled_indexes:
        return ""
    if found.tasks == 1:
        return "its GPUs were idle for ten minutes or more without interruption"
    shown = ", ".join(str(index) for index in found.stalled_indexes[:_SOME])
    more = len(found.stalled_indexes) - _SOME
    number = len(found.stalled_indexes)
    return f"{number} task{'s' if number > 1 else ''}: {shown}" + (f" and {more} more" if more > 0 else "")
