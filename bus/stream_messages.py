"""Read a stream without a consumer: permission to create consumers would allow delivery to any subject."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.js.errors import APIError, NotFoundError

from . import permissions

_BATCH: Final = 500
_TIMEOUT_SECONDS: Final = 5.0


async def read(
    nc: Client, stream: str, subject: str, *, since: datetime | None = None, batch: int = _BATCH
) -> AsyncGenerator[Msg]:
    """Yield the messages of a stream that match a subject, from the oldest to the newest.

    Args:
        nc: connection; it needs `$JS.API.DIRECT.GET.<stream>`.
        stream: to read.
        subject: that its messages match, as the header `Nats-Subject` of each says.
        since: only those that were stored then or later.
        batch: messages asked for at a time.

    Raises:
        NotFoundError: there is no such stream.
        NotAllowed: the connection may not read it.
        nats.errors.TimeoutError: the bus did not answer.
        APIError: the server is older than 2.11.
    """
    where = f"$JS.API.DIRECT.GET.{stream}"
    after = 0
    while True:
        wanted: dict[str, object] = {"batch": batch, "next_by_subj": subject, "seq": after + 1}
        if since is not None and not after:
            wanted |= {"start_time": since.isoformat().replace("+00:00", "Z")}
            del wanted["seq"]
        inbox = nc.new_inbox()
        subscription = await nc.subscribe(inbox, pending_msgs_limit=-1, pending_bytes_limit=-1)
        try:
            await nc.publish(where, json.dumps(wanted).encode(), reply=inbox)
            pending = 0
            while True:
                message = await subscription.next_msg(timeout=_TIMEOUT_SECONDS)
                headers = message.headers or {}
                status = headers.get("Status")
                if status is None:
                    after = int(headers["Nats-Sequence"])
                    pending = int(headers.get("Nats-Num-Pending", "0"))
                    yield message
                    continue
                if status == "503":
                    raise NotFoundError(description=f"there is no stream {stream}")
                if status not in ("204", "404"):
                    raise APIError.from_msg(message)
                break
        finally:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()
        if not pending:
            return


def stored_at(message: Msg) -> float:
    """Time when the server stored a message that was read here, seconds since the epoch; -inf if it does not say."""
    text = (message.headers or {}).get("Nats-Time-Stamp", "")
    try:
        return _seconds(text)
    except ValueError:
        return -math.inf


async def clock(nc: Client, stream: str, *, timeout: float = _TIMEOUT_SECONDS) -> float | None:
    """Time of the server, seconds since the epoch; None if it refuses, or gives none.

    Raises:
        nats.errors.Error: the bus did not answer.
    """
    reply = await nc.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=timeout)
    try:
        return _seconds(json.loads(reply.data)["ts"])
    except (ValueError, KeyError, TypeError):
        return None


def _seconds(text: str) -> float:
    """Parse a time as Go writes it, to seconds since the epoch: Python's parser does not take nanoseconds."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


async def last(nc: Client, stream: str, subject: str, *, timeout: float = _TIMEOUT_SECONDS) -> Msg | None:
    """The newest message of a subject (`*` stands for any token); None if there is none.

    Args:
        nc: connection; it needs `$JS.API.DIRECT.GET.<stream>.<subject>`.
        stream: to read.
        subject: of the message.
        timeout: seconds to wait.

    Raises:
        NotFoundError: there is no such stream.
        NotAllowed: the connection may not read it.
        nats.errors.TimeoutError: the bus did not answer.
    """
    try:
        message = await permissions.request(nc, f"$JS.API.DIRECT.GET.{stream}.{subject}", timeout=timeout)
    except NoRespondersError:
        raise NotFoundError(description=f"there is no stream {stream}") from None
    return None if (message.headers or {}).get("Status") == "404" else message
