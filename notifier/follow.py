"""Follows a stream from where it was read to, without a gap and across restarts of the bus.

How far it was read is kept after what came before is kept, so that a message may be read twice, and is never left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js import api
from nats.js.errors import NotFoundError

from ..bus import stream_reader
from ..bus.stream_reader import Stored
from ..bus.tasks import heed_cancellation
from .store import Cursor, Store, StoreFailed

log = logging.getLogger("corral.notifier")

_BATCH: Final = 256
_EXPIRES_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 0.5
_HARMLESS: Final = frozenset({"404", "408"})
"""Statuses of a request that has ended without messages."""

Take = Callable[[Sequence[Stored]], Awaitable[None]]


class _Again(Exception):
    """The consumer is of no use any more."""


class Follower:
    """Reads a stream on and on.

    Args:
        nc: connection.
        store: keeps how far it was read.
        stream: name of the stream.
        subjects: that its messages match.
        take: is given messages, in order, and keeps what follows from them. It raises `StoreFailed` to get them again.

    Attributes:
        problem: why it can't read at the moment; empty if it can.
    """

    def __init__(self, nc: Client, store: Store, stream: str, subjects: Sequence[str], take: Take) -> None:
        self.problem = "it has not begun to read"
        self._nc = nc
        self._store = store
        self._stream = stream
        self._subjects = list(subjects)
        self._take = take

    async def begin(self) -> Cursor:
        """Keep where the stream is now, unless it was read before: what happened before the first start is no news.

        Raises:
            StoreFailed: it could not be kept.
            nats.errors.Error: the bus failed.
        """
        cursor = await self._store.cursor(self._stream)
        if cursor is not None:
            return cursor
        try:
            info = await self._nc.jetstream().stream_info(self._stream)
            cursor = Cursor(created=stream_reader.created(info), sequence=info.state.last_seq)
        except NotFoundError:
            cursor = Cursor(created="", sequence=0)
        await self._store.save_cursor(self._stream, cursor)
        return cursor

    async def run(self) -> None:
        """Follow the stream until cancelled."""
        logged = ""
        while True:
            heed_cancellation()
            try:
                await self._follow()
            except _Again:
                pass
            except NotFoundError:
                self.problem = f"there is no stream {self._stream} yet"
            except (NatsError, StoreFailed, OSError, TimeoutError) as error:
                self.problem = f"{self._stream} can't be read: {error or type(error).__name__}"
            if self.problem and self.problem != logged:
                log.warning("%s; retrying", self.problem)
            logged = self.problem
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _follow(self) -> None:
        js = self._nc.jetstream()
        info = await js.stream_info(self._stream)
        created = stream_reader.created(info)
        cursor = await self._store.cursor(self._stream)
        config = api.ConsumerConfig(
            filter_subjects=self._subjects,
            ack_policy=api.AckPolicy.NONE,
            mem_storage=True,
            inactive_threshold=30.0,
        )
        if cursor is None:
            cursor = await self.begin()
        if cursor.created == created and cursor.sequence <= info.state.last_seq:
            config.deliver_policy = api.DeliverPolicy.BY_START_SEQUENCE
            config.opt_start_seq = cursor.sequence + 1
        elif cursor.stored_at:
            # The stream was made anew, or restored: what has come since is known by its time alone.
            config.deliver_policy = api.DeliverPolicy.BY_START_TIME
            config.opt_start_time = datetime.fromtimestamp(cursor.stored_at, UTC)
        else:
            config.deliver_policy = api.DeliverPolicy.ALL
        consumer = (await js.add_consumer(self._stream, config)).name
        inbox = self._nc.new_inbox()
        arrived: asyncio.Queue[Msg] = asyncio.Queue()

        async def on_message(message: Msg) -> None:
            arrived.put_nowait(message)

        subscription = await self._nc.subscribe(inbox, cb=on_message)
        try:
            self.problem = ""
            number = 0
            while True:
                heed_cancellation()
                await stream_reader.pull(self._nc, self._stream, consumer, inbox, _BATCH, _EXPIRES_SECONDS)
                number = await self._batch(arrived, created, number)
        finally:
            with contextlib.suppress(NatsError, OSError, TimeoutError):
                await subscription.unsubscribe()
                await js.delete_consumer(self._stream, consumer)

    async def _first(self, arrived: asyncio.Queue[Msg]) -> Msg:
        """The next message or status.

        Raises:
            _Again: none comes in time, or the connection is another one, on which the request was not made.
        """
        connection = self._nc.stats["reconnects"]
        for _ in range(round(_EXPIRES_SECONDS * 2 / _LOOK_SECONDS)):
            try:
                return await asyncio.wait_for(arrived.get(), _LOOK_SECONDS)
            except TimeoutError:
                if self._nc.stats["reconnects"] != connection:
                    break
        raise _Again

    async def _batch(self, arrived: asyncio.Queue[Msg], created: str, number: int) -> int:
        """Take the messages of one request, until it ends.

        Returns:
            Number of the last message that the consumer has delivered.

        Raises:
            _Again: nothing comes any more, or a message was lost on its way.
        """
        left = _BATCH
        while left:
            messages = [await self._first(arrived)]
            while not arrived.empty():
                messages.append(arrived.get_nowait())
            found: list[Stored] = []
            status = ""
            for message in messages:
                if not message.reply:
                    status = (message.headers or {}).get("Status", "")
                    continue
                place = stream_reader.delivery(message.reply.encode())
                if place.number != number + 1:
                    raise _Again
                number += 1
                left -= 1
                found.append(Stored(message.subject, message.data, place.sequence, place.stored_ns * 1e-9))
            if found:
                await self._take(found)
                last = found[-1]
                await self._store.save_cursor(
                    self._stream, Cursor(created=created, sequence=last.sequence, stored_at=last.stored_at)
                )
            if status and status not in _HARMLESS:
                raise _Again
            if status:
                break
        return number
