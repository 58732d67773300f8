"""Job page: states of all tasks, the selected one with its output, what the job executes, and commands about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

from nicegui import ui
from starlette.requests import Request

from ...client import CorralError, NotFound
from ...client.jobs.names import Selection
from ...schemas.requests import Lease
from ...schemas.work.jobs import FINAL, Job, JobListing, JobState, JobTask, JobVerb, task_name
from ..components.job_details import show_spec
from ..components.job_rows import gpus_of, length, percent, state_chip, states_bar, states_in_words
from ..components.output_panel import OutputPanel
from ..components.summary_panel import SummaryPanel
from ..components.task_details import TaskDetails, clock
from ..components.tasks import TaskGrid
from ..fleet import Problem, problem_of
from ..html import button, on_typing, remember, tag, url
from ..job_tasks import STATES, TaskStates
from ..jobs import WatchedTasks
from ..page_frame import Frame, NotAllowed, Notice
from ..security.accounts import Role

_FIRST_SHOWN: Final = (JobState.FAILED, JobState.LOST, JobState.RUNNING, JobState.COMPLETING, JobState.STARTING)
"""A task in the first of these states is selected until somebody selects another one."""


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/job/{job_id}")
    async def page(request: Request, job_id: str, task: str = "") -> None:
        around = frame(request, f"Job {job_id[:32]}")
        await around.fleet.ready()
        with around.show("/jobs"):
            if not job_id.isdecimal() or len(job_id) > 32:
                Notice().tell(_no_job(job_id[:32]), whole=True)
                return
            JobPage(around, job_id, int(task) if task.isdecimal() and len(task) < 11 else None)


class JobPage:
    """The page of a job in one browser.

    Args:
        frame: frame of the page.
        job_id: id of the job.
        index: of the selected task; None for one that is worth a look.
    """

    def __init__(self, frame: Frame, job_id: str, index: int | None) -> None:
        self.frame = frame
        self.job_id = job_id
        self.index = index
        self._job: Job | None = None
        self._asking = False
        self._again = False
        self._summing = False
        self._head_shown: Any = None
        self._facts_shown: Any = None
        self._task_shown: Any = None
        self._watching: contextlib.AbstractContextManager[WatchedTasks] | None = None
        self._watched: WatchedTasks | None = None
        self._states: TaskStates | None = None
        self._head = tag("div")
        self._notice = Notice()
        with tag("div") as self._content:
            self._content.classes("main").style("padding:0;max-width:none")
            self._facts = tag("section", "panel")
            with tag("section", "panel") as self._array:
                with tag("div", "panel-head"):
                    tag("h2", text="Tasks")
                    with tag("div", "bar"):
                        self._array_note = tag("span", "note", "")
                        self._number = tag("input", "field", type="number", min=0, placeholder="Task",
                                           aria_label="Select a task by its index").style("width:110px")  # fmt: skip
                        on_typing(self._number, self._typed)
                self._grid = TaskGrid(self._open)
            self._array.set_visibility(False)
            with tag("section", "panel") as self._one:
                with tag("div", "panel-head"):
                    self._title = tag("h2", text="Task")
                    self._task_commands = tag("div", "bar")
                self._task = TaskDetails()
            self._one.set_visibility(False)
            self._output = OutputPanel(frame)
            self._command = _Command(frame, self._perform)
        self._content.set_visibility(False)
        self._summary = SummaryPanel(frame)
        frame.on_close(self._close)
        self._refresh()
        frame.on_refresh(self._refresh)

    def _close(self) -> None:
        if self._watching is not None:
            self._watching.__exit__(None, None, None)
            self._watching = None

    # Selection

    async def _open(self, position: int) -> None:
        if self._states is not None and 0 <= position < len(self._states.indexes):
            await self._select(self._states.indexes[position])

    async def _typed(self, text: str) -> None:
        if text.isdecimal() and self._states is not None and self._states.position(int(text)) is not None:
            await self._select(int(text))

    async def _select(self, index: int) -> None:
        self.index = index
        remember(f"/job/{self.job_id}", task=str(index))
        self._mark()
        await self._ask()

    def _mark(self) -> None:
        if self._states is not None and self.index is not None:
            at = self._states.position(self.index)
            self._grid.select(-1 if at is None else at)

    # What is shown

    def _refresh(self) -> None:
        ui.timer(0, self._ask, once=True)

    async def _ask(self) -> None:
        """Ask for the job and show it. A call while this is running makes it ask once more afterwards."""
        if self._asking:
            self._again = True
            return
        self._asking = True
        try:
            while True:
                self._again = False
                await self._ask_once()
                if not self._again:
                    break
        finally:
            self._asking = False

    async def _ask_once(self) -> None:
        try:
            listing = await self.frame.jobs.job(self.job_id, self.index)
        except NotFound:
            self._notice.tell(_no_job(self.job_id), whole=self._job is None)
            if await self._summary.show(self.job_id, self.index) and self._job is None:
                self._notice.tell(_FORGOTTEN)
            return
        except CorralError as error:
            self._notice.tell(problem_of(error, self.frame.fleet.url), whole=self._job is None)
            return
        self._job = listing.job
        self._content.set_visibility(True)
        self._notice.tell(self.frame.fleet.problem)
        self._show_head(listing.job)
        self._show_facts(listing.job)
        self._show_array(listing)
        self._show_task(listing)
        self._command.show(listing.job)
        if not self._summing:
            ui.timer(0, self._sum, once=True)

    async def _sum(self) -> None:
        # Apart from what the planner knows, since the history takes longer to answer.
        self._summing = True
        try:
            array = self._job is not None and self._job.array
            await self._summary.show(self.job_id, self.index if array else None)
        finally:
            self._summing = False

    def _show_head(self, job: Job) -> None:
        commands = self._commands(job)
        shown = (job.state, job.held, [verb for verb, *_ in commands])
        if shown == self._head_shown:
            return
        self._head_shown = shown
        self._head.clear()
        with self._head, tag("div", "head"):
            with tag("div"):
                with tag("div", "bar"):
                    tag("h1", text=f"Job {job.job_id}" + (f" · {job.name}" if job.name else ""))
                    state_chip(job.state, held=job.held)
                with tag("div", "sub"):
                    tag("a", "link", job.owner, href=url("/jobs", owner=job.owner))
                    group = f", {job.group}" if job.group else ""
                    tag("span", text=f"{group}, submitted {clock(job.submitted_at)}")
            with tag("div", "bar"):
                for verb, words, look in commands:
                    button(words, lambda verb=verb: self._confirm(verb, Selection(self.job_id)), look)

    def _show_facts(self, job: Job) -> None:
        facts = [
            ("GPUs of each task", gpus_of(job)),
            ("Processes on each host", str(job.tasks_per_host) if job.tasks_per_host > 1 else ""),
            ("Array", job.array),
            ("Progress", percent(job.progress) if job.progress is not None else ""),
            ("Waits for", ", ".join(f"{one.job_id} ({one.condition})" for one in job.after)),
            ("Ended", clock(job.ended_at) if job.ended_at else ""),
            ("Took", length((job.ended_at - job.submitted_at).total_seconds()) if job.ended_at else ""),
            ("Labels", ", ".join(f"{name}={value}" for name, value in job.labels.items())),
        ]
        shown = (facts, job.counts, job.message)
        if shown == self._facts_shown:
            return
        self._facts_shown = shown
        self._facts.clear()
        with self._facts:
            with tag("div", "panel-head"):
                tag("h2", text=states_in_words(job.counts))
                tag("span", "note", job.message)
            states_bar(job.counts, wide=True)
            with tag("div", "facts").style("margin-top:14px"):
                for name, value in facts:
                    if value:
                        with tag("div"):
                            tag("div", "fact-name", name)
                            tag("div", "fact-value", value)

    def _show_array(self, listing: JobListing) -> None:
        if not listing.job.array:
            self._again = self._again or self.index != 0
            self.index = 0
            return
        self._array.set_visibility(True)
        if self._watched is None:
            self._watching = self.frame.jobs.watch_tasks(self.job_id)
            self._watched = self._watching.__enter__()
        self._watched.check(listing)
        error = self._watched.error
        self._array_note.set_text(str(error) if error else "" if self._watched.states else "Loading…")
        self._states = states = self._watched.states
        if states is None:
            return
        if self.index is None:
            self.index = _worth_a_look(states)
            self._again = True
        at = states.position(self.index)
        self._grid.show(states.indexes, bytes(states.codes), -1 if at is None else at)

    def _show_task(self, listing: JobListing) -> None:
        job, index = listing.job, self.index
        task = next((one for one in listing.tasks if one.index == index), None)
        if index is None or (task is None and not listing.tasks and self._again):
            return
        self._one.set_visibility(True)
        self._title.set_text(f"Task {task_name(job.job_id, index)}" if job.array else "Task")
        self._show_task_commands(job, task, index)
        self._task.show(job, task, self._lease(task))
        self._output.show(job, task)

    def _show_task_commands(self, job: Job, task: JobTask | None, index: int) -> None:
        commands = self._task_commands_of(job, task)
        shown = (index, commands)
        if shown == self._task_shown:
            return
        self._task_shown = shown
        self._task_commands.clear()
        with self._task_commands:
            for verb, words, look in commands:
                which = Selection(job.job_id, (index,))
                button(words, lambda verb=verb, which=which: self._confirm(verb, which), f"small {look}")

    def _lease(self, task: JobTask | None) -> Lease | None:
        if task is None or not task.lease_id:
            return None
        return next((one for one in self.frame.fleet.leases if one.lease_id == task.lease_id), None)

    # Commands

    def _acts(self, job: Job) -> bool:
        """True if whoever has logged in may give commands about the job."""
        mine = job.owner == self.frame.session.name
        return self.frame.may(Role.REQUESTER if mine else Role.OPERATOR)

    def _commands(self, job: Job) -> list[tuple[JobVerb, str, str]]:
        """Commands about the whole job: verb, words and look of the button."""
        if not self._acts(job):
            return []
        found: list[tuple[JobVerb, str, str]] = []
        if job.held:
            found.append((JobVerb.RELEASE, "Unhold", ""))
        elif job.counts.get(JobState.PENDING.value):
            found.append((JobVerb.HOLD, "Hold", ""))
        if any(job.counts.get(state.value) for state in FINAL - {JobState.DONE}):
            found.append((JobVerb.RESUBMIT, "Resubmit", ""))
        if any(job.counts.get(state.value) for state in set(JobState) - FINAL):
            found.append((JobVerb.CANCEL, "Cancel job", "danger"))
        return found

    def _task_commands_of(self, job: Job, task: JobTask | None) -> list[tuple[JobVerb, str, str]]:
        if task is None or not job.array or not self._acts(job):
            return []
        if task.state in FINAL:
            return [(JobVerb.RESUBMIT, "Resubmit task", "")]
        return [(JobVerb.CANCEL, "Cancel task", "danger")]

    def _confirm(self, verb: JobVerb, which: Selection) -> None:
        job = self._job
        if job is None:
            return
        name = task_name(which.job_id, which.indexes[0]) if which.indexes else f"job {which.job_id}"
        asks, effect, done = _WORDS[verb]
        mine = job.owner == self.frame.session.name

        async def do(reason: str) -> bool:
            async def act() -> None:
                await self._perform(job, verb, which, reason)

            return await self.frame.attempt(act, f"{name} {done}")

        title = f"{asks} {name}{'' if mine else f' of {job.owner}'}?"
        verb_words = {JobVerb.CANCEL: "Cancel it", JobVerb.RELEASE: "Unhold"}.get(verb, asks)
        self.frame.confirm(title, effect, verb_words, do, None if mine else "Reason")

    async def _perform(self, job: Job, verb: JobVerb, which: Selection, reason: str = "") -> Any:
        """Give a command as the owner, or as an operator.

        Raises:
            NotAllowed: the role does not permit it.
            CorralError: the call failed.
        """
        if job.owner == self.frame.session.name:
            if verb is not JobVerb.SHOW:
                self.frame.require(Role.REQUESTER)
            elif not self.frame.may_read(job.owner):
                raise NotAllowed("Only its owner and operators may read what a job executes.")
            return await self.frame.jobs.act(verb, which, owner=job.owner, reason=reason)
        user = self.frame.require(Role.OPERATOR)
        return await self.frame.jobs.act(verb, which, operator=user.name, reason=reason)


class _Command:
    """Panel with what the job executes, which is asked for by a button."""

    def __init__(self, frame: Frame, perform: Callable[..., Any]) -> None:
        self.frame = frame
        self._perform = perform
        self._job: Job | None = None
        with tag("section", "panel") as self._place:
            with tag("div", "panel-head"):
                tag("h2", text="What it executes")
                self._button = button("Show command and environment", self._show, "small")
            self._spec = tag("div")
        self._place.set_visibility(False)

    def show(self, job: Job) -> None:
        """Show the panel to those who may read it."""
        self._job = job
        may = self.frame.may_read(job.owner)
        self._place.set_visibility(may)
        if not may:
            self._spec.clear()

    async def _show(self) -> None:
        job = self._job
        if job is None:
            return
        try:
            details = await self._perform(job, JobVerb.SHOW, Selection(job.job_id))
        except (NotAllowed, CorralError) as error:
            ui.notify(str(error), type="negative", multi_line=True)
            return
        self._button.set_visibility(False)
        self._spec.clear()
        if details.spec is not None:
            with self._spec:
                show_spec(details.spec)


_WORDS: Final = {
    JobVerb.CANCEL: (
        "Cancel", "What runs of it is stopped, and what waits leaves the queue. Its devices are freed.",
        "is cancelled",
    ),
    JobVerb.HOLD: ("Hold", "What waits of it is not started before it is released; what runs goes on.", "is held"),
    JobVerb.RELEASE: ("Unhold", "What waits of it is started as devices become free.", "is no longer held"),
    JobVerb.RESUBMIT: (
        "Resubmit", "What has ended of it and is not done is queued again, as a further attempt.", "is queued again",
    ),
}  # fmt: skip
"""By verb: what it asks, what it does, and what is then true."""


def _worth_a_look(states: TaskStates) -> int:
    for state in _FIRST_SHOWN:
        at = states.codes.find(STATES.index(state))
        if at >= 0:
            return states.indexes[at]
    return states.indexes[0]


_FORGOTTEN: Final = Problem(
    kind="jobs", title="It ended long ago", detail="The planner no longer knows this job; the history does."
)


def _no_job(job_id: str) -> Problem:
    return Problem(
        kind="jobs",
        title=f"No job {job_id}",
        detail="Neither the planner nor the history knows such a job.",
        commands=(f"corral job {job_id}",),
    )
