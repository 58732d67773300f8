"""Read streams: with a consumer (`read`), or by direct requests for those who may not create one (`read_direct`).

Permission to create consumers would allow delivery to any subject, so only the planner and processors have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import api
from nats.js.errors import APIError, NotFoundError

from . import permissions
from .tasks import heeding

_BATCH: Final = 500
_TIMEOUT_SECONDS: Final = 5.0
_RUN_OUT: Final = "408"
"""Status of a request for messages whose time is over; any other says that the consumer gives no more."""
_NO_CONSUMER: Final = "503"


_decode_integers: Final = msgspec.json.Decoder(list[int]).decode


class MessagesLost(NatsError, ConnectionError):
    """Messages of a stream did not come, though later ones did: it must be read again."""


class Stored(NamedTuple):
    """A message as a stream holds it.

    Attributes:
        subject: where it was published.
        data: its body.
        sequence: its place.
        stored_at: when it was stored, seconds since the epoch; -inf if the server does not say.
    """

    subject: str
    data: bytes
    sequence: int
    stored_at: float


class Delivery(NamedTuple):
    """Place of a message that a consumer delivers, from its reply subject.

    nats-py's `Msg.metadata` rounds the time to microseconds and takes several times as long.

    Attributes:
        sequence: its place in the stream.
        number: its place among the messages of the consumer, from 1.
        stored_ns: when the server stored it, nanoseconds since the epoch.
        pending: messages that the consumer has left.
    """

    sequence: int
    number: int
    stored_ns: int
    pending: int


def delivery(reply: bytes) -> Delivery:
    """Parse the reply subject of a delivered message.

    `$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<deliveries>.<sequence>.<number>.<nanoseconds>.<pending>[.<random>]`
    """
    parts = reply.split(b".")
    first = 5 if len(parts) == 9 else 7
    return Delivery(int(parts[first]), int(parts[first + 1]), int(parts[first + 2]), int(parts[first + 3]))


def deliveries(replies: Sequence[bytes]) -> list[int] | None:
    """Parse the reply subjects of messages of one consumer, for a fifth of the time that `delivery` takes for each.

    Returns:
        The four numbers of each, as in `Delivery`; None unless the subjects differ in these alone, and end with them,
        as where no domain is named.
    """
    prefix = replies[0].rsplit(b".", 4)[0] + b"."
    if prefix.count(b".") != 5:
        return None
    text = b",".join(replies).replace(prefix, b"").replace(b".", b",")
    try:
        numbers = _decode_integers(b"[%b]" % text)
    except msgspec.DecodeError:
        return None
    return numbers if len(numbers) == 4 * len(replies) else None


async def pull(
    nc: Client, stream: str, consumer: str, inbox: str, batch: int, expires_seconds: float, **options: int
) -> None:
    """Ask a consumer for messages.

    Args:
        nc: connection.
        stream: of the consumer.
        consumer: its name.
        inbox: subject that the messages are delivered to, and a status where the request ends early.
        batch: largest number of messages.
        expires_seconds: time after which the request ends.
        options: further fields of the request, such as `max_bytes`.
    """
    body = {"batch": batch, "expires": int(expires_seconds * 1e9), **options}
    await nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", json.dumps(body).encode(), reply=inbox)


def created(info: api.StreamInfo) -> str:
    """Creation time of a stream, as text: a stream that is created again has another one."""
    time: datetime | None = info.created
    return time.isoformat() if time else ""


async def read(
    nc: Client, stream: str, subject: str, config: api.ConsumerConfig, until: int = 0
) -> AsyncIterator[Stored]:
    """Yield the messages that the stream holds now and that a consumer with this configuration gets.

    Requests overlap, since the start of a planner waits for it.

    Args:
        nc: connection.
        stream: to read.
        subject: that its messages match.
        config: which messages are delivered; acknowledgement and storage of the consumer are set here.
        until: a sequence that the stream is known to hold; reading goes on until it is reached.

    Raises:
        TimeoutError: no message came for 5 s.
        nats.errors.Error: the consumer has gone, as when the server was restarted.
        MessagesLost: some were on their way when the connection broke.
    """
    js = nc.jetstream()
    config.filter_subject = subject
    config.ack_policy = api.AckPolicy.NONE
    config.mem_storage = True
    config.inactive_threshold = 30.0
    info = await js.add_consumer(stream, config)
    if not info.num_pending and not until:
        return
    arrived: asyncio.Queue[Msg] = asyncio.Queue()
    inbox = nc.new_inbox()

    async def on_message(message: Msg) -> None:
        arrived.put_nowait(message)

    subscription = await nc.subscribe(inbox, cb=on_message)
    try:
        owed = count = 0
        left, reached = info.num_pending or 0, 0
        while left or reached < until:
            while owed <= _BATCH:  # the next batch is on its way while one is worked on
                # They run out later than the wait ends: one that runs out had its messages, but for the last of them.
                await pull(nc, stream, info.name, inbox, _BATCH, 2 * _TIMEOUT_SECONDS)
                owed += _BATCH
            if arrived.empty():
                async with asyncio.timeout(_TIMEOUT_SECONDS):
                    message = await arrived.get()
            else:
                message = arrived.get_nowait()
            if not message.reply:
                if (status := (message.headers or {}).get("Status")) != _RUN_OUT:
                    raise _ended(status, message)
                owed = 0
                continue
            owed -= 1
            reached, number, stored_ns, left = delivery(message.reply.encode())
            if number != count + 1:
                raise MessagesLost(f"messages {count + 1} to {number - 1} from {stream} were lost with a connection")
            count = number
            yield Stored(message.subject, message.data, reached, stored_ns * 1e-9)
    finally:
        with contextlib.suppress(NatsError):
            await subscription.unsubscribe()
            await js.delete_consumer(stream, info.name)


def _ended(status: str | None, message: Msg) -> NatsError:
    if status == _NO_CONSUMER:
        return NoRespondersError()
    description = (message.headers or {}).get("Description", "")
    return APIError(int(status) if status and status.isdigit() else None, f"the consumer gives no more: {description}")


async def read_direct(
    nc: Client, stream: str, subject: str, *, since: datetime | None = None, batch: int = _BATCH
) -> AsyncGenerator[Stored]:
    """Yield the messages of a stream that match a subject, from the oldest to the newest.

    Args:
        nc: connection; it needs `$JS.API.DIRECT.GET.<stream>`.
        stream: to read.
        subject: that its messages match.
        since: only those that were stored then or later.
        batch: messages asked for at a time.

    Raises:
        NotFoundError: there is no such stream.
        NotAllowed: the connection may not read it.
        nats.errors.TimeoutError: the bus did not answer.
        APIError: the server is older than 2.11.
        MessagesLost: some were on their way when the connection broke.
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
            pending = before = 0
            while True:
                message = await heeding(subscription.next_msg(timeout=_TIMEOUT_SECONDS))
                headers = message.headers or {}
                status = headers.get("Status")
                if status in (None, "204") and int(headers.get("Nats-Last-Sequence", before)) != before:
                    raise MessagesLost(f"messages after {before} from {stream} were lost with a connection")
                if status is None:
                    stored = _stored(message)
                    after = before = stored.sequence
                    pending = int(headers.get("Nats-Num-Pending", "0"))
                    yield stored
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


async def last(nc: Client, stream: str, subject: str, *, timeout: float = _TIMEOUT_SECONDS) -> Stored | None:
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
    return None if (message.headers or {}).get("Status") == "404" else _stored(message)


def _stored(message: Msg) -> Stored:
    """The message in the answer to a direct request, whose place is in headers."""
    headers = message.headers or {}
    try:
        stored_at = _seconds(headers.get("Nats-Time-Stamp", ""))
    except ValueError:
        stored_at = -math.inf
    return Stored(headers.get("Nats-Subject", ""), message.data, int(headers.get("Nats-Sequence", "0")), stored_at)


async def server_time(nc: Client, stream: str, *, timeout: float = _TIMEOUT_SECONDS) -> float | None:
    """Time of the server, seconds since the epoch; None if it refuses, or gives none.

    Raises:
        nats.errors.Error: the bus did not answer.
    """
    reply = await heeding(nc.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=timeout))
    try:
        return _seconds(json.loads(reply.data)["ts"])
    except (ValueError, KeyError, TypeError):
        return None


def _seconds(text: str) -> float:
    """Parse a time as Go writes it, to seconds since the epoch: Python's parser does not take nanoseconds."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
