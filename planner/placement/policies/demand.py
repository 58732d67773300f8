"""The mix of requests: given, or learned from those that arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ...fleet.state import Ask, AskKey

FIRST_AFTER: Final = 8
"""Number of requests after which the mix is evaluated for the first time."""
GROWTH: Final = 1.5
"""Factor on the number of requests after which the mix is evaluated again."""
EVERY_MOST: Final = 8192
"""Number of further requests after which the mix is evaluated again at the latest."""
WEIGHT_MOST: Final = 32_768
"""Limit on the sum of weights, beyond which all are halved, so that last month's mix fades."""
KINDS_MOST: Final = 4096
"""Limit on the kinds of requests, beyond which the rarest are forgotten."""


class Demand:
    """The mix of requests.

    Args:
        profile: request → weight, if it is known; it is then not learned.

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
            True if the mix should be evaluated again.
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
