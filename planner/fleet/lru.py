"""What is worked out once and kept while it is in use."""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """A mapping that forgets what was asked for longest ago.

    Args:
        most: entries that it keeps.
    """

    __slots__ = ("_entries", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: dict[K, V] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value, which becomes the youngest; None if there is none."""
        entries = self._entries
        value = entries.pop(key, None)
        if value is not None:
            entries[key] = value
        return value

    def put(self, key: K, value: V) -> V:
        """Keep a value, in place of the oldest one if need be."""
        entries = self._entries
        entries.pop(key, None)
        if len(entries) >= self._most:
            del entries[next(iter(entries))]
        entries[key] = value
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
