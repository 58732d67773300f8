"""Read a stream to its end fast, since a start or a takeover waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import api

_BATCH: Final = 500
_TIMEOUT_SECONDS: Final = 5.0


class Stored(NamedTuple):
    """A message as a stream holds it.

    Attributes:
        subject: where it was published.
        data: its body.
        sequence: its place.
        stored_at: when it was stored, seconds since the epoch.
    """

    subject: str
    data: bytes
    sequence: int
    stored_at: float


async def read(
    nc: Client, stream: str, subject: str, config: api.ConsumerConfig, until: int = 0
) -> AsyncIterator[Stored]:
    """Yield the messages that the stream holds now and that a consumer with this configuration gets.

    Args:
        nc: connection.
        stream: to read.
        subject: that its messages match.
        config: which messages are delivered; acknowledgement and storage of the consumer are set here.
        until: a sequence that the stream is known to hold; reading goes on until it is reached.

    Raises:
        TimeoutError: no message came for 5 s.
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
    ask = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{info.name}"
    body = json.dumps({"batch": _BATCH, "expires": int(_TIMEOUT_SECONDS * 1e9)}).encode()
    try:
        owed = 0
        left, reached = info.num_pending or 0, 0
        while left or reached < until:
            while owed <= _BATCH:  # the next batch is on its way while one is worked on
                await nc.publish(ask, body, reply=inbox)
                owed += _BATCH
            message = (
                await asyncio.wait_for(arrived.get(), _TIMEOUT_SECONDS) if arrived.empty() else arrived.get_nowait()
            )
            if not message.reply:  # a status: the request for a batch has run out
                owed = 0
                continue
            owed -= 1
            # $JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<delivered>.<sequence>.<…>.<nanoseconds>.<pending>[.<…>]
            parts = message.reply.split(".")
            first = 5 if len(parts) == 9 else 7
            reached, left = int(parts[first]), int(parts[first + 3])
            yield Stored(message.subject, message.data, reached, int(parts[first + 2]) * 1e-9)
    finally:
        with contextlib.suppress(NatsError):
            await subscription.unsubscribe()
            await js.delete_consumer(stream, info.name)
