"""Estimates of how long work runs: given by the request, or learned from leases that have ended.

A distribution is a few quantiles (`KNOTS`), interpolated in the logarithm of time. Beyond the last one it has a tail of
Pareto with exponent `TAIL`. From it follow the value for ordering, an interval, and what remains at an age.

Learned distributions are Kaplan-Meier estimates [1] with weights that halve each `HALF_LIFE_SECONDS`: leases that still
run, or were ended from outside, count as longer than their age. They are taken from the most specific group with
enough leases: owner and name, then name, then owner and shape, then shape, then all. Of requests that come in bursts
(`bursts.py`) and are not known by name, that group is the prior, and their siblings make it an estimate.

[1] E. L. Kaplan, P. Meier: Nonparametric Estimation from Incomplete Observations. JASA 53 (1958).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec import Struct

from ...schemas.values.durations import DurationDigest, bin_seconds
from .bursts import EDGES, Bursts, Prior

KNOTS: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Probabilities of the quantiles of a distribution."""
TAIL: Final = 1.5
"""Exponent of the tail beyond the last quantile: less than 2, as durations of jobs on clusters are heavy-tailed."""
HALF_LIFE_SECONDS: Final = 14 * 86400.0
LEAST_LEASES: Final = 3
"""Number of ended leases that a group must have."""
MOST_LEASES: Final = 128
"""Number of leases of a group that are kept, the most recent."""
MOST_PRIOR: Final = 20.0
"""Limit on the number of leases that count for a burst beside its own: the next one may be unlike all before."""
UNKNOWN_SECONDS: Final = 3600.0
"""Expected duration where nothing at all is known."""
OVERRUN: Final = 0.25
"""Expected remaining time of work that exceeds a given estimate, in units of its age."""
LEAST_SECONDS: Final = 1.0
LEAST_GUESSES: Final = 20
"""Number of ended leases of a shape from which its own guesses are corrected."""
MOST_GUESSES: Final = 400
"""Number of guesses that are kept of a shape, the most recent."""
_GUESSES_KEPT: Final = 1024
_LEAST_SIGMA: Final = 0.05
_SHIFT: Final = 10.0
"""Seconds added before the logarithm, so that a second more of a short lease is no great error."""
_ALL: Final = "all"
NAMED: Final = frozenset({"owner_name", "name"})
"""Groups of names, which say more than a burst."""


class Estimate(Struct, frozen=True):
    """Expected duration of a request.

    Attributes:
        quantiles: seconds at the probabilities of `KNOTS`, ascending; a single one if the duration was given.
        basis: what it rests on: `given`, `owner_name`, `name`, `burst`, `owner_shape`, `shape`, `all` or `unknown`.
        count: number of leases that it rests on.
        limit: longest duration that is possible (`max_seconds`).
    """

    quantiles: tuple[float, ...]
    basis: str
    count: int = 0
    limit: float = math.inf

    @property
    def seconds(self) -> float:
        """Value for ordering and reservations: the median, which half of such work exceeds."""
        return self.quantile(0.5)

    @property
    def known(self) -> bool:
        """True if it was given, or learned from work of the same name."""
        return self.basis == "given" or self.basis in NAMED

    def quantile(self, probability: float) -> float:
        """Quantile of the duration."""
        return min(self.limit, _quantile(self.quantiles, probability))

    def remaining(self, age: float, probability: float = 0.5) -> float:
        """Quantile of the time that work of this age has left."""
        quantiles = self.quantiles
        if len(quantiles) == 1:
            left = quantiles[0] - age if age < quantiles[0] else max(LEAST_SECONDS, OVERRUN * age)
        else:
            before = _below(quantiles, age)
            left = _quantile(quantiles, before + (1 - before) * probability) - age
        return max(0.0, min(left, self.limit - age))


def given(seconds: float, limit: float = math.inf) -> Estimate:
    """Estimate of a request that says how long it will take."""
    return Estimate((max(LEAST_SECONDS, min(seconds, limit)),), "given", 0, limit)


def unknown(limit: float = math.inf) -> Estimate:
    """Estimate where nothing is known: a wide distribution around `UNKNOWN_SECONDS`."""
    spread = tuple(UNKNOWN_SECONDS * (p / (1 - p)) ** 1.5 for p in KNOTS)
    return Estimate(spread, "unknown", 0, limit)


def _quantile(quantiles: Sequence[float], probability: float) -> float:
    if len(quantiles) == 1:
        return quantiles[0]
    if probability <= KNOTS[0]:
        return quantiles[0]
    if probability >= KNOTS[-1]:
        return quantiles[-1] * ((1 - KNOTS[-1]) / max(1e-9, 1 - probability)) ** (1 / TAIL)
    at = bisect_left(KNOTS, probability)
    part = (probability - KNOTS[at - 1]) / (KNOTS[at] - KNOTS[at - 1])
    low, high = max(quantiles[at - 1], 1e-3), max(quantiles[at], 1e-3)
    return low * (high / low) ** part


