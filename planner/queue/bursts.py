"""Requests that come in bursts, such as sweeps and job arrays: how long one takes says how long its siblings will.

A burst is a series of requests of one owner and shape, each submitted within `GAP_SECONDS` of the one before. The
logarithms of its durations are taken to be normal around a center of its own, with a spread that all bursts share. The
center's prior is what is known of such requests otherwise; the siblings that have ended, and the ages of those that
run, make it a posterior. An estimate is the posterior predictive distribution, computed on a grid.

The spread is that within past bursts (`Spread`), with a prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from heapq import heappop, heappush
from typing import Any, Final, Generic, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
"""Name of a request, from its submission to the end of its lease."""
GAP_SECONDS: Final = 300.0
"""Longest time between the submissions of two neighbors in a burst."""
_SHIFT: Final = 10.0
"""Seconds added before the logarithm, so that a second more of a short lease is no great error."""
_BINS: Final = 64
GRID: Final = np.linspace(math.log(_SHIFT), math.log(3e7), _BINS)
"""Centers of the grid: logarithms of shifted durations, up to a year."""
_STEP: Final = float(GRID[1] - GRID[0])
EDGES: Final = np.maximum(0.0, np.exp(np.append(GRID, GRID[-1] + _STEP) - _STEP / 2) - _SHIFT)
"""Durations at the borders of the bins, in seconds."""
_PRIOR_SIGMA: Final = 0.7
_PRIOR_COUNT: Final = 5.0
"""Prior of the spread within bursts, and the number of leases that it counts as."""
_DOUBT: Final = 5.0
"""Number of leases as which a flat prior counts beside those that the center's prior rests on."""
_REVIEW_SECONDS: Final = 600.0
_REVIEW_GROWTH: Final = 0.1
"""A running lease changes its siblings' estimates once its age has grown by so much, and so many seconds."""
_MOST: Final = 64
"""Number of ended leases of a burst that are kept, the most recent, and of running ones that are looked at."""
_KINDS_KEPT: Final = 4096
"""Number of kinds from which on those whose bursts are over are forgotten."""

Prior = tuple[tuple[float, ...], float]
"""Probabilities of durations below each of `EDGES`, and the number of leases that they rest on."""


class Burst(Generic[Key]):
    """Requests submitted close to one another.

    Attributes:
        last: time of the last submission.
        waiting: keys of the requests that wait.
        running: times of the starts of those that run, about the oldest first.
        ended: (logarithm of the shifted duration, true if it ended by itself) of the ended.
        changes: number of ends so far.
        found: estimate for those that wait or run; None before the first.
        found_after: number of ends that it rests on.
        found_at: time of it.
    """

    __slots__ = ("changes", "ended", "found", "found_after", "found_at", "last", "running", "waiting")

    def __init__(self, last: float) -> None:
        self.last = last
        self.waiting: set[Key] = set()
        self.running: dict[Key, float] = {}
        self.ended: list[tuple[float, bool]] = []
        self.changes = 0
        self.found: tuple[float, ...] | None = None
        self.found_after = 0
        self.found_at = 0.0

    def is_old(self, now: float) -> bool:
        """True if its estimate should be renewed: an eighth more have ended, or those that run are older."""
        if self.found is None or self.changes > self.found_after + self.changes // 8:
            return True
        oldest = now - next(iter(self.running.values()), now)
        return now - self.found_at >= max(_REVIEW_SECONDS, _REVIEW_GROWTH * oldest)


class Spread:
    """Standard deviation of the logarithm of durations within bursts."""

    def __init__(self) -> None:
        self._squares = _PRIOR_COUNT * _PRIOR_SIGMA**2
        self._count = _PRIOR_COUNT

    @property
    def sigma(self) -> float:
        """As estimated so far."""
        return math.sqrt(self._squares / self._count)

    def note(self, before: Sequence[float], value: float) -> None:
        """Note another value of a burst."""
        if before:
            n = len(before)
            # The error against the mean of n others has n + 1 over n times the variance.
            self._squares += (value - sum(before) / n) ** 2 * n / (n + 1)
            self._count += 1


def log_of(seconds: float) -> float:
    """Logarithm of a shifted duration."""
    return math.log(max(0.0, seconds) + _SHIFT)


def posterior(prior: Prior, ended: Iterable[tuple[float, bool]], ages: Iterable[float], sigma: float) -> Any:
    """Posterior predictive probabilities of the bins of `GRID`.

    Args:
        prior: of the center.
        ended: siblings that have ended: (logarithm of the shifted duration, true if it ended by itself).
        ages: of siblings that still run, in seconds.
        sigma: spread within bursts.
    """
    below, count = prior
    flat = _DOUBT / _BINS
    logs = np.log(np.diff(np.array(below)) * count + flat)
    for value, by_itself in ended:
        logs += _exact(value, sigma) if by_itself else _longer(value, sigma)
    for age in ages:
        logs += _longer(log_of(age), sigma)
    center = np.exp(logs - logs.max())
    reach = min(_BINS - 1, math.ceil(3.5 * sigma / _STEP))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * _STEP / sigma) ** 2)
    found = np.convolve(center, kernel)[reach : reach + _BINS]
    return found / found.sum()


