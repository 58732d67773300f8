"""Delivery of answers: computed parts wait here until their reader takes them.

`put` is called by the thread of the query, which continues at once while there is room. `deliver` runs in the event
loop, and ends when the reader has all parts, or is given up. A reader with a window acknowledges each part. One without
gets all parts at once, so its answer is limited to `PLAIN_ANSWER_BYTES`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from ...schemas.query import QueryEnd
from .execution import SET_BACK, Execution, timed_out
from .guard.errors import QueryError
from .spool import Spool, SpoolRoom

PLAIN_ANSWER_BYTES: Final = 32 * 2**20
"""Largest answer to a reader that acknowledges nothing: half of what a NATS server buffers for a slow consumer."""
MIN_BYTES_PER_SECOND: Final = 2**20
"""A reader slower than this may block its query for `Limits.blocked_seconds` more, and no longer."""
_POLL_SECONDS: Final = 0.05

Publish = Callable[[bytes, int, QueryEnd | None], Awaitable[None]]
"""Sends a part under its number; the last one with its end."""


class Answer:
    """The answer to one query, from its first part to its last.

    Args:
        execution: the query.
        subject: that acknowledgements come to.
        room: for parts that wait.
        express: the query runs in an express slot: nothing is sent before the answer is complete, so that the query
            can be requeued.

    Attributes:
        computed: true once the query has ended and freed its slot.
        parts: that were sent.
    """

    def __init__(self, execution: Execution, subject: str, room: SpoolRoom, *, express: bool = False) -> None:
        self.execution = execution
        self.subject = subject
        self.express = express
        self.computed = False
        self.parts = 0
        self._spool = Spool(room, execution.asker)
        self._size = execution.request.window
        self._loop = asyncio.get_running_loop()
        self._bytes = 0
        self._sent_bytes = 0
        self._acknowledged = 0
        self._end: QueryEnd | None = None
        self._failure: QueryError | None = None
        self._moved = asyncio.Event()

    # In the thread of the query

    def put(self, part: bytes, end: QueryEnd | None, blocked_seconds: float) -> None:
        """Keep a part for delivery. It waits for room, and ends the query if the reader makes none in time.

        Raises:
            QueryError: it is stopped, too large, or read too slowly.
        """
        self._bytes += len(part)
        if not self._size and self._bytes > PLAIN_ANSWER_BYTES:
            raise QueryError(
                "too_large",
                f"the answer is larger than {PLAIN_ANSWER_BYTES >> 20} MiB: lower `limit`, or set `window` "
                "and acknowledge the parts",
            )
        if not self._keep(part):
            self._wait_for_room(part, blocked_seconds)
        if end is not None:
            self._end = end
        self._loop.call_soon_threadsafe(self._moved.set)

    def _keep(self, part: bytes) -> bool:
        try:
            return self._spool.put(part)
        except OSError as error:
            raise QueryError("unavailable", f"the answer can't be kept for its reader: {error.strerror}") from None

    def _wait_for_room(self, part: bytes, blocked_seconds: float) -> None:
        if self.express:
            raise QueryError(SET_BACK, "the answer is large")
        began = time.monotonic()
        while not self._keep(part):
            self.execution.check_stopped()
            self.execution.blocked_seconds += time.monotonic() - began
            began = time.monotonic()
            if self.execution.blocked_seconds > blocked_seconds + self._sent_bytes / MIN_BYTES_PER_SECOND:
                raise QueryError(
                    "cancelled",
                    "the answer is read more slowly than it may hold up others: ask for less with `limit`, or read "
                    "the parts as they come",
                )
            time.sleep(_POLL_SECONDS)

    # In the event loop

    def end(self, failure: QueryError | None = None) -> None:
        """Mark the query as ended, with a failure if there was one. The remaining parts still wait for the reader."""
        self.computed = True
        self._failure = self._failure or failure
        self._moved.set()

    def acknowledge(self) -> None:
        """Record that the reader has taken a part."""
        self._acknowledged += 1
        self._moved.set()

    def look(self) -> None:
        """Wake `deliver`, so that it sees that the query was stopped."""
        self._moved.set()

    def close(self) -> None:
        """Drop the remaining parts."""
        self._spool.close()

    async def deliver(self, publish: Publish, acknowledge_seconds: float, reading_seconds: float) -> None:
        """Send all parts.

        Args:
            publish: sends one.
            acknowledge_seconds: time without an acknowledgement, while the query runs, after which the reader is given
                up.
            reading_seconds: the same once the answer is computed, and only takes up room.

        Raises:
            QueryError: the query failed, or the reader takes no part.
        """
        while True:
            await self._until(self._ready)
            if self._failure is not None:
                raise self._failure
            self._check_stopped()
            last = self._end is not None and len(self._spool) == 1
            if not last and self._size and self.parts - self._acknowledged >= self._size:
                await self._taken(acknowledge_seconds, reading_seconds)
                continue
            part = self._spool.take()
            self._sent_bytes += len(part)
            await publish(part, self.parts, self._end if last else None)
            self.parts += 1
            if last:
                return

    def _ready(self) -> bool:
        if self._failure is not None:
            return True
        # A part is known to be the last only once the end is set, which happens after it was kept.
        return bool(len(self._spool)) and (self.computed or (len(self._spool) > 1 and not self.express))

    async def _taken(self, acknowledge_seconds: float, reading_seconds: float) -> None:
        before, began = self._acknowledged, time.monotonic()
        while self._acknowledged == before and self._failure is None:
            limit = reading_seconds if self.computed else acknowledge_seconds
            left = began + limit - time.monotonic()
            if left <= 0:
                raise QueryError("cancelled", "the asker has acknowledged no part for too long")
            self._check_stopped()
            self._moved.clear()
            try:
                async with asyncio.timeout(min(left, 1.0)):
                    await self._moved.wait()
            except TimeoutError:
                if not self.computed and time.monotonic() > self.execution.deadline:
                    raise timed_out(self.execution) from None

    async def _until(self, found: Callable[[], bool]) -> None:
        while not found():
            self._moved.clear()
            await self._moved.wait()
            if self.computed:
                self._check_stopped()

    def _check_stopped(self) -> None:
        try:
            self.execution.check_stopped()
        except QueryError as error:
            # A query that ended before it could be requeued keeps its answer.
            if error.code != SET_BACK:
                raise


def header(end: QueryEnd) -> str:
    """Encode a query's end as a header: one line of ASCII."""
    return json.dumps({name: value for name, value in msgspec.to_builtins(end).items() if name != "warnings" or value})
