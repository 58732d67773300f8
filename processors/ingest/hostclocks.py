"""Hosts whose clock is off, and since when: by how much later or earlier messages are stored than they were read.

A message that was read later than it was stored shows a clock that is ahead, at once. One that is stored late may have
waited for the bus; where all messages of a host are late by the same time, its clock is behind. Each host is judged
over some seconds, by the least late of its messages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...schemas.clocks import AHEAD_SECONDS
from ..storage.protocol import HostClock

WINDOW_SECONDS: Final = 10.0
"""A host is judged by the messages of so long."""
LEAST_MESSAGES: Final = 3
STEADY_SECONDS: Final = 3.0
"""Messages that waited are late by less and less: a clock that is off is so by the same all the time."""
CHANGE_SECONDS: Final = 1.0
"""A clock that has moved by less is not written anew."""


class _Window:
    """How late the messages of a host came, since a time."""

    __slots__ = ("least", "messages", "most", "since_ns")

    def __init__(self, since_ns: int, late: float) -> None:
        self.since_ns = since_ns
        self.least = self.most = late
        self.messages = 1

    def add(self, late: float) -> None:
        self.least, self.most = min(self.least, late), max(self.most, late)
        self.messages += 1


class HostClocks:
    """Which hosts' clocks are off, as far as messages have told.

    Args:
        stored: what was known before.
    """

    def __init__(self, stored: Iterable[HostClock] = ()) -> None:
        self._off: dict[str, HostClock] = {clock.host: clock for clock in stored if clock.until_ns is None}
        self._windows: dict[str, _Window] = {}
        self._changed: dict[str, HostClock] = {}

    @property
    def watched(self) -> bool:
        """Whether messages that are in time tell something, too."""
        return bool(self._off or self._windows)

    def watches(self, host: str) -> bool:
        """Whether a host's messages that are in time tell something."""
        return host in self._off or host in self._windows

    def observe(self, host: str, newest_ns: int, stored_ns: int) -> None:
        """Take note of a message whose newest time is off, or that is of a watched host, in the order of the stream."""
        late = (stored_ns - newest_ns) * 1e-9
        known = self._off.get(host)
        # It is ahead by as much as the least late of its messages shows: the others have been on their way.
        if -late > AHEAD_SECONDS and (known is None or -late > known.offset_seconds):
            self._is_off(host, -late, stored_ns)
        window = self._windows.get(host)
        if window is None:
            self._windows[host] = _Window(stored_ns, late)
            return
        window.add(late)
        if stored_ns - window.since_ns < WINDOW_SECONDS * 1e9 or window.messages < LEAST_MESSAGES:
            return
        del self._windows[host]
        if abs(window.least) <= AHEAD_SECONDS:
            self._is_right(host, stored_ns)
        elif window.least < 0 or window.most - window.least <= STEADY_SECONDS:
            self._is_off(host, -window.least, window.since_ns)

    def take_changed(self) -> list[HostClock]:
        """What has changed since the last call."""
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
