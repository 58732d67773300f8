"""Spool of answers that wait for their readers: a little in memory, more in unnamed files, all of it bounded.

A query's slot is freed when its answer is computed, not when it is read: a slow reader takes up room here, and no slot.
Room is limited for each asker. If it is used up, the query waits for its reader, within limits (`delivery.py`).
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import IO, Final, NamedTuple

from msgspec import Struct

MIN_FREE_DISK_BYTES: Final = 2 * 2**30
"""Free disk space that files leave to the database, which may be on the same disk."""


class Room(Struct, frozen=True, kw_only=True):
    """Limits of the answers that wait.

    Attributes:
        bytes: of all answers.
        asker_bytes: of the answers of one asker.
        memory_bytes: of all answers, in memory; the rest is in files.
    """

    bytes: int = 2**30
    asker_bytes: int = 2**28
    memory_bytes: int = 2**25


class SpoolRoom:
    """Room that all spools take up. May be called from any thread.

    Args:
        room: see `Room`.
        folder: for the files; the system's by default.
    """

    def __init__(self, room: Room, folder: Path | None = None) -> None:
        self.folder = folder
        self._room = room
        self._lock = threading.Lock()
        self._by_asker: dict[str, int] = {}
        self._memory = 0

    @property
    def held_bytes(self) -> int:
        """Number of bytes held for all askers."""
        with self._lock:
            return sum(self._by_asker.values())

    def take(self, asker: str, size: int) -> bool | None:
        """Reserve room for a part.

        Returns:
            True if it may stay in memory, False if it goes to a file; None if there is no room. There is always room
            for a part of an asker that holds none.
        """
        with self._lock:
            own = self._by_asker.get(asker, 0)
            full = own + size > self._room.asker_bytes or sum(self._by_asker.values()) + size > self._room.bytes
            in_memory = self._memory + size <= self._room.memory_bytes
            if own and (full or not (in_memory or self._disk_has_room())):
                return None
            self._by_asker[asker] = own + size
            self._memory += size if in_memory else 0
            return in_memory

    def give(self, asker: str, size: int, in_memory: bool) -> None:
        """Release the room of a part."""
        with self._lock:
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
        return found.f_bavail * found.f_frsize > MIN_FREE_DISK_BYTES


class _Slot(NamedTuple):
    offset: int
    size: int


class _Part(NamedTuple):
    size: int
    body: bytes | None
    slot: _Slot | None


class Spool:
    """Parts of one answer, first in, first out. `put` is called by one thread, the rest by another.

    Args:
        room: shared with all others.
        asker: that its room counts for.
    """

    def __init__(self, room: SpoolRoom, asker: str) -> None:
        self._room = room
        self._asker = asker
        self._parts: deque[_Part] = deque()
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._free: list[_Slot] = []
        self._end = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._parts)

    def put(self, body: bytes) -> bool:
        """Keep a part; False if there is no room for it now. After `close` it is dropped.

        Raises:
            OSError: it can't be written.
        """
        in_memory = self._room.take(self._asker, len(body))
        if in_memory is None:
            return False
        with self._lock:
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
        """Remove and return the oldest part.

        Raises:
            IndexError: there is none.
        """
        with self._lock:
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
        """Drop all remaining parts, and those that are put later."""
        with self._lock:
            self._closed = True
            left, self._parts = self._parts, deque()
            if self._file is not None:
                self._file.close()
                self._file = None
        for part in left:
            self._room.give(self._asker, part.size, part.body is not None)
