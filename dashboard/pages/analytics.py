"""Analytics page: each documented view as a chart and a table, and a console for SQL queries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime

from msgspec import Struct, to_builtins
from nicegui import ui
from starlette.requests import Request

from ...client import Client, CorralError, QueryFailed, QueryResult
from .. import period_usage, periods, view_queries
from ..components.period_bar import PeriodBar
from ..components.results import Chart, Grid
from ..components.sql_history import SqlHistory
from ..downloads import FORMATS, Exports
from ..fleet import Problem, problem_of
from ..html import button, remember, search, tag, url
from ..page_frame import Frame, Notice
from ..view_queries import SHOWN, Column
from ..zones import local, zone_name, zone_of

_SECONDS = 60.0
_WHEN = "%d %b %Y %H:%M"
_EXAMPLE = """-- Any read-only question: SHOW TABLES, DESCRIBE samples, FROM questions …
SELECT host, avg(gpu_utilization_percent) AS gpu_utilization_percent, max(temperature_celsius) AS hottest_celsius
FROM samples
WHERE time > now() - INTERVAL 10 MINUTE
GROUP BY host
ORDER BY 2 DESC"""
_VIEWS = """SELECT t.table_name, t.TABLE_COMMENT, c.column_name, c.COLUMN_COMMENT
FROM information_schema.tables t JOIN information_schema.columns c USING (table_schema, table_name)
WHERE t.table_type = 'VIEW' AND t.TABLE_COMMENT IS NOT NULL AND t.table_schema = 'main'
  AND t.table_name <> 'questions'
