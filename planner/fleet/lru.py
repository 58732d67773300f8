"""A cache that evicts the least recently used entry."""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """A mapping that evicts the least recently used entry.

    Args:
        most: number of entries that it keeps.
    """

    __slots__ = ("_entries", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: dict[K, V] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """Value of a key, which counts as used; None if there is none."""
        entries = self._entries
        value = entries.pop(key, None)
        if value is not None:
            entries[key] = value
        return value

    def put(self, key: K, value: V) -> V:
        """Store a value and return it; evicts the least recently used entry if the cache is full."""
        entries = self._entries
        entries.pop(key, None)
        if len(entries) >= self._most:
            del entries[next(iter(entries))]
        entries[key] = value
        return value

    def remove(self, key: K) -> None:
        """Remove an entry, if it is there."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()
