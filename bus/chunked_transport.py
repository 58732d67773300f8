"""Receive messages from the socket as chunks that are cut at message boundaries, so that each byte is copied once.

nats-py gathers what it receives in the stream reader's buffer, takes it out, gathers it again in its parser's buffer,
and takes each payload out of that, moving what is behind it to the front: half of the CPU time that receiving messages
of 53 KiB took. Here a chunk stays as the event loop has read it. A payload that lies within one chunk is copied out of
it, and one that spans several is joined from them. nats-py's own parser still handles every line that is not a message.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, Final, cast

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

log = logging.getLogger("corral.bus")

TESTED_VERSIONS: Final = ("2.16.0",)
"""Versions of nats-py whose internals this was written for, and that the tests ran with."""
VARIABLE: Final = "CORRAL_CHUNKED_TRANSPORT"

_MESSAGE: Final = re.compile(rb"MSG\s+(\S+)\s+([0-9]+)\s+(?:(\S+)[^\S\r\n]+)?()([0-9]+)\r\n")
_WITH_HEADERS: Final = re.compile(rb"HMSG\s+(\S+)\s+([0-9]+)\s+(?:(\S+)[^\S\r\n]+)?([0-9]+)\s+([0-9]+)\r\n")


Tap = Callable[[list[tuple[bytes, bytes, bytes]]], None]
"""Takes the messages of a chunk, in order: of each its subject, the subject for a reply, and its payload. It must not
fail."""


class ChunkParser(Parser):
    """Parser that cuts messages out of chunks, and passes all other lines to nats-py's parser.

    Attributes:
        taps: by the number of a subscription: take its messages without headers, past nats-py's queue.
    """

    taps: Mapping[bytes, Tap] = MappingProxyType({})
    _tail: bytes
    _parts: list[bytes]
    _missing: int
    _life: int = 0
    _head: tuple[bytes, bytes, bytes, int, int]

    def reset(self) -> None:
        """Drop the received part of an incomplete message or line."""
        super().reset()
        self.forget()

    def forget(self) -> None:
        """Start anew at the beginning of a line. A `parse` call in progress drops the rest of its chunk."""
        self._tail, self._parts, self._missing = b"", [], 0
        self._head = b"", b"", b"", 0, 0
        self._life += 1

    async def parse(self, data: bytes = b"") -> None:
        """Parse a chunk, and pass on the messages that it completes."""
        at, life = 0, self._life
        if self.state != AWAITING_CONTROL_LINE or self.buf:
            # Finish what nats-py's parser had begun before its class was replaced.
            await super().parse(data)
            return
        if self._missing:
            if len(data) < self._missing:
                self._parts.append(data)
                self._missing -= len(data)
                return
            at = self._missing
            # Leave out the line end, so that the payload is all of it: slicing a whole bytes object copies nothing.
            self._parts.append(data[: max(0, at - 2)])
            whole = b"".join(self._parts)
            self._parts, self._missing = [], 0
            await self._hand_on(whole, 0)
        elif self._tail:
            data, self._tail = self._tail + data, b""
        end = len(data)
        # If the connection ends meanwhile, the rest of the chunk is dropped.
        while at < end and life == self._life:
            if self.taps and (behind := self._take(data, at)) > at:
                at = behind
                continue
            found = _MESSAGE.match(data, at) or _WITH_HEADERS.match(data, at)
            if found is None:
                newline = data.find(b"\n", at)
                if newline < 0:
                    self._tail = data[at:]
                    return
                await super().parse(data[at : newline + 1])
                at = newline + 1
                continue
            sid, subject, reply, header, total = found.group(2, 1, 3, 4, 5)
            start, size = found.end(), int(total)
            self._head = sid, subject, reply or b"", int(header or 0), size
            if start + size + 2 > end:
                self._parts, self._missing = [data[start:]], start + size + 2 - end
                return
            await self._hand_on(data, start)
            at = start + size + 2

    def _take(self, data: bytes, at: int) -> int:
        """Pass on the messages of one tapped subscription that follow each other in a chunk, and return what is next.

        It only knows lines as the server writes them, of messages with a reply subject, which lie within the chunk.
        """
        taken: list[tuple[bytes, bytes, bytes]] = []
        number, tap = b"", None
        end = len(data)
        while at < end:
            newline = data.find(b"\n", at)
            words = data[at:newline].split()
            if newline < 0 or len(words) != 5 or words[0] != b"MSG" or not words[4].isdigit():
                break
            _, subject, sid, reply, total = words
            if sid != number:
                if tap is not None or (tap := self.taps.get(sid)) is None:
                    break
                number = sid
            start = newline + 1
            stop = start + int(total)
            if stop + 2 > end:
                break
            taken.append((subject, reply, data[start:stop]))
            at = stop + 2
        if tap is not None and taken:
            tap(taken)
        return at

    async def _hand_on(self, data: bytes, start: int) -> None:
        sid, subject, reply, header, size = self._head
        if not header and (tap := self.taps.get(sid)) is not None:
            tap([(subject, reply, data[start : start + size])])
            return
        split = start + header
        headers = data[start:split] if header else None
        await cast("Any", self.nc)._process_msg(int(sid), subject, reply, data[split : start + size], headers)


class ChunkReader(asyncio.StreamReader):
    """Stream reader that returns chunks as they were received, without joining them."""

    chunks: deque[bytes]
    waiting: int

    def feed_data(self, data: bytes) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Append a chunk; called by the event loop. Reading pauses if too many bytes wait, as for any stream."""
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
        """Return the next chunk, of any length; empty at the end."""
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
        """True if the stream has ended and no chunk waits."""
        return super().at_eof() and not self.chunks


