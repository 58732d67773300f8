"""Eviction of cached rejections: they take a limited part of the bucket, and each owner a limited part of that."""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

PART: Final = 1 / 16
"""Part of the bucket that rejections may take."""
_UNLIMITED_BYTES: Final = 32 * 2**20
"""Bytes that they may take in a bucket without a limit."""
OWNER_PART: Final = 1 / 4
"""Part of that for one owner."""
_ENTRY_BYTES: Final = 200
"""Overhead of an entry: subject, headers and what the server adds."""


class StoredRejections:
    """Sizes of the rejections that are in the bucket, in order of age.

    Args:
        max_bytes: capacity of the bucket; 0 or less for no limit.

    Attributes:
        max_bytes: that rejections may take.
        bytes: that they take, approximately.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = int(max_bytes * PART) if max_bytes > 0 else _UNLIMITED_BYTES
        self.bytes = 0
        self._of = Counter[str]()
        self._entries: dict[str, tuple[str, int, int]] = {}
        self._count = 0
        self._oldest: deque[tuple[str, int]] = deque()
        self._oldest_of: dict[str, deque[tuple[str, int]]] = {}

    def add(self, key: str, owner: str, size: int) -> list[str]:
        """Add a rejection that is written to the bucket.

        Args:
            key: of the entry.
            owner: of the request.
            size: bytes of its value.

        Returns:
            Keys of the rejections to evict for it: the oldest of the owner, then the oldest of all.
        """
        self.drop(key)
        size += len(key) + _ENTRY_BYTES
        self._count += 1
        self._entries[key] = (owner, size, self._count)
        self._oldest.append((key, self._count))
        self._oldest_of.setdefault(owner, deque()).append((key, self._count))
        self._of[owner] += size
        self.bytes += size
        gone: list[str] = []
        while self._of[owner] > self.max_bytes * OWNER_PART and len(self._oldest_of[owner]) > 1:
            self._evict(self._oldest_of[owner], gone)
        while self.bytes > self.max_bytes and len(self._entries) > 1:
            self._evict(self._oldest, gone)
        if len(self._oldest) > 2 * len(self._entries) + 64:
            self._compact()
        return gone

    def drop(self, key: str) -> None:
        """Remove a rejection that is no longer in the bucket; nothing if it is not known."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        owner, size, _ = entry
        self.bytes -= size
        self._of[owner] -= size
        if not self._of[owner]:
            del self._of[owner]
            del self._oldest_of[owner]

    def clear(self) -> None:
        """Remove all: the bucket has none any more."""
        for key in list(self._entries):
            self.drop(key)
        self._oldest.clear()

    def _evict(self, oldest: deque[tuple[str, int]], gone: list[str]) -> None:
        key, number = oldest.popleft()
        entry = self._entries.get(key)
        if entry is not None and entry[2] == number:  # else it was dropped, and perhaps added again, since
            gone.append(key)
            self.drop(key)

    def _compact(self) -> None:
        self._oldest = deque((key, number) for key, (_, _, number) in self._entries.items())
        self._oldest_of = {}
        for key, (owner, _, number) in self._entries.items():
            self._oldest_of.setdefault(owner, deque()).append((key, number))
