"""Who of those in line is still there, by when they were last heard.

Whoever waits is heard when it asks again under its id, or when its connection is seen to be there (see `probe`). Time
counts only while it could have been heard: an outage of the bus and a pause of the planner are left out, and after a
new connection everybody has a whole silence to come back.
"""

from __future__ import annotations

from typing import Final

from .queue import Waiting

SILENCE_SECONDS: Final = 30.0
"""Who is not heard for so long is out of line."""
ASK_AGAIN: Final = 1 / 3
"""Parts of the silence: so often one in line asks again."""
FRESH: Final = 1 / 2
"""Who was heard within it may be granted."""
NOTICE: Final = 3 / 4
"""Who is silent for longer is told to ask again."""
_STEP_SECONDS: Final = 1.0
_STEP: Final = 1 / 12
"""A look that comes later than this part of the silence after the last one, and than a second, comes after a pause, of
which no more counts. A second passes between two looks, and another where the server does not say who is there."""


class Presence:
    """Measures silence.

    Args:
        silence_seconds: who is not heard for so long is gone.
    """

    def __init__(self, silence_seconds: float = SILENCE_SECONDS) -> None:
        self.silence_seconds = silence_seconds
        self._step = max(_STEP_SECONDS, silence_seconds * _STEP)
        self._clock = 0.0
        """Seconds in which somebody could be heard."""
        self._since = 0.0
        """Nobody's silence began before."""
        self._looked_at: float | None = None
        self._connection: int | None = None

    def tick(self, now: float, connection: int | None) -> None:
        """Let time go on.

        Args:
            now: seconds, by a clock that does not go back.
            connection: number of the connection to the bus, another one after it was lost; None while there is none.
        """
        if self._looked_at is not None and connection is not None:
            self._clock += min(now - self._looked_at, self._step)
        self._looked_at = now
        if connection is None or connection != self._connection:
            self._since = self._clock
        self._connection = connection

    def heard(self, entry: Waiting) -> None:
        """One in line was heard."""
        entry.heard_at = self._clock
        entry.told = False

    def silence(self, entry: Waiting) -> float:
        """Seconds for which one was not heard, though it could have been."""
        return self._clock - max(entry.heard_at, self._since)

    def quiet(self, entry: Waiting) -> bool:
        """One should be looked for."""
        return self.silence(entry) >= self.silence_seconds * ASK_AGAIN

    def fresh(self, entry: Waiting) -> bool:
        """One may be granted."""
        return self.silence(entry) <= self.silence_seconds * FRESH

    def due(self, entry: Waiting) -> bool:
        """One should be told to ask again."""
        return self.silence(entry) >= self.silence_seconds * NOTICE

    def gone(self, entry: Waiting) -> bool:
        """One is out of line."""
        return self.silence(entry) >= self.silence_seconds
