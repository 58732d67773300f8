"""Limit of wrong tokens by address. Pure state.

A key can't be guessed: the limit is for the work that each attempt makes for the bus.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from ..bus.addresses import machine

FREE: Final = 20
"""Wrong tokens from one address in `SECONDS` before it has to wait."""
SECONDS: Final = 60.0
_KEPT: Final = 10_000


class Attempts:
    """Times of wrong tokens; of more than 10,000 addresses those that were heard first are dropped."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def failed(self, address: str, now: float) -> None:
        """Count a wrong token.

        Args:
            address: of the client.
            now: seconds on a monotonic clock.
        """
        place = machine(address)
        times = [at for at in self._failures.pop(place, []) if now - at < SECONDS]
        self._failures[place] = [*times, now][-FREE:]
        while len(self._failures) > _KEPT:
            self._failures.popitem(last=False)

    def wait_seconds(self, address: str, now: float) -> float:
        """Seconds until an address may log in again; 0 if it may now."""
        times = self._failures.get(machine(address), [])
        return max(0.0, times[0] + SECONDS - now) if len(times) >= FREE else 0.0
