"""Fragmentation gradient descent (FGD, Weng et al., USENIX ATC'23): place where the expected fragments grow least.

A fragment is free share that a request can't use. For a host in state s, over typical requests r of frequency pᵣ,

    F(s) = Σ pᵣ · (free milli of s that r can't use)

That is all of it if r asks for no device, does not fit the cores, or finds too few devices with its share free. Else it
is the milli on devices that have less than its share free, or are of a model that r does not allow. Device memory and
RAM are ignored, as in the paper. The score is ⌊100 · sigmoid((F(s) − F(s after)) / 1000)⌋, as in the authors'
simulator. These whole steps matter: in a tie the fuller host is taken, and on it the fuller device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from math import exp
from typing import TYPE_CHECKING, Final, NamedTuple

from ...fleet.state import WHOLE_MILLI, Ask, AskKey, HostState, Model
from ..feasible import model_allowed
from .demand import Demand
from .policy import Choice, pick
from .simple import Base, fullest_first
from .strain import strain, strain_of

if TYPE_CHECKING:
    from ...fleet.fleet import Fleet

TYPICAL: Final = 0.9
"""Part of all requests that the typical ones make up, the most frequent first, if the mix is given. Of a learned mix
all count: few requests have been seen at first, and some that are not rare would be cut."""
STEPS: Final = 100
KEPT: Final = 50_000

Free = list[tuple[Model, int, int]]
"""Free capacity of a host: (model, free share, number of devices) each."""


class _Row(NamedTuple):
    """Weights of the typical requests that fit a model, on a host with so many free cores.

    Attributes:
        one: weight of requests for one device, of the n smallest sizes for each n.
        several: weight of requests for several devices for which n whole ones suffice, for each n up to the largest.
    """

    one: list[float]
    several: list[float]


class _Typical:
    """Typical requests: weights that sum to at most 1 over all of them, including those without devices.

    Args:
        mix: request → weight.
        part: of all requests that the typical ones make up.
    """

    def __init__(self, mix: Mapping[Ask, float], part: float) -> None:
        merged: dict[tuple[object, ...], tuple[Ask, float]] = {}
        for ask, weight in mix.items():
            # Amounts of memory are ignored.
            key = (ask.gpus, ask.share_milli, ask.cpus_milli, ask.models, ask.vendors, ask.min_compute_capability)
            first, before = merged.get(key, (ask, 0.0))
            merged[key] = (first, before + weight)
        asks = sorted(merged.values(), key=lambda entry: (-entry[1], entry[0].key))
        wanted = part * sum(weight for _, weight in asks)
        kept: list[tuple[Ask, float]] = []
        total = 0.0
        for ask, weight in asks:
            if total >= wanted:
                break
            kept.append((ask, weight))
            total += weight
        self.one = [(ask, weight / total) for ask, weight in kept if ask.gpus == 1]
        self.several = [(ask, weight / total) for ask, weight in kept if ask.gpus > 1]
        self.sizes = sorted({ask.share_milli for ask, _ in self.one})
        self.place = {size: at for at, size in enumerate(self.sizes)}
        self.reach = [bisect_left(self.sizes, share + 1) for share in range(WHOLE_MILLI + 1)]
        """Number of the sizes that fit a free share, for each share."""
        self.most = max((ask.gpus for ask, _ in self.several), default=0)
        self._rows: dict[tuple[Model, int], _Row] = {}

    def row(self, model: Model, cpus: int) -> _Row:
        """Weights of the requests that fit a model and so many free cores; cached."""
        found = self._rows.get((model, cpus))
        if found is None:
            if len(self._rows) >= KEPT:
                self._rows.clear()
            one = [0.0] * (len(self.sizes) + 1)
            for ask, weight in self.one:
                if ask.cpus_milli <= cpus and model_allowed(model, ask):
                    one[self.place[ask.share_milli] + 1] += weight
            several = [0.0] * (self.most + 1)
            for ask, weight in self.several:
                if ask.cpus_milli <= cpus and model_allowed(model, ask):
                    several[ask.gpus] += weight
            found = self._rows[model, cpus] = _Row(_sums(one), _sums(several))
        return found

    def usable(self, free: Free, cpus: int) -> float:
        """Free milli that requests could use, on average."""
        total = 0.0
        whole: dict[Model, int] = {}
        reach = self.reach
        for model, share, count in free:
            total += count * share * self.row(model, cpus).one[reach[share]]
            if share == WHOLE_MILLI:
                whole[model] = whole.get(model, 0) + count
        if self.most:
            if len(whole) == 1:
                for model, count in whole.items():
                    total += WHOLE_MILLI * count * self.row(model, cpus).several[min(count, self.most)]
            elif whole:
                for ask, weight in self.several:
                    if ask.cpus_milli <= cpus:
                        count = sum(count for model, count in whole.items() if model_allowed(model, ask))
                        total += weight * WHOLE_MILLI * count if count >= ask.gpus else 0.0
        return total


def _sums(values: Iterable[float]) -> list[float]:
    total = 0.0
    found: list[float] = []
    for value in values:
        total += value
        found.append(total)
    return found


class Fragmentation(Base):
    """Picks the host whose fragments grow least.

    Args:
        profile: the mix of requests, if it is known; otherwise it is learned from the requests.
    """

    name = "fragmentation"

    def __init__(self, profile: Mapping[AskKey, float] | None = None) -> None:
        self.version = 0
        self._demand = Demand(profile)
        self._learn()

    def _learn(self) -> None:
        self._typical = _Typical(self._demand.mix, TYPICAL if self._demand.given else 1.0)
        self._before: dict[HostState, tuple[float, Free]] = {}

    def observe(self, fleet: Fleet, ask: Ask) -> None:
        """Learn the mix of requests."""
        if self._demand.observe(ask):
            self.version += 1
            self._learn()

    def choose(self, state: HostState, ask: Ask, candidates: Sequence[int]) -> Choice:
        """Pick the device that leaves the fewest fragments; several devices by the best links."""
        usable, free = self._standing(state)
        cpus = state.cpus_free - ask.cpus_milli
        devices = state.devices
        if not ask.gpus:
            return Choice(_step(self._typical.usable(free, cpus) - usable), 0.0, ())
        if ask.whole:
            chosen = pick(state, fullest_first(state, ask, candidates), ask.gpus)
            left = free
            for at in chosen:
                left = _after(left, devices[at].model, WHOLE_MILLI, WHOLE_MILLI)
            return Choice(
                _step(ask.gpus * WHOLE_MILLI + self._typical.usable(left, cpus) - usable),
                -strain_of(state, chosen),
                chosen,
            )
        best, place = -1.0, -1
        seen: set[tuple[Model, int]] = set()
        order = candidates
        if len(state.kinds) > 1:
            order = sorted(
                candidates, key=lambda at: (devices[at].share_free, strain(devices[at]), devices[at].memory_free)
            )
        for at in order:
            device = devices[at]
            kind = (device.model, device.share_free)
            if kind in seen:
                continue
            seen.add(kind)
            left = _after(free, device.model, device.share_free, ask.share_milli)
            score = _step(ask.share_milli + self._typical.usable(left, cpus) - usable)
            if score > best:
                best, place = score, at
        return Choice(best, -strain(devices[place]), (place,))

    def parts(self, state: HostState, ask: Ask, choice: Choice, device: int) -> dict[str, float]:
        """Score by name: near 100 if the request removes thousands of milli of fragments, 50 if they do not change."""
        return {"fragments": choice.score}

    def _standing(self, state: HostState) -> tuple[float, Free]:
        """Free milli that requests could use on a host, and its free capacity; cached."""
        found = self._before.get(state)
        if found is None:
            if len(self._before) >= KEPT:
                self._before.clear()
            counts: dict[tuple[Model, int], int] = {}
            for device, places in state.kinds:
                if device.share_free:
                    kind = (device.model, device.share_free)
                    counts[kind] = counts.get(kind, 0) + len(places)
            free = [(model, share, count) for (model, share), count in counts.items()]
            found = self._before[state] = (self._typical.usable(free, state.cpus_free), free)
        return found


def _after(free: Free, model: Model, share: int, taken: int) -> Free:
    """Free capacity after one device of a model and free share gives `taken` milli; there may be equal entries."""
    left: Free = []
    for entry in free:
        if entry[0] is model and entry[1] == share:
            if entry[2] > 1:
                left.append((model, share, entry[2] - 1))
        else:
            left.append(entry)
    if share > taken:
        left.append((model, share - taken, 1))
    return left


def _step(gain: float) -> float:
    """Score of the fragments that are removed: placed milli plus the gain in usable milli."""
    return float(int(STEPS / (1 + exp(-round(gain, 9) / WHOLE_MILLI))))
