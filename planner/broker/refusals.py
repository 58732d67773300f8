"""How much of the bucket remembered refusals take: a bounded part, of which one owner has a bounded part again."""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

PART: Final = 1 / 16
"""Of the bucket."""
_UNLIMITED_BYTES: Final = 32 * 2**20
"""Where the bucket has no limit."""
OWNER_PART: Final = 1 / 4
"""Of that, for one owner."""
_ENTRY_BYTES: Final = 200
"""Of an entry beside its value: subject, headers and what the server adds."""


class Written:
    """The refusals that are in the bucket.

    Args:
        most_bytes: that the bucket takes; 0 or less where there is no limit.

    Attributes:
        bytes: that they take, about.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = int(most_bytes * PART) if most_bytes > 0 else _UNLIMITED_BYTES
        self.bytes = 0
        self._of = Counter[str]()
        self._entries: dict[str, tuple[str, int, int]] = {}
        self._count = 0
        self._oldest: deque[tuple[str, int]] = deque()
        self._oldest_of: dict[str, deque[tuple[str, int]]] = {}

    def add(self, key: str, owner: str, size: int) -> list[str]:
        """One more is written.

        Args:
            key: of the entry.
            owner: whose request was refused.
            size: bytes of its value.

        Returns:
            Keys of those that must go for it, oldest first.
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
        while self._of[owner] > self.most_bytes * OWNER_PART and len(self._oldest_of[owner]) > 1:
            self._evict(self._oldest_of[owner], gone)
        while self.bytes > self.most_bytes and len(self._entries) > 1:
            self._evict(self._oldest, gone)
        if len(self._oldest) > 2 * len(self._entries) + 64:
            self._compact()
        return gone

    def drop(self, key: str) -> None:
        """One is not there any more: its time is over."""
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
        """None is there any more."""
        for key in list(self._entries):
            self.drop(key)
        self._oldest.clear()

    def _evict(self, oldest: deque[tuple[str, int]], gone: list[str]) -> None:
        key, number = oldest.popleft()
        entry = self._entries.get(key)
        if entry is not None and entry[2] == number:  # else it was dropped meanwhile, be it written again or not
            gone.append(key)
            self.drop(key)

    def _compact(self) -> None:
        self._oldest = deque((key, number) for key, (_, _, number) in self._entries.items())
        self._oldest_of = {}
        for key, (owner, _, number) in self._entries.items():
            self._oldest_of.setdefault(owner, deque()).append((key, number))
