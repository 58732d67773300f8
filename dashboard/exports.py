"""Taking a result away: a page gives out a ticket, and the browser fetches the file with it.

A file is sent as it comes from the history, part by part: what is held of it is bounded, however large it is. What goes
wrong on the way breaks the download off, so that no browser takes half a file for a whole one.
"""

from __future__ import annotations

import secrets
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Final

import nats.errors
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..client import CorralError, QueryFailed, TimedOut
from ..client.query import parts
from ..schemas.query import MOST_ROWS, QueryEnd, QueryRequest, ResultFormat
from .fleet import Fleet
from .parquet import as_parquet
from .security.guard import session_of

FORMATS: Final = {
    "csv": ("text/csv; charset=utf-8", "csv"),
    "parquet": ("application/vnd.apache.parquet", "parquet"),
    "arrow": ("application/vnd.apache.arrow.stream", "arrows"),
}
AT_ONCE: Final = 2
"""Of one person."""
_SECONDS: Final = 300.0
_MARGIN_SECONDS: Final = 10.0
_TICKETS: Final = 1000


class _Ticket(Struct, frozen=True):
    session: str
    sql: str


class Exports:
    """Tickets and the files that they fetch. A ticket is good for the session that it was given to, and for no other.

    Args:
        fleet: asks the history.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tickets: OrderedDict[str, _Ticket] = OrderedDict()
        self._running: Counter[str] = Counter()

    def ticket(self, session: str, sql: str) -> str:
        """A ticket for the result of a statement."""
        made = secrets.token_urlsafe(18)
        self._tickets[made] = _Ticket(session, sql)
        while len(self._tickets) > _TICKETS:
            self._tickets.popitem(last=False)
        return made

    def route(self) -> Route:
        """`GET /export/<ticket>/<format>`."""
        return Route("/export/{ticket}/{format}", self.fetch, methods=["GET"])

    async def fetch(self, request: Request) -> Response:
        """Ask anew, without the page's limit, and answer with a file."""
        ticket = self._tickets.get(request.path_params["ticket"])
        format = request.path_params["format"]
        session = session_of(request)
        if ticket is None or ticket.session != session.id or format not in FORMATS:
            return PlainTextResponse("There is no such export (any more): run the query again.\n", 404)
        if self._running[session.name] >= AT_ONCE:
            return PlainTextResponse(f"{AT_ONCE} exports of yours run already: let one of them end.\n", 429)
        wanted = ResultFormat.CSV if format == "csv" else ResultFormat.ARROW
        body = self._body(ticket.sql, wanted, session.name)
        if format == "parquet":
            body = as_parquet(body)
        try:
            # What is wrong with the query is known with the first part.
            first = await anext(body)
        except QueryFailed as error:
            return PlainTextResponse(f"The query failed: {error}\n", 422)
        except TimedOut as error:
            return PlainTextResponse(f"{error}\n", 504)
        except (CorralError, nats.errors.Error, OSError) as error:
            return PlainTextResponse(f"{error}\n", 503)
        media, ending = FORMATS[format]
        headers = {
            "Content-Disposition": f'attachment; filename="corral.{ending}"',
            "Cache-Control": "no-store",
            # Packing hundreds of megabytes would hold up everybody else.
            "Content-Encoding": "identity",
        }
        return StreamingResponse(_with(first, body), media_type=media, headers=headers)

    async def _body(self, sql: str, format: ResultFormat, person: str) -> AsyncGenerator[bytes]:
        """The parts of the answer, in the person's own turns.

        Raises:
            CorralError: it failed, or there are more rows than an answer can have.
        """
        asked = QueryRequest(
            sql=sql,
            format=format,
            limit=MOST_ROWS,
            timeout_seconds=_SECONDS,
            query_id=uuid.uuid4().hex,
            window=8,
        )
        nc = self._fleet.connection()
        end: QueryEnd | None = None
        self._running[person] += 1
        try:
            async with aclosing(parts(nc, asked, margin_seconds=_MARGIN_SECONDS, person=person)) as pieces:
                async for piece, end in pieces:
                    if end is not None and end.truncated:
                        raise QueryFailed(f"there are more than {MOST_ROWS:,} rows: export a part of them", "too_large")
                    yield piece
        finally:
            self._running[person] -= 1
            self._running += Counter()  # forgets who has none


async def _with(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece
