"""Sends a query and joins the parts of its answer into one result (see `schemas/query.py`)."""

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
from ..bus.tasks import heeding
from ..schemas import codec, requests, subjects
from ..schemas.instruments import ServiceKind
from ..schemas.query import END_HEADER, PART_HEADER, CancelRequest, QueryEnd, QueryRequest
from .errors import CorralError, QueryFailed, Refused, TimedOut, Unavailable, error_of
from .result import QueryResult
from .rpc import no_service

SERVICE: Final = "dashboard"
"""Service name in subjects that name a person, on a bus without authentication."""


def user_subject(nc: nats.aio.client.Client, subject: str, person: str = "") -> str:
    """Append the name of the credentials' user to a subject, as a bus with authentication requires.

    Args:
        nc: a connected client of the bus.
        subject: subject without a user name.
        person: user on whose behalf a trusted service asks, and under whose name the request is queued; it is appended
            too.
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
        nc: a connected client of the bus.
        request: the query.
        margin_seconds: seconds added to the query's timeout, for transport and queueing.
        person: user on whose behalf a trusted service asks.

    Raises:
        NoService: no processor is running, or it is overloaded.
        QueryFailed: the statement is invalid, not permitted, or its result is too large.
        TimedOut: the answer, or its next part, did not arrive in time.
        Refused: the credentials don't permit queries of the history.
        Unavailable: a part was lost in transit.
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
    """Send a query and yield the parts of its answer as they arrive, the last one with a `QueryEnd`.

    A part is acknowledged when the next one is requested, so a slow consumer slows the processor down and loses
    nothing. Closing the generator before the end cancels the query. Raises the same errors as `collect`.
    """
    inbox = nc.new_inbox()
    # No limit: parts that were dropped would be lost rows.
    subscription = await nc.subscribe(inbox, pending_msgs_limit=0, pending_bytes_limit=0)
    done = False
    try:
        seconds = request.timeout_seconds + margin_seconds
        first: Msg | None = None
        if person:
            # A server or processor of an earlier version has no subjects that name a person behind a service.
            with contextlib.suppress(Refused):
                first = await _first_part(
                    nc, user_subject(nc, subjects.QUERY, person), request, subscription, inbox, seconds
                )
        if first is None or _no_responders(first):
            first = await _first_part(nc, user_subject(nc, subjects.QUERY), request, subscription, inbox, seconds)
        count = 0
        while True:
            try:
                message = first or await heeding(subscription.next_msg(timeout=seconds))
            except nats.errors.TimeoutError:
                raise _timed_out(request) from None
            first = None
            headers = message.headers or {}
            if _no_responders(message):
                done = True
                raise no_service(subjects.QUERY)
            if END_HEADER not in headers and message.data.startswith(b'{"type":"error"'):
                done = True
                refusal = codec.decode(message.data, requests.Error, codec.JSON)
                raise _failure(refusal.code, refusal.message, refusal.field)
            if (part := headers.get(PART_HEADER)) is not None and int(part) != count:
                raise Unavailable(f"part {count} of the result was lost in transit: retry")
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


async def _first_part(
    nc: nats.aio.client.Client, subject: str, request: QueryRequest, answers: Subscription, inbox: str, seconds: float
) -> Msg:
    """Send the query, and wait for the first part of its answer.

    Raises:
        Refused: these credentials may not publish on the subject. The server sends no reply then, so its permission
            errors are watched.
        TimedOut: no answer came in time.
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
            raise _timed_out(request) from None
        finally:
            coming.cancel()


def _no_responders(message: Msg) -> bool:
    """True if the message is the server's "no responders" status (503)."""
    return (message.headers or {}).get("Status") == "503" and not message.data


def _timed_out(request: QueryRequest) -> TimedOut:
    return TimedOut(f"the query did not finish within {request.timeout_seconds:g} s: narrow it, or raise the timeout")


def _failure(code: str, message: str, field: str = "") -> CorralError:
    """Map an error code to an exception: absent or slow services to their exceptions, all else to `QueryFailed`."""
    if code in ("timeout", "unavailable", "busy"):
        return error_of(requests.Error(code=code, message=message), ServiceKind.PROCESSOR)
    return QueryFailed(message, code, field)


async def _cancel(nc: nats.aio.client.Client, query_id: str) -> None:
    """Cancel a query whose rows are no longer needed; errors of the connection are ignored."""
    with contextlib.suppress(nats.errors.Error, OSError):
        await nc.publish(subjects.QUERY_CANCEL, codec.encode(CancelRequest(query_id=query_id), codec.JSON))
        await nc.flush(1)
