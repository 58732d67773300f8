"""Jobs page: what whoever has logged in has going (jobs, leases, waiting requests), and all jobs with a filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from nicegui import ui
from starlette.requests import Request

from ...client import CorralError
from ...schemas.operations import QueueEntry
from ...schemas.requests import Lease
from ...schemas.work.jobs import JobFilter, Jobs, JobState, attempt_of_request
from ..components.job_rows import JobTable, length
from ..fleet import Problem, problem_of
from ..html import button, on_choice, remember, search, table, tag, url
from ..page_frame import Frame, Notice

_SHOWN: Final = 100
"""Jobs on one page of the listing."""
_MINE: Final = 50
_ACTIVE: Final = "active"
_HELD_SHOWN: Final = 20
_STATE_CHOICES: Final = (
    ("", "All states"),
    (_ACTIVE, "Not ended"),
    *((state.value, state.value) for state in JobState),
)
_NO_JOBS: Final = Problem(
    kind="jobs",
    title="No jobs",
    detail="A job is a command or a script that waits for GPUs, runs on their hosts, and keeps what it prints.",
    commands=("corral submit --gpus 1 -- python train.py", "corral submit --array 0-99%10 sweep.sh"),
)


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/jobs")
    async def page(request: Request, owner: str = "", state: str = "", name: str = "", page: str = "") -> None:
        around = frame(request, "Jobs")
        await around.fleet.ready()
        chosen = state if state in dict(_STATE_CHOICES) else ""
        number = int(page) if page.isdecimal() and len(page) < 7 else 1
        with around.show("/jobs"):
            JobsPage(around, owner[:128], chosen, name[:128], max(1, number))


class JobsPage:
    """The jobs page in one browser.

    Args:
        frame: frame of the page.
        owner: only jobs of this owner; empty for all.
        state: only jobs in this state, or `active` for those that have not ended; empty for all.
        name: only jobs whose name has this text, or matches it as a glob; empty for all.
        page: number of the page of the listing, from 1.
    """

    def __init__(self, frame: Frame, owner: str, state: str, name: str, page: int) -> None:
        self.frame = frame
        self.owner, self.state, self.name, self.page = owner, state, name, page
        self._asking = False
        self._again = False
        with tag("div", "head"):
            with tag("div"):
                tag("h1", text="Jobs")
                self._sub = tag("div", "sub", "")
            with tag("div", "filters", role="search"):
                search(owner, lambda text: self._filter(owner=text), "Owner")
                with tag("select", "field", aria_label="State") as chooser:
                    for value, words in _STATE_CHOICES:
                        tag("option", "", words, value=value, selected=value == state or None)
                on_choice(chooser, lambda value: self._filter(state=value))
                search(name, lambda text: self._filter(name=text), "Name")
        self._notice = Notice()
        with tag("div") as self._content:
            self._content.classes("main").style("padding:0;max-width:none")
            self._mine = _MyWork(frame)
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="All jobs")
                    with tag("div", "bar") as self._pager:
                        self._which = tag("span", "note", "")
                        button("", lambda: self._turn(-1), "quiet small", "chevron_left", title="Newer jobs")
                        button("", lambda: self._turn(1), "quiet small", "chevron_right", title="Older jobs")
                self._table = JobTable(owners=True, empty="No job matches the filter.")
        self._content.set_visibility(False)
        self._refresh()
        frame.on_refresh(self._refresh)

    def _refresh(self) -> None:
        ui.timer(0, self._ask, once=True)

    async def _filter(self, **chosen: str) -> None:
        self.owner = chosen.get("owner", self.owner).strip()[:128]
        self.state = chosen.get("state", self.state)
        self.name = chosen.get("name", self.name).strip()[:128]
        self.page = 1
        await self._changed()

    async def _turn(self, pages: int) -> None:
        self.page = max(1, self.page + pages)
        await self._changed()

    async def _changed(self) -> None:
        shown = self.page if self.page > 1 else ""
        remember("/jobs", owner=self.owner, state=self.state, name=self.name, page=shown)
        await self._ask()

    @property
    def _wanted(self) -> JobFilter:
        plain = self.name and not set(self.name) & set("*?[")
        return JobFilter(
            owner=self.owner or None,
            states=[JobState(self.state)] if self.state not in ("", _ACTIVE) else [],
            active=self.state == _ACTIVE,
            name=f"*{self.name}*" if plain else self.name,
            offset=(self.page - 1) * _SHOWN,
            limit=_SHOWN,
        )

    async def _ask(self) -> None:
        """Ask for the jobs and show them. A call while this is running makes it ask once more afterwards."""
        if self._asking:
            self._again = True
            return
        self._asking = True
        try:
            while True:
                self._again = False
                await self._show()
                if not self._again:
                    break
        finally:
            self._asking = False

    async def _show(self) -> None:
        jobs, fleet = self.frame.jobs, self.frame.fleet
        mine = JobFilter(owner=self.frame.session.name, limit=_MINE)
        try:
            found = await jobs.page(self._wanted)
            own = await jobs.page(mine)
            counts = await jobs.counts()
        except CorralError as error:
            self._notice.tell(problem_of(error, fleet.url), whole=not self._content.visible)
            return
        anything = bool(found.total or own.total or self.owner or self.state or self.name)
        nothing = not anything and not self._mine.holds_anything
        self._notice.tell(_NO_JOBS if nothing else fleet.problem, whole=nothing)
        self._content.set_visibility(not nothing)
        if counts is not None:
            self._sub.set_text(f"{counts.going:,} with GPUs or running, {counts.waiting:,} waiting")
        self._mine.show(own)
        self._show_page(found)

    def _show_page(self, found: Jobs) -> None:
        first = (self.page - 1) * _SHOWN
        last = first + len(found.jobs)
        self._which.set_text(f"{first + 1:,}–{last:,} of {found.total:,}" if found.jobs else f"{found.total:,}")
        before, after = self._pager.default_slot.children[1:]
        for one, disabled in ((before, self.page == 1), (after, last >= found.total)):
            if one.props.get("disabled", False) != disabled:
                one.props["disabled"] = disabled
                one.update()
        self._table.show([listing.job for listing in found.jobs])


class _MyWork:
    """Jobs, leases and waiting requests of whoever has logged in."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._held_shown: Any = None
        with tag("section", "panel") as self._place:
            with tag("div", "panel-head"):
                tag("h2", text="My work")
                self._note = tag("span", "note", "")
            self._jobs = JobTable(owners=False, empty="")
            self._held = tag("div").style("margin-top:14px")

    @property
    def _leases(self) -> list[Lease]:
        return [lease for lease in self.frame.fleet.leases if lease.owner == self.frame.session.name]

    @property
    def _queue(self) -> list[QueueEntry]:
        return [entry for entry in self.frame.fleet.queue if entry.owner == self.frame.session.name]

    @property
    def holds_anything(self) -> bool:
        """True if there are leases or waiting requests."""
        return bool(self._leases or self._queue)

    def show(self, own: Jobs) -> None:
        """Show the jobs, and leases and requests as of the last refresh."""
        leases, queue = self._leases, self._queue
        of_jobs = sum(attempt_of_request(lease.request_id) is not None for lease in leases)
        waiting = [entry for entry in queue if attempt_of_request(entry.request_id) is None]
        words = [_count(own.total, "job"), _count(len(leases), "lease"), _count(len(waiting), "waiting request")]
        more = f"; the newest {_MINE} jobs are shown" if own.total > len(own.jobs) else ""
        of_them = f" ({of_jobs} of jobs)" if of_jobs else ""
        self._note.set_text(f"{words[0]}, {words[1]}{of_them}, {words[2]}{more}")
        self._place.set_visibility(bool(own.total or leases or queue))
        self._jobs.show([listing.job for listing in own.jobs])
        self._show_held([lease for lease in leases if attempt_of_request(lease.request_id) is None], waiting)

    def _show_held(self, leases: Sequence[Lease], waiting: Sequence[QueueEntry]) -> None:
        now = datetime.now(UTC)
        rows = [*(_lease_row(one, now) for one in leases[:_HELD_SHOWN]), *map(_queue_row, waiting[:_HELD_SHOWN])]
        if rows == self._held_shown:
            return
        self._held_shown = rows
        self._held.clear()
        if not rows:
            return
        with self._held:
            table(
                ("Name", "What", "GPUs", "Since", "Where, or why it waits", "Id"), [_row(row) for row in rows],
                numeric=(2,),
            )  # fmt: skip


def _lease_row(lease: Lease, now: datetime) -> tuple[str, ...]:
    gpus = sum(grant.share for grant in lease.grants if grant.device)
    since = length((now - lease.granted_at).total_seconds())
    return lease.name or "–", "lease", f"{gpus:g}", since, _hosts(lease), lease.lease_id


def _queue_row(entry: QueueEntry) -> tuple[str, ...]:
    why = f"position {entry.position}: {entry.message}"
    return entry.name or "–", "waiting request", str(entry.gpus), length(entry.waiting_seconds), why, entry.request_id


def _row(row: tuple[str, ...]) -> tuple[Any, ...]:
    *words, id = row
    return (*words, lambda: tag("a", "mono", id, href=url("/leases", q=id)))


def _hosts(lease: Lease) -> str:
    return ", ".join(sorted({grant.host for grant in lease.grants}))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