class ChunkTransport(TcpTransport):
    """nats-py's TCP transport, whose reader becomes a `ChunkReader` after the handshake. Kept over reconnections."""

    async def read(self, buffer_size: int) -> bytes:
        """Return the next chunk."""
        reader = self._io_reader
        if type(reader) is asyncio.StreamReader:
            reader.__class__ = ChunkReader
            reader = cast("ChunkReader", reader)
            reader.chunks, reader.waiting = deque(), 0
        return await reader.read(buffer_size)  # pyright: ignore[reportOptionalMemberAccess]


def install_chunked_parser(nc: Client) -> bool:
    """Make a connection receive in chunks.

    It relies on internals of nats-py, so it is done only for `TESTED_VERSIONS`. Otherwise, or if the variable
    `CORRAL_CHUNKED_TRANSPORT` is `off`, nats-py receives without chunks: the same messages at about twice the CPU time.

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
        parser = cast("ChunkParser", parser)
        parser.forget()
    return type(inner._transport) is ChunkTransport


def tap(nc: Client, subscription: Subscription, take: Tap) -> bool:
    """Take the messages of a subscription as they are received, for a third of the CPU time of nats-py's dispatch.

    Those with headers, such as the server's status messages, still come to the subscription's callback, later than what
    was received after them. nats-py's statistics and limits leave out what is taken here.

    Args:
        nc: connection, after `install_chunked_parser`.
        subscription: whose messages; until `untap`.
        take: called in the event loop for the messages of each chunk.

    Returns:
        False if the connection does not receive in chunks: all messages come to the callback.
    """
    parser = cast("Any", nc)._ps
    if not isinstance(parser, ChunkParser):
        return False
    parser.taps = {**parser.taps, _number(subscription): take}
    return True


def untap(nc: Client, subscription: Subscription) -> None:
    """End `tap`; does nothing for a subscription that is not tapped."""
    parser = cast("Any", nc)._ps
    if isinstance(parser, ChunkParser):
        number = _number(subscription)
        parser.taps = {sid: take for sid, take in parser.taps.items() if sid != number}


def _number(subscription: Subscription) -> bytes:
    """Number of a subscription, as the server writes it."""
    return b"%d" % cast("Any", subscription)._id


@functools.cache
def _tell(version: str) -> None:
    """Log once that this version of nats-py receives without chunks."""
    log.warning(
        "nats-py %s is another than the chunked transport was tested with (%s): messages are received without it, at "
        "about twice the CPU time",
        version,
        ", ".join(TESTED_VERSIONS),
    )
