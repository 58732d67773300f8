"""Converts an Arrow stream to a Parquet file piece by piece, without holding either in memory as a whole."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from ..bus.tasks import cancel_all
from ..client import CorralError

# pyarrow has no type annotations.
ipc: Final[Any] = pyarrow.ipc
parquet: Final[Any] = pyarrow.parquet

GROUP_BYTES: Final = 32 * 2**20
"""Size of the Arrow data in one row group of the file."""
_PIECES: Final = 4
"""Maximum number of pieces that wait in each queue, before and after the thread."""
_POLL_SECONDS: Final = 0.2


class _Gone(Exception):
    """The other side of a queue has left, so the file is no longer needed."""


class _BoundedQueue:
    """Bounded queue of pieces between the event loop and a thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pieces: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._soon = asyncio.Event()
        self.ended = False
        self.gone = False

    async def put(self, piece: bytes) -> None:
        while len(self._pieces) >= _PIECES and not self.gone:
            self._soon.clear()
            await self._soon.wait()
        with self._changed:
            if not self.gone:
                self._pieces.append(piece)
                self._changed.notify_all()

    async def take(self) -> bytes | None:
        while True:
            # Both are checked under one lock: the last piece and the end could arrive between two separate checks.
            with self._changed:
                if self._pieces:
                    self._changed.notify_all()
                    return self._pieces.popleft()
                if self.ended:
                    return None
            self._soon.clear()
            await self._soon.wait()

    def put_blocking(self, piece: bytes) -> None:
        with self._changed:
            while len(self._pieces) >= _PIECES:
                self._wait()
            self._pieces.append(piece)
        self._wake()

    def take_blocking(self) -> bytes:
        with self._changed:
            while not self._pieces:
                if self.ended:
                    return b""
                self._wait()
            piece = self._pieces.popleft()
        self._wake()
        return piece

    def end(self) -> None:
        with self._changed:
            self.ended = True
            self._changed.notify_all()
        self._wake()

    def leave(self) -> None:
        with self._changed:
            self.gone = True
            self._changed.notify_all()
        self._wake()

    def _wait(self) -> None:
        if self.gone:
            raise _Gone
        self._changed.wait(_POLL_SECONDS)

    def _wake(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._soon.set)


class _Source(io.RawIOBase):
    """File object from which pyarrow reads the stream."""

    def __init__(self, line: _BoundedQueue) -> None:
        self._line = line
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._rest:
            self._rest = memoryview(self._line.take_blocking())
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class _Sink(io.RawIOBase):
    """File object to which pyarrow writes the file."""

    def __init__(self, line: _BoundedQueue) -> None:
        self._line = line

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._line.put_blocking(bytes(data))
        return len(data)


async def as_parquet(arrow: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Convert an Arrow IPC stream to a stream of the bytes of a Parquet file.

    Raises:
        CorralError: the file can't be written. Errors of the Arrow stream are raised unchanged.
    """
    loop = asyncio.get_running_loop()
    incoming, outgoing = _BoundedQueue(loop), _BoundedQueue(loop)
    failure: list[Exception] = []

    def convert() -> None:
        try:
            _convert(_Source(incoming), io.BufferedWriter(_Sink(outgoing), 2**18))
        except _Gone:
            pass
        except Exception as error:
            failure.append(error)
        finally:
            incoming.leave()
            outgoing.end()

    async def feed() -> None:
        try:
            async with aclosing(arrow):
                async for piece in arrow:
                    await incoming.put(piece)
        except BaseException:
            # The file must not look complete.
            incoming.leave()
            raise
        incoming.end()

    thread = threading.Thread(target=convert, name="parquet", daemon=True)
    feeding = asyncio.create_task(feed())
    thread.start()
    try:
        while (piece := await outgoing.take()) is not None:
            if feeding.done() and feeding.exception() is not None:
                break
            yield piece
        # If the Arrow stream failed, raise its error. If the conversion failed first, its rest isn't needed.
        if feeding.done() or not failure:
            await feeding
        if failure:
            raise CorralError(f"the file can't be written: {failure[0]}")
    finally:
        incoming.leave()
        outgoing.leave()
        await cancel_all([feeding])


def _convert(source: _Source, sink: io.BufferedWriter) -> None:
    reader: Any = ipc.open_stream(pa.PythonFile(io.BufferedReader(source, 2**18), mode="r"))
    batches: list[Any] = []
    held = 0
    with parquet.ParquetWriter(pa.PythonFile(sink, mode="w"), reader.schema, compression="zstd") as writer:
        for batch in reader:
            batches.append(batch)
            held += batch.nbytes
            if held >= GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(batches, reader.schema))
                batches, held = [], 0
        if batches:
            writer.write_table(pa.Table.from_batches(batches, reader.schema))
    sink.flush()
