"""What requests are like: given, or learned from those that come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ...fleet.state import Ask, AskKey

FIRST_AFTER: Final = 8
"""Requests after which the mix is looked at for the first time."""
GROWTH: Final = 1.5
"""It is looked at again when so many times as many have been seen."""
EVERY_MOST: Final = 8192
"""And after so many requests at the latest."""
WEIGHT_MOST: Final = 32_768
"""Beyond it all weights are halved, so that last month's mix fades."""
KINDS_MOST: Final = 4096
"""Kinds of requests that are kept apart; beyond it the rarest are forgotten."""


class Demand:
    """The mix of requests.

    Args:
        profile: request → weight, where it is known; it is then not learned.

    Attributes:
        mix: request → weight.
    """

    def __init__(self, profile: Mapping[AskKey, float] | None = None) -> None:
        self.given = profile is not None
        self.mix: dict[Ask, float] = {Ask(key): weight for key, weight in (profile or {}).items()}
        self._seen = 0
        self._next = FIRST_AFTER

    def observe(self, ask: Ask) -> bool:
        """Count a request.

        Returns:
            Whether the mix should be looked at again.
        """
        if self.given:
            return False
        mix = self.mix
        mix[ask] = mix.get(ask, 0.0) + 1.0
        self._seen += 1
        if self._seen < self._next:
            return False
        self._next = self._seen + max(FIRST_AFTER, min(int(self._seen * (GROWTH - 1)), EVERY_MOST))
        self._forget()
        return True

    def _forget(self) -> None:
        mix = self.mix
        if sum(mix.values()) > WEIGHT_MOST:
            self.mix = mix = {ask: weight / 2 for ask, weight in mix.items() if weight > 0.5}
        if len(mix) > KINDS_MOST:
            kept = sorted(mix.items(), key=lambda entry: -entry[1])[: KINDS_MOST // 2]
            self.mix = dict(kept)
