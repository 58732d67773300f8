"""Usage reports for browsers: what a URL asks for, and the report as a file. See `client/reports`."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, tzinfo
from typing import Final

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..client import Client, CorralError, QueryFailed, TimedOut
from ..client.reports import periods as calendar
from ..client.reports import usage_sql
from ..client.reports.asking import ask_usage, scope_of
from ..client.reports.forms import Form, renderer
from ..client.reports.periods import Period, Slice
from ..client.reports.prices import Prices
from ..client.reports.usage import Scope, UsageReport
from ..client.reports.usage_sql import By, Filters
from . import periods
from .fleet import Fleet
from .security.guard import session_of
from .security.sessions import GUEST_ID, Session
from .zones import ZONE_COOKIE, zone_of

SECONDS: Final = 120.0
"""Time limit of each query of a report."""
DEFAULT_PERIOD: Final = "month"
AT_ONCE: Final = 2
"""Maximum number of concurrent reports as files per user."""
_LONGEST: Final = 128


class Asked(Struct, frozen=True, kw_only=True):
    """Report that a URL asks for.

    Attributes:
        mine: only the usage of the user who asks.
        period: name of the period.
        by: what the rows are by.
        owner: name of an owner; empty for all.
        group: name of a group; empty for all.
        model: part of a model's name, or a pattern; empty for all.
    """

    mine: bool
    period: str
    by: tuple[By, ...]
    owner: str = ""
    group: str = ""
    model: str = ""

    @property
    def query(self) -> dict[str, str]:
        """Parameters of the URL; the usual ones are left out."""
        return {
            "who": "mine" if self.mine else "all",
            "period": "" if self.period == DEFAULT_PERIOD else self.period,
            "by": "" if self.by == _usual_rows(self.mine) else ",".join(self.by),
            "owner": "" if self.mine else self.owner,
            "group": self.group,
            "model": self.model,
        }


def _usual_rows(mine: bool) -> tuple[By, ...]:
    return (By.GROUP, By.MODEL) if mine else (By.GROUP, By.OWNER, By.MODEL)


def asked_of(query: Mapping[str, str], mine: bool) -> Asked:
    """Read the parameters of a URL; those that are invalid are ignored.

    Args:
        query: the parameters.
        mine: whether a URL that doesn't say is about the user's own usage.
    """
    own = {"mine": True, "all": False}.get(query.get("who", ""), mine)
    names = query.get("by", "").split(",")
    by = tuple(one for one in By if one.value in names)
    return Asked(
        mine=own,
        period=query.get("period", "")[:32] or DEFAULT_PERIOD,
        by=by or _usual_rows(own),
        **{name: query.get(name, "").strip()[:_LONGEST] for name in ("owner", "group", "model")},
    )


def has_own_usage(session: Session) -> bool:
    """True if a session has a name that says who it is; without a login everybody has the same."""
    return session.id != GUEST_ID


def report_scope(asked: Asked, session: Session, now: datetime, zone: tzinfo) -> Scope:
    """Scope of a report.

    Args:
        asked: what the user asks for.
        session: the user, whose usage it is if they ask for their own.
        now: the present.
        zone: time zone of days and months.

    Raises:
        ValueError: there is no such period, it has not begun, or nobody has logged in whose usage it could be.
    """
    if asked.mine and not has_own_usage(session):
        raise ValueError("Your own usage needs a login: this dashboard is served without one.")
    filters = Filters(
        owner=session.name if asked.mine else asked.owner or None,
        group=asked.group or None,
        model=asked.model or None,
    )
    return scope_of(_period(asked.period, now, zone), asked.by, filters, now)


def _period(name: str, now: datetime, zone: tzinfo) -> Period:
    key = getattr(zone, "key", "UTC")
    try:
        return calendar.period_of({"month": "this-month"}.get(name, name), key, now)
    except ValueError:
        found = periods.period_of(name, now.replace(microsecond=0), zone)
    if found is None:
        raise ValueError(f"{name!r} is no period, or has not begun: choose one above.")
    words = name.replace("since-", "since ") if name.startswith("since-") else f"the last {name}"
    return Period(name=words, start=found.start, end=found.end, zone=key)


def held_before(scope: Scope) -> str:
    """SQL of the GPU-microseconds (`granted_us`, `known_us`, `idle_us`) in as long a time before a report's period."""
    period = scope.period
    before = Slice(name="before", start=period.start - (period.end - period.start), end=period.start)
    sums = ", ".join(f"sum({name})::HUGEINT AS {name}" for name in ("granted_us", "known_us", "idle_us"))
    return f"SELECT {sums} FROM ({usage_sql.usage([before], scope.filters)})"


MEDIA: Final = {
    Form.HTML: "text/html; charset=utf-8",
    Form.PDF: "application/pdf",
    Form.CSV: "text/csv; charset=utf-8",
    Form.MARKDOWN: "text/markdown; charset=utf-8",
    Form.JSON: "application/json",
}
"""Media type of each form of a report."""


class ReportFiles:
    """Downloads of reports.

    Args:
        fleet: the shared state with the connection to the bus.
        prices: price list; None for reports without costs.
        now: returns the present.
    """

    def __init__(self, fleet: Fleet, prices: Prices | None, now: Callable[[], datetime]) -> None:
        self._fleet = fleet
        self._prices = prices
        self._now = now
        self._running: Counter[str] = Counter()

    def route(self) -> Route:
        """Route for `GET /reports/usage.<form>`."""
        return Route("/reports/usage.{form}", self.fetch, methods=["GET"])

    async def fetch(self, request: Request) -> Response:
        """Ask the history, and send the report as a file."""
        session = session_of(request)
        try:
            form = Form(request.path_params["form"])
        except ValueError:
            return PlainTextResponse(f"A report is one of {', '.join(Form)}.\n", 404)
        zone = request.query_params.get("zone")
        rules = zone_of(request.cookies if zone is None else {ZONE_COOKIE: zone})
        try:
            scope = report_scope(asked_of(request.query_params, has_own_usage(session)), session, self._now(), rules)
        except ValueError as error:
            return PlainTextResponse(f"{error}\n", 400)
        if self._running[session.name] >= AT_ONCE:
            return PlainTextResponse(f"{AT_ONCE} of your reports are being made: wait for one to end.\n", 429)
        self._running[session.name] += 1
        try:
            make = renderer(form)
            report = await self._fleet.ask(lambda client: self._ask(client, scope), session.name)
            # Drawing takes up to a second, in which other users' pages go on.
            body = await asyncio.to_thread(make, report)
        except ModuleNotFoundError:
            return PlainTextResponse("This dashboard can't draw reports: pip install 'corral[report]'\n", 501)
        except QueryFailed as error:
            return PlainTextResponse(f"The history refused: {error}\n", 422)
        except TimedOut as error:
            return PlainTextResponse(f"{error}\n", 504)
        except CorralError as error:
            return PlainTextResponse(f"{error}\n", 503)
        finally:
            self._running[session.name] -= 1
            self._running += Counter()  # removes users without a running report
        name = re.sub(r"[^A-Za-z0-9-]+", "-", f"gpu-usage-{scope.period.name}").strip("-")
        headers = {"Content-Disposition": f'attachment; filename="{name}.{form}"', "Cache-Control": "no-store"}
        return Response(body, media_type=MEDIA[form], headers=headers)

    async def _ask(self, client: Client, scope: Scope) -> UsageReport:
        return await ask_usage(client, scope, self._prices, SECONDS)
