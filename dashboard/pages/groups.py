"""Groups page: what each group holds, borrows and is owed now and over time, who was preempted, and what is booked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from nicegui import ui
from starlette.requests import Request

from ...client import CorralError
from ...schemas.work.groups import DEFAULT_GROUP, Group, Groups
from ...schemas.work.windows import WindowStatus
from .. import group_history
from ..components import booked
from ..components.quotas import HEADS, NUMERIC, GroupRow, extent, legend, number, used_of
from ..components.results import Chart
from ..fleet import Problem, problem_of
from ..group_history import Lending
from ..history import RANGES, Window
from ..html import Segments, remember, table, tag
from ..page_frame import Frame, Notice
from ..zones import local

_SHOWN = 200
_EVERY_SECONDS = 15.0
NO_GROUPS: Final = Problem(
    kind="groups",
    title="No groups",
    detail="All owners share the fleet by the order of the queue. Groups give teams guarantees, limits and weights.",
    commands=("corral group set vision --guarantee '*=16' --members ann,ben",),
)


def register(frame: Callable[[Request, str], Frame]) -> None:
    """Register the page."""

    @ui.page("/groups")
    async def page(request: Request, range: str = "", to: str = "", group: str = "") -> None:
        around = frame(request, "Groups")
        await around.fleet.ready()
        window = Window.of(range, request.query_params.get("from", ""), to, "24h")
        with around.show("/groups"):
            GroupsPage(around, window, group[:128])


class GroupsPage:
    """The groups page in one browser.

    Args:
        frame: frame of the page.
        window: of the charts and the preemptions.
        inside: name of the group whose inner groups the charts compare; empty for the outermost groups.
    """

    def __init__(self, frame: Frame, window: Window, inside: str) -> None:
        self.frame = frame
        self.window = window
        self.inside = inside
        self._asking = False
        self._drawn_at = 0.0
        self._found: Groups | None = None
        self._configured: list[Group] = []
        self._rows: list[GroupRow] = []
        with tag("div", "head"), tag("div"):
            tag("h1", text="Groups")
            self._sub = tag("div", "sub", "")
        self._notice = Notice()
        with tag("div") as self._content:
            self._content.classes("main").style("padding:0;max-width:none")
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="What each group holds")
                    legend()
                self._now = tag("div")
            self._over_time()
            with tag("section", "panel"):
                with tag("div", "panel-head"):
                    tag("h2", text="Who was preempted, for whom and why")
                    self._preempted = tag("span", "note", "")
                self._preemptions = tag("div")
        self._content.set_visibility(False)
        self._windows: list[WindowStatus] = []
        with tag("section", "panel") as self._booked:
            with tag("div", "panel-head"):
                tag("h2", text="Booked windows")
                self._booked_note = tag("span", "note", "")
            self._booked_rows = tag("div")
        self._booked.set_visibility(False)
        ui.timer(0, self._ask, once=True)
        frame.on_refresh(self._refresh)

    def _over_time(self) -> None:
        with tag("section", "panel"):
            with tag("div", "panel-head"):
                with tag("div", "bar"):
                    tag("h2", text="Lent and borrowed")
                    self._charts_note = tag("span", "note", "")
                    if self.inside:
                        tag("a", "note link", "All groups", href="/groups")
                self._ranges = Segments(RANGES[1:], self.window.name, self._choose, "Time")
            self._history_notice = Notice()
            with tag("div") as self._charts:
                tag("div", "note", "GPUs beyond the guarantee; below zero, guaranteed GPUs that the group did not hold")
                self._beyond = Chart()
                self._owed_note = tag("div", "note", "").style("margin-top:14px")
                self._owed = Chart()

    def _choose(self, name: str) -> Any:
        self.window = Window.of(name, "", "", "24h")
        remember("/groups", **({} if self.window.name == "24h" else self.window.query), group=self.inside)
        return self._draw()

    # Groups as they are now

    def _refresh(self) -> None:
        if not self._asking:
            ui.timer(0, self._ask, once=True)

    async def _ask(self) -> None:
        self._asking = True
        try:
            found = await self.frame.fleet.groups()
            await self._ask_windows()
        except CorralError as error:
            self._notice.tell(problem_of(error, self.frame.fleet.url), whole=self._found is None)
            return
        finally:
            self._asking = False
        configured = any(status.group != Group(name=DEFAULT_GROUP) for status in found.groups)
        self._content.set_visibility(configured)
        self._notice.tell(self.frame.fleet.problem if configured else NO_GROUPS, whole=not configured)
        self._found = found if configured else None
        if not configured:
            self._sub.set_text("")
            return
        self._show(found)
        if not self._drawn_at or (self.window.end is None and self._drawn_at < time.monotonic() - _EVERY_SECONDS):
            await self._draw()

    async def _ask_windows(self) -> None:
        """Show the booked windows; none with a planner of an earlier version, which does not answer."""
        try:
            found = await self.frame.fleet.windows()
        except CorralError:
            found = []
        self._booked.set_visibility(bool(found))
        if found == self._windows:
            return
        self._windows = found
        missing = sum(len(status.missing) for status in found)
        more = f", the first {_SHOWN} are shown" if len(found) > _SHOWN else ""
        self._booked_note.set_text(f"{len(found):,}{more}" + (f"; short of {missing:,} GPUs" if missing else ""))
        self._booked_rows.clear()
        with self._booked_rows:
            table(booked.HEADS, [booked.row(status) for status in found[:_SHOWN]], numeric=booked.NUMERIC)

    def _show(self, found: Groups) -> None:
        groups = sorted(found.groups, key=lambda status: status.group.name.split("/"))
        outermost = group_history.inside(groups, "")
        held, waiting = sum(map(used_of, outermost)), sum(status.waiting_requests for status in outermost)
        days = found.half_life_seconds / 86400
        more = f", the first {_SHOWN} are shown" if len(groups) > _SHOWN else ""
        self._sub.set_text(
            f"{len(groups):,} groups{more}; {held:,.6g} GPUs held, {waiting:,} requests wait; "
            f"usage halves in {days:.3g} d"
        )
        groups = groups[:_SHOWN]
        configured = [status.group for status in groups]
        if configured != self._configured:
            self._configured = configured
            parents = {group.name.rpartition("/")[0] for group in configured}
            self._rows = [GroupRow(group, group.name in parents) for group in configured]
            self._now.clear()
            with self._now:
                table(HEADS, [row.cells for row in self._rows], numeric=NUMERIC)
        scale = max(map(extent, groups), default=0.0) or 1.0
        for row, status in zip(self._rows, groups, strict=True):
            row.show(status, scale)

    # Over time

    async def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        window, fleet = self.window, self.frame.fleet
        try:
            use = await self.frame.ask(lambda client: group_history.use(client, window, fleet.queue))
            preempted = await self.frame.ask(lambda client: group_history.preemptions(client, window))
        except CorralError as error:
            self._charts.set_visibility(False)
            self._history_notice.tell(problem_of(error, fleet.url), whole=True)
            return
        if self._found is None or window != self.window:
            return
        self._history_notice.tell(None)
        self._charts.set_visibility(True)
        self._ranges.show(window.name)
        within = f"within {self.inside}, " if self.inside else ""
        self._charts_note.set_text(f"{within}means of {_length(group_history.bucket_seconds(window.seconds))}, "
                                   "by today's guarantees")  # fmt: skip
        self._show_charts(group_history.lending(use, group_history.inside(self._found.groups, self.inside)))
        self._show_preemptions(preempted)

    def _show_charts(self, found: Lending) -> None:
        times = [1000 * at for at in found.times]
        start, end = (1000 * at for at in self.window.bounds)
        owed = any(any(values) for values in found.owed.values())
        self._owed_note.set_text("GPUs owed: guaranteed, asked for and not held" if owed else "No group was owed GPUs")
        self._owed.set_visibility(owed)
        self._beyond.show("stack", times, _series(found.beyond), "", (start, end))
        if owed:
            self._owed.show("stack", times, _series(found.owed), "", (start, end))

    def _show_preemptions(self, found: Sequence[dict[str, Any]]) -> None:
        more = f", the newest {group_history.PREEMPTIONS}" if len(found) == group_history.PREEMPTIONS else ""
        self._preempted.set_text(f"{len(found):,} in this time{more}" if found else "nobody in this time")
        self._preemptions.clear()
        if not found:
            return
        heads = ("When", "Who", "Name", "GPUs", "For", "Why", "What came of it", "Lost GPU h")
        with self._preemptions:
            table(heads, [_preemption(one) for one in found], numeric=(3, 7))


def _series(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"name": name, "values": numbers} for name, numbers in values.items()]


def _preemption(one: dict[str, Any]) -> tuple[Any, ...]:
    lost = one["lost_gpu_seconds"]
    after = "" if one["notice_seconds"] is None else f" after {one['notice_seconds']:,.0f} s"
    return (
        local(one["at"], "%d %b %H:%M:%S %Z"),
        _person(one["owner"], one["group_name"]),
        one["name"] or one["lease_id"],
        number(one["gpus"]),
        _person(one["claimant_owner"], one["claimant_group"]) if one["claimant_owner"] else "an operator",
        one["reason"] or "–",
        f"{one['outcome']}{after}",
        "–" if lost is None else f"{lost / 3600:,.2f}",
    )


def _person(owner: str, group: str | None) -> str:
    return f"{owner} ({group})" if group else owner


def _length(seconds: int) -> str:
    if seconds < 3600:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h" if seconds < 86400 else "1 d"
