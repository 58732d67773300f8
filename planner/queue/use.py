"""Use of the fleet by owner: device seconds of running and ended leases, which fade."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from ..groups.usage import decay

HALF_LIFE_SECONDS: Final = 7 * 86400.0
"""Time after which a device second counts half."""
_LEAST: Final = 1.0
"""Device seconds below which an owner counts as one that has used nothing."""


class _Faded:
    """Device seconds that accrue at a rate, and fade."""

    __slots__ = ("at", "done", "rate")

    def __init__(self, now: float) -> None:
        self.at = now
        self.done = 0.0
        self.rate = 0.0

    def settle(self, now: float, half_life: float) -> float:
        """Device seconds as of now."""
        passed = max(0.0, now - self.at)
        if passed:
            left, gained = decay(passed, half_life)
            self.done = self.done * left + self.rate * gained
            self.at = now
        return self.done


class Use:
    """Device seconds of each owner.

    Args:
        half_life_seconds: time after which a device second counts half.
    """

    def __init__(self, half_life_seconds: float = HALF_LIFE_SECONDS) -> None:
        self._half_life = half_life_seconds
        self._running: dict[str, tuple[str, float]] = {}
        self._owners: dict[str, _Faded] = {}
        self._total: _Faded | None = None

    def starts(self, lease_id: str, owner: str, gpus: float, now: float) -> None:
        """Note the start of a lease."""
        self._running[lease_id] = (owner, gpus)
        self._change(owner, gpus, now)

    def ends(self, lease_id: str, now: float) -> None:
        """Note the end of a lease."""
        found = self._running.pop(lease_id, None)
        if found is not None:
            self._change(found[0], -found[1], now)

    def of(self, owner: str, now: float) -> float:
        """Device seconds that an owner has used recently."""
        found = self._owners.get(owner)
        return 0.0 if found is None else found.settle(now, self._half_life)

    def share(self, owner: str, now: float) -> float:
        """The same in units of an equal share: of all use, over the number of owners that have any."""
        total = 0.0 if self._total is None else self._total.settle(now, self._half_life)
        return self.of(owner, now) * len(self._owners) / total if total >= _LEAST else 0.0

    def of_all(self, owners: Sequence[str], now: float) -> tuple[Any, Any]:
        """`of` and `share` of each of these, as arrays."""
        self._forget(now)
        return self._array(owners, {owner: self.of(owner, now) for owner in set(owners)}), self._array(
            owners, {owner: self.share(owner, now) for owner in set(owners)}
        )

    @staticmethod
    def _array(owners: Iterable[str], values: dict[str, float]) -> Any:
        return np.array([values[owner] for owner in owners])

    def _change(self, owner: str, rate: float, now: float) -> None:
        if self._total is None:
            self._total = _Faded(now)
        for faded in (self._owners.setdefault(owner, _Faded(now)), self._total):
            faded.settle(now, self._half_life)
            faded.rate += rate

    def _forget(self, now: float) -> None:
        """Forget owners that have used nothing recently."""
        gone = [
            owner
            for owner, faded in self._owners.items()
            if faded.settle(now, self._half_life) < _LEAST and faded.rate < 1e-9
        ]
        for owner in gone:
            del self._owners[owner]
