"""Output of a task as text: bounded, with what is missing counted in bytes. Pure."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from ..client.jobs.logs import LogPiece

HEAD_BYTES: Final = 256 * 1024
"""Bytes that are kept of the begin, as many as the bus keeps."""
TAIL_BYTES: Final = 1024 * 1024
"""Bytes that are kept of the end."""
# Colors and cursor movements: `ESC [ … letter`, and titles: `ESC ] … BEL`.
_CONTROLS: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Entry(Struct, frozen=True):
    """A piece of an output as text.

    Attributes:
        offset: of its first byte.
        end: offset behind its last byte.
        text: its text.
    """

    offset: int
    end: int
    text: str


class OutputText:
    """Begin and end of what a task prints on one host, at its newest attempt.

    Attributes:
        attempt: number of the attempt; 0 before the first piece.
        position: offset behind the last byte.
        file: of the whole output, on the host; empty if unknown.
    """

    def __init__(self) -> None:
        self.attempt = 0
        self.position = 0
        self.file = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._head: list[Entry] = []
        self._tail: deque[Entry] = deque()
        self._tail_bytes = 0

    def add(self, piece: LogPiece) -> None:
        """Add what is new in a piece. Pieces come in the order of their offsets, some of them again."""
        if piece.attempt < self.attempt:
            return
        if piece.attempt > self.attempt:
            self.__init__()
            self.attempt = piece.attempt
        self.file = piece.file or self.file
        data = piece.data[max(0, self.position - piece.offset) :]
        if not data:
            return
        offset = max(piece.offset, self.position)
        if offset > self.position:
            self._decoder.reset()
        self.position = offset + len(data)
        entry = Entry(offset, self.position, plain(self._decoder.decode(data)))
        if self.position <= HEAD_BYTES:
            self._head.append(entry)
            return
        self._tail.append(entry)
        self._tail_bytes += len(data)
        while self._tail_bytes > TAIL_BYTES and len(self._tail) > 1:
            oldest = self._tail.popleft()
            self._tail_bytes -= oldest.end - oldest.offset

    def since(self, position: int) -> Iterator[Entry]:
        """Pieces behind an offset; the bytes between two that don't meet are missing."""
        return (entry for entries in (self._head, self._tail) for entry in entries if entry.end > position)


def plain(text: str) -> str:
    """Text without colors and other control sequences; a carriage return, which progress bars use, ends a line."""
    lines = _CONTROLS.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return _UNPRINTABLE.sub("", lines)
