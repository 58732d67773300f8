"""Sessions inside the runs of a host, as a runner sees them: their processes' sockets, and the steps of their clients.

What is under way is bounded in both directions: the process of a session is some frames of output ahead of its client,
and an input is taken only when the one before it was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ..bus.tasks import BackgroundTasks
from ..schemas.work.attach import PIECE_BYTES, AttachEnd, AttachExit, AttachNews, AttachStep, TerminalSize
from . import attached

OPEN_SECONDS: Final = 10.0
"""Time limit for the supervisor of a run to start the process of a session."""


class SessionError(Exception):
    """A session can't be opened; the message says why."""


class Session:
    """A session inside a run.

    Args:
        key: name of the run on this host.
        caller: who has opened it.
        lost_seconds: time without a question of its client after which it ends.

    Attributes:
        heard_at: when its client has asked something last, on the monotonic clock.
        exit: its end; None before.
    """

    def __init__(self, key: str, caller: object, lost_seconds: float) -> None:
        self.key = key
        self.caller = caller
        self.heard_at = time.monotonic()
        self._lost_seconds = lost_seconds
        self.exit: AttachExit | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks = BackgroundTasks()
        self._frames: deque[tuple[int, bytes]] = deque()
        self._news = asyncio.Event()
        self._piece = AttachNews()
        self._pieces = 0
        self._reading = 0
        self._written = 0
        self._taken = 0
        self._input = asyncio.Event()

    async def open(self, folder: Path, name: str, wanted: dict[str, Any], poke: Callable[[], None]) -> None:
        """Have the run's supervisor start the process of the session.

        Args:
            folder: of the run.
            name: of the files of the session, in that folder.
            wanted: command, size of the terminal and further variables; see `attached.fork`.
            poke: makes the supervisor read what is wanted.

        Raises:
            SessionError: it has not been started.
        """
        file = folder / f"{name}.json"
        listening = _listen(folder, name)
        try:
            new = file.with_suffix(".new")
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as writing:
                json.dump({**wanted, "socket": name}, writing)
            new.replace(file)
            poke()
            async with asyncio.timeout(OPEN_SECONDS):
                connection, _ = await asyncio.get_running_loop().sock_accept(listening)
        except TimeoutError:
            raise SessionError(
                "the supervisor of the job has not started a session: it may be of an earlier version of Corral"
            ) from None
        finally:
            listening.close()
            for path in (file, folder / name):
                with contextlib.suppress(OSError):
                    path.unlink()
        reader, self._writer = await asyncio.open_connection(sock=connection)
        self._tasks.start(self._receive(reader), name=f"session in {self.key}")

    async def step(self, step: AttachStep) -> AttachNews:
        """Do what a step asks for, and wait for what it waits for."""
        self.heard_at = time.monotonic()
        if step.close:
            self.end(AttachExit(end=AttachEnd.CLOSED))
        if step.terminal is not None:
            self._send(attached.SIZE, packed(step.terminal))
        if step.signal:
            self._send(attached.SIGNAL, bytes([step.signal]))
        end = time.monotonic() + step.wait_seconds
        if step.number:
            await self._write(step, end)
        news = AttachNews() if step.received is None else await self._read(step.received, end)
        self.heard_at = time.monotonic()
        return AttachNews(
            piece=news.piece,
            output=news.output,
            error_output=news.error_output,
            taken=self._taken,
            exit=self.exit if step.received is None or self._all_read else None,
        )

    @property
    def _all_read(self) -> bool:
        """True if all output is with the client, or lost."""
        return not self._frames and not self._piece.piece

    async def _write(self, step: AttachStep, end: float) -> None:
        if step.number > self._written and self._taken == self._written:
            self._written = step.number
            if step.input_ended:
                self._send(attached.INPUT_ENDED)
            self._send(attached.INPUT, step.data)
        while self._taken < step.number and self.exit is None and time.monotonic() < end:
            await _set(self._input, end)

    async def _read(self, received: int, end: float) -> AttachNews:
        # A question that comes again takes the place of the one before.
        self._reading += 1
        own = self._reading
        self._news.set()
        if received >= self._pieces:
            self._piece = AttachNews()
        while not self._piece.piece:
            if self._frames:
                self._piece = self._next_piece()
            elif self.exit is not None or time.monotonic() >= end or own != self._reading:
                return AttachNews()
            else:
                self._news.clear()
                await _set(self._news, end)
        return self._piece

    def _next_piece(self) -> AttachNews:
        texts = {attached.OUTPUT: b"", attached.ERROR_OUTPUT: b""}
        while self._frames and all(len(text) + attached.FRAME_BYTES <= PIECE_BYTES for text in texts.values()):
            kind, data = self._frames.popleft()
            texts[kind] += data
            self._send(attached.MORE)
        self._pieces += 1
        return AttachNews(piece=self._pieces, output=texts[attached.OUTPUT], error_output=texts[attached.ERROR_OUTPUT])

    def _send(self, kind: int, content: bytes = b"") -> None:
        # Without waiting: what is sent is bounded by the steps, and the process reads at all times.
        if self._writer is not None and self.exit is None:
            self._writer.write(attached.HEADER.pack(kind, len(content)) + content)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                kind, length = attached.HEADER.unpack(await reader.readexactly(attached.HEADER.size))
                content = await reader.readexactly(length)
                if kind == attached.EXIT:
                    self.end(_exit_of(json.loads(content)))
                    return
                if kind == attached.TAKEN:
                    self._taken = self._written
                    self._input.set()
                else:
                    self._frames.append((kind, content))
                    self._news.set()
        except (asyncio.IncompleteReadError, OSError):
            self.end(AttachExit(end=AttachEnd.LOST, message="the session was ended on the host"))

    def end(self, exit_: AttachExit) -> None:
        """End the session with its processes, unless it has ended already."""
        if self.exit is None:
            self.exit = exit_
        if self._writer is not None:
            self._writer.close()
        self._news.set()
        self._input.set()

    @property
    def gone(self) -> bool:
        """True if its client has asked nothing for too long."""
        return time.monotonic() - self.heard_at > self._lost_seconds

    async def close(self) -> None:
        """End the session, and what follows it."""
        self.end(AttachExit(end=AttachEnd.LOST, message="the runner has ended"))
        await self._tasks.cancel()


def packed(size: TerminalSize) -> bytes:
    """Size of a terminal as the session's process takes it."""
    return size.rows.to_bytes(2) + size.columns.to_bytes(2)


def _exit_of(found: dict[str, Any]) -> AttachExit:
    end = AttachEnd.NOT_EXECUTED if found.get("failed") else AttachEnd.EXITED
    return AttachExit(
        end=end, exit_code=found.get("exit_code"), signal=found.get("signal"), message=found.get("message", "")
    )


def _listen(folder: Path, name: str) -> socket.socket:
    """Listen on a socket in a folder whose path may be longer than the address of a socket."""
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(f"/proc/self/fd/{place}/{name}")
        listening.listen(1)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    finally:
        os.close(place)
    return listening


async def _set(event: asyncio.Event, end: float) -> None:
    """Wait until an event is set, or a time of the monotonic clock has come."""
    event.clear()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, end - time.monotonic())):
            await event.wait()
