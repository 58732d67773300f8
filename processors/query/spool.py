"""Answers that wait for their readers: a little in memory, more in files without a name, all of it bounded.

A query's turn ends when its answer is computed, not when it is read: who reads slowly holds room here, no slot. Room
is bounded for each asker. Where it is used up the query waits for its reader, within limits (`delivery.py`).
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import IO, Final, NamedTuple

from msgspec import Struct

LEAST_FREE_DISK_BYTES: Final = 2 * 2**30
"""Files leave so much of the disk to the database that may be on it."""


class Room(Struct, frozen=True, kw_only=True):
    """What answers that wait may take.

    Attributes:
        bytes: of all.
        asker_bytes: of one asker's.
        memory_bytes: of all, in memory; the rest is in files.
    """

    bytes: int = 2**30
    asker_bytes: int = 2**28
    memory_bytes: int = 2**25


class SpoolRoom:
    """What all spools hold. Called from any thread.

    Args:
        room: see `Room`.
        folder: for the files; the system's by default.
    """

    def __init__(self, room: Room, folder: Path | None = None) -> None:
        self.folder = folder
        self._room = room
        self._guard = threading.Lock()
        self._by_asker: dict[str, int] = {}
        self._memory = 0

    @property
    def held_bytes(self) -> int:
        """What is held for all askers."""
        with self._guard:
            return sum(self._by_asker.values())

    def take(self, asker: str, size: int) -> bool | None:
        """Take room for a part.

        Returns:
            Whether it may stay in memory; None if there is no room. A first part always has some.
        """
        with self._guard:
            own = self._by_asker.get(asker, 0)
            full = own + size > self._room.asker_bytes or sum(self._by_asker.values()) + size > self._room.bytes
            in_memory = self._memory + size <= self._room.memory_bytes
            if own and (full or not (in_memory or self._disk_has_room())):
                return None
            self._by_asker[asker] = own + size
            self._memory += size if in_memory else 0
            return in_memory

    def give(self, asker: str, size: int, in_memory: bool) -> None:
        """Give the room of a part back."""
        with self._guard:
            left = self._by_asker[asker] - size
            if left:
                self._by_asker[asker] = left
            else:
                del self._by_asker[asker]
            self._memory -= size if in_memory else 0

    def _disk_has_room(self) -> bool:
        try:
            found = os.statvfs(self.folder or tempfile.gettempdir())
        except OSError:
            return False
        return found.f_bavail * found.f_frsize > LEAST_FREE_DISK_BYTES


class _Slot(NamedTuple):
    offset: int
    size: int


class _Part(NamedTuple):
    size: int
    body: bytes | None
    slot: _Slot | None


class Spool:
    """The parts of one answer, first in, first out. `put` belongs to one thread, the rest to another.

    Args:
        room: shared with all others.
        asker: whose room it takes.
    """

    def __init__(self, room: SpoolRoom, asker: str) -> None:
        self._room = room
        self._asker = asker
        self._parts: deque[_Part] = deque()
        self._guard = threading.Lock()
        self._file: IO[bytes] | None = None
        self._free: list[_Slot] = []
        self._end = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._parts)

    def put(self, body: bytes) -> bool:
        """Keep a part; False if there is no room for it now.

        Raises:
            OSError: it can't be written.
        """
        in_memory = self._room.take(self._asker, len(body))
        if in_memory is None:
            return False
        with self._guard:
            try:
                if not self._closed:
                    self._parts.append(self._kept(body, in_memory))
                    return True
            except OSError:
                self._room.give(self._asker, len(body), in_memory)
                raise
        self._room.give(self._asker, len(body), in_memory)
        return True

    def _kept(self, body: bytes, in_memory: bool) -> _Part:
        if in_memory:
            return _Part(len(body), body, None)
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._room.folder, prefix="corral-answer-")  # noqa: SIM115
        # All parts but the last are of about one size: where one was read, the next fits nearly always.
        slot = next((free for free in self._free if free.size >= len(body)), None)
        if slot is None:
            slot = _Slot(self._end, len(body))
            self._end += len(body)
        else:
            self._free.remove(slot)
        self._file.seek(slot.offset)
        self._file.write(body)
        self._file.flush()
        return _Part(len(body), None, slot)

    def take(self) -> bytes:
        """The oldest part.

        Raises:
            IndexError: there is none.
        """
        with self._guard:
            part = self._parts.popleft()
            if part.slot is None:
                assert part.body is not None
                body = part.body
            else:
                assert self._file is not None
                self._file.seek(part.slot.offset)
                body = self._file.read(part.size)
                self._free.append(part.slot)
        self._room.give(self._asker, part.size, part.body is not None)
        return body

    def close(self) -> None:
        """Drop all that is left, and what comes later."""
        with self._guard:
            self._closed = True
            left, self._parts = self._parts, deque()
            if self._file is not None:
                self._file.close()
                self._file = None
        for part in left:
            self._room.give(self._asker, part.size, part.body is not None)
