"""Tables and texts about jobs for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...client.job_names import compact
from ...schemas.jobs import FINAL, Job, JobListing, JobState, JobTask, task_name
from ...schemas.units import format_bytes
from .. import render

_STYLES: Final = {
    JobState.RUNNING: "green",
    JobState.COMPLETING: "green",
    JobState.STARTING: "cyan",
    JobState.PENDING: "yellow",
    JobState.DONE: "dim",
    JobState.CANCELLED: "dim",
}
_WIDE: Final = 100
_NARROW: Final = 60


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


def jobs_table(jobs: Iterable[Job], width: int, now: datetime | None = None) -> Table:
    """Table of jobs, one per line.

    Args:
        jobs: the jobs.
        width: of the terminal, in columns: a narrow one leaves out what matters least.
        now: time of the listing.
    """
    jobs = list(jobs)
    now = now or datetime.now(UTC)
    grouped = any(job.group for job in jobs) and width >= _WIDE
    progressing = any(job.progress is not None for job in jobs)
    columns = [
        ("JOB", True),
        ("OWNER", width >= _NARROW),
        ("GROUP", grouped),
        ("NAME", True),
        ("STATE", True),
        ("DONE", progressing),
        ("GPUS", width >= _NARROW),
        ("HOSTS", any(job.hosts > 1 for job in jobs) and width >= _WIDE),
        ("AGE", width >= _NARROW),
        ("TASKS", any(job.array for job in jobs) and width >= _WIDE),
        ("WHY", any(job.message for job in jobs) and width >= _NARROW),
    ]
    made = render.table(*(name for name, shown in columns if shown), right=("JOB", "DONE", "GPUS", "HOSTS", "AGE"))
    for column in made.columns:
        if column.header in ("JOB", "STATE", "DONE", "GPUS", "AGE"):
            column.overflow, column.min_width = "fold", len(str(column.header))
            column.ratio = None
    longest = max((len(job.job_id) for job in jobs), default=3)
    made.columns[0].min_width = max(3, longest)
    for job in jobs:
        cells: dict[str, Any] = {
            "JOB": escape(job.job_id),
            "OWNER": escape(job.owner),
            "GROUP": escape(job.group),
            "NAME": escape(job.name),
            "STATE": state_text(job.state, job.held),
            "DONE": progress_text(job.progress),
            "GPUS": str(job.gpus),
            "HOSTS": str(job.hosts),
            "AGE": render.duration((now - job.submitted_at).total_seconds()),
            "TASKS": escape(tasks_text(job)),
            "WHY": escape(job.message),
        }
        made.add_row(*(cells[name] for name, shown in columns if shown))
    return made


def elapsed_seconds(task: JobTask, now: datetime | None = None) -> float | None:
    """How long a task has run, in its last attempt; None if it has not started."""
    if task.started_at is None:
        return None
    return ((task.ended_at or now or datetime.now(UTC)) - task.started_at).total_seconds()


def ended_text(task: JobTask) -> str:
    """How a task ended: its exit code or signal; empty if it has neither."""
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
    made.columns[0].min_width = max((len(_name(job, task)) for task in tasks), default=4)
    made.columns[1].min_width = max((len(task.state.value) for task in tasks), default=5)
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
    return made


def _name(job: Job, task: JobTask) -> str:
    return task_name(job.job_id, task.index if job.array else None)


def shown_tasks(tasks: Sequence[JobTask], most: int) -> list[JobTask]:
    """Tasks worth a line: those that run or have failed before those that wait or are done, in order within each."""
    order = {state: place for place, state in enumerate(JobState)}
    dull = (JobState.PENDING, JobState.DONE)
    chosen = sorted(
        tasks, key=lambda task: (task.state in dull, order[task.state] if task.state in dull else 0, task.index)
    )
    return sorted(chosen[:most], key=lambda task: task.index)


def failed_tasks(listing: JobListing) -> str:
    """Names of the tasks that have not ended well, as `corral resubmit` takes them; empty if all have."""
    wrong = [task.index for task in listing.tasks if task.state in FINAL and task.state is not JobState.DONE]
    if not wrong or not listing.job.array:
        return ""
    return f"{listing.job.job_id}_{wrong[0]}" if len(wrong) == 1 else f"{listing.job.job_id}_[{compact(wrong)}]"


def details(listing: JobListing) -> list[tuple[str, Any]]:
    """What is known of a job, as names and values."""
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
    return at.astimezone().isoformat(sep=" ", timespec="seconds")