def _below(quantiles: Sequence[float], seconds: float) -> float:
    """Probability that work is no longer than this."""
    if seconds < quantiles[0]:
        return 0.0
    if seconds >= quantiles[-1]:
        return 1 - (1 - KNOTS[-1]) * (quantiles[-1] / seconds) ** TAIL
    at = bisect_right(quantiles, seconds)
    low, high = max(quantiles[at - 1], 1e-3), max(quantiles[at], 1e-3)
    part = math.log(max(seconds, 1e-3) / low) / math.log(high / low) if high > low else 1.0
    return KNOTS[at - 1] + part * (KNOTS[at] - KNOTS[at - 1])


def survival_quantiles(leases: Iterable[tuple[float, float, bool]]) -> tuple[float, ...]:
    """Weighted Kaplan-Meier quantiles of durations.

    Args:
        leases: (seconds, weight, true if it ended by itself) each. One that did not is known to be longer.
    """
    ordered = sorted(leases, key=lambda lease: (lease[0], not lease[2]))
    at_risk = sum(weight for _, weight, _ in ordered)
    alive = 1.0
    found: list[float] = []
    last = LEAST_SECONDS
    for seconds, weight, ended in ordered:
        last = max(LEAST_SECONDS, seconds)
        if ended and at_risk > 0:
            alive *= max(0.0, 1 - weight / at_risk)
            while len(found) < len(KNOTS) and 1 - alive >= KNOTS[len(found)] - 1e-12:
                found.append(last)
        at_risk -= weight
    # Beyond the last one that ended: the tail.
    found += [last * (max(1e-9, alive) / (1 - p)) ** (1 / TAIL) for p in KNOTS[len(found) :]]
    return tuple(found)


class Kind(NamedTuple):
    """Kind of a lease, by which durations are grouped.

    Attributes:
        owner: of the request.
        name: of the workload; empty if it has none.
        shape: what is asked for, in words or numbers.
    """

    owner: str
    name: str
    shape: object

    @property
    def burst(self) -> tuple[str, object]:
        """Kind of a burst."""
        return self.owner, self.shape


class _Group:
    def __init__(self) -> None:
        self.ended: deque[tuple[float, float, bool]] = deque(maxlen=MOST_LEASES)
        """(time of the end, seconds, true if it ended by itself)"""
        self.running: dict[object, float] = {}
        self.digest: list[tuple[float, float, bool]] = []
        """(seconds, weight at the time of the digest, true if it ended by itself)"""
        self.digest_weight = 0.0
        self.changes = 0
        self.kept: tuple[int, Estimate] | None = None


class Durations:
    """Durations learned from leases as they start and end.

    Args:
        bursts: of the requests.
    """

    def __init__(self, bursts: Bursts[Any] | None = None) -> None:
        self._bursts = Bursts[Any](KNOTS) if bursts is None else bursts
        self._half_life = HALF_LIFE_SECONDS
        self._groups: dict[tuple[object, ...], _Group] = {}
        self._digest_at = 0.0

    def take_digest(self, digest: DurationDigest) -> None:
        """Take a digest of past leases, in place of an earlier one and of the leases that it counts.

        A workload without a name, or of another one, counts for the groups that it belongs to.
        """
        self._digest_at = digest.time.timestamp()
        for group in self._groups.values():
            group.digest, group.digest_weight = [], 0.0
            group.ended = deque((one for one in group.ended if one[0] > self._digest_at), maxlen=MOST_LEASES)
            group.kept = None
        for counted in digest.groups:
            for key in _levels(Kind(counted.owner, counted.name, counted.shape)).values():
                group = self._groups.setdefault(key, _Group())
                group.digest += [(bin_seconds(number), weight, True) for number, weight in counted.ended]
                group.digest += [(bin_seconds(number), weight, False) for number, weight in counted.censored]
                group.digest_weight += sum(weight for _, weight in (*counted.ended, *counted.censored))

    def learn(self, kind: Kind, ended_at: float, seconds: float, by_itself: bool) -> None:
        """Note a lease that ended, whose start was not noted.

        Args:
            kind: of the lease.
            ended_at: time of the end.
            seconds: duration.
            by_itself: false if it was ended from outside: the work would have run longer.
        """
        if ended_at <= self._digest_at:
            return
        for key in _levels(kind).values():
            group = self._groups.setdefault(key, _Group())
            group.ended.append((ended_at, seconds, by_itself))
            group.changes += 1

    def started(self, lease: Hashable, kind: Kind, now: float) -> None:
        """Note the start of a lease."""
        self._bursts.started(lease, now)
        for key in _levels(kind).values():
            group = self._groups.setdefault(key, _Group())
            group.running[lease] = now

    def ended(self, lease: Hashable, kind: Kind, now: float, by_itself: bool = True) -> None:
        """Note the end of a lease.

        Args:
            lease: as for `started`; unknown ones are ignored.
            kind: as for `started`.
            now: time of the end.
            by_itself: false if it was ended from outside: the work would have run longer.
        """
        self._bursts.ended(lease, now, by_itself)
        for key in _levels(kind).values():
            group = self._groups.get(key)
            began = group.running.pop(lease, None) if group is not None else None
            if group is not None and began is not None:
                group.ended.append((now, now - began, by_itself))
                group.changes += 1

    def estimate(self, kind: Kind, now: float, limit: float = math.inf, lease: Hashable = None) -> Estimate:
        """Estimate from the most specific group that has enough leases, and the burst, if it is no group of names.

        Args:
            kind: of the request.
            now: time.
            limit: longest duration that is possible.
            lease: its key among the bursts; None for a request that was not noted.
        """
        found = self._of_group(kind, now)
        if found.basis not in NAMED and lease is not None:
            burst = self._bursts.quantiles(lease, now, lambda: _prior(found))
            if burst is not None:
                found = Estimate(burst[0], "burst", burst[1])
        return found if math.isinf(limit) else Estimate(found.quantiles, found.basis, found.count, limit)

    def _of_group(self, kind: Kind, now: float) -> Estimate:
        for basis, key in _levels(kind).items():
            group = self._groups.get(key)
            if group is None or len(group.ended) + group.digest_weight < LEAST_LEASES:
                continue
            kept = group.kept
            # An estimate is renewed as its group grows by an eighth.
            if kept is None or group.changes > kept[0] + len(group.ended) // 8:
                kept = group.kept = group.changes, self._of(group, basis, now)
            return kept[1]
        return unknown()

    def _of(self, group: _Group, basis: str, now: float) -> Estimate:
        leases = [(seconds, 0.5 ** ((now - at) / self._half_life), own) for at, seconds, own in group.ended]
        leases += [(now - began, 1.0, False) for began in list(group.running.values())[-MOST_LEASES:]]
        faded = 0.5 ** (max(0.0, now - self._digest_at) / self._half_life)
        leases += [(seconds, weight * faded, own) for seconds, weight, own in group.digest]
        return Estimate(survival_quantiles(leases), basis, len(group.ended) + round(group.digest_weight))


