"""Snapshots of the history over the bus: the processor writes a copy to its disk, and the client reads it in pieces.

    corral.v1.history.snapshot   ask for one: `SnapshotRequest`, answered with `Snapshot` once it is complete
    corral.v1.history.read       a piece of one: `SnapshotRead`, answered with its bytes, or with an `Error`

Both subjects may end with the user's name. On a bus with authentication they must, and only operators may use them. The
client names no path, so it can't make a processor write elsewhere. A piece has the type `application/octet-stream`,
and an error the header `Nats-Service-Error-Code`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import duckdb
import msgspec
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ...bus.tasks import BackgroundTasks
from ...schemas import codec, replies, subjects
from ...schemas.query import Snapshot, SnapshotRead, SnapshotRequest
from ...schemas.requests import Error
from ...schemas.values import units
from ..storage import StorageError, StoragePaused

log = logging.getLogger("corral.processor")

PIECE_BYTES: Final = 512 * 1024
PIECE_TYPE: Final = "application/octet-stream"
KEPT_SECONDS: Final = 3600.0
KEPT: Final = 2
"""Maximum number of copies: a further one evicts the least recently read."""


_ELSEWHERE_SECONDS: Final = 0.3
"""Delay before `not_found` is answered: another processor that has the copy answers sooner."""


class NoRoom(Exception):
    """A copy would not fit on the disk; the message says what to do."""


class SnapshotService:
    """Serves snapshots of one history; they are written one at a time.

    Args:
        nc: connection to the bus.
        folder: for copies until they are fetched, and for nothing else: it is deleted at the start and at the end.
        write: writes a copy to a path, with the archive or without, and returns the number of samples in it.
        size_bytes: of the database; a copy is not begun if less is free on the disk.
        reading: gives the context of a copy, in which what was received before is stored.
        kept_seconds: age at which a copy is deleted.
    """

    def __init__(
        self,
        nc: Client,
        folder: Path,
        write: Callable[[Path, bool], int],
        size_bytes: Callable[[], int] = lambda: 0,
        reading: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
        *,
        kept_seconds: float = KEPT_SECONDS,
    ) -> None:
        self._nc = nc
        self._write = write
        self._folder = folder
        self._size_bytes = size_bytes
        self._reading = reading
        self._kept_seconds = kept_seconds
        self._busy = asyncio.Lock()
        self._subscriptions: list[Subscription] = []
        self._background = BackgroundTasks()
        # When each copy was last read, and the timer that will delete it.
        self._read_at: dict[str, float] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        """Start listening. Copies that an earlier process left are deleted."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for subject in (subjects.SNAPSHOT, f"{subjects.SNAPSHOT}.*"):
            self._subscriptions.append(await self._nc.subscribe(subject, queue="snapshot", cb=self._on_request))
        for subject in (subjects.SNAPSHOT_READ, f"{subjects.SNAPSHOT_READ}.*"):
            self._subscriptions.append(await self._nc.subscribe(subject, cb=self._on_read))

    async def stop(self) -> None:
        """Stop listening and remove what was not fetched."""
        for subscription in self._subscriptions:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()
        await self._background.cancel()
        for timer in self._timers.values():
            timer.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _on_request(self, message: Msg) -> None:
        # In a separate task, so that the subscription goes on receiving messages.
        self._background.start(self._answer(message))

    async def _answer(self, message: Msg) -> None:
        warnings: list[str] = []
        reply: Struct
        try:
            # An empty message is refused, too: the server sends some by itself.
            content = codec.content_type(message.headers)
            request, warnings = codec.decode_request(message.data, SnapshotRequest, content)
            async with self._busy:
                reply = msgspec.structs.replace(await self._make(request), warnings=warnings)
        except codec.DecodeError as error:
            reply = Error(code=error.code, message=str(error), field=error.field)
        except (NoRoom, StoragePaused, StorageError, duckdb.Error, OSError) as error:
            log.error("no snapshot: %s", error)
            reply = Error(code="unavailable", message=f"no snapshot: {error}"[:2000])
        await self._respond(message, reply, warnings)

    async def _respond(self, message: Msg, reply: Struct, warnings: Sequence[str] = ()) -> None:
        if message.reply:
            content = replies.asked_in(message.headers)
            headers = replies.headers(reply, content, warnings)
            await self._nc.publish(message.reply, codec.encode(reply, content), headers=headers)

    async def _make(self, request: SnapshotRequest) -> Snapshot:
        while len(self._read_at) >= KEPT:
            self._drop(min(self._read_at, key=self._read_at.__getitem__))
        self._check_room()
        name = f"{time.time_ns():016x}"[:16]
        path = self._folder / f"{name}.duckdb"
        loop = asyncio.get_running_loop()
        async with self._reading():
            rows = await loop.run_in_executor(None, self._write, path, request.archive)
        self._read_at[name] = time.monotonic()
        self._timers[name] = loop.call_later(self._kept_seconds, self._drop, name)
        return Snapshot(snapshot_id=name, bytes=path.stat().st_size, samples=rows)

    def _check_room(self) -> None:
        """Raise `NoRoom` if less space is free than the database takes: a full disk would stop ingest."""
        self._folder.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(self._folder).free, self._size_bytes()
        if free < needed:
            raise NoRoom(
                f"{units.format_bytes(free)} are free beside the database, which has {units.format_bytes(needed)}: "
                "make room, then ask again"
            )

    def _drop(self, name: str) -> None:
        self._read_at.pop(name, None)
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()
        (self._folder / f"{name}.duckdb").unlink(missing_ok=True)

    async def _on_read(self, message: Msg) -> None:
        try:
            content = codec.content_type(message.headers)
            request, warnings = codec.decode_request(message.data, SnapshotRead, content)
        except codec.DecodeError as error:
            await self._respond(message, Error(code=error.code, message=str(error), field=error.field))
            return
        if request.snapshot_id not in self._read_at:
            # Another processor may have it, and answers at once.
            self._background.start(self._not_found(message, request.snapshot_id))
            return
        if request.done:
            self._drop(request.snapshot_id)
            return
        self._read_at[request.snapshot_id] = time.monotonic()
        with (self._folder / f"{request.snapshot_id}.duckdb").open("rb") as file:
            file.seek(request.offset)
            piece = file.read(min(PIECE_BYTES, self._nc.max_payload - 1024))
        if message.reply:
            await self._nc.publish(message.reply, piece, headers=replies.headers(None, PIECE_TYPE, warnings))

    async def _not_found(self, message: Msg, snapshot_id: str) -> None:
        await asyncio.sleep(_ELSEWHERE_SECONDS)
        text = f"there is no copy {snapshot_id[:64]!r}: it was fetched, or is older than an hour"
        await self._respond(message, Error(code="not_found", message=text, field="$.snapshot_id"))
