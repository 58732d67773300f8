"""Liveness of queued clients, by when each was last heard.

A client is heard when it asks again under its request id, or when its connection is found to be up (see `probe`). Time
counts only while it could have been heard: outages of NATS and pauses of the planner are left out, and after a
reconnection every client has the whole timeout to come back. It is granted nothing until it was heard, though: it may
have gone meanwhile.
"""

from __future__ import annotations

from typing import Final

from .queue import QueuedRequest

SILENCE_SECONDS: Final = 30.0
"""Timeout after which a queued client that is not heard leaves the queue."""
ASK_AGAIN: Final = 1 / 3
"""Part of the timeout after which a queued client should ask again, and is probed."""
FRESH: Final = 1 / 2
"""Part of the timeout: a client that was heard within it may be granted devices."""
NOTICE: Final = 3 / 4
"""Part of the timeout after which a silent client is told to ask again."""
_STEP_SECONDS: Final = 1.0
_STEP: Final = 1 / 12
"""Part of the timeout, and at least `_STEP_SECONDS`, that counts at most between two ticks: the rest was a pause of the
planner. A second passes between two ticks, and another if the server does not answer the probe."""


class Presence:
    """Measures the silence of queued clients.

    Args:
        silence_seconds: timeout after which a silent client counts as gone.
    """

    def __init__(self, silence_seconds: float = SILENCE_SECONDS) -> None:
        self.silence_seconds = silence_seconds
        self._step = max(_STEP_SECONDS, silence_seconds * _STEP)
        self._clock = 0.0
        """Seconds in which clients could be heard."""
        self._since = 0.0
        """Silence counts from here on at the earliest, on that clock."""
        self._looked_at: float | None = None
        self._connection: int | None = None
        self._connections = 0

    def tick(self, now: float, connection: int | None) -> None:
        """Advance the clock.

        Args:
            now: seconds, by a monotonic clock.
            connection: number of the connection to NATS, which a reconnection changes; None while there is none.
        """
        if self._looked_at is not None and connection is not None:
            self._clock += min(now - self._looked_at, self._step)
        self._looked_at = now
        if connection is None or connection != self._connection:
            self._since = self._clock
            self._connections += self._connection is not None
        self._connection = connection

    def note_heard(self, entry: QueuedRequest) -> None:
        """Note that a queued client was heard."""
        entry.heard_at = self._clock
        entry.heard_in = self._connections
        entry.asked_to_retry = entry.probed = False

    def silence(self, entry: QueuedRequest) -> float:
        """Seconds for which a client was not heard, though it could have been."""
        return self._clock - max(entry.heard_at, self._since)

    def needs_probe(self, entry: QueuedRequest) -> bool:
        """True if a client should be probed."""
        return not self.is_confirmed(entry) or self.silence(entry) >= self.silence_seconds * ASK_AGAIN

    def is_confirmed(self, entry: QueuedRequest) -> bool:
        """True if a client was heard since the planner started, and since the last outage of NATS."""
        return entry.heard_in == self._connections

    def is_fresh(self, entry: QueuedRequest) -> bool:
        """True if a client was heard recently enough to be granted devices."""
        return self.is_confirmed(entry) and self.silence(entry) <= self.silence_seconds * FRESH

    def needs_notice(self, entry: QueuedRequest) -> bool:
        """True if a client should be told to ask again."""
        return self.silence(entry) >= self.silence_seconds * NOTICE

    def timed_out(self, entry: QueuedRequest) -> bool:
        """True if a client has been silent for the timeout, and must leave the queue."""
        return self.silence(entry) >= self.silence_seconds
