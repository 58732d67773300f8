"""A copy of the history over the bus: the processor writes it beside its database, and the asker reads it in pieces.

    corral.v1.history.snapshot        ask for one: `SnapshotRequest`, answered with `Snapshot` once it is complete
    corral.v1.history.snapshot.read   a piece of one: `SnapshotRead`, answered with its bytes

The asker names no path, so that nobody can make a processor write where it should not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import duckdb
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..schemas import bus, codec
from ..schemas.query import Snapshot, SnapshotRead, SnapshotRequest
from ..schemas.requests import Error
from .storage import StorageError, StoragePaused

log = logging.getLogger("corral.processor")

PIECE_BYTES: Final = 512 * 1024
KEPT_SECONDS: Final = 3600.0
_ID: Final = re.compile(r"[0-9a-f]{16}")


class SnapshotService:
    """Answers requests for snapshots of one history, one at a time.

    Args:
        nc: connection to the bus.
        folder: where copies lie until they are fetched; nothing else does.
        write: writes a copy to a path, with the archive or without, and says how many samples are in it.
    """

    def __init__(self, nc: Client, folder: Path, write: Callable[[Path, bool], int]) -> None:
        self._nc = nc
        self._write = write
        self._folder = folder
        self._busy = asyncio.Lock()
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. What an earlier life has left is removed."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._subscriptions = [
            await self._nc.subscribe(bus.SNAPSHOT, queue="snapshot", cb=self._on_request),
            await self._nc.subscribe(bus.SNAPSHOT_READ, cb=self._on_read),
        ]

    async def stop(self) -> None:
        """Stop listening and remove what was not fetched."""
        for subscription in self._subscriptions:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()
        for task in self._tasks:
            task.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _on_request(self, message: Msg) -> None:
        # Beside the subscription's own task: it has to hear the reads meanwhile.
        task = asyncio.create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Msg) -> None:
        try:
            request = codec.decode(message.data or b"{}", SnapshotRequest, codec.JSON)
            async with self._busy:
                self._drop_old()
                name = f"{time.time_ns():016x}"[:16]
                path = self._folder / f"{name}.duckdb"
                loop = asyncio.get_running_loop()
                rows = await loop.run_in_executor(None, self._write, path, request.archive)
            reply = codec.encode(Snapshot(snapshot_id=name, bytes=path.stat().st_size, samples=rows), codec.JSON)
        except codec.DecodeError as error:
            reply = codec.encode(Error(code=error.code, message=str(error), field=error.field), codec.JSON)
        except (StoragePaused, StorageError, duckdb.Error, OSError) as error:
            log.error("no snapshot: %s", error)
            reply = codec.encode(Error(code="unavailable", message=f"no snapshot: {error}"[:2000]), codec.JSON)
        if message.reply:
            await self._nc.publish(message.reply, reply)

    async def _on_read(self, message: Msg) -> None:
        try:
            request = codec.decode(message.data, SnapshotRead, codec.JSON)
        except codec.DecodeError:
            return
        path = self._folder / f"{request.snapshot_id}.duckdb"
        if not _ID.fullmatch(request.snapshot_id) or not path.exists():
            return  # another processor's
        if request.done:
            path.unlink(missing_ok=True)
            return
        with path.open("rb") as file:
            file.seek(request.offset)
            piece = file.read(min(PIECE_BYTES, self._nc.max_payload - 1024))
        await self._nc.publish(message.reply, piece)

    def _drop_old(self) -> None:
        for path in self._folder.glob("*"):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink(missing_ok=True)
