"""Valuation of the free capacity of hosts, in milli of a device, at the prices of a mix, and the cost of a request.

The worth is V = B − X + T: B is the worth of a host's gaps one by one, X the part of B for which its free cores and RAM
are not expected to suffice, T the extra worth of whole devices together (all from `prices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import erfc, exp, pi, sqrt
from typing import Final, NamedTuple

from ....fleet.state import UNLIMITED, WHOLE_MILLI, Ask, DeviceState, HostState, Model
from ..strain import strain
from .prices import Prices, Worth

STRAIN_MILLI: Final = 300.0
"""Cost of the maximum strain on a device, in milli."""
_STATES_KEPT: Final = 50_000


class Standing(NamedTuple):
    """Valuation of a host's free capacity: B, X, and the number of free whole devices by model."""

    base: float
    lack: float
    whole: dict[Model, int]


class Traits(NamedTuple):
    """Valuation of a device, independent of its host.

    Attributes:
        model: its model.
        number: of the model, counted from 0.
        whole: true if it can be granted as a whole.
        gap: milli that are still usable.
        worth: of the gap, in milli.
        trouble: cost of its strain, in milli.
        prices: of its model.
    """

    model: Model
    number: int
    whole: bool
    gap: int
    worth: float
    trouble: float
    prices: Worth


class Valuation:
    """Valuations of states at fixed prices, cached.

    Args:
        prices: of a mix.
        models: model → number; new models are added.
    """

    def __init__(self, prices: Prices, models: dict[Model, int]) -> None:
        self.prices = prices
        self.models = models
        self._mark = object()
        self._traits: dict[DeviceState, Traits] = {}

    def costs(self, state: HostState, ask: Ask, chosen: Sequence[int]) -> tuple[float, float, float]:
        """Cost of a request with the chosen devices: the loss of B, the gain of X, and the loss of T.

        If a host has free whole devices of several models, T ignores cores.
        """
        base, lack, whole = self.standing(state)
        taken = 0.0
        opened: dict[Model, int] = {}
        for at in chosen:
            device = state.devices[at]
            taken += self.taken(device, ask)
            if self.traits(device).whole:
                opened[device.model] = opened.get(device.model, 0) + 1
        group = 0.0
        if len(whole) == 1:
            for model, free in whole.items():
                worth = self.prices.worth(model)
                left = state.cpus_free - ask.cpus_milli
                group = worth.group(free, state.cpus_free) - worth.group(free - opened.get(model, 0), left)
        else:
            for model, count in opened.items():
                worth, free = self.prices.worth(model), whole[model]
                group += worth.group(free, UNLIMITED) - worth.group(free - count, UNLIMITED)
        after = self.unfed(base - taken, state.cpus_free - ask.cpus_milli, state.memory_free - ask.host_memory_bytes)
        return taken, after - lack, group

    def taken(self, device: DeviceState, ask: Ask) -> float:
        """Loss of B on one device."""
        traits = self.traits(device)
        if ask.whole or traits.gap <= ask.share_milli:
            return traits.worth
        return traits.worth - traits.prices.gaps[traits.gap - ask.share_milli]

    def standing(self, state: HostState) -> Standing:
        """Valuation of a host's free capacity; cached in the state."""
        kept = state.standing
        if kept is not None and kept[0] is self._mark:
            return kept[1]
        base = 0.0
        whole: dict[Model, int] = {}
        for device, places in state.kinds:
            traits = self.traits(device)
            base += traits.worth * len(places)
            if traits.whole:
                whole[traits.model] = whole.get(traits.model, 0) + len(places)
        lack = self.unfed(base, state.cpus_free, state.memory_free)
        found = Standing(base, lack, whole)
        state.standing = (self._mark, found)
        return found

    def unfed(self, base: float, cpus: float, memory: float) -> float:
        """Expected milli of `base` for which so many free cores and so much RAM do not suffice."""
        prices = self.prices
        lack = 0.0
        if prices.cpus_per_milli > 0:
            short = prices.cpus_per_milli * base - cpus
            deviation = sqrt(prices.cpus_variance * base) if base > 0 else 0.0
            if deviation <= 0 or short > 6 * deviation:
                lack = max(0.0, short) / prices.cpus_per_milli
            elif short > -6 * deviation:
                z = short / deviation
                excess = z * 0.5 * erfc(-z / sqrt(2)) + exp(-0.5 * z * z) / sqrt(2 * pi)
                lack = deviation * excess / prices.cpus_per_milli
        if prices.memory_per_milli > 0:
            lack += max(0.0, prices.memory_per_milli * base - memory) / prices.memory_per_milli
        return lack

    def traits(self, device: DeviceState) -> Traits:
        """Valuation of a device; cached."""
        found = self._traits.get(device)
        if found is None:
            if len(self._traits) > _STATES_KEPT:
                self._traits.clear()
            model, gap = device.model, _gap(device)
            prices = self.prices.worth(model)
            number = self.models.setdefault(model, len(self.models))
            whole = device.idle
            trouble = STRAIN_MILLI * strain(device)
            found = self._traits[device] = Traits(model, number, whole, gap, prices.gaps[gap], trouble, prices)
        return found


def _gap(device: DeviceState) -> int:
    """Usable milli: the free share, or less if the free memory is less than that share of the memory."""
    total = device.model.memory_bytes
    if not total or device.memory_free >= total * device.share_free // WHOLE_MILLI:
        return device.share_free
    return device.memory_free * WHOLE_MILLI // total
