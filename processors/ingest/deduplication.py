"""Duplicates beyond the stream's own window: which messages of an agent's run have come from a host.

A stream stores a message id once within two minutes. A collector that comes back later and sends again what it had no
answer for is caught here: an agent numbers its messages from 1 and sends them in order, so what is at most `WINDOW`
behind the greatest number is looked up in a bitmap, and what is further behind has come before. The state is stored
with the rows of each batch.

A run is counted for each host by itself: agents that share an id, be it copied with a machine's image or taken over on
purpose, have nothing to do with each other. What an older Corral stored is by agent alone; each host's count begins
with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..storage.protocol import Arrival

WINDOW: Final = 64
"""How far messages of one run may overtake each other in a stream."""

_MASK: Final = (1 << WINDOW) - 1


class Arrivals:
    """What has come of each run in one stream.

    Args:
        stored: what the storage knows.
    """

    def __init__(self, stored: Iterable[Arrival] = ()) -> None:
        self._runs: dict[str, tuple[int, int]] = {run.agent: (run.high, run.seen) for run in stored}
        self._changed: set[str] = set()

    def is_new(self, host: str, agent: str, sequence: int) -> bool:
        """Take note of a message; False where it has come before. A sequence below 1 says that nobody counts."""
        if sequence < 1:
            return True
        key = f"{host}/{agent}"
        found = self._runs.get(key) or self._runs.get(agent)
        if found is None:
            self._runs[key] = (sequence, 1)
        else:
            high, seen = found
            ahead = sequence - high
            if ahead > 0:
                self._runs[key] = (sequence, ((seen << ahead) & _MASK if ahead < WINDOW else 0) | 1)
            else:
                bit = 1 << -ahead if ahead > -WINDOW else 0
                if not bit or seen & bit:
                    return False
                self._runs[key] = (high, seen | bit)
        self._changed.add(key)
        return True

    def take_changed(self) -> list[Arrival]:
        """The runs that have moved since the last call."""
        changed = [Arrival(key, *self._runs[key]) for key in self._changed]
        self._changed.clear()
        return changed
