"""Rows of a table of jobs, with a bar of the states of each job's tasks; also states, times and names as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from nicegui.element import Element

from ...schemas.work.jobs import Attempt, Job, JobState
from ..html import table, tag

_HEADS: Final = ("Job", "Owner", "State", "Tasks", "Progress", "Array", "GPUs", "Group", "Age", "Because")
_IN_BAR: Final = (
    JobState.DONE, JobState.RUNNING, JobState.COMPLETING, JobState.STARTING, JobState.PENDING, JobState.CANCELLED,
    JobState.PREEMPTED, JobState.LOST, JobState.FAILED,
)  # fmt: skip
"""States in the order of the bar: what is done on the left, what went wrong on the right."""
_TONES: Final = {
    JobState.RUNNING: "busy", JobState.COMPLETING: "busy", JobState.STARTING: "busy", JobState.DONE: "good",
    JobState.LOST: "bad", JobState.FAILED: "bad", JobState.PREEMPTED: "warn",
}  # fmt: skip


class JobTable:
    """A table of jobs. Only what changes is sent to the browser.

    Args:
        owners: show the owners.
        empty: text where there are no jobs.
    """

    def __init__(self, *, owners: bool, empty: str) -> None:
        self._heads = [head for head in _HEADS if owners or head != "Owner"]
        self._empty = empty
        self._place = tag("div")
        self._ids: list[str] | None = None
        self._rows: list[_Row] = []

    def show(self, jobs: Sequence[Job]) -> None:
        """Show jobs in this order."""
        ids = [job.job_id for job in jobs]
        if ids != self._ids:
            self._ids = ids
            self._place.clear()
            self._rows = [_Row(job, self._heads) for job in jobs]
            with self._place:
                if jobs:
                    table(self._heads, [row.cells for row in self._rows], numeric=(self._heads.index("GPUs"),))
                else:
                    tag("div", "note", self._empty)
        now = datetime.now(UTC)
        for row, job in zip(self._rows, jobs, strict=True):
            row.show(job, now)


class _Row:
    def __init__(self, job: Job, heads: Sequence[str]) -> None:
        self._job = job
        self._heads = heads
        self._places: dict[str, Element] = {}
        self._shown: dict[str, Any] = {}

    @property
    def cells(self) -> list[Any]:
        """Texts of what stays, and functions that create the cells of what changes."""
        job = self._job
        fixed: dict[str, Any] = {
            "Job": self._name,
            "Owner": job.owner,
            "Array": job.array or "–",
            "GPUs": gpus_of(job),
            "Group": job.group or "–",
        }
        return [fixed.get(head) or self._cell(head) for head in self._heads]

    def _name(self) -> None:
        job = self._job
        with tag("div", "clip"), tag("a", "", href=job_url(job.job_id), title=job.name or None):
            tag("b", text=job.job_id)
            if job.name:
                tag("span", text=f" {job.name}")

    def _cell(self, head: str) -> Callable[[], None]:
        def create() -> None:
            self._places[head] = tag("div", "clip") if head in ("State", "Tasks", "Because") else tag("span", text="")

        return create

    def show(self, job: Job, now: datetime) -> None:
        if self._changed("State", (job.state, job.held)):
            with self._cleared("State"):
                state_chip(job.state, held=job.held)
        if self._changed("Tasks", job.counts):
            with self._cleared("Tasks"):
                states_bar(job.counts)
        if self._changed("Because", job.message):
            with self._cleared("Because"):
                tag("span", text=job.message or "–", title=job.message or None)
        for head, text in (("Progress", percent(job.progress)), ("Age", age(job, now))):
            if self._changed(head, text):
                self._places[head].set_text(text)  # pyright: ignore[reportAttributeAccessIssue]

    def _changed(self, head: str, value: Any) -> bool:
        if head in self._shown and self._shown[head] == value:
            return False
        self._shown[head] = value
        return True

    def _cleared(self, head: str) -> Element:
        self._places[head].clear()
        return self._places[head]


def job_url(job_id: str, index: int | None = None) -> str:
    """Path of a job's page, with a task selected if an index is given."""
    return f"/job/{job_id}" if index is None else f"/job/{job_id}?task={index}"


def job_link(attempt: Attempt, name: str = "") -> None:
    """Create a link to the task of a job that a lease or a request is for."""
    with tag("a", "link", href=job_url(attempt.job_id, attempt.task), title=f"Job {attempt.job_id}"):
        tag("span", text=f"{name or 'job'} · {attempt.job_id}_{attempt.task}")


def state_chip(state: JobState, *, held: bool = False) -> None:
    """Create the state of a job or a task."""
    tag("span", f"chip {_TONES.get(state, '')}", state.value)
    if held:
        tag("span", "chip warn", "held")


def states_bar(counts: Mapping[str, int], *, wide: bool = False) -> None:
    """Create a bar with a part for each state that tasks have."""
    total = sum(counts.values()) or 1
    words = states_in_words(counts)
    with tag("div", "job-bar wide" if wide else "job-bar", role="img", aria_label=words, title=words):
        at = 0
        for state in _IN_BAR:
            if count := counts.get(state.value, 0):
                tag("i", f"job-{state.value}").style(f"left:{100 * at / total:.2f}%;width:{100 * count / total:.2f}%")
                at += count


def states_in_words(counts: Mapping[str, int]) -> str:
    """Number of tasks in each state: `12 tasks: 10 done, 2 failed`."""
    parts = ", ".join(f"{counts[state.value]:,} {state.value}" for state in _IN_BAR if counts.get(state.value))
    total = sum(counts.values())
    return f"{total:,} task{'' if total == 1 else 's'}: {parts}"


def gpus_of(job: Job) -> str:
    """Devices of each task, and on how many hosts if on several."""
    return f"{job.gpus} on {job.hosts} hosts" if job.hosts > 1 else str(job.gpus)


def percent(fraction: float | None) -> str:
    """A fraction in percent; a dash if it is unknown."""
    return "–" if fraction is None else f"{100 * fraction:.0f}%"


def age(job: Job, now: datetime) -> str:
    """Time since a job was submitted."""
    return length((now - job.submitted_at).total_seconds())


def length(seconds: float) -> str:
    """A duration in the largest unit that says something."""
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} d"
