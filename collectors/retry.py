"""Retries of refused driver calls: less and less often, but never given up.

A refusal is not always for good. Drivers return "not supported" or "no permission" during a reset, while a board is
being split, or before a daemon has opened the device, and answer a minute later.
"""

from __future__ import annotations

from typing import Final

FIRST_SECONDS: Final = 10.0
SOON_SECONDS: Final = 2.0
MAX_SECONDS: Final = 640.0


class Retry:
    """The time of the next try, with a pause that doubles from one refusal to the next.

    Args:
        now: time on the monotonic clock.
        first_seconds: the first pause.
        most_seconds: the longest pause.

    Attributes:
        due: time of the next try, on the monotonic clock.
    """

    __slots__ = ("_most", "_pause", "due")

    def __init__(self, now: float, first_seconds: float = FIRST_SECONDS, most_seconds: float = MAX_SECONDS) -> None:
        self._pause = first_seconds
        self._most = most_seconds
        self.due = now + first_seconds

    def refused(self, now: float) -> None:
        """Double the pause after a try that was refused."""
        self._pause = min(self._pause * 2, self._most)
        self.due = now + self._pause

    def soon(self, now: float) -> None:
        """Schedule a try soon, since a call that worked is refused, however long others have been refused."""
        self._pause = SOON_SECONDS
        self.due = min(self.due, now + SOON_SECONDS)