ORDER BY 1, c.ordinal_position"""


class _View(Struct):
    """A view of the history, with the question that it answers and the descriptions of its columns."""

    name: str
    question: str
    columns: dict[str, str]


async def _views(client: Client) -> list[_View]:
    found: dict[str, _View] = {}
    for name, question, column, meaning in (await client.query(_VIEWS, limit=5000)).rows:
        view = found.setdefault(name, _View(name, question, {}))
        view.columns[column] = meaning or ""
    return [found[name] for name in view_queries.ordered(list(found))]


def register(frame: Callable[[Request, str], Frame], exports: Exports) -> None:
    """Register the page."""

    # The list of views is asked before there is a page; of a busy history that takes a while.
    @ui.page("/analytics", response_timeout=30)
    async def page(request: Request, view: str = "", sql: str = "", period: str = "") -> None:
        filters = {name: request.query_params.get(name, "")[:128] for name in periods.FILTERS}
        around = frame(request, "Analytics")
        views: list[_View] = []
        problem: Problem | None = None
        try:
            views = await around.ask(_views)
        except CorralError as error:
            problem = problem_of(error, around.fleet.url)
        with around.show("/analytics"):
            with tag("div", "head"), tag("div"):
                tag("h1", text="Analytics")
                tag("div", "sub", "Views of the history, and read-only SQL.")
            if problem is not None:
                Notice().tell(problem, whole=True)
                return
            AnalyticsPage(around, exports, views, view, sql[:20_000], period[:32], filters)


class AnalyticsPage:
    """The analytics page in one browser."""

    def __init__(
        self,
        frame: Frame,
        exports: Exports,
        views: list[_View],
        view: str,
        sql: str,
        period: str,
        filters: dict[str, str],
    ) -> None:
        self.frame = frame
        self.period, self.filters = period, filters
        self._chosen: _View | None = None
        self._exports = exports
        self._asked = 0
        chosen = next((one for one in views if one.name == view), None)
        console = bool(sql) or view == "console" or not views
        if not console and chosen is None:
            chosen = views[0]
        with tag("div", "with-list"):
            with tag("nav", "panel questions", aria_label="Questions"):
                with tag("a", f"question{' here' if console else ''}", href=url("/analytics", view="console")):
                    tag("div", text="SQL console")
                    tag("div", text="console")
                for one in views:
                    here = chosen is not None and one.name == chosen.name and not console
                    with tag("a", f"question{' here' if here else ''}", href=self._url(one.name)):
                        tag("div", text=one.question)
                        tag("div", text=one.name)
            with tag("div", "main").style("padding:0;max-width:none"):
                if console:
                    self._console(sql)
                elif chosen is not None:
                    self._view(chosen)

    def _url(self, view: str) -> str:
        return url("/analytics", view=view, period=self.period, **self.filters)

    def _view(self, view: _View) -> None:
        self._chosen = view
        with tag("section", "panel"):
            with tag("div", "panel-head"):
                tag("h2", text=view.question)
                with tag("div", "bar"):
                    self._note = tag("span", "note", "Asking…")
                    self._as_sql = tag("a", "note link", "Edit as SQL")
            PeriodBar(periods.CHOICES, self.period, self._in_period)
            with tag("div", "bar").style("margin:10px 0"):
                for name in periods.FILTERS:
                    words = {"owner": "Owner", "group": "Group", "model": "Model has", "host": "Host has"}[name]
                    search(self.filters[name], lambda text, name=name: self._filtered(name, text), words, "")
            self._counted = tag("div", "note", "")
            self._results(view.columns)
        with tag("section", "panel") as self._meaning:
            with tag("div", "panel-head"):
                tag("h2", text="Columns")
            with tag("div", "facts"):
                for name, meaning in view.columns.items():
                    with tag("div"):
                        tag("div", "fact-name mono", name)
                        tag("div", "fact-value", meaning)
        ui.timer(0, self._ask_view, once=True)

    async def _in_period(self, period: str) -> None:
        self.period = period
        await self._ask_view()

    async def _filtered(self, name: str, text: str) -> None:
        self.filters[name] = text[:128]
        await self._ask_view()

    async def _ask_view(self) -> None:
        """Ask the chosen view about the period, with the filters; both are in the URL then."""
        view = self._chosen
        if view is None:
            return
        now = datetime.now(UTC)
        period = periods.period_of(self.period, now, zone_of(self.frame.request.cookies))
        narrowed = periods.narrowed(view.columns, period, self.filters)
        known = view_queries.KNOWN.get(view.name)
        drawing = known.drawing if known else None
        usage = period_usage.QUESTIONS.get(view.name)
        if usage is not None and period is not None:
            sql, counted, drawing = usage.sql(period, self.filters), period_usage.COUNTED, usage.drawing
            refused: list[str] = []
        else:
            sql, counted = view_queries.sql(view.name, narrowed.where), narrowed.counted
            refused = narrowed.ignored
        ignored = f" It can't be filtered by {' or '.join(refused)}." if refused else ""
        when = f"{local(period.start, _WHEN)} to {local(period.end, _WHEN)} {zone_name(period.end)}. " if period else ""
        if self.period and period is None:
            when = f"{self.period!r} is no period, or has not begun: this is the whole history. "
        self._counted.set_text(f"{when}{counted}{ignored}".strip())
        remember("/analytics", view=view.name, period=self.period, **self.filters)
        self._as_sql.props["href"] = url("/analytics", sql=sql)
        # Within a period, usage has other columns, which the sentence above explains.
        self._meaning.set_visibility(usage is None or period is None)
        await self._ask(sql, drawing)

    def _console(self, sql: str) -> None:
        with tag("section", "panel"):
            with tag("div", "panel-head"):
                tag("h2", text="SQL console")
                self._note = tag("span", "note", "Ctrl-Enter to run")
            with tag("div", "editor"):
                self._editor = ui.codemirror(sql or _EXAMPLE, language="SQL", theme="basicLight", line_wrapping=True)
                self._editor.style("min-height:150px;height:auto")
            ui.timer(0, self._dress, once=True)
            self.frame.on_theme(self._dress)
            self._editor.on("keydown.ctrl.enter", self._run, [])
            self._editor.on("keydown.meta.enter", self._run, [])
            with tag("div", "bar").style("margin:14px 0"):
                button("Run", self._run, "primary", "play_arrow")
                tag("span", "note", "SQL computes in UTC; times are shown, but not exported, in your zone.")
            self._history = SqlHistory(self.frame.session.name)
            self._results({})
        if sql:
            ui.timer(0, self._run, once=True)

    def _results(self, columns: dict[str, str]) -> None:
        self._meanings = columns
        self._failure = tag("div", "banner", "", role="alert")
        self._failure.set_visibility(False)
        self._problem = Notice()
        self._chart = Chart()
        self._chart.set_visibility(False)
        with tag("div", "bar").style("margin:14px 0 6px;justify-content:flex-end") as self._export_bar:
            self._count = tag("span", "note", "")
            for kind, word in (("csv", "CSV"), ("parquet", "Parquet"), ("arrow", "Arrow")):
                if kind not in FORMATS:
                    continue
                button(word, lambda kind=kind: self._export(kind), "small", "download", title="Download all rows")
        self._export_bar.set_visibility(False)
        self._grid = Grid()
        self._sql = ""

    async def _dress(self) -> None:
        """Give the editor the colors of the page, which the system may choose."""
        with contextlib.suppress(TimeoutError):
            dark = await ui.run_javascript("document.body.classList.contains('body--dark')", timeout=5)
            self._editor.set_theme("vscodeDark" if dark else "basicLight")

    async def _run(self) -> None:
        sql = str(self._editor.value or "").strip()
        if not sql:
            return
        remember("/analytics", sql=sql)
        self._history.add(sql)
        await self._ask(sql, None)

    async def _ask(self, sql: str, drawing: view_queries.Drawing | None) -> None:
        self._asked += 1
        asked = self._asked
        self._note.set_text("Asking…")
        self._failure.set_visibility(False)
        try:
            result = await self.frame.ask(lambda client: client.query(sql, limit=SHOWN, timeout=_SECONDS))
        except QueryFailed as error:
            self._fail(asked, str(error))
            return
        except CorralError as error:
            problem = problem_of(error, self.frame.fleet.url)
            if problem.kind == "error":
                self._fail(asked, str(error))
            elif asked == self._asked:
                self._note.set_text("")
                self._problem.tell(problem, whole=True)
            return
        if asked == self._asked:
            self._problem.tell(None)
            self._show(sql, result, drawing)

    def _fail(self, asked: int, text: str) -> None:
        if asked == self._asked:
            self._note.set_text("")
            self._failure.set_text(text)
            self._failure.set_visibility(True)

    def _show(self, sql: str, result: QueryResult, drawing: view_queries.Drawing | None) -> None:
        self._sql = sql
        rows = view_queries.with_times(result.types, result.rows)
        columns = [
            Column(
                name=name,
                numeric=view_queries.numeric([row[at] for row in rows[:200]]),
                help=self._meanings.get(name, ""),
            )
            for at, name in enumerate(result.columns)
        ]
        more = f", the first {SHOWN:,} shown" if result.truncated else ""
        self._note.set_text(f"{result.seconds * 1000:,.0f} ms")
        zone = zone_of(self.frame.request.cookies)
        zones = view_queries.zones_of(rows, zone)
        named = f", times in {zones}" if zones else ""
        narrowed = self._chosen is not None and (self.period or any(self.filters.values()))
        nothing = "Nothing in this period with these filters." if narrowed else "No rows."
        self._count.set_text(f"{len(rows):,} row{'' if len(rows) == 1 else 's'}{more}{named}" if rows else nothing)
        self._export_bar.set_visibility(True)
        self._grid.fill(
            [to_builtins(column) for column in columns], [[view_queries.cell(v, zone) for v in row] for row in rows]
        )
        drawn = view_queries.draw(result.columns, rows, drawing, zone)
        self._chart.set_visibility(drawn is not None)
        if drawn is not None:
            self._chart.show(drawn.kind, drawn.labels, drawn.series, drawn.unit)

    def _export(self, kind: str) -> None:
        if self._sql:
            ticket = self._exports.ticket(self.frame.session.id, self._sql)
            ui.download.from_url(f"/export/{ticket}/{kind}")