class Guesses:
    """Given estimates, corrected by how right those of ended leases were.

    A posterior mean by kernel regression over ended leases of the same shape (of all, where there are fewer than
    `LEAST_GUESSES`): the error is taken to be lognormal, its sigma is estimated from the same leases, and the guess
    itself counts as one more. So a guess is trusted where guesses have been right, and gives way to what is usual where
    they have not.
    """

    def __init__(self) -> None:
        self._of: dict[object, deque[tuple[float, float]]] = {}
        self._arrays: dict[object, tuple[int, Any, Any, float, dict[tuple[float, float, int], Estimate]]] = {}
        self._count: dict[object, int] = {}

    def ended(self, shape: object, guess: float, seconds: float) -> None:
        """Note the duration of a lease, and what was expected."""
        for key in (shape, _ALL):
            self._of.setdefault(key, deque(maxlen=MOST_GUESSES)).append((guess, seconds))
            self._count[key] = self._count.get(key, 0) + 1

    def estimate(self, shape: object, guess: float, limit: float = math.inf) -> Estimate:
        """Corrected estimate."""
        key = shape if self._count.get(shape, 0) >= LEAST_GUESSES else _ALL
        count = self._count.get(key, 0)
        if not count:
            return given(guess, limit)
        kept = self._arrays.get(key)
        if kept is None or count >= kept[0] * 1.1:
            kept = self._arrays[key] = count, *_fit(self._of[key]), {}
        _, logs, durations, sigma, estimates = kept
        asked = guess, limit, min(count, MOST_GUESSES)
        found = estimates.get(asked)
        if found is not None:
            return found
        weights = np.exp(-0.5 * ((math.log(guess + _SHIFT) - logs) / sigma) ** 2)
        corrected = (guess + float(weights @ durations)) / (1.0 + float(weights.sum()))
        if len(estimates) >= _GUESSES_KEPT:
            estimates.clear()
        found = estimates[asked] = Estimate((max(LEAST_SECONDS, min(corrected, limit)),), "given", asked[2], limit)
        return found


def _fit(pairs: Sequence[tuple[float, float]]) -> tuple[Any, Any, float]:
    """Logarithms of durations, durations, and sigma of the guesses' errors, with a prior of five of sigma 1."""
    guesses, durations = np.array(pairs).T
    logs = np.log(durations + _SHIFT)
    errors = np.log(guesses + _SHIFT) - logs
    return logs, durations, max(_LEAST_SIGMA, math.sqrt((5.0 + float(errors @ errors)) / (5.0 + len(pairs))))


def _prior(estimate: Estimate) -> Prior:
    """An estimate as the prior of a burst."""
    below = tuple(_below(estimate.quantiles, edge) for edge in EDGES.tolist())
    return below, min(MOST_PRIOR, float(estimate.count))


def _levels(kind: Kind) -> dict[str, tuple[object, ...]]:
    """Groups that a lease belongs to, the most specific first."""
    found: dict[str, tuple[object, ...]] = {}
    if kind.name:
        found["owner_name"] = ("owner_name", kind.owner, kind.name)
        found["name"] = ("name", kind.name)
    found["owner_shape"] = ("owner_shape", kind.owner, kind.shape)
    found["shape"] = ("shape", kind.shape)
    found["all"] = ("all",)
    return found
