"""Taking a result away: a page gives out a ticket, and the browser fetches the file with it."""

from __future__ import annotations

import io
import secrets
from collections import OrderedDict
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..client import CorralError, QueryFailed, TimedOut
from ..schemas.query import ResultFormat
from .fleet import Fleet
from .security.guard import session_of

FORMATS: Final = {
    "csv": ("text/csv; charset=utf-8", "csv"),
    "parquet": ("application/vnd.apache.parquet", "parquet"),
    "arrow": ("application/vnd.apache.arrow.stream", "arrows"),
}
ROWS: Final = 2_000_000
_SECONDS: Final = 300.0
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
        if ticket is None or ticket.session != session_of(request).id or format not in FORMATS:
            return PlainTextResponse("There is no such export (any more): run the query again.\n", 404)
        sql = ticket.sql
        wanted = ResultFormat.CSV if format == "csv" else ResultFormat.ARROW
        try:
            result = await self._fleet.ask(
                lambda client: client.query(sql, limit=ROWS, timeout=_SECONDS, format=wanted)
            )
        except QueryFailed as error:
            return PlainTextResponse(f"The query failed: {error}\n", 422)
        except TimedOut as error:
            return PlainTextResponse(f"{error}\n", 504)
        except CorralError as error:
            return PlainTextResponse(f"{error}\n", 503)
        body = result.raw
        if format == "parquet":
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(_table(body), buffer, compression="zstd")
            body = buffer.getvalue()
        media, ending = FORMATS[format]
        headers = {
            "Content-Disposition": f'attachment; filename="corral.{ending}"',
            "Cache-Control": "no-store",
            "Corral-Truncated": str(result.truncated).lower(),
        }
        return Response(body, media_type=media, headers=headers)


def _table(raw: bytes) -> Any:
    return pa.ipc.open_stream(io.BytesIO(raw)).read_all()
