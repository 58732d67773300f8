"""How bytes come from the socket into messages: as chunks that are cut where a message ends, each byte copied once.

nats-py gathers what it receives in the stream reader's buffer, takes it out, gathers it again in its parser's buffer,
and takes each payload out of that, moving what is behind it to the front: half of the CPU time that receiving messages
of 53 KiB took. Here a chunk stays as the loop has read it; a payload that lies in it whole is copied out of it, and one
that spans several is joined from them. All else is still done by nats-py: its own parser gets every line that is no
message.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
from collections import deque
from importlib import metadata
from typing import Any, Final, cast

from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

log = logging.getLogger("corral.bus")

TESTED_VERSIONS: Final = ("2.16.0",)
"""Versions of nats-py whose inside this was written for, and that the tests ran with."""
VARIABLE: Final = "CORRAL_CHUNKED_TRANSPORT"

_MESSAGE: Final = re.compile(rb"MSG\s+(\S+)\s+([0-9]+)\s+(?:(\S+)[^\S\r\n]+)?()([0-9]+)\r\n")
_WITH_HEADERS: Final = re.compile(rb"HMSG\s+(\S+)\s+([0-9]+)\s+(?:(\S+)[^\S\r\n]+)?([0-9]+)\s+([0-9]+)\r\n")


class ChunkParser(Parser):
    """nats-py's parser, fed with lines; messages are cut out of the chunks."""

    _tail: bytes
    _parts: list[bytes]
    _missing: int
    _life: int = 0
    _head: tuple[int, bytes, bytes, int, int]

    def reset(self) -> None:
        """Forget what has come of a message or line that is not whole."""
        super().reset()
        self.forget()

    def forget(self) -> None:
        """Start with the beginning of a line."""
        self._tail, self._parts, self._missing = b"", [], 0
        self._head = 0, b"", b"", 0, 0
        self._life += 1

    async def parse(self, data: bytes = b"") -> None:
        """Take a chunk, and hand on the messages that are whole with it."""
        at, life = 0, self._life
        if self.state != AWAITING_CONTROL_LINE or self.buf:
            # What nats-py had begun when its parser became this one.
            await super().parse(data)
            return
        if self._missing:
            if len(data) < self._missing:
                self._parts.append(data)
                self._missing -= len(data)
                return
            at = self._missing
            # Without the end of the line: a slice of all of it is no copy.
            self._parts.append(data[: max(0, at - 2)])
            whole = b"".join(self._parts)
            self._parts, self._missing = [], 0
            await self._hand_on(whole, 0)
        elif self._tail:
            data, self._tail = self._tail + data, b""
        end = len(data)
        # A connection that ends meanwhile takes the rest of the chunk with it.
        while at < end and life == self._life:
            found = _MESSAGE.match(data, at) or _WITH_HEADERS.match(data, at)
            if found is None:
                newline = data.find(b"\n", at)
                if newline < 0:
                    self._tail = data[at:]
                    return
                await super().parse(data[at : newline + 1])
                at = newline + 1
                continue
            subject, sid, reply, header, total = found.groups()
            start, size = found.end(), int(total)
            self._head = int(sid), subject, reply or b"", int(header or 0), size
            if start + size + 2 > end:
                self._parts, self._missing = [data[start:]], start + size + 2 - end
                return
            await self._hand_on(data, start)
            at = start + size + 2

    async def _hand_on(self, data: bytes, start: int) -> None:
        sid, subject, reply, header, size = self._head
        split = start + header
        headers = data[start:split] if header else None
        await cast("Any", self.nc)._process_msg(sid, subject, reply, data[split : start + size], headers)


class ChunkReader(asyncio.StreamReader):
    """A stream reader that hands on what it is given as it is given."""

    chunks: deque[bytes]
    waiting: int

    def feed_data(self, data: bytes) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called by the loop. Reading pauses where too much waits, as for any stream."""
        if not data:
            return
        self.chunks.append(data)
        self.waiting += len(data)
        me = cast("Any", self)
        me._wakeup_waiter()
        if me._transport is not None and not me._paused and self.waiting > 2 * me._limit:
            me._transport.pause_reading()
            me._paused = True

    async def read(self, n: int = -1) -> bytes:
        """The next chunk, however long; empty at the end."""
        me = cast("Any", self)
        if me._exception is not None:
            raise me._exception
        if me._buffer:
            return await super().read(n)
        if not self.chunks and not me._eof:
            await me._wait_for_data("read")
        if not self.chunks:
            return b""
        data = self.chunks.popleft()
        self.waiting -= len(data)
        if me._paused and self.waiting <= me._limit:
            me._paused = False
            me._transport.resume_reading()
        return data

    def at_eof(self) -> bool:
        """Whether nothing more comes, and nothing waits."""
        return super().at_eof() and not self.chunks


class ChunkTransport(TcpTransport):
    """nats-py's connection, whose reader becomes one of chunks once the handshake is over. Kept over reconnections."""

    async def read(self, buffer_size: int) -> bytes:
        """The next chunk."""
        reader = self._io_reader
        if type(reader) is asyncio.StreamReader:
            reader.__class__ = ChunkReader
            reader = cast("ChunkReader", reader)
            reader.chunks, reader.waiting = deque(), 0
        return await reader.read(buffer_size)  # pyright: ignore[reportOptionalMemberAccess]


def install_chunked_parser(nc: Client) -> bool:
    """Have a connection receive in chunks.

    It relies on the inside of nats-py, so it is done for `TESTED_VERSIONS` alone. Elsewhere, and where the variable
    `CORRAL_CHUNKED_TRANSPORT` is `off`, nats-py receives as it is: the same messages at about twice the CPU time.

    Args:
        nc: a connection. One that is not plain TCP or TLS is left as it is.

    Returns:
        True if the connection receives in chunks now.
    """
    if os.environ.get(VARIABLE, "").lower() in ("off", "false", "0", "no"):
        return False
    version = metadata.version("nats-py")
    if version not in TESTED_VERSIONS:
        _tell(version)
        return False
    inner = cast("Any", nc)
    parser = inner._ps
    if type(inner._transport) is TcpTransport and type(parser) is Parser:
        inner._transport.__class__ = ChunkTransport
        parser.__class__ = ChunkParser
        cast("ChunkParser", parser).forget()
    return type(inner._transport) is ChunkTransport


@functools.cache
def _tell(version: str) -> None:
    """Log once that nats-py receives by itself."""
    log.warning(
        "nats-py %s is another than the chunked transport was tested with (%s): messages are received without it, at "
        "about twice the CPU time",
        version,
        ", ".join(TESTED_VERSIONS),
    )
