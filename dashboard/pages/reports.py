"""Usage page: what a period's leases used and cost, for everybody or for the user alone, and the same as a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

from msgspec.structs import replace
from nicegui import ui
from starlette.requests import Request

from ...client import Client, CorralError, QueryFailed
from ...client.reports import tables
from ...client.reports.asking import ask_usage
from ...client.reports.prices import Prices
from ...client.reports.usage import Bar, Row, UsageReport, gpu_hours
from ...client.reports.usage_sql import By
from ...schemas.query import ResultFormat
from ..components.period_bar import PeriodBar
from ..components.results import Chart
from ..fleet import Problem, problem_of
from ..html import Segments, remember, search, table, tag, url
from ..page_frame import Frame, Notice
from ..periods import CHOICES
from ..security.accounts import Role
from ..usage_reports import SECONDS, Asked, asked_of, has_own_usage, held_before, report_scope
from ..zones import zone_of

PERIODS: Final = CHOICES[2:]
"""Periods that are offered: an hour is too short for a report."""
_BARS: Final = 15
_ROWS: Final = 200
_EVERY_SECONDS: Final = 60.0
_COST_OF_FOLLOWING: Final = 30
"""A report that took a second is asked again after that many, or after `_EVERY_SECONDS` if that is longer."""


def register(frame: Callable[[Request, str], Frame], prices: Prices | None) -> None:
    """Register the page.

    Args:
        frame: makes the frame of a page.
        prices: price list; None for a page without costs.
    """

    @ui.page("/reports")
    async def page(request: Request) -> None:
        around = frame(request, "Usage")
        # Operators look after the fleet, all others after their own work.
        mine = has_own_usage(around.session) and not around.session.role.covers(Role.OPERATOR)
        with around.show("/reports"):
            ReportsPage(around, prices, asked_of(request.query_params, mine))


class ReportsPage:
    """The usage page in one browser."""

    def __init__(self, frame: Frame, prices: Prices | None, asked: Asked) -> None:
        self.frame = frame
        self.asked = asked
        self._prices = prices
        self._number = 0
        self._asking = False
        self._follows_now = False
        self._next = 0.0
        self._rows: dict[By, Any] = {}
        self._files: dict[str, Any] = {}
        with tag("div", "head"):
            with tag("div"):
                tag("h1", text="Usage")
                self._sub = tag("div", "sub", "")
            if has_own_usage(frame.session):
                whose = (("mine", "My usage"), ("all", "Everybody"))
                Segments(whose, "mine" if asked.mine else "all", self._of, "Whose usage")
        with tag("section", "panel"):
            PeriodBar(PERIODS, asked.period, lambda name: self._ask_for(period=name or "month"))
            with tag("div", "bar").style("margin-top:10px"):
                self._owner = search(asked.owner, lambda text: self._ask_for(owner=text.strip()), "Owner", "")
                search(asked.group, lambda text: self._ask_for(group=text.strip()), "Group, with those within", "")
                search(asked.model, lambda text: self._ask_for(model=text.strip()), "Model has", "")
                tag("span", "seg-label", "rows by")
                with tag("div", "seg", role="group", aria_label="Rows by"):
                    for one in By:
                        made = tag("button", "", one.value.capitalize(), type="button", data_by=one.value)
                        made.on("click", lambda one=one: self._toggle(one), [])
                        self._rows[one] = made
            with tag("div", "bar").style("margin-top:10px"):
                self._note = tag("span", "note", "Asking…")
                tag("span").style("flex:1")
                for form, word in (("html", "HTML"), ("pdf", "PDF"), ("csv", "CSV"), ("md", "Markdown")):
                    with tag("a", "btn small", download=True, title=f"The report as {word}") as link:
                        ui.icon("download")
                        tag("span", text=word)
                    self._files[form] = link
        self._notice = Notice()
        with tag("div", "main").style("padding:0;max-width:none") as self._content:
            self._tiles = tag("div", "tiles many")
            with tag("div", "main").style("padding:0;max-width:none") as self._charts:
                with tag("section", "panel"):
                    with tag("div", "panel-head"):
                        tag("h2", text="GPU-hours over time")
                    self._over_time = Chart()
                with tag("section", "panel"):
                    with tag("div", "panel-head"):
                        self._by_row_title = tag("h2", text="")
                    self._by_row = Chart()
            self._tables = tag("div", "main report").style("padding:0;max-width:none")
        self._content.set_visibility(False)
        self._show_asked()
        ui.timer(0, self._ask, once=True)
        frame.on_refresh(self._follow)

    # What is asked

    async def _ask_for(self, **changed: Any) -> None:
        self.asked = replace(self.asked, **{name: value[:128] for name, value in changed.items()})
        await self._changed()

    async def _of(self, who: str) -> None:
        self.asked = asked_of(self.asked.query | {"who": who, "by": ""}, mine=True)
        await self._changed()

    async def _toggle(self, one: By) -> None:
        wanted = {*self.asked.by} ^ {one}
        if wanted:
            self.asked = replace(self.asked, by=tuple(by for by in By if by in wanted))
            await self._changed()

    async def _changed(self) -> None:
        remember("/reports", **self.asked.query)
        self._show_asked()
        await self._ask()

    def _show_asked(self) -> None:
        """Show what is asked for in the controls, and in the links of the files."""
        self._owner.set_visibility(not self.asked.mine)
        for one, made in self._rows.items():
            on = one in self.asked.by
            made.classes(add="on") if on else made.classes(remove="on")
            made.props["aria-pressed"] = "true" if on else "false"
        zone = getattr(zone_of(self.frame.request.cookies), "key", "UTC")
        for form, link in self._files.items():
            link.props["href"] = url(f"/reports/usage.{form}", **self.asked.query, zone=zone)
            link.update()

    def _follow(self) -> None:
        """Ask again from time to time while the period is not over."""
        if self._follows_now and not self._asking and time.monotonic() > self._next:
            ui.timer(0, self._ask, once=True)

    # The answer

    async def _ask(self) -> None:
        self._number += 1
        number = self._number
        self._asking = True
        self._note.set_text("Asking…")
        began = time.monotonic()
        try:
            found = await self._report()
        finally:
            self._asking = False
            self._next = time.monotonic() + max(_EVERY_SECONDS, _COST_OF_FOLLOWING * (time.monotonic() - began))
        if number != self._number:
            return
        self._note.set_text("")
        if isinstance(found, Problem):
            self._notice.tell(found, whole=True)
            self._content.set_visibility(False)
            return
        self._notice.tell(None)
        self._content.set_visibility(True)
        self._show(*found)

    async def _report(self) -> tuple[UsageReport, Decimal] | Problem:
        """The report, and the GPU-hours granted in as long a time before it; or why there is none."""
        now = datetime.now(UTC)
        try:
            scope = report_scope(self.asked, self.frame.session, now, zone_of(self.frame.request.cookies))
        except ValueError as error:
            return Problem(kind="error", title="No such report", detail=str(error))
        self._follows_now = scope.period.end >= now.replace(microsecond=0)

        async def ask(client: Client) -> tuple[UsageReport, Decimal]:
            report = await ask_usage(client, scope, self._prices, SECONDS)
            before = await client.query(held_before(scope), timeout=SECONDS, format=ResultFormat.JSON)
            return report, gpu_hours(before.dicts()[0]["granted_us"] or 0)

        try:
            return await self.frame.ask(ask)
        except QueryFailed as error:
            return Problem(kind="error", title="The history refused", detail=str(error))
        except CorralError as error:
            return problem_of(error, self.frame.fleet.url)

    def _show(self, report: UsageReport, before: Decimal) -> None:
        self._sub.set_text(tables.subtitle(report))
        self._show_tiles(report, before)
        times = [1000 * one.start.timestamp() for one in report.scope.slices]
        over_time = _series(report.bars)
        window = (1000 * report.scope.period.start.timestamp(), 1000 * report.scope.period.end.timestamp())
        self._over_time.show("stack", times, over_time, "h", window)
        by = report.scope.by
        rows = sorted((row for row in report.rows if row.leases), key=lambda row: -row.granted_gpu_hours)[:_BARS]
        self._by_row_title.set_text(f"GPU-hours by {', '.join(by)}")
        self._charts.set_visibility(bool(rows))
        # Without groups, a label is not lengthened by none.
        named = [one for one in by if one is not By.GROUP or len(by) == 1 or any(row.group for row in rows)]
        self._by_row.show("bars", [tables.short_label(row, named) for row in rows], _series(rows), "h")
        self._tables.clear()
        with self._tables:
            for section in tables.sections(report):
                _show_section(section)
            for note in tables.notes(report):
                tag("p", "note", note).style("margin:0")

    def _show_tiles(self, report: UsageReport, before: Decimal) -> None:
        self._tiles.clear()
        granted = report.total.granted_gpu_hours
        change = f"{100 * (granted / before - 1):+.0f}% on as long a time before" if before else "none before"
        with self._tiles:
            for name, value in tables.summary(report):
                number, more = value, change if name == "GPU-hours granted" else ""
                if name in ("Active", "Idle"):
                    number, _, part = value.partition(" (")
                    more = f"{part.removesuffix(')')} of what is known" if part != f"{tables.NONE})" else ""
                elif name == "Requests":
                    number, _, more = value.partition(", ")
                with tag("div", "tile"):
                    tag("div", "tile-name", name)
                    tag("div", "tile-value", number)
                    tag("div", "tile-more", more)


def _series(parts: Sequence[Bar | Row]) -> list[dict[str, Any]]:
    return [
        {"name": word, "values": [float(getattr(part, f"{word.lower()}_gpu_hours")) for part in parts], "color": color}
        for word, color in (("Active", 0), ("Idle", 1), ("Unknown", 7))
    ]


def _show_section(section: tables.Section) -> None:
    with tag("section", "panel"):
        with tag("div", "panel-head"):
            tag("h2", text=section.title)
            if len(section.rows) > _ROWS:
                tag("span", "note", f"the first {_ROWS} of {len(section.rows):,}; the files have all")
        if not section.rows:
            tag("div", "note", section.nothing)
            return
        rows: list[Sequence[Any]] = [*section.rows[:_ROWS]]
        if section.total:
            rows.append([_strong(cell) for cell in section.total])
        table(section.columns, rows, numeric=section.numbers)
        if section.note:
            tag("p", "note", section.note).style("margin:8px 0 0")


def _strong(text: str) -> Callable[[], Any]:
    return lambda: tag("b", text=text)
