"""Detect hosts whose clock is off, and since when, from the delay between a message's time and its storage.

A message with a time later than its storage shows at once that the clock is ahead. A message that is stored late may
have waited for the bus. Only if all messages of a host are late by about the same time is its clock behind. Each host
is judged over some seconds, by its least late message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...schemas.values.clocks import AHEAD_SECONDS
from ..storage.protocol import HostClock

WINDOW_SECONDS: Final = 10.0
"""A host is judged by messages that span at least this time."""
MIN_MESSAGES: Final = 3
STEADY_SECONDS: Final = 3.0
"""Largest spread of delays that counts as a clock that is behind. Messages that waited are late by less and less."""
CHANGE_SECONDS: Final = 1.0
"""A change of the offset by less is not recorded."""


class _Window:
    """Least and greatest delay of a host's messages since a time, in seconds, and their number."""

    __slots__ = ("least", "messages", "most", "since_ns")

    def __init__(self, since_ns: int, late: float) -> None:
        self.since_ns = since_ns
        self.least = self.most = late
        self.messages = 1

    def add(self, late: float) -> None:
        if late < self.least:
            self.least = late
        elif late > self.most:
            self.most = late
        self.messages += 1


class HostClocks:
    """Hosts whose clocks are off, as far as their messages show.

    Args:
        stored: state from the storage.
    """

    def __init__(self, stored: Iterable[HostClock] = ()) -> None:
        self._off: dict[str, HostClock] = {clock.host: clock for clock in stored if clock.until_ns is None}
        self._windows: dict[str, _Window] = {}
        self._changed: dict[str, HostClock] = {}

    @property
    def watched(self) -> bool:
        """True if any host is watched: its clock is off, or is being judged."""
        return bool(self._off or self._windows)

    def watches(self, host: str) -> bool:
        """True if a host is watched, so that its messages are needed even if they are in time."""
        return host in self._off or host in self._windows

    def observe(self, host: str, newest_ns: int, stored_ns: int) -> None:
        """Record a message whose newest time is off, or one of a watched host. Call it in the order of the stream."""
        late = (stored_ns - newest_ns) * 1e-9
        known = self._off.get(host)
        # The least late message shows by how much the clock is ahead; the others took longer to arrive.
        if -late > AHEAD_SECONDS and (known is None or -late > known.offset_seconds):
            self._is_off(host, -late, stored_ns)
        window = self._windows.get(host)
        if window is None:
            self._windows[host] = _Window(stored_ns, late)
            return
        window.add(late)
        if stored_ns - window.since_ns < WINDOW_SECONDS * 1e9 or window.messages < MIN_MESSAGES:
            return
        del self._windows[host]
        if abs(window.least) <= AHEAD_SECONDS:
            self._is_right(host, stored_ns)
        elif window.least < 0 or window.most - window.least <= STEADY_SECONDS:
            self._is_off(host, -window.least, window.since_ns)

    def take_changed(self) -> list[HostClock]:
        """Clocks that were found to be off, or right again, since the last call."""
        changed, self._changed = list(self._changed.values()), {}
        return changed

    def _is_off(self, host: str, offset_seconds: float, since_ns: int) -> None:
        known = self._off.get(host)
        if known is not None:
            if abs(known.offset_seconds - offset_seconds) < CHANGE_SECONDS:
                return
            same_way = (known.offset_seconds > 0) == (offset_seconds > 0)
            since_ns = known.since_ns if same_way else since_ns
        self._changed[host] = self._off[host] = HostClock(host, offset_seconds, since_ns)

    def _is_right(self, host: str, stored_ns: int) -> None:
        known = self._off.pop(host, None)
        if known is not None:
            self._changed[host] = HostClock(host, known.offset_seconds, known.since_ns, stored_ns)
