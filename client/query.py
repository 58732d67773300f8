"""Parts of a query's answer into one result (see `schemas/query.py`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Final

import nats.aio.client
import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..bus.permissions import NotAllowed, identity_of, refusals
from ..schemas import codec, requests, subjects
from ..schemas.query import END_HEADER, PART_HEADER, CancelRequest, QueryEnd, QueryRequest
from .errors import CorralError, NoService, QueryFailed, Refused, TimedOut, Unavailable, error_of
from .result import QueryResult

SERVICE: Final = "dashboard"
"""Who speaks for others on a bus without authentication."""


def in_own_name(nc: nats.aio.client.Client, subject: str, person: str = "") -> str:
    """A subject with the name of the credentials' user at its end, as a bus with authentication wants it.

    Args:
        nc: a connected client.
        subject: that names nobody.
        person: for whom a trusted service asks: turns are theirs.
    """
    user = identity_of(nc).user
    if person:
        return f"{subject}.{user or SERVICE}.{subjects.person_token(person)}"
    return f"{subject}.{user}" if user else subject


async def collect(
    nc: nats.aio.client.Client, request: QueryRequest, *, margin_seconds: float, person: str = ""
) -> QueryResult:
    """Send a query and join the parts of its answer.

    Args:
        nc: a connected client.
        request: the query.
        margin_seconds: added to the query's own timeout, for the way and for the queue.
        person: for whom a trusted service asks.

    Raises:
        NoService: no processor listens, or it can take no more.
        QueryFailed: the statement is wrong, not allowed, or too large.
        TimedOut: it, or the next part of it, did not come in time.
        Refused: the credentials may not ask the history.
        Unavailable: a part was lost on the way.
    """
    pieces: list[bytes] = []
    async with contextlib.aclosing(parts(nc, request, margin_seconds=margin_seconds, person=person)) as stream:
        async for piece, end in stream:
            pieces.append(piece)
            if end is not None:
                return QueryResult(b"".join(pieces), request.format, end)
    raise AssertionError("unreachable")


async def parts(
    nc: nats.aio.client.Client, request: QueryRequest, *, margin_seconds: float, person: str = ""
) -> AsyncGenerator[tuple[bytes, QueryEnd | None]]:
    """Send a query and yield the parts of its answer as they come, the last with its end; raises as `collect`.

    A part is acknowledged when the next is asked for, so a slow consumer slows the processor down and loses nothing.
    Closing the generator before the end cancels the query.
    """
    inbox = nc.new_inbox()
    # No limit: parts that were dropped would be lost rows.
    subscription = await nc.subscribe(inbox, pending_msgs_limit=0, pending_bytes_limit=0)
    done = False
    try:
        seconds = request.timeout_seconds + margin_seconds
        first: Msg | None = None
        if person:
            # A server or a processor of an earlier version knows nobody behind whom it knows.
            with contextlib.suppress(Refused):
                first = await _first(nc, in_own_name(nc, subjects.QUERY, person), request, subscription, inbox, seconds)
        if first is None or _nobody(first):
            first = await _first(nc, in_own_name(nc, subjects.QUERY), request, subscription, inbox, seconds)
        count = 0
        while True:
            try:
                message = first or await subscription.next_msg(timeout=seconds)
            except nats.errors.TimeoutError:
                raise _late(request) from None
            first = None
            headers = message.headers or {}
            if _nobody(message):
                done = True
                raise NoService(
                    "the bus is there, but no processor answers: "
                    "start one with `corral process` (or all with `corral up`)"
                )
            if END_HEADER not in headers and message.data.startswith(b'{"type":"error"'):
                done = True
                refusal = codec.decode(message.data, requests.Error, codec.JSON)
                raise _failure(refusal.code, refusal.message, refusal.field)
            if (part := headers.get(PART_HEADER)) is not None and int(part) != count:
                raise Unavailable(f"part {count} of the result was lost on the way: ask again")
            count += 1
            if END_HEADER in headers:
                done = True
                end = codec.decode(headers[END_HEADER].encode(), QueryEnd, codec.JSON)
                if end.error:
                    raise _failure(end.code, end.error)
                yield message.data, end
                return
            yield message.data, None
            if message.reply:
                await nc.publish(message.reply, b"")
    finally:
        if not done and request.query_id is not None:
            await asyncio.shield(_cancel(nc, request.query_id))
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()


async def _first(
    nc: nats.aio.client.Client, subject: str, request: QueryRequest, answers: Subscription, inbox: str, seconds: float
) -> Msg:
    """Ask, and wait for the first part.

    Raises:
        Refused: the server lets these credentials ask nothing there, which it tells nobody who waits.
        TimedOut: nothing came.
    """
    with refusals(nc, subject) as refused:
        headers = {codec.CONTENT_TYPE_HEADER: codec.JSON}
        await nc.publish(subject, codec.encode(request, codec.JSON), reply=inbox, headers=headers)
        coming = asyncio.ensure_future(answers.next_msg(timeout=seconds))
        try:
            await asyncio.wait({coming, refused}, return_when=asyncio.FIRST_COMPLETED)
            if refused.cancelled() and not coming.done():
                raise Refused(str(NotAllowed(subject, identity_of(nc))), "refused")
            return await coming
        except nats.errors.TimeoutError:
            raise _late(request) from None
        finally:
            coming.cancel()


def _nobody(message: Msg) -> bool:
    """Whether the server says that nobody listens."""
    return (message.headers or {}).get("Status") == "503" and not message.data


def _late(request: QueryRequest) -> TimedOut:
    return TimedOut(f"the query did not end within {request.timeout_seconds:g} s: narrow it, or raise the timeout")


def _failure(code: str, message: str, field: str = "") -> CorralError:
    """Whatever is wrong with a statement is one error to its asker; only who is not there or too slow is another."""
    if code in ("timeout", "unavailable", "busy"):
        return error_of(requests.Error(code=code, message=message))
    return QueryFailed(message, code, field)


async def _cancel(nc: nats.aio.client.Client, query_id: str) -> None:
    """Nobody waits for the rows any more: let the database stop."""
    with contextlib.suppress(nats.errors.Error, OSError):
        await nc.publish(subjects.QUERY_CANCEL, codec.encode(CancelRequest(query_id=query_id), codec.JSON))
        await nc.flush(1)
