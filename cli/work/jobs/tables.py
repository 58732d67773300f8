"""Tables and texts about jobs for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ....client.jobs.names import compact
from ....schemas.values.units import format_bytes
from ....schemas.work.jobs import FINAL, Job, JobListing, JobState, JobTask, task_name
from ... import render

_STYLES: Final = {
    JobState.RUNNING: "green",
    JobState.COMPLETING: "green",
    JobState.STARTING: "cyan",
    JobState.PENDING: "yellow",
    JobState.DONE: "dim",
    JobState.CANCELLED: "dim",
}


def state_text(state: JobState, held: bool = False) -> Text:
    """A state, colored; what fails is red."""
    shown = "held" if held and state is JobState.PENDING else state.value
    return Text(shown, style=_STYLES.get(state, "red"))


def tasks_text(job: Job) -> str:
    """Tasks of an array by state, as `3 running, 97 pending`; empty for a job of one."""
    if not job.array:
        return ""
    return ", ".join(f"{job.counts[state]} {state}" for state in JobState if job.counts.get(state))


def progress_text(progress: float | None) -> str:
    """Progress in percent; empty if the job says none."""
    return "" if progress is None else f"{progress:.0%}"


_LEAST: Final = {"NAME": 10, "OWNER": 8, "WHY": 12, "TASKS": 12, "GROUP": 6}
"""Least widths of columns that may be cut; all others are shown whole, or not at all."""
_ORDER: Final = ("JOB", "OWNER", "GROUP", "NAME", "STATE", "DONE", "GPUS", "HOSTS", "AGE", "TASKS", "WHY")
_KEPT_FIRST: Final = ("JOB", "STATE", "NAME", "OWNER", "DONE", "AGE", "GPUS", "WHY", "TASKS", "HOSTS", "GROUP")
_WIDENED: Final = (
    ("OWNER", 20),
    ("TASKS", 40),
    ("NAME", 24),
    ("WHY", 200),
    ("NAME", 200),
    ("GROUP", 40),
    ("OWNER", 200),
)
"""Columns in the order in which they get the room that is left, each up to a width."""
_PADDING: Final = 2


def jobs_table(jobs: Iterable[Job], width: int, now: datetime | None = None) -> Table:
    """Table of jobs, one per line.

    Args:
        jobs: the jobs.
        width: of the terminal, in columns: a narrow one cuts texts, and leaves out what matters least.
        now: time of the listing.
    """
    now = now or datetime.now(UTC)
    rows = [
        {
            "JOB": job.job_id,
            "OWNER": job.owner,
            "GROUP": job.group,
            "NAME": job.name,
            "STATE": state_text(job.state, job.held),
            "DONE": progress_text(None if job.state in FINAL else job.progress),
            "GPUS": str(job.gpus),
            "HOSTS": str(job.hosts) if job.hosts > 1 else "",
            "AGE": render.duration((now - job.submitted_at).total_seconds()),
            "TASKS": tasks_text(job),
            "WHY": job.message,
        }
        for job in jobs
    ]
    cells = {name: [row[name] for row in rows] for name in _ORDER}
    longest = {name: max(len(name), *(len(cell) for cell in column)) for name, column in cells.items() if any(column)}
    widths = _fitting(longest, width)
    shown = [name for name in _ORDER if name in widths]
    made = render.table(*shown, right=("JOB", "DONE", "GPUS", "HOSTS", "AGE"))
    for column in made.columns:
        column.width = widths[str(column.header)]
    for row in rows:
        made.add_row(*(escape(cell) if isinstance(cell := row[name], str) else cell for name in shown))
    return made


def _fitting(longest: Mapping[str, int], width: int) -> dict[str, int]:
    """Widths of the columns that are shown: those that matter most at their least width, then as wide as fits."""
    found: dict[str, int] = {}
    left = width
    for name in _KEPT_FIRST:
        least = min(longest.get(name, 0), _LEAST.get(name) or longest.get(name, 0))
        if name in longest and least + _PADDING <= left:
            found[name] = least
            left -= least + _PADDING
    for name, most in _WIDENED:
        if name in found:
            more = max(0, min(left, min(longest[name], most) - found[name]))
            found[name] += more
            left -= more
    return found


def _keep_whole(table: Table, *names: str) -> None:
    """Let columns be as wide as their cells, so that others are cut in a narrow terminal."""
    for column in table.columns:
        if column.header in names:
            column.min_width = max(len(str(cell)) for cell in (column.header, *column.cells))


def elapsed_seconds(task: JobTask, now: datetime | None = None) -> float | None:
    """Time that a task has run, in its last attempt; None if it has not started."""
    if task.started_at is None:
        return None
    return ((task.ended_at or now or datetime.now(UTC)) - task.started_at).total_seconds()


def ended_text(task: JobTask) -> str:
    """End of a task: its exit code or signal; empty if it has neither."""
    if task.signal:
        return f"signal {task.signal}"
    return "" if task.exit_code is None else f"exit {task.exit_code}"


def tasks_table(listing: JobListing, tasks: Sequence[JobTask]) -> Table:
    """Table of tasks, one per line."""
    job = listing.job
    made = render.table(
        "TASK", "STATE", "TRIES", "TIME", "DONE", "RAM", "CPU", "HOSTS", "END", "WHY",
        right=("TRIES", "TIME", "DONE", "RAM", "CPU"),
    )  # fmt: skip
    for task in tasks:
        elapsed = elapsed_seconds(task)
        memory = sum(part.peak_memory_bytes for part in task.parts)
        cpu = sum(part.cpu_seconds for part in task.parts)
        made.add_row(
            escape(_name(job, task)),
            state_text(task.state, job.held),
            str(task.attempt),
            "" if elapsed is None else render.duration(elapsed),
            progress_text(task.progress),
            format_bytes(memory) if memory else "",
            render.duration(cpu) if cpu else "",
            escape(" ".join(part.host for part in task.parts)),
            ended_text(task),
            escape(task.message),
        )
    _keep_whole(made, "TASK", "STATE", "TRIES", "TIME", "END")
    return made


def _name(job: Job, task: JobTask) -> str:
    return task_name(job.job_id, task.index if job.array else None)


def shown_tasks(tasks: Sequence[JobTask], most: int) -> list[JobTask]:
    """Tasks worth a line: those that run or have failed before those that wait or are done, in order within each."""
    last = {JobState.PENDING: 1, JobState.DONE: 2}
    chosen = sorted(tasks, key=lambda task: (last.get(task.state, 0), task.index))
    return sorted(chosen[:most], key=lambda task: task.index)


def failed_tasks(listing: JobListing) -> str:
    """Names of the tasks that have not ended well, as `corral resubmit` takes them; empty if all have."""
    wrong = [task.index for task in listing.tasks if task.state in FINAL and task.state is not JobState.DONE]
    if not wrong or not listing.job.array:
        return ""
    return f"{listing.job.job_id}_{wrong[0]}" if len(wrong) == 1 else f"{listing.job.job_id}_[{compact(wrong)}]"


def details(listing: JobListing) -> list[tuple[str, Any]]:
    """Details of a job, as names and values."""
    job, request = listing.job, listing.job.request
    asked: list[str] = [f"{job.gpus} GPUs" if job.gpus != 1 else "1 GPU"]
    if request is not None:
        asked += [f"{format_bytes(request.gpu_memory_bytes)} each"] if request.gpu_memory_bytes else []
        asked += [f"{request.cpus:g} cores"] if request.cpus else []
        asked += [f"{format_bytes(request.host_memory_bytes)} RAM"] if request.host_memory_bytes else []
        asked += [f"at most {render.duration(request.max_seconds)}"] if request.max_seconds else []
    if job.hosts > 1:
        asked.append(f"on {job.hosts} hosts")
    if job.tasks_per_host > 1:
        asked.append(f"{job.tasks_per_host} processes on each")
    after = ", ".join(f"{one.job_id}:{one.condition.value}" for one in job.after)
    found: list[tuple[str, Any]] = [
        ("name", escape(job.name)),
        ("owner", escape(job.owner + (f" (group {job.group})" if job.group else ""))),
        ("state", state_text(job.state, job.held)),
        ("tasks", escape(f"{job.array}: {tasks_text(job)}") if job.array else ""),
        ("progress", progress_text(job.progress)),
        ("each" if job.array else "asked for", escape(", ".join(asked))),
        ("after", escape(after)),
        ("submitted", _time(job.submitted_at)),
        ("ended", "" if job.ended_at is None else _time(job.ended_at)),
        ("why", escape(job.message)),
    ]
    return [(name, value) for name, value in found if value]


def _time(at: datetime) -> str:
    return render.local_time(at)