def _exact(value: float, sigma: float) -> Any:
    return -0.5 * ((value - GRID) / sigma) ** 2


def _longer(value: float, sigma: float) -> Any:
    above = [0.5 * math.erfc((value - center) / sigma * math.sqrt(0.5)) for center in GRID.tolist()]
    return np.log(1e-9 + np.array(above))


def quantiles_of(weights: Any, knots: Iterable[float]) -> tuple[float, ...]:
    """Quantiles of probabilities of the bins, in seconds."""
    below = np.concatenate(([0.0], np.cumsum(weights)))
    logs = np.append(GRID, GRID[-1] + _STEP) - _STEP / 2
    return tuple(np.maximum(1.0, np.exp(np.interp(list(knots), below, logs)) - _SHIFT).tolist())


class Bursts(Generic[Key]):
    """The bursts whose requests wait or run, or that may go on.

    Args:
        knots: probabilities of the quantiles of estimates.
    """

    def __init__(self, knots: Sequence[float]) -> None:
        self._knots = knots
        self._newest: dict[Hashable, Burst[Key]] = {}
        self._of: dict[Key, Burst[Key]] = {}
        self._spread = Spread()
        self._reviews: list[tuple[float, int, Burst[Key]]] = []
        self._changed: dict[int, Burst[Key]] = {}
        self._number = 0

    def submitted(self, key: Key, kind: Hashable, at: float) -> None:
        """Note a request, as they come; one that is known already is ignored.

        Args:
            key: of the request.
            kind: owner and shape.
            at: time of its submission.
        """
        if key in self._of:
            return
        burst = self._newest.get(kind)
        if burst is None or abs(at - burst.last) > GAP_SECONDS:
            if len(self._newest) >= _KINDS_KEPT:
                self._forget(at)
            burst = self._newest[kind] = Burst[Key](at)
        burst.last = max(burst.last, at)
        burst.waiting.add(key)
        self._of[key] = burst

    def started(self, key: Key, now: float) -> None:
        """Note its start."""
        burst = self._of.get(key)
        if burst is not None and key not in burst.running:
            burst.waiting.discard(key)
            burst.running[key] = now
            if len(burst.running) == 1:
                self._plan_review(burst, now + _REVIEW_SECONDS)

    def withdrawn(self, key: Key) -> None:
        """Note that a request has left the line; one that runs is not meant."""
        burst = self._of.get(key)
        if burst is not None and key in burst.waiting:
            burst.waiting.discard(key)
            del self._of[key]

    def ended(self, key: Key, now: float, by_itself: bool = True) -> None:
        """Note the end of its lease; unknown ones are ignored."""
        burst = self._of.get(key)
        began = None if burst is None else burst.running.pop(key, None)
        if burst is None or began is None:
            return
        del self._of[key]
        value = log_of(now - began)
        if by_itself:
            self._spread.note([log for log, own in burst.ended if own], value)
        burst.ended.append((value, by_itself))
        del burst.ended[:-_MOST]
        burst.changes += 1
        if burst.is_old(now):
            self._changed[id(burst)] = burst

    def changed(self, now: float) -> list[Key]:
        """Requests and leases whose siblings have ended, or grown older, since the last call."""
        while self._reviews and self._reviews[0][0] <= now:
            burst = heappop(self._reviews)[2]
            if burst.running:
                self._changed[id(burst)] = burst
                age = now - next(iter(burst.running.values()))
                self._plan_review(burst, now + max(_REVIEW_SECONDS, _REVIEW_GROWTH * age))
        found = [key for burst in self._changed.values() for key in (*burst.waiting, *burst.running)]
        self._changed = {}
        return found

    def quantiles(self, key: Key, now: float, prior: Callable[[], Prior]) -> tuple[tuple[float, ...], int] | None:
        """Quantiles of a duration, and the number of leases that they rest on; None if no sibling runs or has ended.

        Args:
            key: of the request.
            now: time.
            prior: what is known of such requests otherwise.
        """
        burst = self._of.get(key)
        if burst is None or not (burst.ended or burst.running):
            return None
        if burst.found is None or burst.is_old(now):
            every = 1 + len(burst.running) // _MOST
            ages = [now - began for began in list(burst.running.values())[::every]]
            burst.found = quantiles_of(posterior(prior(), burst.ended, ages, self._spread.sigma), self._knots)
            burst.found_after, burst.found_at = burst.changes, now
        return burst.found, len(burst.ended) + len(burst.running)

    def _plan_review(self, burst: Burst[Key], at: float) -> None:
        self._number += 1
        heappush(self._reviews, (at, self._number, burst))

    def _forget(self, now: float) -> None:
        """Forget which bursts were the newest of their kinds and are over."""
        self._newest = {kind: burst for kind, burst in self._newest.items() if now - burst.last <= GAP_SECONDS}
