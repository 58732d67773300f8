"""Deduplication beyond the stream's duplicate window, by sequence numbers within each agent's run on a host.

A stream stores a message id once within two minutes. Here duplicates are found of a collector that returns later and
sends again what was not acknowledged. An agent numbers its messages from 1 and sends them in order. So a number less
than `MAX_OUT_OF_ORDER` behind the greatest is looked up in a bitmap, and one further behind counts as a duplicate. The
state is stored with the rows of each batch.

Runs are tracked for each host separately: agents that share an id, whether copied with a machine's image or taken over
on purpose, do not affect each other. An older Corral stored runs by agent alone; each host's run starts from that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...schemas.limits import MAX_OUT_OF_ORDER
from ..storage.protocol import Arrival

_MASK: Final = (1 << MAX_OUT_OF_ORDER) - 1


class Arrivals:
    """Messages of each agent's run that one stream has delivered.

    Args:
        stored: state from the storage.
    """

    def __init__(self, stored: Iterable[Arrival] = ()) -> None:
        self._runs: dict[str, tuple[int, int]] = {run.agent: (run.high, run.seen) for run in stored}
        self._changed: set[str] = set()

    def is_new(self, host: str, agent: str, sequence: int) -> bool:
        """Record a message; False if it is a duplicate. One with a sequence below 1 is not numbered, and always new."""
        if sequence < 1:
            return True
        key = f"{host}/{agent}"
        found = self._runs.get(key) or self._runs.get(agent)
        if found is None:
            self._runs[key] = (sequence, 1)
        else:
            high, seen = found
            ahead = sequence - high
            if ahead == 1 and seen == _MASK:
                self._runs[key] = (sequence, seen)
            elif ahead > 0:
                self._runs[key] = (sequence, ((seen << ahead) & _MASK if ahead < MAX_OUT_OF_ORDER else 0) | 1)
            else:
                bit = 1 << -ahead if ahead > -MAX_OUT_OF_ORDER else 0
                if not bit or seen & bit:
                    return False
                self._runs[key] = (high, seen | bit)
        self._changed.add(key)
        return True

    def take_changed(self) -> list[Arrival]:
        """Runs that have changed since the last call."""
        changed = [Arrival(key, *self._runs[key]) for key in self._changed]
        self._changed.clear()
        return changed
