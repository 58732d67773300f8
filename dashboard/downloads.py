"""Exports of query results: a page issues a ticket, and the browser downloads the file with it.

A file is streamed from the history part by part, so that memory use is bounded, however large it is. An error aborts
the download, so that a browser never takes an incomplete file for a complete one.
"""

from __future__ import annotations

import secrets
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from importlib.util import find_spec
from typing import Final

import nats.errors
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..client import CorralError, QueryFailed, TimedOut
from ..client.query import parts
from ..schemas.query import MAX_ROWS, QueryEnd, QueryRequest, ResultFormat
from .fleet import Fleet
from .security.guard import session_of

FORMATS: Final = {
    "csv": ("text/csv; charset=utf-8", "csv"),
    "parquet": ("application/vnd.apache.parquet", "parquet"),
    "arrow": ("application/vnd.apache.arrow.stream", "arrows"),
}
if find_spec("pyarrow") is None:  # 170 MB for this alone: whoever wants it installs it
    del FORMATS["parquet"]
AT_ONCE: Final = 2
"""Maximum number of concurrent exports per user."""
_SECONDS: Final = 300.0
_MARGIN_SECONDS: Final = 10.0
_TICKETS: Final = 1000


class _Ticket(Struct, frozen=True):
    session: str
    sql: str


class Exports:
    """Tickets for exports, and the downloads. A ticket is valid only in the session that it was issued to.

    Args:
        fleet: the shared state with the connection to the bus.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._tickets: OrderedDict[str, _Ticket] = OrderedDict()
        self._running: Counter[str] = Counter()

    def ticket(self, session: str, sql: str) -> str:
        """Issue a ticket for the result of a statement; of more than 1000 tickets the oldest become invalid."""
        made = secrets.token_urlsafe(18)
        self._tickets[made] = _Ticket(session, sql)
        while len(self._tickets) > _TICKETS:
            self._tickets.popitem(last=False)
        return made

    def route(self) -> Route:
        """Route for `GET /export/<ticket>/<format>`."""
        return Route("/export/{ticket}/{format}", self.fetch, methods=["GET"])

    async def fetch(self, request: Request) -> Response:
        """Run the query again, without the page's limit, and stream the result as a file."""
        ticket = self._tickets.get(request.path_params["ticket"])
        format = request.path_params["format"]
        session = session_of(request)
        if ticket is None or ticket.session != session.id or format not in FORMATS:
            return PlainTextResponse("This export doesn't exist or has expired: run the query again.\n", 404)
        if self._running[session.name] >= AT_ONCE:
            return PlainTextResponse(f"{AT_ONCE} of your exports are running: wait for one to end.\n", 429)
        wanted = ResultFormat.CSV if format == "csv" else ResultFormat.ARROW
        body = self._body(ticket.sql, wanted, session.name)
        if format == "parquet":
            from .parquet import as_parquet

            body = as_parquet(body)
        try:
            # Errors of the query are known when the first part arrives.
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
            # Compressing hundreds of megabytes would delay all other users.
            "Content-Encoding": "identity",
        }
        return StreamingResponse(_with(first, body), media_type=media, headers=headers)

    async def _body(self, sql: str, format: ResultFormat, person: str) -> AsyncGenerator[bytes]:
        """Stream the parts of the answer; the query is queued under the person's name.

        Raises:
            CorralError: the query failed, or it has more rows than an answer can hold.
        """
        asked = QueryRequest(
            sql=sql,
            format=format,
            limit=MAX_ROWS,
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
                        raise QueryFailed(f"there are more than {MAX_ROWS:,} rows: select fewer", "too_large")
                    yield piece
        finally:
            self._running[person] -= 1
            self._running += Counter()  # removes users without a running export


async def _with(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece
